"""The parts of training: schedule, groups, batches, losses, initial weights."""

from __future__ import annotations

import math
import platform
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from lowbit import data, methods, models
from lowbit.cli import app
from lowbit.errors import LowbitError, UsageError
from lowbit.files import remove_partial_files, write_whole
from lowbit.methods.base import Recipe
from lowbit.models.base import load_weights
from lowbit.preprocessing import Preprocessing
from lowbit.training import environment, train
from lowbit.training.batches import EvalBatches, TrainBatches, derived_seed
from lowbit.training.checkpoints import Checkpoint, save_weights
from lowbit.training.distillation import distillation_loss
from lowbit.training.module import find_not_finite, make_optimizer, parameter_groups, squared_hinge
from lowbit.training.schedules import multiplier
from lowbit.training.settings import TrainConfig, check_effect, check_recipe, choose_recipe

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("recipe", "epoch", "expected"),
    [
        (Recipe(schedule="cosine", epochs=10), 0, 1.0),
        (Recipe(schedule="cosine", epochs=10), 5, 0.5),
        (Recipe(schedule="cosine", epochs=10), 2.5, 0.5 + math.sqrt(0.5) / 2),
        (Recipe(schedule="cosine", epochs=10), 10, 0.0),
        (Recipe(schedule="cosine", epochs=12, warmup=2), 1, 0.5),
        (Recipe(schedule="cosine", epochs=12, warmup=2), 2, 1.0),
        (Recipe(schedule="cosine", epochs=12, warmup=2), 7, 0.5),
        (Recipe(schedule="linear", epochs=8), 2, 0.75),
        (Recipe(schedule="poly", gamma=2.0, epochs=8), 2, 0.5625),
        (Recipe(schedule="exponential", gamma=1e-4, epochs=8), 0, 1.0),
        (Recipe(schedule="exponential", gamma=1e-4, epochs=8), 4, 0.01),
        (Recipe(schedule="exponential", gamma=1e-4, epochs=8), 8, 1e-4),
        (Recipe(schedule="step", milestones=(0.5, 0.75), epochs=20), 9.99, 1.0),
        (Recipe(schedule="step", milestones=(0.5, 0.75), epochs=20), 10, 0.1),
        (Recipe(schedule="step", milestones=(0.5, 0.75), epochs=20), 19, 0.01),
        (Recipe(schedule="step", milestones=(0.5,), epochs=20, warmup=4), 1, 0.25),
        (Recipe(schedule="cosine", epochs=2, warmup=5), 1, 0.2),
    ],
)
def test_schedules_have_their_closed_forms(recipe: Recipe, epoch: float, expected: float) -> None:
    assert multiplier(recipe, epoch) == pytest.approx(expected)


@pytest.mark.parametrize(
    "change",
    [
        {"learning_rate": 0.0},
        {"learning_rate": math.nan},
        {"bias_rate": 0.0},
        {"momentum": 1.0},
        {"nesterov": True, "momentum": 0.0},
        {"epochs": 0},
        {"batch_size": 1},
        {"schedule": "cosin"},
        {"optimizer": "lion"},
        {"milestones": (0.5, 1.5)},
        {"label_smoothing": -0.1},
        {"distill_weight": 1.5},
        {"distill_weight": 0.0},
        {"temperature": 0.0},
        {"average": 1.5},
        {"crop": -1},
        {"cutout": -1},
    ],
)
def test_recipes_out_of_range_are_refused_by_field(change: dict[str, object]) -> None:
    with pytest.raises(UsageError, match=next(iter(change))):
        check_recipe(replace(Recipe(), **change))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("overrides", "teacher", "sentence"),
    [
        ({"momentum": 0.5}, None, "recipe field momentum has no effect beside optimizer adamw and schedule cosine"),
        ({"nesterov": True}, None, "recipe field nesterov has no effect"),
        ({"gamma": 0.5}, None, "recipe field gamma has no effect"),
        ({"milestones": (0.5,)}, None, "recipe field milestones has no effect"),
        ({"augment": False, "crop": 2}, None, "recipe field crop has no effect beside augment False; leave"),
        ({"schedule": "step", "gamma": 0.5}, None, "recipe field schedule is step, which needs milestones"),
        ({"warmup": 2.0, "epochs": 2}, None, "is 2.0 of 2 epochs, so that the learning rate never comes to its peak"),
        ({"temperature": 2.0}, None, "recipe field 'temperature' is for a teacher"),
        ({"distill_weight": 0.5}, None, "recipe field 'distill_weight' is for a teacher"),
        ({"label_smoothing": 0.1}, "teacher", "label_smoothing is of the labels, and a teacher's logits are the only"),
    ],
)
def test_fields_that_would_change_nothing_are_refused(
    overrides: dict[str, object], teacher: str | None, sentence: str
) -> None:
    method = methods.registry["xnor_net"]()
    recipe = replace(method.recipe, **overrides)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=sentence):
        check_effect(method, recipe, overrides, taught=teacher is not None)


