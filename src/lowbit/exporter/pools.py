"""Max-pools in front of what only rises or falls, so that norms and activations meet fewer numbers, mostly a quarter.

    max(f(v)) = f(max(v)) where f rises        max(f(v)) = f(min(v)) where it falls

Roundings keep the order of numbers, so both sides are the same float32; of a zero the sign may be another.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Container

import torch
from torch import Tensor, nn

from lowbit.exporter.capture import NORMS, Graph, Step


def move_pools(graph: Graph, made: Container[Step]) -> None:
    """Move each max-pool of ``made``, the steps between layers whose results are there in float32, to its layer.

    It passes steps of ``made`` that nothing else reads, as far as each channel only rises or falls. Steps stay where
    they are and exchange what they do, so that whoever reads the last of them reads the same.
    """
    readers = Counter(value for step in graph.steps for value in step.inputs)
    for step in graph.steps:
        if not isinstance(step.module, nn.MaxPool2d) or step not in made:
            continue
        moved = [step]
        falling = torch.zeros(step.shape[0], dtype=torch.bool)
        while readers[before := moved[0].inputs[0]] == 1 and before in made and (falls := _falls(before)) is not None:
            moved.insert(0, before)
            falling = falling ^ falls
        if len(moved) == 1:
            continue
        *passed, pool = [(s.source, s.module, s.rank) for s in moved]
        for place, content in zip(moved, [pool, *passed], strict=True):
            place.source, place.module, place.rank = content
            place.shape = step.shape
        moved[0].falling = falling.to(torch.uint8)


def _falls(step: Step) -> Tensor | None:
    """Where a step between layers falls, (C,) or for all channels; None if it does both, or is a pool."""
    module = step.module
    if isinstance(module, NORMS) and module.weight is not None:
        return module.weight.detach() < 0
    bends = isinstance(module, nn.LeakyReLU) and module.negative_slope < 0
    return None if bends or isinstance(module, nn.MaxPool2d) else torch.tensor(False)
