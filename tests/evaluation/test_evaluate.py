"""Evaluation changes no weight, is the same for every batch size, and counts what a network costs."""

import dataclasses
import io
import json
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file
from torch import nn

from lowbit import export
from lowbit.errors import LowbitError, UsageError
from lowbit.evaluation import evaluate, evaluate_model, profile, render
from lowbit.evaluation.metrics import scores
from lowbit.layers import QuantConv2d, QuantLinear
from lowbit.layers.quantized import quantized_twin
from lowbit.methods.xnor_net import ScaledSign
from lowbit.models import create, load_run
from lowbit.preprocessing import Preprocessing
from lowbit.quantizers.binary import SignQuantizer
from lowbit.runs import Run, write_json


@dataclass
class Images:
    test_images: np.ndarray
    test_labels: np.ndarray
    classes: tuple[str, ...]
    preprocessing: Preprocessing


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (37, 8, 8, 3), dtype=np.uint8)
    preprocessing = Preprocessing("RGB", (8, 8), 0, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
    return Images(images, rng.integers(0, 4, 37), ("a", "b", "c", "d"), preprocessing)


@pytest.fixture
def model():
    torch.manual_seed(0)
    binary = quantized_twin(nn.Conv2d(16, 24, 3, padding=1, bias=False), ScaledSign("exact"), SignQuantizer())
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        binary,
        nn.Dropout(0.5),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(24 * 16, 4),
    )


def test_evaluation_leaves_the_model_as_it_was(model, data):
    model.train()
    model[1].eval()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    evaluate_model(model, data, batch_size=16)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert modes == [module.training for module in model.modules()]
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("batch_size", [1, 7, 37, 1000])
def test_batch_size_changes_no_prediction(model, data, batch_size):
    expected = evaluate_model(model, data, batch_size=37)
    record = evaluate_model(model, data, batch_size=batch_size)
    assert record["predictions"] == expected["predictions"]
    assert record["loss"] == pytest.approx(expected["loss"], rel=1e-5)


def test_weights_whose_codes_name_levels_cost_what_their_packed_file_has():
    model = create("lenet", method="adabin", width=0.2).eval()
    found = profile(model, torch.zeros(1, 3, 32, 32))
    packed = export(model, torch.zeros(1, 3, 32, 32)).packed
    weights = sum(packed.tensors[name].nbytes for name in packed.tensors if name.endswith("weight"))
    of_layers = sum(4 * layer.weight.numel() for layer in model.modules() if isinstance(layer, (nn.Conv2d, nn.Linear)))
    assert weights == of_layers
    assert found["weight_bytes"] == found["float32_bytes"]


def test_progress_counts_images(model, data):
    seen = []
    evaluate_model(model, data, batch_size=20, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(20, 37), (37, 37)]


def test_profile_counts_by_hand(model):
    found = profile(model, torch.zeros(2, 3, 8, 8))
    assert found["macs"] == {"1x1": 8 * 8 * 24 * 16 * 9, "32x32": 8 * 8 * 16 * 3 * 9 + 24 * 16 * 4}
    assert found["parameters"] == (16 * 27 + 16) + 2 * 16 + 24 * 144 + (24 * 16 * 4 + 4)
    assert found["float32_bytes"] == 4 * (found["parameters"] + 2 * 16)
    # One bit a weight and one float32 scale a filter, in place of float32 weights.
    assert found["weight_bytes"] == found["float32_bytes"] - 4 * 24 * 144 + 24 * 144 // 8 + 4 * 24
    layers = [(layer["name"], layer["kind"], layer["bits_w"], layer["bits_a"]) for layer in found["layers"]]
    assert layers == [
        ("0", "Conv2d", 32, 32),
        ("1", "BatchNorm2d", 32, 32),
        ("2", "QuantConv2d", 1, 1),
        ("6", "Linear", 32, 32),
    ]


