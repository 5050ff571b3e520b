"""Loss, accuracy, confusion matrix and per-class scores: pure functions over logits and labels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

from lowbit.errors import LowbitError

Logits = npt.NDArray[np.floating[Any]]
Labels = npt.NDArray[np.integer[Any]]


def cross_entropy(logits: Logits, labels: Labels) -> float:
    """Average of ``log(sum_k exp(z_k)) - z_label`` over the images, in nats, computed in float64.

    The logarithms of probabilities are logits too, so a model that gives probabilities passes their ``np.log``.

    Args:
        logits: shape (N, K).
        labels: shape (N,), each in ``0 .. K - 1``.
    """
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    return float(np.mean(np.log(np.exp(shifted).sum(axis=1)) - shifted[np.arange(len(labels)), labels]))


def scores(logits: Logits, labels: Labels, classes: Sequence[str]) -> dict[str, Any]:
    """The part of ``evaluation.json`` that follows from the logits alone.

    The prediction is the largest logit, the first of equals. A class that is never predicted has precision 0, one
    without images has recall 0 and a row of zeros in the normalised matrix.

    Args:
        logits: shape (N, K), finite.
        labels: shape (N,), each in ``0 .. K - 1``.
        classes: K names.

    Returns:
        ``loss`` (cross entropy, nats), ``accuracy`` (0 to 1), ``correct``, ``total``, ``classes``, ``confusion_matrix``
        (rows are the true class), ``normalised`` (each row divided by its sum), ``per_class``, ``averages``
        (``macro`` and, by support, ``weighted``), ``predictions`` and ``labels``; plain Python numbers, ready for JSON.

    Raises:
        LowbitError: there are no images, shapes do not agree, or a logit is not finite.
    """
    if len(labels) == 0:
        raise LowbitError("there are no test images to evaluate on; choose a data set with a test part")
    if logits.shape != (len(labels), len(classes)):
        raise LowbitError(
            f"the model gives logits of shape {logits.shape} for {len(labels)} images of {len(classes)} classes; "
            "evaluate it on the data set that it was trained for"
        )
    if labels.min() < 0 or labels.max() >= len(classes):
        raise LowbitError(f"labels must lie in 0..{len(classes) - 1}, but go from {labels.min()} to {labels.max()}")
    broken = np.flatnonzero(~np.isfinite(logits).all(axis=1))
    if len(broken):
        raise LowbitError(f"the logits of test image {broken[0]} are not finite; the training has diverged")

    predictions = logits.argmax(axis=1)
    indices = np.arange(len(classes))
    matrix = confusion_matrix(labels, predictions, labels=indices)
    per_class = precision_recall_fscore_support(labels, predictions, labels=indices, zero_division=0)
    correct = int((predictions == labels).sum())
    return {
        "loss": cross_entropy(logits, labels),
        "accuracy": correct / len(labels),
        "correct": correct,
        "total": len(labels),
        "classes": list(classes),
        "confusion_matrix": matrix.tolist(),
        "normalised": (matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)).tolist(),
        "per_class": [
            {"class": name, "precision": float(p), "recall": float(r), "f1": float(f), "support": int(s)}
            for name, p, r, f, s in zip(classes, *per_class, strict=True)
        ],
        "averages": {average: _average(predictions, labels, indices, average) for average in ("macro", "weighted")},
        "predictions": predictions.tolist(),
        "labels": labels.tolist(),
    }


def _average(predictions: Labels, labels: Labels, indices: Labels, average: str) -> dict[str, float]:
    values = precision_recall_fscore_support(labels, predictions, labels=indices, average=average, zero_division=0)
    return {"precision": float(values[0]), "recall": float(values[1]), "f1": float(values[2]), "support": len(labels)}
