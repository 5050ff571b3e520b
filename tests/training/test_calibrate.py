"""From a float run to a low-bit run without training: in a program and on the command line."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from command import lowbit
from safetensors.torch import load_file

from lowbit import models
from lowbit.errors import LowbitError, UsageError
from lowbit.files import PARTIAL
from lowbit.layers import quantized_layers
from lowbit.report import compare
from lowbit.rest import int8_rest
from lowbit.runs import Run, write_json
from lowbit.training import TrainConfig, calibrate_run, train
from lowbit.training.checkpoints import save_weights
from lowbit.training.lock import LOCK, sole_process
from lowbit.training.module import TrainingModule

SMALL = {"model": "lenet", "data": "digits", "model_options": {"width": 0.25}, "threads": 1, "progress": False}


@pytest.fixture(scope="module")
def float_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "float"
    train(TrainConfig(out=path, method="float", epochs=2, val_fraction=0.2, **SMALL))
    return path


@pytest.fixture(scope="module")
def int8_run(float_run: Path) -> Path:
    return calibrate_run(float_run, float_run.parent / "int8", images=96).path


def test_the_run_is_complete_and_says_where_it_comes_from(float_run: Path, int8_run: Path) -> None:
    source, made = Run.open(float_run).config, Run.open(int8_run).config
    for key in ("model", "num_classes", "in_channels", "image_size", "classes", "data", "preprocessing"):
        assert made[key] == source[key]
    assert made["method"] == {"name": "affine", "options": {"fold": True}}
    assert made["calibration"]["source"] == str(float_run)
    assert made["calibration"]["images"] == 96
    assert made["hardware"] == source["hardware"]
    assert made["calibration"]["source_epochs"] == made["epochs"] + 2 == 2
    assert len(made["calibration"]["weights_sha256"]) == 64
    model = models.load_run(int8_run)
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in model.modules())


def test_the_same_seed_gives_the_same_ranges_and_another_one_others(float_run: Path, int8_run: Path, tmp_path) -> None:
    state = load_file(Run(int8_run).weights_path)
    for seed in (0, 1):
        again = load_file(calibrate_run(float_run, tmp_path / str(seed), images=96, seed=seed).weights_path)
        differing = {name for name in state if not torch.equal(state[name], again[name])}
        assert bool(differing) == (seed == 1)
        assert all("observer" in name for name in differing)


def test_without_folding_the_weights_are_those_of_the_float_run(float_run: Path, tmp_path: Path) -> None:
    made = calibrate_run(float_run, tmp_path / "run", "affine", {"fold": False, "bits_w": 4}, images=10)
    found, expected = load_file(made.weights_path), load_file(Run(float_run).weights_path)
    assert {name: tensor for name, tensor in found.items() if "observer" not in name}.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_validation_and_test_images_are_not_looked_at(float_run: Path, tmp_path: Path) -> None:
    """All train images but the fifth that validated."""
    made = calibrate_run(float_run, tmp_path / "run", images=10_000)
    config = made.config
    assert 0.75 < config["calibration"]["images"] / config["data"]["train_images"] < 0.85


def test_the_report_says_why_there_are_no_curves(float_run: Path, int8_run: Path, tmp_path: Path) -> None:
    page = compare([Run.open(float_run), Run.open(int8_run)], tmp_path / "report.html", "t").read_text()
    assert "it was calibrated, not trained" in page


def test_what_cannot_be_calibrated_is_refused_and_leaves_nothing(
    float_run: Path, int8_run: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with pytest.raises(UsageError, match="has calibrated layers already"):
        calibrate_run(int8_run, out)
    with pytest.raises(UsageError, match="method 'xnor_net' has nothing to calibrate"):
        calibrate_run(float_run, out, "xnor_net")
    with pytest.raises(UsageError, match="no option 'bits'"):
        calibrate_run(float_run, out, method_options={"bits": 8})
    with pytest.raises(UsageError, match="exists; choose another --out"):
        calibrate_run(float_run, int8_run)
    with pytest.raises(UsageError, match="--images is 0"):
        calibrate_run(float_run, out, images=0)
    with pytest.raises(UsageError, match="was calibrated, not trained"):
        TrainConfig.resuming(int8_run)
    with pytest.raises(LowbitError, match="no run folder"):
        calibrate_run(tmp_path / "nowhere", out)
    other = tmp_path / "other"
    other.mkdir()
    config = Run(float_run).config
    write_json(Run(other).config_path, {**config, "data": {**config["data"], "hash": "0"}})
    with pytest.raises(LowbitError, match="has not finished"):
        calibrate_run(other, out)
    Run(other).weights_path.write_bytes(Run(float_run).weights_path.read_bytes())
    with pytest.raises(LowbitError, match="digits is not the data that"):
        calibrate_run(other, out)
    assert not out.exists()


def untrained(float_run: Path, out: Path, method: str) -> Path:
    """A finished run of ``method``, with the weights that its network is made with."""
    config = {**Run(float_run).config, "method": {"name": method, "options": {}}}
    model = models.create("lenet", method=method, in_channels=1, image_size=32, width=0.25)
    out.mkdir()
    save_weights(model, Run(out).weights_path)
    write_json(Run(out).config_path, config)
    return out


@pytest.mark.parametrize("method", ["wage", "fixed_point", "bnn"])
def test_a_method_that_quantizes_every_layer_leaves_nothing_to_calibrate(
    method: str, float_run: Path, tmp_path: Path
) -> None:
    run = untrained(float_run, tmp_path / "run", method)
    with pytest.raises(UsageError, match=f"has no layer in float: method '{method}' quantizes them all"):
        int8_rest(run)
    assert not (tmp_path / "run-int8").exists()


def test_the_rest_of_a_low_bit_run(float_run: Path, tmp_path: Path) -> None:
    """What was low-bit keeps its method and every number; the source stays as it is, and nothing is made twice."""
    run = untrained(float_run, tmp_path / "run", "xnor_net")
    before = load_file(Run(run).weights_path)
    with pytest.raises(UsageError, match="fold is for float runs"):
        calibrate_run(run, tmp_path / "no", method_options={"fold": True})
    with pytest.raises(UsageError, match="method 'bnn' has nothing to calibrate"):
        calibrate_run(run, tmp_path / "no", "bnn")
    with pytest.raises(UsageError, match="float is a float run, of which all would be the rest"):
        int8_rest(float_run)
    made = int8_rest(run)
    assert made.path == tmp_path / "run-int8"
    assert made.config["method"] == {"name": "xnor_net", "options": {}}
    assert made.config["rest"] == {"name": "affine", "options": {"observer": "mse"}}
    after = load_file(made.weights_path)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert {name.split(".activation")[0] for name in after.keys() - before.keys()} == {"0.conv", "3.conv"}
    bits = [(layer["bits_w"], layer["bits_a"]) for layer in made.evaluation["profile"]["layers"] if layer["macs"]]
    assert bits == [(8, 8), (1, 1), (1, 1), (8, 8)]
    written = made.config_path.stat().st_mtime_ns, made.evaluation_path.stat().st_mtime_ns
    assert int8_rest(run) == made
    assert (made.config_path.stat().st_mtime_ns, made.evaluation_path.stat().st_mtime_ns) == written
    with pytest.raises(UsageError, match="has calibrated layers already"):
        int8_rest(made.path)
    save_weights(models.load_run(untrained(float_run, tmp_path / "other", "xnor_net")), Run(run).weights_path)
    with pytest.raises(UsageError, match="run-int8 exists, but is not the 8-bit rest of"):
        int8_rest(run)


def test_what_a_failed_or_a_killed_calibration_leaves_is_in_nobodys_way(
    float_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, made = untrained(float_run, tmp_path / "run", "xnor_net"), tmp_path / "run-int8"

    def full(path: Path, record: object) -> None:
        raise LowbitError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr("lowbit.training.calibrate.write_json", full)
        with pytest.raises(LowbitError, match="the disk is full"):
            int8_rest(run)
    assert not made.exists()
    with sole_process(made), pytest.raises(LowbitError, match=r"another process is at work in .*run-int8"):
        int8_rest(run)
    made.mkdir()
    (made / "model.safetensors").touch()
    with pytest.raises(UsageError, match=r"run-int8 exists; .* move it away"):
        int8_rest(run)
    for name in (LOCK, f".config.json.abc{PARTIAL}"):
        (made / name).touch()
    int8_rest(run)
    assert {path.name for path in made.iterdir()} == {"config.json", "evaluation.json", "model.safetensors"}


def test_the_command_line_from_calibration_to_the_packed_file(float_run: Path, tmp_path: Path) -> None:
    run, packed = tmp_path / "int4", tmp_path / "int4.lowbit"
    said = lowbit(
        "calibrate", float_run, "--bits-w", "4", "--bits-a", "6", "--set", "observer=percentile", "--images", "200",
        "--out", run,
    )  # fmt: skip
    assert "ranges from 200 train images" in said.stderr
    assert Run(run).config["method"]["options"] == {
        "bits_w": 4,
        "bits_a": 6,
        "observer": "percentile",
        "fold": True,
    }
    accuracies = [json.loads(lowbit("evaluate", source, "--json").stdout)["accuracy"] for source in (float_run, run)]
    assert accuracies[1] > accuracies[0] - 0.06
    lowbit("export", run, "-o", packed)
    assert json.loads(lowbit("verify", run, packed, "--images", "16", "--json").stdout)["passed"]
    inside = json.loads(lowbit("inspect", packed, "--json").stdout)
    assert [op["kind"] for op in inside["ops"]].count("quant_conv2d") == 4
    assert inside["provenance"]["calibration"]["source"] == str(float_run)
    lowbit("bench", packed, "--against", "torch")
    lowbit("compare", float_run, run, "-o", tmp_path / "report.html")
    refused = lowbit("calibrate", float_run, "--set", "model.width=2", "--out", tmp_path / "no", status=2)
    assert "settings of the method only" in refused.stderr


def test_training_goes_on_from_a_calibrated_run_and_freezes_late(int8_run: Path, tmp_path: Path) -> None:
    """Every epoch starts its phase: in the last of two, ranges stay as they are while weights move."""
    config = TrainConfig(
        out=tmp_path / "tuned",
        method="affine",
        method_options={"fold": True, "freeze": 0.5},
        epochs=2,
        init_from=int8_run,
        **SMALL,
    )
    tuned = load_file(train(config).weights_path)
    steps = Run(config.out).config["data"]["train_images"] // 128
    before = load_file(Run(int8_run).weights_path)
    counts = {name: tuned[name] - before[name] for name in tuned if name.endswith("observer.batches")}
    assert len(counts) == 4
    assert {int(count) for count in counts.values()} == {steps}
    assert not torch.equal(tuned["0.conv.weight"], before["0.conv.weight"])


def test_training_keeps_the_rest_of_a_calibrated_run(
    float_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its ranges too, also in the average of weights and where a stopped training goes on; the weights learn."""
    made = int8_rest(untrained(float_run, tmp_path / "run", "xnor_net"))
    config = TrainConfig(
        out=tmp_path / "whole",
        method="xnor_net",
        epochs=2,
        overrides={"average": 0.5},
        init_from=made.path,
        **SMALL,
    )
    before, tuned = load_file(made.weights_path), load_file(train(config).weights_path)
    assert Run(config.out).config["rest"] == made.config["rest"]
    assert tuned.keys() == before.keys()
    moved = {name for name in tuned if not torch.equal(tuned[name], before[name])}
    assert {"0.conv.weight", "3.conv.weight"} <= moved
    assert not any("observer" in name for name in moved)
    bits = [layer.weight_quantizer.bits for layer in quantized_layers(models.load_run(config.out))]
    assert bits == [8, 1, 1, 8]

    step, steps = TrainingModule.training_step, 0

    def stopping(self: TrainingModule, batch: Any, batch_idx: int) -> torch.Tensor:
        nonlocal steps
        steps += 1
        if steps > len(self.batches):
            raise KeyboardInterrupt
        return step(self, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(TrainingModule, "training_step", stopping)
        with pytest.raises(KeyboardInterrupt):
            train(replace(config, out=tmp_path / "stopped"))
    resumed = train(TrainConfig.resuming(tmp_path / "stopped", progress=False))
    again = load_file(resumed.weights_path)
    assert all(torch.equal(again[name], tensor) for name, tensor in tuned.items())
    with pytest.raises(UsageError, match=r"the range of .* does not fit this run; keep its model, method and bits"):
        train(replace(config, out=tmp_path / "other", method="bwn"))
    assert not Run(tmp_path / "other").config_path.exists()
    named = train(replace(config, out=tmp_path / "named", init_from=made.weights_path))
    assert named.config["rest"] == made.config["rest"]
    assert load_file(named.weights_path).keys() == tuned.keys()


def test_batch_norms_are_frozen_late_in_a_run(float_run: Path, tmp_path: Path) -> None:
    config = TrainConfig(
        out=tmp_path / "tuned",
        method="affine",
        method_options={"delay": 0.0, "freeze": 0.5},
        recipe="fine_tune",
        epochs=2,
        init_from=float_run,
        **SMALL,
    )
    tuned, before = load_file(train(config).weights_path), load_file(Run(float_run).weights_path)
    steps = Run(config.out).config["data"]["train_images"] // 128
    seen = tuned["0.norm.num_batches_tracked"] - before["0.norm.num_batches_tracked"]
    assert seen == steps
    assert not torch.equal(tuned["0.norm.weight"], before["0.norm.weight"])