@pytest.mark.parametrize(
    ("overrides", "teacher"),
    [
        ({"optimizer": "sgd", "momentum": 0.5, "nesterov": True}, None),
        ({"schedule": "exponential", "gamma": 0.5}, None),
        ({"crop": 4, "momentum": 0.9, "average": 0.0}, None),
        ({"distill_weight": 0.5, "label_smoothing": 0.1, "temperature": 2.0}, "teacher"),
    ],
)
def test_fields_that_have_an_effect_or_are_as_always_are_taken(
    overrides: dict[str, object], teacher: str | None
) -> None:
    method = methods.registry["xnor_net"]()
    recipe = replace(method.recipe, **overrides)  # type: ignore[arg-type]
    check_effect(method, recipe, overrides, taught=teacher is not None)
    # A recipe that smooths labels may be taught by a teacher alone.
    check_effect(method, replace(recipe, label_smoothing=0.1), [], taught=True)


@pytest.mark.parametrize("overrides", [{"optimizer": "adam"}, {"momentum": 0.9}, {"weight_decay": 1e-4}])
def test_settings_of_the_optimizer_are_refused_by_a_method_that_needs_none(overrides: dict[str, object]) -> None:
    wage = methods.registry["wage"]()
    with pytest.raises(UsageError, match=f"recipe field {next(iter(overrides))} is for an optimizer, and 'wage' moves"):
        check_effect(wage, replace(wage.recipe, **overrides), overrides, taught=False)  # type: ignore[arg-type]
    check_effect(wage, wage.recipe, ["optimizer", "momentum", "learning_rate"], taught=False)


@pytest.mark.parametrize("method", ["bnn", "wage"])
def test_smoothed_labels_are_refused_by_losses_that_would_ignore_them(method: str) -> None:
    config = TrainConfig("x", method=method, overrides={"label_smoothing": 0.1})
    with pytest.raises(UsageError, match=f"label_smoothing is for cross entropy, and the loss of '{method}' is"):
        choose_recipe(methods.registry[method](), config)
    assert choose_recipe(methods.registry["xnor_net"](), replace(config, method="xnor_net"))[1].label_smoothing == 0.1


