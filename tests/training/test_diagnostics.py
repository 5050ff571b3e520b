"""Diagnostics: each figure against one that is known, and that looking changes nothing."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from ctrl_c import train_until
from torch import Tensor, nn

from lowbit import methods, models, quantize_
from lowbit.cli import app
from lowbit.errors import UsageError
from lowbit.layers import quantized_twin
from lowbit.methods.dorefa import UnitActivation
from lowbit.methods.hwgq import HalfWave
from lowbit.quantizers.base import Grid, Quantizer
from lowbit.quantizers.binary import ScaledSign, SignQuantizer
from lowbit.runs import Run
from lowbit.training import TrainConfig, train
from lowbit.training.checkpoints import Checkpoint
from lowbit.training.diagnostics import Diagnostics, FlipCounter, Probe, diagnose
from lowbit.training.diagnostics.probe import BINS


class Smooth(Quantizer):
    """No staircase at all: a softened sign, with its own gradient times ``factor``."""

    bits = 8
    signed = True

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = _Tanh.apply(x, self.factor)
        return result

    def encode(self, x: Tensor) -> tuple[Tensor, Grid]:
        return (x > 0).to(torch.uint8), Grid(1, 2, -1, torch.ones(()))


class _Tanh(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.factor = factor
        return x.tanh()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        [x] = ctx.saved_tensors
        return ctx.factor * gradient * (1 - x.tanh() ** 2), None


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits, labels)


def of_output(logits: Tensor, labels: Tensor) -> Tensor:
    """A loss linear in the network's output."""
    return logits.mean(0).sum()


def layer(made: nn.Module, activation: Quantizer | None, weight: Quantizer | None = None) -> nn.Module:
    return quantized_twin(made, weight, activation)


def cosine(model: nn.Module, probe: Probe, name: str = "0") -> float:
    value = diagnose(model, probe)[name]["gradient_cosine"]
    assert isinstance(value, float)
    return value


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize(("factor", "expected"), [(1.0, 1.0), (3.0, 1.0), (-1.0, -1.0)])
def test_a_right_gradient_has_cosine_1_and_a_negated_one_minus_1(factor: float, expected: float) -> None:
    model = nn.Sequential(layer(nn.Linear(20, 30), Smooth(factor)), nn.Tanh(), nn.Linear(30, 5))
    probe = Probe(torch.randn(16, 20), torch.randint(5, (16,)), cross_entropy, width=0.01)
    assert cosine(model, probe) == pytest.approx(expected, abs=1e-3)


def test_losses_near_zero_keep_their_digits() -> None:
    last = nn.Linear(30, 5)
    model = nn.Sequential(layer(nn.Linear(20, 30), Smooth(1)), nn.Tanh(), last)
    images = torch.randn(16, 20)
    with torch.no_grad():
        last.weight.mul_(40)
        labels = model(images).argmax(1)
        assert cross_entropy(model(images), labels) < 0.3
    assert cosine(model, Probe(images, labels, cross_entropy, width=0.01)) == pytest.approx(1, abs=0.02)


def test_dropout_is_off_and_batch_norm_treats_images_alone() -> None:
    above = [nn.BatchNorm1d(30), nn.Dropout(0.5), nn.Tanh(), nn.Linear(30, 5)]
    model = nn.Sequential(layer(nn.Linear(20, 30), Smooth(1)), *above).train()
    probe = Probe(torch.randn(16, 20), torch.randint(5, (16,)), cross_entropy, width=0.01)
    assert cosine(model, probe) == pytest.approx(1, abs=1e-3)


def test_a_gradient_that_knows_nothing_has_cosine_0() -> None:
    class Shuffled(Smooth):
        def forward(self, x: Tensor) -> Tensor:
            return x.tanh().detach() + (x.roll(1, 1) - x.roll(1, 1).detach())

    model = nn.Sequential(layer(nn.Linear(200, 30), Shuffled(1)), nn.Tanh(), nn.Linear(30, 5))
    probe = Probe(torch.randn(64, 200), torch.randint(5, (64,)), cross_entropy, directions=8)
    # The standard error is 1 / sqrt(64 * 8), and a little for the chance correlation of the weights.
    assert abs(cosine(model, probe)) < 0.15


