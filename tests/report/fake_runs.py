"""Run folders as training and evaluation would leave them, made up but plausible, for tests of the report."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lowbit.runs import Run, write_json

CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
MACHINE = "Some CPU, avx2"
COST = {
    "float": ({"32x32": 313_201_664}, 58_890_000),
    "xnor_net": ({"1x1": 311_427_072, "32x32": 1_774_592}, 2_108_744),
    "bnn": ({"1x1": 311_427_072, "32x32": 1_774_592}, 2_091_848),
}


def make_run(
    folder: Path,
    *,
    method: str = "xnor_net",
    accuracy: float = 0.80,
    epochs: int = 10,
    finished: int | None = None,
    classes: Sequence[str] = CIFAR10,
    images: int = 10_000,
    evaluated: bool = True,
    layers: int = 0,
    test_seed: int = 0,
    packed_bytes: int | None = None,
    milliseconds: float | None = None,
    evaluated_on: str | None = None,
    **settings: Any,
) -> Run:
    """Write a run folder.

    Args:
        accuracy: about what the test accuracy will be.
        finished: epochs in ``metrics.csv``; all by default.
        layers: quantized layers in ``diagnostics.json``; 0 leaves the file out.
        test_seed: runs with the same one share their test labels.
        packed_bytes: in ``export.json``; None leaves the file out.
        milliseconds: in ``latency.json``; None leaves the file out.
        evaluated_on: hash of the images in ``evaluation.json``; None as in earlier versions, which did not say.
        settings: further keys of ``config.json``.
    """
    rng = np.random.default_rng([len(method), int(1e6 * accuracy)])
    labels = np.random.default_rng(test_seed).permutation(np.arange(images) % len(classes))
    rows = _curves(rng, accuracy, epochs)[: epochs if finished is None else finished]
    write_json(folder / "config.json", {**_config(method, epochs, classes), **settings})
    if rows:
        with (folder / "metrics.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=rows[0])
            writer.writeheader()
            writer.writerows(rows)
    if evaluated:
        evaluation = _evaluation(rng, method, accuracy, labels, classes, folder.name)
        said = {} if evaluated_on is None else {"data_hash": evaluated_on}
        write_json(folder / "evaluation.json", {**evaluation, **said})
    if layers:
        write_json(folder / "diagnostics.json", diagnostics(layers, len(rows)))
    run = Run.open(folder)
    if packed_bytes is not None:
        write_json(run.export_path, {"packed_bytes": packed_bytes, "refusal": ""})
    if milliseconds is not None:
        write_json(run.latency_path, {MACHINE: latency(milliseconds)})
    return run


def latency(milliseconds: float, disturbed: bool = False, date: str = "2026-11-01T12:00:00+00:00") -> dict[str, Any]:
    return {"milliseconds": milliseconds, "disturbed": disturbed, "date": date}


def _config(method: str, epochs: int, classes: Sequence[str]) -> dict[str, Any]:
    return {
        "lowbit": "0.1.0",
        "model": {"name": "vgg16", "options": {}},
        "method": {"name": method, "options": {} if method == "float" else {"gradient": "exact", "clamp": True}},
        "num_classes": len(classes),
        "in_channels": 3,
        "classes": list(classes),
        "data": {"name": "cifar10", "hash": "9f2c", "train_images": 50_000, "test_images": 10_000, "val_fraction": 0.1},
        "recipe": {
            "optimizer": "sgd" if method == "float" else "adamw",
            "learning_rate": 0.05 if method == "float" else 0.003,
            "weight_decay": 5e-4 if method == "float" else 1e-4,
            "schedule": "cosine",
            "warmup": 1.0 if method == "float" else 0.5,
            "batch_size": 128,
        },
        "epochs": epochs,
        "seed": 1,
        "precision": "bf16",
        "threads": 2,
    }


def diagnostics(layers: int, epochs: int) -> dict[str, Any]:
    """Mismatch grows from top to bottom, flips die out, and latent weights spread to the ends of [-1, 1]. The first
    layer reads the image: it has no activation quantizer."""
    rng = np.random.default_rng(layers)

    def figures(layer: int, progress: float) -> dict[str, Any]:
        height = (layer + 1) / layers
        weights = np.clip(rng.normal(0, 0.05 + 0.5 * progress * (1.2 - height), 4000), -1, 1)
        counts, edges = np.histogram(weights, 40)
        flips = 0.2 * math.exp(-5 * progress) * (0.5 + height)
        return {
            "flip_ratio": flips,
            "step_flip_ratio": flips / 60,
            "gradient_cosine": 0.1 + 0.6 * height**2 + rng.normal(0, 0.02),
            "saturated": None if layer == 0 else 0.3 + 0.1 * height * progress + rng.normal(0, 0.003),
            "dead": None if layer == 0 else (0.05 * progress if layer == 1 else 0.0),
            "weights": {"low": float(edges[0]), "high": float(edges[-1]), "counts": counts.tolist()},
        }

    return {
        "probe": {"images": 64, "directions": 4, "width": 0.3, "seed": 0},
        "epochs": [
            {
                "epoch": epoch,
                "layers": {f"features.{layer}.conv": figures(layer, epoch / epochs) for layer in range(layers)},
            }
            for epoch in range(1, epochs + 1)
        ],
    }


def _curves(rng: np.random.Generator, accuracy: float, epochs: int) -> list[dict[str, float]]:
    rows = []
    for epoch in range(1, epochs + 1):
        progress = epoch / epochs
        reached = accuracy * (1 - math.exp(-6 * progress)) + rng.normal(0, 0.02 * (1 - progress) + 0.002)
        rows.append(
            {
                "epoch": epoch,
                "learning_rate": 0.02 * (1 - accuracy) * (1 + math.cos(math.pi * (epoch - 1) / epochs)),
                "train_loss": 2.3 * math.exp(-2.6 * progress * accuracy) + rng.normal(0, 0.01),
                "test_loss": 2.2 * math.exp(-2.0 * progress * accuracy) + rng.normal(0, 0.03),
                "test_accuracy": reached,
                "val_loss": 2.2 * math.exp(-2.0 * progress * accuracy) + rng.normal(0, 0.03),
                "val_accuracy": reached + rng.normal(0, 0.004),
                "seconds": 200.0,
            }
        )
    return rows


def _evaluation(
    rng: np.random.Generator, method: str, accuracy: float, labels: np.ndarray, classes: Sequence[str], name: str
) -> dict[str, Any]:
    count = len(classes)
    # Animals are confused with animals and vehicles with vehicles, and cats do worst.
    kin = np.array([[1.0 if (2 <= i <= 7) == (2 <= j <= 7) else 0.2 for j in range(count)] for i in range(count)])
    if count == len(CIFAR10):
        kin[3, 5] = kin[5, 3] = 5
        kin[1, 9] = kin[9, 1] = 4
    np.fill_diagonal(kin, 0)
    error = (1 - accuracy) * rng.uniform(0.5, 1.3, count)
    error[3 % count] *= 1.6
    # One uniform number per image, from the labels' own seed: hard images are hard for every run.
    draws = np.random.default_rng(len(labels)).uniform(size=len(labels))
    draws = np.where(rng.uniform(size=len(labels)) < 0.7, draws, rng.uniform(size=len(labels)))
    own = 1 - error[labels]
    wrong = np.array([rng.choice(count, p=kin[label] / kin[label].sum()) for label in labels])
    predictions = np.where(draws < own, labels, wrong)
    matrix = np.zeros((count, count), int)
    np.add.at(matrix, (labels, predictions), 1)
    hits = matrix.diagonal()
    precision = hits / np.maximum(matrix.sum(axis=0), 1)
    recall = hits / np.maximum(matrix.sum(axis=1), 1)
    f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
    macs, stored = COST[method]
    return {
        "run": name,
        "source": "run",
        "loss": float(1.9 * (1 - hits.sum() / len(labels)) + 0.1),
        "accuracy": int(hits.sum()) / len(labels),
        "correct": int(hits.sum()),
        "total": len(labels),
        "classes": list(classes),
        "confusion_matrix": matrix.tolist(),
        "normalised": (matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)).tolist(),
        "per_class": [
            {"class": c, "precision": float(p), "recall": float(r), "f1": float(f), "support": int(s)}
            for c, p, r, f, s in zip(classes, precision, recall, f1, matrix.sum(axis=1), strict=True)
        ],
        "averages": {},
        "predictions": predictions.tolist(),
        "labels": labels.tolist(),
        "profile": {
            "parameters": 14_722_500,
            "weight_bytes": stored,
            "float32_bytes": 58_890_000,
            "macs": macs,
            "layers": [],
        },
        "date": "2026-11-01T12:00:00+00:00",
        "versions": {"lowbit": "0.1.0"},
    }