def test_profile_counts_groups_strides_and_shared_layers():
    shared = QuantLinear(6, 6, bias=False)
    grouped = QuantConv2d(4, 6, 3, stride=2, padding=1, groups=2, bias=False)
    model = nn.Sequential(grouped, nn.AdaptiveAvgPool2d(1), nn.Flatten(), shared, shared)
    found = profile(model, torch.zeros(1, 4, 9, 9))
    assert found["macs"] == {"32x32": 5 * 5 * 6 * 2 * 9 + 2 * 36}
    assert found["parameters"] == 6 * 2 * 9 + 36


def test_a_model_for_other_classes_is_refused(data):
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 3))
    with pytest.raises(LowbitError, match="4 classes"):
        evaluate_model(model, data)


@pytest.fixture
def run(tmp_path):
    torch.manual_seed(0)
    model = create("lenet", num_classes=4, method="xnor_net", in_channels=3, image_size=32)
    folder = tmp_path / "small"
    config = {
        "model": {"name": "lenet", "options": {}},
        "method": {"name": "xnor_net", "options": {}},
        "num_classes": 4,
        "in_channels": 3,
        "image_size": 32,
        "classes": ["a", "b", "c", "d"],
        "preprocessing": Preprocessing("RGB", (32, 32), 0, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)).to_dict(),
    }
    write_json(folder / "config.json", config)
    save_file(model.state_dict(), folder / "model.safetensors")
    return folder


@pytest.fixture
def large(data):
    """The same images, tiled to 32 x 32, with a normalisation that is not the run's."""
    preprocessing = Preprocessing("RGB", (32, 32), 0, (0.1, 0.2, 0.3), (1.0, 1.0, 1.0))
    return Images(np.tile(data.test_images, (1, 4, 4, 1)), data.test_labels, data.classes, preprocessing)


def test_a_run_is_evaluated_with_its_own_normalisation(run, large):
    expected = Preprocessing("RGB", (32, 32), 0, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)).normalise(large.test_images)
    with torch.inference_mode():
        logits = load_run(run)(torch.from_numpy(expected)).numpy()
    assert evaluate(run, large)["loss"] == pytest.approx(scores(logits, large.test_labels, large.classes)["loss"])


def test_grey_images_are_seen_in_colour_by_a_network_that_takes_colour(run, large):
    grey = dataclasses.replace(
        large,
        test_images=large.test_images[..., :1],
        preprocessing=Preprocessing("L", (32, 32), 0, (0.1,), (1.0,)),
    )
    colour = dataclasses.replace(large, test_images=large.test_images[..., [0, 0, 0]])
    assert evaluate(run, grey)["predictions"] == evaluate(run, colour)["predictions"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"classes": ("a", "b", "d", "c")}, "other classes"),
        (
            {"preprocessing": Preprocessing("RGB", (8, 8), 0, (0, 0, 0), (1, 1, 1))},
            "gives colour images of 8x8 pixels",
        ),
        (
            {"preprocessing": Preprocessing("RGB", (28, 28), 2, (0, 0, 0), (1, 1, 1))},
            "gives colour images of 28x28 pixels with a border of 2; --image-size resizes",
        ),
    ],
)
def test_data_that_does_not_fit_the_run_is_refused(run, large, change, message):
    with pytest.raises(LowbitError, match=message):
        evaluate(run, replace(large, **change))


def test_other_images_do_not_take_the_place_of_the_runs_own_evaluation(run, large):
    @dataclass
    class Hashed(Images):
        hash: str = "own"

    fields = [getattr(large, field.name) for field in dataclasses.fields(large)]
    own, other = Hashed(*fields), Hashed(*fields, hash="other")
    config = json.loads((run / "config.json").read_text())
    write_json(run / "config.json", {**config, "data": {"hash": "own"}, "finished": "2026"})
    assert evaluate(run, own)["data_hash"] == "own"
    kept = (run / "evaluation.json").read_text()
    with pytest.raises(UsageError, match="trained beside other images than these; name a file for the record with -o"):
        evaluate(run, other)
    assert (run / "evaluation.json").read_text() == kept
    evaluate(run, other, output=run / "other.json")
    assert json.loads((run / "other.json").read_text())["data_hash"] == "other"
    assert Run(run).is_evaluated
    (run / "other.json").replace(run / "evaluation.json")
    assert not Run(run).is_evaluated


