"""Post-training quantization of what a run has left in float: from its folder to a new one, without training."""

from __future__ import annotations

import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import track
from torch import nn

from lowbit import data, methods, models
from lowbit.convert import quantize_
from lowbit.data import ImageData
from lowbit.data.base import Labels
from lowbit.errors import LowbitError, UsageError
from lowbit.files import remove_partial_files
from lowbit.hardware import machine, versions
from lowbit.layers import calibrate, fold_batch_norms_
from lowbit.layers.quantized import is_quantizable
from lowbit.preprocessing import Preprocessing
from lowbit.quantizers.observers import Observer
from lowbit.runs import Run, write_json
from lowbit.terminal import notes
from lowbit.training.batches import EvalBatches
from lowbit.training.checkpoints import save_weights
from lowbit.training.lock import sole_process, visible

BATCH = 64
# What the new run has in common with its source, as config.json says it.
INHERITED = ("model", "num_classes", "in_channels", "image_size", "classes", "data", "preprocessing")


def calibrate_run(
    source: str | Path,
    out: str | Path,
    method: str = "affine",
    method_options: Mapping[str, Any] | None = None,
    *,
    images: int = 1024,
    seed: int = 0,
    data_dir: str | Path | None = None,
) -> Run:
    """Quantize what a finished run has left in float; ranges of activations come from some of its train images.

    Of a float run that is the whole network, which becomes one of ``method``. Of a low-bit run it is the layers that
    its own method leaves in float, such as the first, the last and those of shortcuts: they become layers of
    ``method``, and config.json says so as ``rest``. All else, the batch norms too, stays as it was trained.

    The run folder in ``out`` holds config.json and model.safetensors, as training leaves them; there are no epochs, so
    there is no metrics.csv. Validation images of the source are left out of the choice.

    Args:
        source: run folder with a layer in float.
        out: the run folder to make.
        method: one whose activations have observers.
        method_options: its keyword arguments; ``fold`` is True for a float run unless they say otherwise.
        images: how many train images the observers see, chosen at random; all if there are fewer.
        seed: of that choice.
        data_dir: where the data set lies now, if not where the source found it.

    Raises:
        UsageError: the source has no layer in float, the method has nothing to calibrate or no such option, or ``out``
            exists.
        LowbitError: the source is not finished, or the data set is not the one that it was trained on.
    """
    started = time.monotonic()
    run, made = Run.finished(source), Run(Path(out))
    if images < 1:
        raise UsageError(f"--images is {images}, but must be at least 1")
    if made.path.exists() and not made.path.is_dir():
        raise UsageError(_taken(made))
    trained, config = models.load_run(source), run.config
    options = dict(method_options or {})
    methods.registry.check_options(method, options)
    whole = config["method"]["name"] == "float"
    if whole:
        if "fold" in methods.registry.options(method):
            options.setdefault("fold", True)
        model = _quantized(run, trained, method, options)
    else:
        model = _with_quantized_rest(run, trained, method, options)
    quantized = {"name": method, "options": options}
    with sole_process(made.path) as abandoned:
        # The weights that a killed calibration left, without their config.json, are no run: they are made again.
        if visible(made.path) - ({made.weights_path.name} if abandoned else set()):
            raise UsageError(_taken(made))
        if abandoned:
            remove_partial_files(made.path)
        spec = config["data"]["spec"]
        image_data = data.load(spec, data_dir or config["data"]["data_dir"], config["data"]["image_size"])
        if image_data.hash != config["data"]["hash"]:
            mend = "restore that folder" if spec.startswith("folder:") else "give --data-dir"
            raise LowbitError(f"{spec} is not the data that {source} was trained on; {mend}")
        chosen = _choose_images(image_data, images, seed, config)
        preprocessing = Preprocessing.from_dict(config["preprocessing"])
        batches = EvalBatches(
            image_data.train_images[chosen], image_data.train_labels[chosen], preprocessing, BATCH, torch.device("cpu")
        )
        calibrate(model, track(batches, "calibrating", console=notes, transient=True, disable=not notes.is_terminal))
        record = {
            "lowbit": versions()["lowbit"],
            **{key: config[key] for key in INHERITED},
            **({"method": quantized} if whole else {"method": config["method"], "rest": quantized}),
            "calibration": {
                "source": str(run.path),
                "weights_sha256": run.weights_sha256,
                "source_epochs": config["epochs"],
                "source_seed": config["seed"],
                "images": len(chosen),
                "asked": images,
            },
            "epochs": 0,
            "seed": seed,
            "versions": versions("torch", "numpy"),
            "hardware": machine(),
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
            "seconds": round(time.monotonic() - started, 3),
        }
        try:
            save_weights(model, made.weights_path)
            write_json(made.config_path, record)
        finally:
            if not made.config_path.is_file():
                made.weights_path.unlink(missing_ok=True)
    return made


def _taken(made: Run) -> str:
    return f"{made.path} exists; choose another --out, or move it away"


def _quantized(run: Run, trained: nn.Module, method: str, options: Mapping[str, Any]) -> nn.Module:
    """The low-bit twin of a run's network, with its weights, not yet calibrated; ``trained`` may be changed."""
    config = run.config
    model = models.create(
        config["model"]["name"],
        num_classes=config["num_classes"],
        method=method,
        in_channels=config["in_channels"],
        image_size=config["image_size"],
        method_options=options,
        **config["model"]["options"],
    )
    state = _state_of_observers(run, model, method)
    if options.get("fold"):
        fold_batch_norms_(trained)
    found = trained.state_dict()
    misfits = sorted(found.keys() ^ (model.state_dict().keys() - state))
    if misfits:
        raise LowbitError(
            f"the weights of {run.path} do not fit the network of '{method}' with these options: tensor '{misfits[0]}' "
            f"and {len(misfits) - 1} more stand in one of the two only"
        )
    model.load_state_dict(found, strict=False)
    return model


def _with_quantized_rest(run: Run, trained: nn.Module, method: str, options: Mapping[str, Any]) -> nn.Module:
    """A low-bit run's network with its float layers quantized, not yet calibrated; ``trained`` is changed."""
    own = run.config["method"]["name"]
    modules = list(trained.modules())
    if any(isinstance(module, Observer) for module in modules):
        raise UsageError(f"{run.path} has calibrated layers already; start from the run without them")
    if not any(is_quantizable(module) for module in modules):
        raise UsageError(f"{run.path} has no layer in float: method '{own}' quantizes them all; export it as it is")
    if options.get("fold"):
        raise UsageError(f"fold is for float runs: the batch norms of {run.path} belong to method '{own}'")
    quantize_(trained, methods.registry[method](**options))
    _state_of_observers(run, trained, method)
    return trained


def _state_of_observers(run: Run, model: nn.Module, method: str) -> set[str]:
    """Names of the tensors that a calibration fills in.

    Raises:
        UsageError: there are none.
    """
    state = {
        f"{name}.{key}"
        for name, module in model.named_modules()
        if isinstance(module, Observer)
        for key in module.state_dict()
    }
    if not state:
        raise UsageError(
            f"method '{method}' has nothing to calibrate; train it with `lowbit train --init-from {run.path}`"
        )
    return state


def _choose_images(images: ImageData, count: int, seed: int, config: Mapping[str, Any]) -> Labels:
    """Sorted indices of train images that did not validate the source."""
    candidates, _ = images.split(config["data"]["val_fraction"], config["seed"])
    random = np.random.default_rng(seed)
    return np.sort(random.choice(candidates, min(count, len(candidates)), replace=False))
