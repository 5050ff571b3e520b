"""Evaluate a trained network, or its packed file, on a test set and write ``evaluation.json``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from lowbit.errors import LowbitError, UsageError
from lowbit.evaluation.metrics import scores
from lowbit.evaluation.modes import evaluating
from lowbit.evaluation.profile import profile, profile_packed
from lowbit.hardware import versions
from lowbit.layers.integer import IntegerConvolutions
from lowbit.models.base import load_run, load_weights
from lowbit.preprocessing import Inputs, Pixels, Preprocessing
from lowbit.runs import Run, check_source, is_of_data, write_json

LogitsOf = Callable[[Inputs], npt.NDArray[np.float32]]
Progress = Callable[[int, int], None]


class LabelledImages(Protocol):
    """What evaluation needs of a data set; `lowbit.data.ImageData` has it."""

    @property
    def test_images(self) -> Pixels: ...
    @property
    def test_labels(self) -> npt.NDArray[np.int64]: ...
    @property
    def classes(self) -> Sequence[str]: ...
    @property
    def preprocessing(self) -> Preprocessing: ...


def evaluate(
    source: str | Path,
    data: LabelledImages,
    *,
    batch_size: int = 250,
    threads: int = 1,
    output: str | Path | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Evaluate ``source`` on the test part of ``data`` and write the record.

    A torch model runs in float32, in ``eval()`` and inference mode, and none of its weights change. Images
    are normalised with the mean and deviation that the model was trained with.

    Args:
        source: a run folder, a weights file (``.safetensors``, with the run's ``config.json`` beside it) or a packed
            file (``.lowbit``).
        batch_size: images at a time; it changes no prediction, save where the two largest logits are within 1e-4.
        threads: of the engine, for a packed file.
        output: where to write the record; by default ``evaluation.json`` in the run folder, or ``FILE.evaluation.json``
            beside a file. A run's own ``evaluation.json`` is of the images that it was trained beside.
        progress: called with (images done, images in all) after each batch.

    Returns:
        The record, as written: `lowbit.evaluation.metrics.scores`, with ``run``, ``source`` (``run``, ``weights`` or
        ``packed``), ``data_hash`` (`lowbit.data.ImageData.hash`, or None), ``profile``, ``date`` and ``versions``.

    Raises:
        UsageError: ``source`` is none of the three, ``batch_size`` is below 1, or the data set is not that of a run and
            there is no ``output``.
        LowbitError: the model and the data set do not fit each other.
    """
    if batch_size < 1:
        raise UsageError(f"the batch size is {batch_size}, but must be at least 1")
    path = Path(source)
    kind = _kind(path)
    own = default_output(path)
    target = own if output is None else Path(output)
    data_hash = getattr(data, "hash", None)
    if kind == "run" and target.resolve() == own.resolve() and not is_of_data(data_hash, Run.open(path).config):
        raise UsageError(
            f"{path} was trained beside other images than these; name a file for the record with -o, so that "
            "evaluation.json stays what it is"
        )
    if kind == "packed":
        from lowbit.runtime import Engine

        engine = Engine(path, threads=threads)
        data = as_trained(data, engine.classes, engine.preprocessing, path)
        found = logits(engine, data, batch_size, progress)
        result = {**scores(found, data.test_labels, data.classes), "profile": profile_packed(engine.model)}
    else:
        run = Run.open(path if kind == "run" else path.parent)
        data = as_trained(data, run.config.get("classes"), _preprocessing(run), path)
        result = evaluate_model(_model(path, kind), data, batch_size=batch_size, progress=progress)
    record = {
        "run": Run(path).name if kind == "run" else path.name,
        "source": kind,
        "data_hash": data_hash,
        **result,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": versions("torch", "numpy", "scikit-learn"),
    }
    write_json(target, record)
    return record


@dataclass(frozen=True)
class _TestPart:
    test_images: Pixels
    test_labels: npt.NDArray[np.int64]
    classes: Sequence[str]
    preprocessing: Preprocessing