@pytest.mark.parametrize("width", [0.1, 0.3, 1.0])
def test_signs_in_front_of_a_linear_loss_against_the_integral(width: float) -> None:
    r"""$L = \sum_j w_j\,\mathrm{sign}(x_j)$: the smoothed gradient is $2 w_j \varphi(x_j / \sigma) / \sigma$, and
    $E[d^2] = \sum_j w_j^2\,P(|u| > |x_j| / \sigma) / \sigma^2$, since terms of different j are independent and odd."""
    linear = nn.Linear(500, 1, bias=False)
    model = nn.Sequential(layer(linear, SignQuantizer()))
    images = torch.randn(32, 500)
    sigma = width * images.std(correction=0).item()
    x, w = images.double().numpy(), linear.weight.detach().double().numpy()
    g = w * (abs(x) <= 1)
    h = 2 * w * np.exp(-((x / sigma) ** 2) / 2) / math.sqrt(2 * math.pi) / sigma
    d2 = (w**2 * np.vectorize(math.erfc)(abs(x) / sigma / math.sqrt(2)) / sigma**2).sum(1)
    expected = ((g * h).sum(1) / np.sqrt((g * g).sum(1) * d2)).mean()
    probe = Probe(images, torch.zeros(32, dtype=torch.long), of_output, directions=128, width=width)
    assert cosine(model, probe) == pytest.approx(expected, abs=4 / math.sqrt(32 * 128))


def test_the_yardstick_of_the_docs() -> None:
    """What docs/diagnostics.md says of lone signs in front of a linear loss, at the default width."""
    model = nn.Sequential(layer(nn.Linear(5000, 1, bias=False), SignQuantizer()))
    images = torch.randn(64, 5000)
    probe = Probe(images, torch.zeros(64, dtype=torch.long), of_output, directions=64)
    assert cosine(model, probe) == pytest.approx(0.64, abs=0.03)


def test_a_few_directions_have_the_stated_bias() -> None:
    model = nn.Sequential(layer(nn.Linear(500, 1, bias=False), SignQuantizer()))
    images, labels = torch.randn(1000, 500), torch.zeros(1000, dtype=torch.long)
    few, many = (cosine(model, Probe(images, labels, of_output, directions=k)) for k in (4, 24))
    assert few == pytest.approx(many - many * (1 - many**2) * (1 / 4 - 1 / 24) / 2, abs=0.02)
    assert few < many - 0.02


def test_mismatch_grows_from_top_to_bottom() -> None:
    """Lin and Talathi 2016: each staircase on the way down adds its own."""
    parts = [nn.Sequential(nn.BatchNorm1d(100), layer(nn.Linear(100, 100), SignQuantizer())) for _ in range(4)]
    model = nn.Sequential(*parts, nn.Linear(100, 5))
    images = torch.randn(64, 100)
    for _ in range(100):
        model(images)
    figures = diagnose(model, Probe(images, torch.randint(5, (64,)), cross_entropy, directions=8))
    cosines = [figure["gradient_cosine"] for figure in figures.values()]
    assert cosines == sorted(cosines)
    assert cosines[-1] > cosines[0] + 0.2


def test_a_shortcut_around_a_layer_is_no_part_of_its_gradient() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(20, 20)
            self.inner = layer(nn.Linear(20, 20), Smooth(1))
            self.last = nn.Linear(20, 5)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            return self.last(self.inner(x) - 3 * x)

    probe = Probe(torch.randn(16, 20), torch.randint(5, (16,)), cross_entropy, width=0.01)
    assert cosine(Residual(), probe, "inner") == pytest.approx(1, abs=1e-3)


