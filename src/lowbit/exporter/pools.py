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


def move_pools(graph: Graph, in_float: Container[Step]) -> None:
    """Move each max-pool that is computed in float anyway back towards the layer whose output it pools.

    It passes steps that nothing else reads. Steps stay where they are and exchange what they do, so that whoever reads
    the last of them reads the same.

    Args:
        in_float: the steps between layers that are computed in float; each of their channels only rises or only falls.
    """
    readers = Counter(value for step in graph.steps for value in step.inputs)
    for step in graph.steps:
        if not isinstance(step.module, nn.MaxPool2d) or step not in in_float:
            continue
        moved = [step]
        falling = torch.zeros(step.shape[0], dtype=torch.bool)
        while (before := moved[0].inputs[0]) in in_float and readers[before] == 1:
            if (falls := _falls(before)) is None:
                break
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
    """Where a step between layers falls, (C,) or for all channels; None of a pool."""
    module = step.module
    if isinstance(module, NORMS) and module.weight is not None:
        return module.weight.detach() < 0
    return None if isinstance(module, nn.MaxPool2d) else torch.tensor(False)