def as_trained(
    data: LabelledImages, classes: Sequence[str] | None, preprocessing: Preprocessing | None, source: Path
) -> LabelledImages:
    """``data`` with the normalisation that a model was trained with, and in colour where the model takes colour.

    Args:
        classes, preprocessing: of the model at ``source``; None where it does not say.

    Raises:
        LowbitError: the model has other classes, or takes images of another size or border, or grey ones.
    """
    if classes is not None and list(classes) != list(data.classes):
        raise LowbitError(f"{source} knows other classes than the data set; evaluate it on data with the same classes")
    if preprocessing is None:
        return data
    given = data.preprocessing
    in_colour = (given.mode, preprocessing.mode) == ("L", "RGB")
    same_frame = (given.size, given.pad) == (preprocessing.size, preprocessing.pad)
    if not same_frame or not (in_colour or given.mode == preprocessing.mode):
        raise LowbitError(
            f"{source} takes {_images(preprocessing)}, but the data set gives {_images(given)}; "
            "--image-size resizes those of a folder"
        )
    images = data.test_images.repeat(3, axis=-1) if in_colour else data.test_images
    return _TestPart(images, data.test_labels, data.classes, preprocessing)


def _images(preprocessing: Preprocessing) -> str:
    colours, (height, width) = {"L": "grey", "RGB": "colour"}[preprocessing.mode], preprocessing.size
    return f"{colours} images of {width}x{height} pixels with a border of {preprocessing.pad}"


def evaluate_model(
    model: nn.Module, data: LabelledImages, *, batch_size: int = 250, progress: Progress | None = None
) -> dict[str, Any]:
    """Scores and profile of a torch model on the test part of ``data``; the model is left as it was.

    Args:
        model: float32, from inputs (N, C, H, W) to logits (N, K).

    Raises:
        LowbitError: the model and the data set do not fit each other.
    """
    device = next((p.device for p in model.parameters()), torch.device("cpu"))

    def logits_of(inputs: Inputs) -> npt.NDArray[np.float32]:
        result: npt.NDArray[np.float32] = model(torch.from_numpy(inputs).to(device)).float().cpu().numpy()
        return result

    with evaluating(model), torch.inference_mode(), IntegerConvolutions():
        found = logits(logits_of, data, batch_size, progress)
    example = torch.from_numpy(data.preprocessing.normalise(data.test_images[:1])).to(device)
    return {**scores(found, data.test_labels, data.classes), "profile": profile(model, example)}


def logits(
    logits_of: LogitsOf, data: LabelledImages, batch_size: int, progress: Progress | None = None
) -> npt.NDArray[np.float32]:
    """Logits of all test images, of shape (N, K).

    Args:
        logits_of: from inputs of shape (n, C, H, W), float32, to logits of shape (n, K).
    """
    total = len(data.test_images)
    if total == 0:
        raise LowbitError("there are no test images to evaluate on; choose a data set with a test part")
    parts = []
    for start, stop in _batches(total, batch_size):
        parts.append(logits_of(data.preprocessing.normalise(data.test_images[start:stop])))
        if progress is not None:
            progress(stop, total)
    return np.concatenate(parts)


def default_output(source: Path) -> Path:
    """Where the record of ``source`` goes when nothing else is said."""
    return Run(source).evaluation_path if source.is_dir() else source.with_name(f"{source.name}.evaluation.json")


def _kind(path: Path) -> str:
    if path.is_dir():
        Run.open(path)
        return "run"
    check_source(path)
    kinds = {".safetensors": "weights", ".lowbit": "packed"}
    if path.suffix not in kinds:
        raise UsageError(f"{path} is neither a run folder nor a .safetensors or .lowbit file")
    return kinds[path.suffix]


def _preprocessing(run: Run) -> Preprocessing | None:
    stored = run.config.get("preprocessing")
    return None if stored is None else Preprocessing.from_dict(stored)


def _model(path: Path, kind: str) -> nn.Module:
    if kind == "run":
        return load_run(path)
    model = load_run(path.parent)
    load_weights(model, path)
    return model


def _batches(total: int, size: int) -> Iterator[tuple[int, int]]:
    for start in range(0, total, size):
        yield start, min(start + size, total)
