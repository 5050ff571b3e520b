"""Learn from a trained network, in place of the labels or beside them: its logits are the target."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lowbit.errors import UsageError
from lowbit.models.base import load_run
from lowbit.runs import Run

# What the teacher's images must be for its logits to mean anything to the student.
SHARED = ("num_classes", "in_channels", "image_size", "classes", "preprocessing")


def distillation_loss(logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    r"""$T^2\,\mathrm{KL}(p \,\|\, q)$, the mean over the batch, as a scalar.

    $p$ and $q$ are the softmax of teacher's and student's logits (N, classes), each divided by $T$. $T^2$ keeps the
    gradient's size. With $T = 1$ it is ReActNet's distributional loss.

    Source: Hinton, Vinyals and Dean 2015, "Distilling the Knowledge in a Neural Network", arXiv 1503.02531, section 2;
    Liu et al. 2020, "ReActNet", arXiv 2003.03488, on its distributional loss.
    """
    student, teacher = ((values / temperature).log_softmax(1) for values in (logits, teacher_logits))
    divergence = functional.kl_div(student, teacher, reduction="batchmean", log_target=True)
    return temperature**2 * divergence


def load_teacher(path: str | Path, settings: dict[str, Any]) -> nn.Module:
    """The model of the run in ``path``, in ``eval()``, its parameters at rest.

    Args:
        settings: config.json of the student's run.

    Raises:
        UsageError: the run saw other images or classes than the student.
        LowbitError: it has not finished, or its files are damaged.
    """
    config, settings = Run.open(path).config, json.loads(json.dumps(settings))
    for key in SHARED:
        if config.get(key) != settings[key]:
            raise UsageError(
                f"--distill-from {path}: its {key} is {config.get(key)}, not {settings[key]}; "
                "give a run on the same data"
            )
    return load_run(path).requires_grad_(False)


def weights_hash(path: str | Path) -> str:
    """SHA-256 of a run's weights, in hexadecimal: so a resumed run knows its teacher again."""
    run = Run.of_option("--distill-from", path)
    if not run.weights_path.is_file():
        raise UsageError(f"--distill-from {path}: its {run.weights_path.name} is gone; restore it, or train it anew")
    return run.weights_sha256


@torch.no_grad()
def teach(teacher: nn.Module, images: Tensor) -> Tensor:
    """The teacher's logits (N, classes), float32, without a gradient."""
    logits: Tensor = teacher(images)
    return logits.float()