def test_a_layer_that_runs_twice_is_followed_through_both_calls() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = layer(nn.Linear(20, 20), Smooth(1))

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(self.inner(x).tanh())

    probe = Probe(torch.randn(16, 20), torch.randint(20, (16,)), cross_entropy, width=0.01)
    assert cosine(Twice(), probe, "inner") == pytest.approx(1, abs=1e-3)


def test_no_figure_where_nothing_can_be_said() -> None:
    constant = nn.Sequential(layer(nn.Linear(20, 5), SignQuantizer()))
    nn.init.zeros_(constant[0].weight)
    probe = Probe(torch.randn(8, 20), torch.randint(5, (8,)), cross_entropy)
    assert diagnose(constant, probe)["0"]["gradient_cosine"] is None
    # A gradient that is lost while the loss moves foretells nothing.
    outside = nn.Sequential(layer(nn.Linear(20, 5), SignQuantizer()))
    far = Probe(torch.randn(8, 20).sign() * 2, torch.randint(5, (8,)), cross_entropy, width=1.0)
    assert diagnose(outside, far)["0"]["gradient_cosine"] == 0


def test_images_must_lie_along_the_first_axis() -> None:
    class Turned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = layer(nn.Linear(8, 8), SignQuantizer())

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x.t()).t()

    with pytest.raises(UsageError, match="'inner' reads a tensor of shape"):
        diagnose(Turned(), Probe(torch.randn(8, 5), torch.randint(5, (8,)), cross_entropy))