def test_a_packed_file_predicts_what_its_run_predicts(run, large):
    preprocessing = Preprocessing("RGB", (32, 32), 0, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
    packed = export(load_run(run), torch.zeros(1, 3, 32, 32), classes=list("abcd"), preprocessing=preprocessing)
    packed.save(run / "model.lowbit")
    of_run, of_file = evaluate(run, large), evaluate(run / "model.lowbit", large, batch_size=10)
    assert of_file["source"] == "packed"
    assert of_file["predictions"] == of_run["predictions"]
    assert of_file["loss"] == pytest.approx(of_run["loss"], rel=1e-4)
    assert of_file["profile"]["macs"] == of_run["profile"]["macs"]
    assert of_file["profile"]["weight_bytes"] < of_run["profile"]["float32_bytes"]


def test_a_run_and_its_weights_file_give_the_same_record(run, large):
    of_run = evaluate(run, large)
    of_file = evaluate(run / "model.safetensors", large)
    assert of_run == json.loads((run / "evaluation.json").read_text())
    assert of_file == json.loads((run / "model.safetensors.evaluation.json").read_text())
    assert (of_run["run"], of_run["source"]) == ("small", "run")
    assert (of_file["run"], of_file["source"]) == ("model.safetensors", "weights")
    same = ("loss", "accuracy", "predictions", "labels", "profile", "averages")
    assert all(of_run[key] == of_file[key] for key in same)
    assert "1x1" in of_run["profile"]["macs"]


@pytest.mark.parametrize(("name", "message"), [("missing", "does not exist"), ("notes.txt", "neither")])
def test_other_sources_are_refused(tmp_path, data, name, message):
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(UsageError, match=message):
        evaluate(tmp_path / name, data)


def test_a_folder_without_config_is_refused(tmp_path, data):
    with pytest.raises(LowbitError, match=r"no config\.json"):
        evaluate(tmp_path, data)


def test_batch_size_must_be_positive(tmp_path, data):
    with pytest.raises(UsageError, match="batch size"):
        evaluate(tmp_path, data, batch_size=0)


@pytest.mark.parametrize("width", [40, 80, 200])
def test_the_terminal_shows_every_number_whole(width, capsys):
    rng = np.random.default_rng(0)
    classes = ["airplane", "automobile", "[red]bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    labels = np.repeat(np.arange(10), 1000)
    logits = rng.normal(size=(10_000, 10))
    logits[np.arange(10_000), labels] += 3
    record = {"run": "small", **scores(logits, labels, classes)}
    render(record, Console(width=width))
    printed = capsys.readouterr().out
    assert "…" not in printed
    assert f"{record['correct']}/10000 ({100 * record['accuracy']:.2f} %)" in " ".join(printed.split())
    assert all(str(count) in printed for row in record["confusion_matrix"] for count in row)
    assert all(f"{share:.3f}" in printed for row in record["normalised"] for share in row)
    assert all(name in printed for name in (*classes, "macro average", "weighted average"))


@pytest.mark.parametrize(("classes", "shown"), [(50, True), (51, False)])
def test_matrices_of_many_classes_are_left_to_the_record(classes, shown):
    labels = np.arange(classes)
    record = {"run": "many", **scores(np.eye(classes, dtype=np.float32), labels, [f"c{i}" for i in labels])}
    console = Console(record=True, width=200, file=io.StringIO())
    render(record, console)
    text = console.export_text()
    assert ("Normalised by row" in text) is shown
    assert (f"The confusion matrix of {classes} classes is in the record." in text) is not shown
    assert "Scores per class" in text
