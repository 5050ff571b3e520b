"""Whole runs: what they leave behind, and that nothing is lost whatever stops them."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from ctrl_c import press_ctrl_c
from torch.nn.modules.batchnorm import _BatchNorm

from lowbit import data, models
from lowbit.errors import LowbitError, UsageError
from lowbit.evaluation import evaluate
from lowbit.runs import Run, write_json
from lowbit.training import TrainConfig, calibrate_run, train
from lowbit.training.batches import Batch, TrainBatches
from lowbit.training.callbacks import COLUMNS, Recorder
from lowbit.training.checkpoints import Checkpoint
from lowbit.training.module import TrainingModule


@pytest.fixture
def config(stripes: Path, tmp_path: Path) -> TrainConfig:
    return TrainConfig(
        out=tmp_path / "run",
        method="xnor_net",
        model="lenet",
        data=f"folder:{stripes}",
        overrides={"batch_size": 16, "epochs": 2},
        precision="float32",
        threads=1,
        progress=False,
    )


def weights(path: Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(Run(path).weights_path)


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_run_leaves_all_that_others_read(config: TrainConfig, capfd: pytest.CaptureFixture[str]) -> None:
    run = train(replace(config, val_fraction=0.25, epochs=3, progress=True))
    written = run.config
    assert written["model"] == {"name": "lenet", "options": {}}
    assert written["in_channels"] == 1
    assert written["classes"] == ["horizontal", "vertical"]
    assert written["recipe"]["epochs"] == written["epochs"] == 3
    assert written["data"]["train_images"] == 80
    rows = run.metrics()
    assert [row["epoch"] for row in rows] == [1, 2, 3]
    assert set(rows[0]) == set(COLUMNS)
    chosen = max(rows, key=lambda row: row["val_accuracy"])
    assert written["best"] == {"epoch": chosen["epoch"], "val_accuracy": chosen["val_accuracy"]}
    assert written["best_test"]["accuracy"] == max(row["test_accuracy"] for row in rows)
    assert not models.load_run(run.path).training
    assert list((run.path / "tensorboard").iterdir())
    out, err = capfd.readouterr()
    assert out == ""
    assert [line.split(":")[0] for line in err.splitlines()] == [
        f"epoch {row['epoch']:.0f}/{len(rows)}" for row in rows
    ]


def test_best_epoch_on_validation_gives_the_weights(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, torch.Tensor]] = []
    row = Recorder.row

    def scripted(self: Recorder, module: TrainingModule) -> dict[str, float]:
        made = row(self, module)
        made["val_accuracy"] = (0.5, 0.9, 0.9)[len(seen)]
        seen.append({name: tensor.clone() for name, tensor in module.model.state_dict().items()})
        return made

    monkeypatch.setattr(Recorder, "row", scripted)
    run = train(replace(config, val_fraction=0.25, epochs=3))
    assert equal(weights(run.path), seen[1])
    assert run.config["best"]["epoch"] == 2


def test_it_learns_and_the_last_epoch_gives_the_weights(config: TrainConfig) -> None:
    run = train(replace(config, method="float", epochs=6, overrides={**config.overrides, "learning_rate": 0.02}))
    assert run.metrics()[-1]["test_accuracy"] > 0.85
    assert "best" not in run.config
    checkpoint = Checkpoint.load(run.checkpoint_path)
    assert equal(weights(run.path), checkpoint.model)
    assert checkpoint.average == {}


@pytest.mark.parametrize(
    ("method", "options", "frozen"),
    [("xnor_net", {}, False), ("affine", {"freeze": 0.5}, True), ("wage", {}, False)],
    ids=["projected weights", "frozen norms", "no norms, weights on a grid"],
)
def test_averaged_weights_are_measured_and_saved(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch, method: str, options: dict[str, Any], frozen: bool
) -> None:
    steps: list[dict[str, np.ndarray]] = []
    stepped = TrainingModule.on_train_batch_end

    def recording(self: TrainingModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        stepped(self, outputs, batch, batch_idx)
        steps.append({name: tensor.numpy().astype(np.float64) for name, tensor in self.model.state_dict().items()})

    monkeypatch.setattr(TrainingModule, "on_train_batch_end", recording)
    # Of 3 epochs of 5 steps, those whose middle lies in the last 1.35.
    overrides = {**config.overrides, "epochs": 3, "average": 0.45}
    run = train(replace(config, method=method, method_options=options, overrides=overrides))
    saved, last = weights(run.path), Checkpoint.load(run.checkpoint_path)
    model = models.load_run(run.path)
    names = {name for name, _ in model.named_parameters()}
    assert len(steps) == 15
    for name in names:
        mean = np.mean([step[name] for step in steps[-7:]], axis=0)
        np.testing.assert_allclose(saved[name].numpy(), mean, rtol=1e-5, atol=1e-6)
    assert any(not torch.equal(saved[name], last.model[name]) for name in names)
    assert all(np.array_equal(steps[-1][name], tensor.numpy()) for name, tensor in last.model.items())
    assert int(last.average["n_averaged"]) == 7

    images = data.load(config.data)
    assert evaluate(run.path, images)["accuracy"] == run.metrics()[-1]["test_accuracy"]
    cpu = torch.device("cpu")
    batches = TrainBatches(
        images.train_images, images.train_labels, images.preprocessing, 16, config.seed, True, images.flip, cpu
    )
    batches.epoch = 2
    norms = {name: module for name, module in model.named_modules() if isinstance(module, _BatchNorm)}
    read: dict[str, list[np.ndarray]] = {name: [] for name in norms}
    for name, norm in norms.items():
        norm.register_forward_pre_hook(lambda _, inputs, name=name: read[name].append(inputs[0].numpy()))
    with torch.no_grad():
        for batch, _ in batches:
            model.train()(batch)
    for name in norms:
        mean = np.mean([x.mean(axis=(0, 2, 3), dtype=np.float64) for x in read[name]], axis=0)
        variance = np.mean([x.var(axis=(0, 2, 3), ddof=1, dtype=np.float64) for x in read[name]], axis=0)
        for statistic, expected in (("running_mean", mean), ("running_var", variance)):
            key = f"{name}.{statistic}"
            if frozen:
                assert torch.equal(saved[key], last.model[key])
            else:
                np.testing.assert_allclose(saved[key].numpy(), expected, rtol=1e-4, atol=1e-5)


def test_a_run_is_never_overwritten(config: TrainConfig, tmp_path: Path) -> None:
    run = train(replace(config, epochs=1))
    before = run.config_path.read_bytes()
    with pytest.raises(UsageError, match="already holds a run; go on with --resume or choose another --out"):
        train(replace(config, epochs=1))
    assert run.config_path.read_bytes() == before
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "letter.txt").write_text("keep me")
    with pytest.raises(UsageError, match="no run folder"):
        train(replace(config, out=tmp_path / "other"))


def test_resume_of_a_finished_run_does_nothing(config: TrainConfig, capfd: pytest.CaptureFixture[str]) -> None:
    run = train(replace(config, epochs=1))
    before = run.config_path.read_bytes()
    train(replace(config, epochs=1, resume=True, progress=True))
    assert "nothing to do" in capfd.readouterr().err
    train(TrainConfig.resuming(run.path, progress=False))
    assert run.config_path.read_bytes() == before


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"epochs": 4}, "epochs"),
        ({"seed": 1}, "seed 0, not 1"),
        ({"method": "bnn"}, "method.name"),
        ({"method_options": {"gradient": "paper"}}, "method.options.gradient"),
        ({"precision": "bf16"}, "precision"),
        ({"val_fraction": 0.25}, "data.val_fraction"),
        ({"data": "digits"}, "classes"),
    ],
)
def test_resume_with_other_settings_names_the_setting(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], named: str
) -> None:
    press_ctrl_c(monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        train(config)
    with pytest.raises(UsageError, match=named):
        train(replace(config, resume=True, **change))


@pytest.mark.parametrize(
    ("method", "overrides"),
    [
        ("xnor_net", {"average": 0.4}),
        ("adabin", {"average": 0.8}),
        ("reactnet", {"average": 0.4, "whiten": True, "freeze_first": True}),
    ],
    ids=["before weights are averaged", "learned levels, phases and averaged weights", "a frozen first layer"],
)
def test_ctrl_c_says_how_to_resume(
    config: TrainConfig,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    tmp_path: Path,
    method: str,
    overrides: dict[str, Any],
) -> None:
    config = replace(config, method=method, overrides={**config.overrides, **overrides})
    whole = train(replace(config, out=tmp_path / "whole", epochs=3))
    handler = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        press_ctrl_c(patch)
        with pytest.raises(KeyboardInterrupt):
            train(replace(config, epochs=3))
    assert signal.getsignal(signal.SIGINT) is handler
    assert "`lowbit train --resume --out" in capfd.readouterr().err
    resumed = train(TrainConfig.resuming(config.out, progress=False))
    assert equal(weights(whole.path), weights(resumed.path))
    drop = {"seconds"}
    for a, b in zip(whole.metrics(), resumed.metrics(), strict=True):
        assert {k: v for k, v in a.items() if k not in drop} == {k: v for k, v in b.items() if k not in drop}


@pytest.mark.parametrize("part", ["model", "optimizer"])
def test_a_checkpoint_of_something_else_is_refused(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    with monkeypatch.context() as patch:
        press_ctrl_c(patch)
        with pytest.raises(KeyboardInterrupt):
            train(config)
    path = Run(Path(config.out)).checkpoint_path
    checkpoint = Checkpoint.load(path)
    setattr(checkpoint, part, {})
    checkpoint.save(path)
    with pytest.raises(LowbitError, match="the checkpoint does not fit the network"):
        train(replace(config, resume=True))


def test_a_folder_whose_name_is_no_text_is_refused(config: TrainConfig, tmp_path: Path) -> None:
    out = Path(os.fsdecode(os.fsencode(tmp_path) + b"/n\xfe"))
    with pytest.raises(UsageError, match=r"n\\udcfe' is no text in UTF-8"):
        train(replace(config, out=out))
    assert not out.exists()


def test_sigterm_is_no_success(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """What a cluster or a container sends; Lightning makes an exit of status 0 of it."""
    step, handler = TrainingModule.training_step, signal.getsignal(signal.SIGTERM)

    def terminated(self: TrainingModule, images_and_labels: Batch, batch_idx: int) -> torch.Tensor:
        if (self.current_epoch, batch_idx) == (1, 1):
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, images_and_labels, batch_idx)

    monkeypatch.setattr(TrainingModule, "training_step", terminated)
    with pytest.raises(KeyboardInterrupt) as stopped:
        train(config)
    assert stopped.value.args == (signal.SIGTERM,)
    assert signal.getsignal(signal.SIGTERM) is handler
    assert "`lowbit train --resume --out" in capfd.readouterr().err


KILLED = """
import os, random, signal, sys, time
import torch
torch.set_num_threads(1)
from lowbit.training import TrainConfig, train