def test_a_published_recipe_is_shown_and_taken_by_its_name(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    app(["methods", "bnn"], standalone_mode=False)
    shown = capsys.readouterr().out
    assert "Recipe paper: optimizer adam, learning_rate 0.001" in shown
    assert "MatthieuCourbariaux/BinaryNet" in shown
    asked: list[TrainConfig] = []
    monkeypatch.setattr("lowbit.training.train", asked.append)
    monkeypatch.setattr("lowbit.cli._summarise", lambda run: None)
    command = ["train", "--method", "bnn", "--model", "lenet", "--data", "digits", "--out", "x"]
    for more in ([], ["--recipe", "paper"], ["--recipe", "paper", "--epochs", "3", "--set", "recipe.batch_size=64"]):
        app([*command, *more], standalone_mode=False)
    bnn = methods.registry["bnn"]()
    paper = bnn.recipes["paper"]
    assert [choose_recipe(bnn, config) for config in asked] == [
        ("default", bnn.recipe),
        ("paper", paper),
        ("paper", replace(paper, epochs=3, batch_size=64)),
    ]
    assert [paper.learning_rate * multiplier(paper, epoch) for epoch in (0, 500)] == pytest.approx([1e-3, 3e-7])


def decayed_names(model: nn.Module, recipe: Recipe) -> set[str]:
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = parameter_groups(model, recipe)
    every = [parameter for group in groups for parameter in group["params"]]
    assert sorted(names[parameter] for parameter in every) == sorted(names.values())
    return {names[parameter] for group in groups if group["weight_decay"] for parameter in group["params"]}


def test_decay_spares_norms_biases_and_latent_weights() -> None:
    recipe = Recipe(weight_decay=0.1)
    float_model = models.create("lenet", method="float", in_channels=1)
    matrices = {name for name, parameter in float_model.named_parameters() if parameter.dim() > 1}
    assert decayed_names(float_model, recipe) == matrices
    binary = models.create("lenet", method="xnor_net", in_channels=1)
    latent = {
        f"{name}.weight"
        for name, module in binary.named_modules()
        if getattr(module, "weight_quantizer", None) is not None
    }
    assert latent
    every = {name for name, _ in binary.named_parameters()}
    assert decayed_names(binary, recipe) == {n for n in matrices & every if n not in latent}
    assert decayed_names(binary, replace(recipe, decay_all=True)) == every


def test_biases_move_at_a_rate_of_their_own(stripes: Path, tmp_path: Path) -> None:
    """One step of SGD without decay moves a parameter by its rate times its gradient: biases by 16 times as much."""

    def step(bias_rate: float) -> dict[str, torch.Tensor]:
        overrides = {"optimizer": "sgd", "momentum": 0.0, "weight_decay": 0.0, "learning_rate": 1e-3}
        more = {"bias_rate": bias_rate, "batch_size": 80, "epochs": 1, "augment": False, "warmup": 0.0}
        out = tmp_path / str(bias_rate)
        config = TrainConfig(
            out, "float", "lenet", f"folder:{stripes}", overrides=overrides | more, precision="float32", progress=False
        )
        return dict(models.load_run(train(config).path).named_parameters())

    torch.manual_seed(derived_seed(0, 0, 0))
    start = dict(models.create("lenet", 2, "float", in_channels=1).named_parameters())
    slow, fast = step(1.0), step(16.0)
    biases = {name for name in start if name.endswith(".bias")}
    moved = {name for name, before in start.items() if not torch.equal(slow[name], before)}
    assert biases & moved
    assert moved - biases
    for name in start:
        times = 16 if name in biases else 1
        torch.testing.assert_close(fast[name] - start[name], times * (slow[name] - start[name]), rtol=1e-3, atol=1e-6)


def test_nesterov_takes_the_gradient_ahead() -> None:
    model = models.create("lenet", method="float", in_channels=1)
    assert not make_optimizer(model, Recipe(optimizer="sgd")).defaults["nesterov"]
    assert make_optimizer(model, Recipe(optimizer="sgd", nesterov=True)).defaults["nesterov"]


@pytest.mark.parametrize(
    ("vendor", "flags", "precision"),
    [
        ("GenuineIntel", {"amx_bf16", "avx512_bf16"}, "bf16"),
        ("GenuineIntel", {"avx512_bf16"}, "float32"),
        ("AuthenticAMD", {"avx512_bf16"}, "bf16"),
        ("AuthenticAMD", {"avx512f"}, "float32"),
        ("", set(), "float32"),
    ],
)
def test_a_cpu_trains_in_bf16_where_that_is_faster(
    vendor: str, flags: set[str], precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment, "cpu_vendor", lambda: vendor)
    monkeypatch.setattr(environment, "cpu_flags", lambda: frozenset(flags))
    assert environment.auto_precision(torch.device("cpu")) == precision


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the settings are glibc's")
def test_memory_that_a_step_frees_is_kept() -> None:
    """Of a process of its own, also where it is more than the largest threshold that glibc takes, 2 GiB."""
    code = """
from pathlib import Path
import numpy as np
from lowbit.memory import keep_freed_memory

def resident():
    return next(int(line.split()[1]) for line in Path("/proc/self/status").open() if line.startswith("VmRSS"))

keep_freed_memory()
tensors = [np.ones(24 << 20, np.uint8) for _ in range(96)]
held = resident()
del tensors
print(held, resident())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    held, kept = map(int, done.stdout.split())
    assert kept > 0.9 * held > 2 << 20


def test_squared_hinge() -> None:
    logits = torch.tensor([[0.5, -2.0, 3.0]])
    expected = ((1 - 0.5) ** 2 + 0 + (1 + 3.0) ** 2) / 3
    assert float(squared_hinge(logits, torch.tensor([0]))) == pytest.approx(expected)


def test_batches_depend_on_seed_and_epoch_only() -> None:
    digits = data.load("digits")

    def batches(seed: int, epoch: int) -> list[torch.Tensor]:
        made = TrainBatches(digits.train_images, digits.train_labels, digits.preprocessing, 100, seed, True, True, CPU)
        made.epoch = epoch
        assert len(made) == 14
        return [inputs for inputs, _ in made]

    torch.manual_seed(1)
    first = batches(0, 3)
    torch.manual_seed(2)
    again = batches(0, 3)
    assert len(first) == 14
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], batches(0, 4)[0])
    assert not torch.equal(first[0], batches(1, 3)[0])
    assert first[0].shape == (100, 1, 32, 32)
    assert first[0].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("crop", [0, 2])
def test_a_crop_moves_images_by_so_many_pixels(crop: int) -> None:
    corner = np.zeros((64, 9, 9, 1), np.uint8)
    corner[:, 4, 4] = 255
    preprocessing = Preprocessing("L", (9, 9), 0, (0.0,), (1.0,))
    made = TrainBatches(corner, np.zeros(64, np.int64), preprocessing, 64, 0, True, False, CPU, crop)
    (inputs, _), *_ = made
    places = inputs[:, 0].nonzero()[:, 1:] - 4
    assert len(places) == 64
    assert int(places.min()) == -crop
    assert int(places.max()) == crop


def test_cutout_comes_behind_the_other_augmentation_and_clears_to_the_mean() -> None:
    images = np.random.default_rng(0).integers(0, 256, (40, 9, 9, 3), dtype=np.uint8)
    preprocessing = Preprocessing("RGB", (9, 9), 0, (0.5,) * 3, (0.25,) * 3)
    whole, cut = (
        next(iter(TrainBatches(images, np.zeros(40, np.int64), preprocessing, 40, 0, True, True, CPU, 2, side)))[0]
        for side in (0, 4)
    )
    cleared = (cut != whole).any(1)
    assert cut.is_contiguous(memory_format=torch.channels_last)
    assert not cut.permute(0, 2, 3, 1)[cleared].any()
    assert cleared.sum((1, 2)).max() == 16
    assert cleared.any((1, 2)).all()


def test_an_epoch_shows_each_image_at_most_once() -> None:
    digits = data.load("digits")
    index = np.arange(1438)
    made = TrainBatches(digits.train_images, index, digits.preprocessing, 100, 0, False, False, CPU)
    seen = torch.cat([labels for _, labels in made])
    assert len(seen) == 1400
    assert len(seen.unique()) == 1400


def test_evaluation_batches_are_what_preprocessing_gives() -> None:
    digits = data.load("digits")
    made = EvalBatches(digits.test_images, digits.test_labels, digits.preprocessing, 100, CPU)
    inputs = torch.cat([inputs for inputs, _ in made])
    assert len(list(made)) == len(made) == 4
    assert np.array_equal(inputs.numpy(), digits.preprocessing.normalise(digits.test_images))


def test_derived_seeds_differ() -> None:
    assert len({derived_seed(seed, epoch, use) for seed in range(5) for epoch in range(5) for use in range(3)}) == 75


def test_checkpoint_round_trip_and_damage(tmp_path: Path) -> None:
    path = tmp_path / "checkpoints" / "last.ckpt"
    rows = [{"epoch": 1, "train_loss": 0.5}]
    Checkpoint({"w": torch.ones(3)}, {"state": {}, "param_groups": []}, rows).save(path)
    assert Checkpoint.load(path).rows == rows
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(LowbitError, match=r"last\.ckpt cannot be read"):
        Checkpoint.load(path)
    torch.save({"model": {}, "optimizer": {}, "rows": 5}, path)
    with pytest.raises(LowbitError, match=r"last\.ckpt cannot be read \(its rows is no list\)"):
        Checkpoint.load(path)


@pytest.mark.parametrize("content", [b"", b"h", b"hello", b"\x80\x02]q\x00."])
def test_what_is_no_checkpoint_is_one_sentence(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "last.ckpt"
    path.write_bytes(content)
    with pytest.raises(LowbitError, match=r"last\.ckpt cannot be read \(.*\); train again"):
        Checkpoint.load(path)


def test_a_link_stays_and_a_new_file_is_as_private_as_any_other(tmp_path: Path) -> None:
    target, link, other = tmp_path / "target", tmp_path / "link", tmp_path / "other"
    target.write_text("old")
    link.symlink_to(target)
    with write_whole(link) as file:
        file.write(b"new")
    assert link.is_symlink()
    assert target.read_text() == "new"
    other.touch()
    assert target.stat().st_mode == other.stat().st_mode


def test_weights_under_two_names_are_saved_and_come_back(tmp_path: Path) -> None:
    def shared() -> nn.Module:
        layer = nn.Linear(3, 3)
        return nn.Sequential(layer, nn.ReLU(), layer)

    saved, loaded = shared(), shared()
    save_weights(saved, tmp_path / "model.safetensors")
    load_weights(loaded, tmp_path / "model.safetensors")
    assert torch.equal(saved[0].weight, loaded[0].weight)
    assert loaded[0] is loaded[2]


def test_unfinished_files_are_removed_and_nothing_else(tmp_path: Path) -> None:
    notes = tmp_path / ".notes"
    notes.write_text("mine")
    with write_whole(tmp_path / "last.ckpt") as file:
        file.write(b"half")
        file.flush()
        killed = {entry.name: entry.read_bytes() for entry in tmp_path.iterdir() if entry != notes}
    for name, content in killed.items():
        (tmp_path / name).write_bytes(content)
    assert set(killed) != {"last.ckpt"}
    remove_partial_files(tmp_path, tmp_path / "none")
    assert {entry.name for entry in tmp_path.iterdir()} == {"last.ckpt", ".notes"}


class Exploding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x))  # type: ignore[no-any-return]


def test_not_finite_names_the_layer() -> None:
    model = Exploding()
    model(torch.ones(1, 4)).sum().backward()
    model.first.weight.grad.fill_(math.inf)  # type: ignore[union-attr]
    assert find_not_finite(model, torch.ones(1, 4)) == "the gradient of layer 'first'"
    with torch.no_grad():
        model.second.bias.fill_(math.nan)
    assert find_not_finite(model, torch.ones(1, 4)) == "the output of layer 'second'"


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_distillation_loss_is_the_divergence_of_softmaxes(temperature: float) -> None:
    student, teacher = np.random.default_rng(0).normal(size=(2, 6, 5))
    p, q = (np.exp(z / temperature) / np.exp(z / temperature).sum(1, keepdims=True) for z in (teacher, student))
    expected = temperature**2 * np.mean(np.sum(p * np.log(p / q), axis=1))
    found = distillation_loss(torch.from_numpy(student), torch.from_numpy(teacher), temperature)
    np.testing.assert_allclose(float(found), expected, rtol=1e-12)
