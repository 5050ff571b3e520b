"""The learning rate as a pure function of time, so that resuming needs no scheduler state."""

from __future__ import annotations

import math

from lowbit.methods.base import Recipe


def multiplier(recipe: Recipe, epoch: float) -> float:
    """What the recipe's learning rate is multiplied by at time ``epoch`` (in epochs, fractions count).

    With w = warm-up, E = all epochs and t = (epoch - w) / (E - w):

    - warm-up, epoch < w: epoch / w
    - ``cosine``: (1 + cos(pi t)) / 2
    - ``linear``: 1 - t
    - ``poly``: (1 - t) ** gamma
    - ``exponential``: gamma ** t
    - ``step``: gamma ** (how many of milestones * E have passed)
    """
    if epoch < recipe.warmup:
        return epoch / recipe.warmup
    if recipe.schedule == "step":
        return float(recipe.gamma ** sum(epoch >= milestone * recipe.epochs for milestone in recipe.milestones))
    t = min(1.0, (epoch - recipe.warmup) / max(recipe.epochs - recipe.warmup, 1e-9))
    if recipe.schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * t))
    if recipe.schedule == "exponential":
        return float(recipe.gamma**t)
    return float((1 - t) ** (recipe.gamma if recipe.schedule == "poly" else 1))