config = TrainConfig(**{**eval(sys.argv[1]), "resume": True})
moments, seconds = random.Random(int(sys.argv[2])), float(sys.argv[3])
ends = []
for attempt in range(60):
    child = os.fork()
    if not child:
        try:
            train(config)
        except KeyboardInterrupt:
            os._exit(130)
        os._exit(0)
    if attempt < 5:
        time.sleep(moments.uniform(0.1, 0.6) * seconds)
        try:
            os.kill(child, signal.SIGINT if attempt == 3 else signal.SIGKILL)
        except ProcessLookupError:
            pass
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    ends.append(status)
    if status == 0:
        break
print(ends)
"""


def test_killed_at_random_moments_gives_the_same_weights(config: TrainConfig, tmp_path: Path) -> None:
    overrides = {"batch_size": 8, "epochs": 5, "average": 0.7}
    config = replace(config, precision="bf16", overrides=overrides, val_fraction=0.1)
    whole = train(replace(config, out=tmp_path / "whole"))
    settings = {name: getattr(config, name) for name in ("method", "model", "data", "overrides", "precision")}
    settings |= {"out": str(config.out), "threads": 1, "val_fraction": 0.1, "progress": False}
    seed = random.randrange(1000)
    ended = subprocess.run(
        [sys.executable, "-c", KILLED, repr(settings), str(seed), str(whole.config["seconds"])],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ended.returncode == 0, ended.stderr
    ends = json.loads(ended.stdout.splitlines()[-1])
    assert ends[-1] == 0, (seed, ends, ended.stderr)
    assert -signal.SIGKILL in ends, (seed, ends)
    killed = Run(Path(config.out))
    assert equal(weights(whole.path), weights(killed.path)), seed
    last = [Checkpoint.load(run.checkpoint_path).model for run in (whole, killed)]
    assert equal(*last), seed
    assert len(killed.metrics()) == 5
    assert killed.config["best"] == whole.config["best"]
    leftovers = [path.name for path in killed.path.rglob(".*")]
    assert leftovers == []


@pytest.mark.parametrize("place", ["model.safetensors", "last.ckpt", "metrics.csv"])
def test_a_full_disk_is_one_sentence_and_loses_no_epoch(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, place: str
) -> None:
    whole = train(replace(config, out=tmp_path / "whole"))
    fsync = os.fsync
    done: list[str] = []

    def full(descriptor: int) -> None:
        name = Path(f"/proc/self/fd/{descriptor}").readlink().name
        if place in name:
            done.append(name)
            if len(done) > 1 + (place == "metrics.csv"):
                raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        with pytest.raises(LowbitError, match=rf"cannot write .*{place}: No space left on device"):
            train(config)
    run = Run(Path(config.out))
    assert len(Checkpoint.load(run.checkpoint_path).rows) == (2 if place == "metrics.csv" else 1)
    assert [path.name for path in run.path.rglob(".*")] == []
    assert equal(weights(train(replace(config, resume=True)).path), weights(whole.path))


def test_not_finite_names_the_layer_and_spares_the_checkpoint(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = TrainingModule.training_step

    def poisoned(self: TrainingModule, batch: Any, batch_idx: int) -> torch.Tensor:
        if self.current_epoch == 1 and batch_idx == 2:
            name = next(name for name, _ in self.model.named_parameters() if name.startswith("1."))
            with torch.no_grad():
                self.model.get_parameter(name).fill_(torch.nan)
        return step(self, batch, batch_idx)

    monkeypatch.setattr(TrainingModule, "training_step", poisoned)
    with pytest.raises(LowbitError, match=r"in epoch 2, step 3, the output of layer '1\..*' is not finite"):
        train(replace(config, method="float"))
    checkpoint = Checkpoint.load(Run(Path(config.out)).checkpoint_path)
    assert len(checkpoint.rows) == 1
    assert all(tensor.isfinite().all() for tensor in checkpoint.model.values())


def test_init_from_another_run(config: TrainConfig, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    source = train(replace(config, method="float", epochs=1, out=tmp_path / "float"))
    run = train(replace(config, epochs=1, init_from=source.path, progress=True))
    report = run.config["init_report"]
    assert report["loaded"]
    assert "tensors taken from" in capfd.readouterr().err
    assert report["sha256"] == source.weights_sha256
    with pytest.raises(UsageError, match="--init-from"):
        train(replace(config, out=tmp_path / "third", init_from=tmp_path / "nowhere"))
    unfinished = {key: value for key, value in source.config.items() if key != "finished"}
    write_json(source.config_path, unfinished)
    for option in ("init_from", "distill_from"):
        with pytest.raises(UsageError, match=rf"--{option.replace('_', '-')} .*: the run has not finished"):
            train(replace(config, out=tmp_path / "third", **{option: source.path}))
    assert not (tmp_path / "third").exists()


def test_a_teacher_is_recorded_and_resuming_with_it_gives_the_same_bits(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = train(replace(config, method="float", epochs=1, out=tmp_path / "teacher"))
    taught = replace(config, distill_from=teacher.path, overrides={**config.overrides, "distill_weight": 0.5})
    whole = train(replace(taught, out=tmp_path / "whole"))
    assert whole.config["distill_from"]["run"] == str(teacher.path)
    assert whole.config["recipe"]["distill_weight"] == 0.5
    assert not equal(weights(whole.path), weights(train(replace(config, out=tmp_path / "alone")).path))

    step, steps = TrainingModule.training_step, 0

    def stopping(self: TrainingModule, batch: Any, batch_idx: int) -> torch.Tensor:
        nonlocal steps
        steps += 1
        if steps == 8:
            raise KeyboardInterrupt
        return step(self, batch, batch_idx)

    monkeypatch.setattr(TrainingModule, "training_step", stopping)
    with pytest.raises(KeyboardInterrupt):
        train(taught)
    with pytest.raises(UsageError, match="distill_from"):
        train(replace(config, resume=True, overrides=taught.overrides))
    resumed = train(TrainConfig.resuming(config.out, progress=False))
    assert len(resumed.metrics()) == 2
    assert equal(weights(resumed.path), weights(whole.path))

    with pytest.raises(UsageError, match="its num_classes is 2, not 10"):
        train(replace(taught, data="digits", out=tmp_path / "other"))
    (teacher.path / "model.safetensors").unlink()
    with pytest.raises(UsageError, match=r"its model\.safetensors is gone; restore it"):
        train(replace(taught, out=tmp_path / "other"))
    assert not (tmp_path / "other").exists()


def test_an_epoch_is_not_chosen_by_images_that_the_source_has_seen(config: TrainConfig, tmp_path: Path) -> None:
    source = train(replace(config, method="float", epochs=1, out=tmp_path / "float")).path
    calibrated = calibrate_run(source, tmp_path / "calibrated", seed=3).path
    larger = train(replace(config, method="float", epochs=1, image_size=16, out=tmp_path / "larger")).path
    for option in (
        {"init_from": source},
        {"init_from": source / "model.safetensors"},
        {"init_from": larger},
        {"init_from": calibrated},
        {"distill_from": source},
    ):
        with pytest.raises(UsageError, match=r"trained on some of the images that are to validate this run"):
            train(replace(config, epochs=1, val_fraction=0.25, **option))
    same = train(replace(config, method="float", epochs=1, val_fraction=0.25, out=tmp_path / "same")).path
    for number, init_from in enumerate((same, calibrate_run(same, tmp_path / "same-calibrated", seed=3).path)):
        run = train(replace(config, epochs=1, val_fraction=0.25, init_from=init_from, out=tmp_path / str(number)))
        assert "best" in run.config


def test_a_run_that_resumes_from_its_start_starts_from_the_same_weights(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = train(replace(config, epochs=1, out=tmp_path / "source"))

    def stopping(self: TrainingModule, batch: Any, batch_idx: int) -> torch.Tensor:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(TrainingModule, "training_step", stopping)
        with pytest.raises(KeyboardInterrupt):
            train(replace(config, init_from=source.path))
    first = source.weights_path.read_bytes()
    safetensors.torch.save_file({name: each + 1 for name, each in weights(source.path).items()}, source.weights_path)
    with pytest.raises(UsageError, match=r"its weights are no longer those that .* started from"):
        train(TrainConfig.resuming(config.out, progress=False))
    source.weights_path.write_bytes(first)
    assert len(train(TrainConfig.resuming(config.out, progress=False)).metrics()) == 2


def test_a_run_says_where_it_was_resumed(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    step = TrainingModule.training_step

    def stopping(self: TrainingModule, batch: Any, batch_idx: int) -> torch.Tensor:
        if self.current_epoch == 1:
            raise KeyboardInterrupt
        return step(self, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(TrainingModule, "training_step", stopping)
        with pytest.raises(KeyboardInterrupt):
            train(config)
    began = Run(Path(config.out)).config
    assert "resumed" not in train(TrainConfig.resuming(config.out, progress=False)).config
    elsewhere = {key: value for key, value in began.items() if key != "finished"}
    write_json(Run(Path(config.out)).config_path, {**elsewhere, "hardware": {"cpu": "another"}})
    resumed = train(TrainConfig.resuming(config.out)).config
    assert "resuming with other versions or on another machine" in capfd.readouterr().err
    assert resumed["hardware"] == {"cpu": "another"}
    assert [entry["hardware"] for entry in resumed["resumed"]] == [began["hardware"]]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"method": "xnor"}, "did you mean xnor_net"),
        ({"model": "lenett"}, "did you mean lenet"),
        ({"data": "digit"}, "did you mean digits"),
        ({"recipe": "fast"}, "has no recipe 'fast'"),
        ({"overrides": {"rate": 1}}, "has no field 'rate'"),
        ({"overrides": {"cutout": 32}}, "must be below the images' side, 32"),
        ({"overrides": {"crop": 99}}, "must be below the images' side, 32"),
        ({"overrides": {"source": "mine"}}, "has no field 'source'"),
        ({"precision": "half"}, "--precision"),
        ({"threads": 0}, "--threads"),
        ({"val_fraction": 2.0}, "--val-fraction"),
    ],
)
def test_wrong_settings_leave_no_folder(config: TrainConfig, change: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        train(replace(config, **change))
    assert not Path(config.out).exists()