@pytest.mark.parametrize(
    ("quantizer", "is_lost"),
    [
        (SignQuantizer(), lambda x: abs(x) > 1),
        (ScaledSign("identity"), lambda x: x != x),
        (UnitActivation(2), lambda x: (x < 0) | (x > 1)),
        (HalfWave(2), lambda x: (x <= 0) | (x > torch.tensor(HalfWave(2).levels[-1]))),
        (HalfWave(2, backward="vanilla"), lambda x: x <= 0),
    ],
    ids=["sign", "identity", "unit", "half-wave", "vanilla"],
)
def test_saturated_is_where_the_backward_gives_nothing(
    quantizer: Quantizer, is_lost: Callable[[Tensor], Tensor]
) -> None:
    model = nn.Sequential(layer(nn.Conv2d(3, 4, 3), quantizer), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    images = torch.randn(8, 3, 6, 6) * 1.5
    images[0, 0, 0, :4] = torch.tensor([0.0, 1.0, -1.0, -0.0])
    figures = diagnose(model, Probe(images, torch.randint(4, (8,)), cross_entropy))["0"]
    assert figures["saturated"] == pytest.approx(is_lost(images).double().mean().item(), abs=1e-9)


@pytest.mark.parametrize("kind", ["conv", "linear"])
def test_dead_channels_say_the_same_to_all_images(kind: str) -> None:
    if kind == "conv":
        model = nn.Sequential(layer(nn.Conv2d(4, 2, 1), SignQuantizer()), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        images = torch.randn(16, 4, 3, 3)
    else:
        model = nn.Sequential(layer(nn.Linear(4, 2), SignQuantizer()))
        images = torch.randn(16, 4)
    images[:, 1] = images[:, 1].abs()
    images[:, 2] = -1 - images[:, 2].abs()
    images[:, 2].flatten()[-1] = -1
    assert diagnose(model, Probe(images, torch.randint(2, (16,)), cross_entropy))["0"]["dead"] == 0.5


def test_sides_that_are_float_or_bypassed_have_no_figures() -> None:
    model = nn.Sequential(
        layer(nn.Linear(6, 6), None, SignQuantizer()), nn.Tanh(), layer(nn.Linear(6, 6), SignQuantizer())
    )
    probe = Probe(torch.randn(8, 6), torch.randint(6, (8,)), cross_entropy)
    figures = diagnose(model, probe)
    assert (figures["0"]["saturated"], figures["0"]["dead"]) == (None, None)
    assert figures["2"]["weights"] is None
    assert figures["2"]["dead"] is not None
    model[2].activation_quantizer.enabled = False
    assert (diagnose(model, probe)["2"]["saturated"]) is None
    assert cosine(model, replace(probe, width=0.01), "2") == pytest.approx(1, abs=1e-3)


def test_histograms_count_every_latent_weight() -> None:
    linear = nn.Linear(50, 30)
    model = nn.Sequential(layer(linear, None, SignQuantizer()))
    probe = Probe(torch.randn(4, 50), torch.randint(30, (4,)), cross_entropy)
    bins = diagnose(model, probe)["0"]["weights"]
    values = linear.weight.detach().numpy()
    assert (bins["low"], bins["high"]) == (values.min(), values.max())
    assert bins["counts"] == np.histogram(values, BINS)[0].tolist()
    nn.init.constant_(linear.weight, 0.5)
    assert sum(diagnose(model, probe)["0"]["weights"]["counts"]) == 1500


def test_flips_per_step_and_against_the_epoch_before() -> None:
    linear = nn.Linear(10, 10, bias=False)
    nn.init.ones_(linear.weight)
    counter = FlipCounter(nn.Sequential(layer(linear, None, SignQuantizer()), layer(nn.Linear(10, 2), SignQuantizer())))
    with torch.no_grad():
        linear.weight[0] = -1
        counter.step()
        linear.weight[0, :5] = 1
        counter.step()
    assert counter.epoch(2) == {"0": (0.05, (10 + 5) / 200)}
    counter.step()
    assert counter.epoch(1) == {"0": (0.0, 0.0)}
    with torch.no_grad():
        linear.weight[1] = -1
    # Also what happens after the last step counts, such as a change of the learned scale.
    assert counter.epoch(1)["0"][0] == 0.1


def test_codes_and_not_signs_are_compared() -> None:
    linear = nn.Linear(4, 1, bias=False)
    quantizer = methods.registry["dorefa"](bits_w=2).weight
    assert quantizer is not None
    with torch.no_grad():
        linear.weight[:] = torch.tensor([1.0, 0.9, -0.9, -1.0])
        counter = FlipCounter(nn.Sequential(layer(linear, None, quantizer())))
        linear.weight[0, 1] = 0.1
    assert counter.epoch(1) == {"0": (0.25, 0.0)}


def everything(model: nn.Module) -> dict[str, Any]:
    """All that looking at a model might change."""
    return {
        "state": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "modes": [module.training for module in model.modules()],
        "gradients": [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        "hooks": [len(module._forward_pre_hooks) for module in model.modules()],
        "random": torch.get_rng_state(),
    }


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return len(a) == len(b) and all(map(same, a, b)) if isinstance(a, list) else a == b


METHODS: list[tuple[str, dict[str, Any]]] = [
    ("xnor_net", {}),
    ("bnn", {"stochastic": True}),
    ("dorefa", {"bits_w": 2, "bits_a": 2, "bits_g": 4}),
    ("affine", {"delay": 0.5}),
]


@pytest.mark.parametrize(("name", "options"), METHODS, ids=lambda value: value if isinstance(value, str) else "")
def test_looking_leaves_a_model_as_it_was(name: str, options: dict[str, Any]) -> None:
    method = methods.registry[name](**options)
    model = models.create("lenet", method=method, in_channels=1, image_size=32, width=0.25)
    if method.phases is not None:
        method.phases([m for m in model.modules() if hasattr(m, "weight_quantizer")], 0.0)
    model.train()
    next(module for module in model.modules() if isinstance(module, nn.BatchNorm2d)).eval()
    images, labels = torch.randn(8, 1, 32, 32), torch.randint(10, (8,))
    cross_entropy(model(images), labels).backward()
    before = everything(model)
    first = diagnose(model, Probe(images, labels, cross_entropy, directions=2))
    assert same(before, everything(model))
    torch.manual_seed(99)
    assert diagnose(model, Probe(images, labels, cross_entropy, directions=2)) == first


def test_a_failure_while_looking_leaves_the_model_as_it_was() -> None:
    model = models.create("lenet", method="xnor_net", in_channels=1, image_size=32, width=0.25).train()
    calls = []

    def failing(logits: Tensor, labels: Tensor) -> Tensor:
        calls.append(0)
        if len(calls) == 15:
            raise KeyboardInterrupt
        return cross_entropy(logits, labels)

    probe = Probe(torch.randn(8, 1, 32, 32), torch.randint(10, (8,)), failing)
    before = everything(model)
    with pytest.raises(KeyboardInterrupt):
        diagnose(model, probe)
    assert same(before, everything(model))


@pytest.fixture
def config(stripes: Path, tmp_path: Path) -> TrainConfig:
    return TrainConfig(
        out=tmp_path / "run",
        method="xnor_net",
        model="lenet",
        data=f"folder:{stripes}",
        overrides={"batch_size": 16, "epochs": 3},
        model_options={"width": 0.25},
        precision="float32",
        threads=1,
        progress=False,
    )


@pytest.mark.parametrize(("name", "options"), METHODS, ids=lambda value: value if isinstance(value, str) else "")
def test_a_diagnosed_run_gives_the_same_weights(
    config: TrainConfig, tmp_path: Path, name: str, options: dict[str, Any]
) -> None:
    config = replace(config, method=name, method_options=options, precision="bf16", epochs=2, val_fraction=0.2)
    plain = train(config)
    diagnosed = train(replace(config, out=tmp_path / "diagnosed", diagnose=True))
    a, b = (Checkpoint.load(run.checkpoint_path) for run in (plain, diagnosed))
    assert same(a.model, b.model)
    assert same(a.optimizer, b.optimizer)
    for row, other in zip(a.rows, b.rows, strict=True):
        assert {**row, "seconds": 0} == {**other, "seconds": 0}
    assert plain.weights_path.read_bytes() == diagnosed.weights_path.read_bytes()
    assert not plain.diagnostics_path.exists()


def test_what_the_file_holds(config: TrainConfig) -> None:
    run = train(replace(config, diagnose=True))
    assert run.config["diagnose"] is True
    written = json.loads(run.diagnostics_path.read_text())
    assert written["probe"] == {"images": 64, "directions": 4, "width": 0.3, "seed": 0}
    assert [row["epoch"] for row in written["epochs"]] == [1, 2, 3]
    for row in written["epochs"]:
        assert list(row["layers"]) == ["1.conv", "2.conv"]
        for figures in row["layers"].values():
            assert 0 <= figures["flip_ratio"] <= 1
            # Each step flips what the epoch keeps, or more.
            assert figures["flip_ratio"] <= 5 * figures["step_flip_ratio"] + 1e-6
            assert -1 <= figures["gradient_cosine"] <= 1
            assert 0 <= figures["saturated"] <= 1
            assert 0 <= figures["dead"] <= 1
            assert len(figures["weights"]["counts"]) == BINS
    assert any(row["layers"]["1.conv"]["flip_ratio"] > 0 for row in written["epochs"])


def test_a_resumed_run_gives_the_same_file(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(config, diagnose=True)
    whole = train(replace(config, out=tmp_path / "whole"))
    train_until(config, monkeypatch)
    run = Run(Path(config.out))
    # As if it had been killed in the next epoch, between this file and the checkpoint.
    run.diagnostics_path.write_bytes(whole.diagnostics_path.read_bytes())
    monkeypatch.setattr(Diagnostics, "on_train_epoch_start", lambda self, *_: seen.append(self.path.read_text()))
    seen: list[str] = []
    train(TrainConfig.resuming(run.path, progress=False))
    assert [row["epoch"] for row in json.loads(seen[0])["epochs"]] == [1]
    assert run.diagnostics_path.read_bytes() == whole.diagnostics_path.read_bytes()


def test_a_run_from_before_there_were_diagnostics_goes_on(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    train_until(config, monkeypatch, batch=0)
    run = Run(Path(config.out))
    old = {key: value for key, value in run.config.items() if key not in ("diagnose", "distill_from")}
    for later in ("average", "crop", "cutout", "distill_weight", "temperature", "whiten", "freeze_first"):
        del old["recipe"][later]
    run.config_path.write_text(json.dumps(old))
    path = run.checkpoint_path
    state = torch.load(path, weights_only=True)
    del state["diagnostics"], state["average"]
    torch.save(state, path)
    with pytest.raises(UsageError, match="diagnose False, not True"):
        train(replace(config, resume=True, diagnose=True))
    assert len(train(replace(config, resume=True)).metrics()) == 3


def test_from_the_command_line(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[TrainConfig] = []
    monkeypatch.setattr("lowbit.training.train", asked.append)
    monkeypatch.setattr("lowbit.cli._summarise", lambda run: None)
    run = train(replace(config, epochs=1, diagnose=True))
    start = ["train", "--method", "bnn", "--model", "lenet", "--data", "digits", "--out", str(run.path)]
    for arguments in (start, [*start, "--diagnose"], ["train", "--resume", "--out", str(run.path)]):
        app(arguments, standalone_mode=False)
    assert [each.diagnose for each in asked] == [False, True, True]


def test_the_python_of_the_docs_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    text = (Path(__file__).parents[2] / "docs/diagnostics.md").read_text(encoding="utf-8")
    [code] = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    exec(compile(code, "docs/diagnostics.md", "exec"), {})
    assert len(capsys.readouterr().out.splitlines()) == 8


def test_a_float_network_has_nothing_to_diagnose(config: TrainConfig) -> None:
    with pytest.raises(UsageError, match="method 'float' quantizes no layer of lenet"):
        train(replace(config, method="float", diagnose=True))
    assert not Run(Path(config.out)).config_path.exists()
    with pytest.raises(UsageError, match="no quantized layer"):
        Diagnostics(nn.Linear(2, 2), Probe(torch.zeros(1, 2), torch.zeros(1), cross_entropy), "x.json")


class Plain(pl.LightningModule):
    """Somebody's own module, with dropout and batch norm, trained with nothing of lowbit's."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(12, 16),
            nn.BatchNorm1d(16),
            nn.Dropout(0.2),
            nn.Linear(16, 16),
            nn.BatchNorm1d(16),
            nn.Linear(16, 3),
        )
        quantize_(self.net, "bnn", overrides={"0": None, "5": None})

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.01)


def fit(folder: Path, epochs: int, diagnosed: bool, resume: Path | None = None) -> tuple[Plain, Path]:
    torch.manual_seed(1)
    images, labels = torch.randn(64, 12), torch.randint(3, (64,))
    module = Plain()
    probe = Probe(images[:16], labels[:16], cross_entropy)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=[Diagnostics(module.net, probe, folder / "diagnostics.json")] if diagnosed else [],
    )
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images, labels), batch_size=16, shuffle=True)
    trainer.fit(module, loader, ckpt_path=resume)
    trainer.save_checkpoint(folder / f"{epochs}.ckpt")
    return module, folder / f"{epochs}.ckpt"


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::lightning.pytorch.utilities.warnings.PossibleUserWarning")
def test_in_a_lightning_trainer_of_ones_own(tmp_path: Path) -> None:
    for folder in ("with", "without", "resumed"):
        (tmp_path / folder).mkdir()
    diagnosed, _ = fit(tmp_path / "with", 3, diagnosed=True)
    plain, _ = fit(tmp_path / "without", 3, diagnosed=False)
    assert same(diagnosed.state_dict(), plain.state_dict())
    _, checkpoint = fit(tmp_path / "resumed", 1, diagnosed=True)
    fit(tmp_path / "resumed", 3, diagnosed=True, resume=checkpoint)
    written = json.loads((tmp_path / "resumed" / "diagnostics.json").read_text())
    assert [row["epoch"] for row in written["epochs"]] == [1, 2, 3]
    whole = json.loads((tmp_path / "with" / "diagnostics.json").read_text())
    assert written["epochs"][0] == whole["epochs"][0]
    assert list(whole["epochs"][0]["layers"]) == ["3"]
