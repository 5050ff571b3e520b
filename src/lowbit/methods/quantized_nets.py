"""Training quantized nets: three update rules for weights on a grid, with and without a float copy."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from lowbit.errors import check_choice
from lowbit.methods.base import Method, Recipe, registry
from lowbit.quantizers.base import Grid, Quantizer, wide
from lowbit.quantizers.binary import clip_latent

Rule = Literal["bc", "r", "sr"]

WIDTHS = range(1, 9)


@registry.register
def quantized_nets(rule: Rule = "bc", bits_w: int = 1) -> Method:
    r"""Weights on a fixed grid of step $\Delta$, moved by one of three rules; activations stay float.

    Problem: minimise the loss over weights that lie on a grid. One step of the optimizer, $-\eta g$ for gradient
    descent, is far smaller than $\Delta$; the rules differ in what becomes of it.

    Forward: $q = Q_d(W)$, see `NearestLevel`; $W$ itself under ``r`` and ``sr``, which keep it on the grid.
    Backward: $\partial L/\partial W = g$.
    After each step: with $W'$ what the optimizer makes of $W$ ($W - \eta g$ for gradient descent; the paper's networks
    are trained with Adam),

    - ``bc`` (BinaryConnect): $W \leftarrow \mathrm{clip}(W', -1, 1)$, a float copy, while the gradient is taken at
      $Q_d(W)$;
    - ``r``: $W \leftarrow Q_d(W')$, the nearest level (`to_nearest`);
    - ``sr``: $W \leftarrow Q_s(W')$, one of the two levels around $W'$, at random with mean $W'$ (`to_neighbour`).

    Why ``r`` stalls: a weight stays where it is as long as $|W' - W| < \Delta/2$, whatever the number of such steps.
    With binary weights and a usual learning rate none ever moves, and only what is float learns.

    Why ``sr`` cannot anneal: a step of size $\delta$ moves a weight by $\Delta$ with probability $\delta/\Delta$. Its
    mean is $\delta$, its variance $\delta\,(\Delta - \delta)$: their ratio tends to $\Delta$ as $\delta$ falls, and not
    to 0. A lower learning rate makes good moves and bad ones rarer alike. It slows the random walk down and leaves the
    distribution of its states as it is, so there is no phase in which the weights settle. Under ``bc`` steps add up in
    the float copy, and the noise falls with the learning rate. Larger batches, with less noise in $g$, help ``sr``.

    The start: the initial weights are rounded by the same rule. ``sr`` keeps their means, which for weights far smaller
    than $\Delta$ leaves little of a trained network; it is meant to start from nothing.
    Block order: convolution, batch norm, ReLU, pooling. The last layer stays float. The paper quantizes convolutions
    and leaves linear layers float; here the hidden ones are quantized as well.

    Args:
        rule: ``bc``, ``r`` or ``sr``.
        bits_w: k, 1 to 8, with $\Delta = 2 / (2^k - 1)$; the paper's experiments have 1 bit.

    Source: Li, De, Xu, Studer, Samet and Goldstein 2017, "Training Quantized Nets: A Deeper Understanding", arXiv
    1706.02379.

    Raises:
        UsageError: an option is none of its choices.
    """
    check_choice("rule of quantized_nets", rule, ("bc", "r", "sr"))
    check_choice("bits_w of quantized_nets", bits_w, WIDTHS)
    projections: dict[str, Callable[[Tensor], None]] = {
        "bc": clip_latent,
        "r": partial(to_nearest, bits=bits_w),
        "sr": partial(to_neighbour, bits=bits_w),
    }
    return Method(
        name="quantized_nets",
        title="Training quantized nets",
        paper="Li et al. 2017",
        url="https://arxiv.org/abs/1706.02379",
        bits_w=bits_w,
        bits_a=32,
        block="conv_bn_act",
        weight=partial(NearestLevel, bits_w),
        skip_first=False,
        projection=projections[rule],
        recipe=Recipe(
            optimizer="adam",
            learning_rate=0.01,
            schedule="step",
            milestones=(0.5, 0.75),
            source="the paper's Adam; rate, steps and epochs are chosen for short runs, and the paper's own could not "
            "be looked up",
        ),
    )


class NearestLevel(Quantizer):
    r"""$q = Q_d(W)$, the nearest of the $2^k$ levels $-1, -1 + \Delta, \ldots, 1$ with $\Delta = 2 / (2^k - 1)$.

    $Q_d(W) = \mathrm{clip}(\Delta\,(\lfloor W/\Delta \rfloor + \frac12), -1, 1)$: odd multiples of $\Delta/2$, none
    of them 0, so that weights which start small are not all alike. One bit gives $\mathrm{sign}(W)$ with sign(0) = +1;
    what lies halfway between two levels becomes the upper one.
    Gradient: $g$.
    Codes: $\lfloor W/\Delta \rfloor + 2^{k-1}$; grid ``(2 code - (2^k - 1)) / (2^k - 1)``.

    Args:
        bits: k, 1 to 8.

    Source: Li et al. 2017, arXiv 1706.02379, whose grid of more bits is shifted by half a step: the multiples of
    $\Delta$, 0 among them.
    """

    signed = True

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.bits = bits

    def encode(self, x: Tensor) -> tuple[Tensor, Grid]:
        top = (1 << self.bits) - 1
        codes = ((wide(x) * (top / 2)).floor() + (1 << (self.bits - 1))).clamp(0, top)
        return codes.to(torch.uint8), Grid(self.bits, 2, -top, torch.tensor(1 / top, device=x.device))


def to_nearest(weight: Tensor, bits: int) -> None:
    r"""$W \leftarrow Q_d(W)$, in place (see `NearestLevel`)."""
    codes, grid = NearestLevel(bits).encode(weight)
    weight.copy_(grid.decode(codes))


def to_neighbour(weight: Tensor, bits: int) -> None:
    r"""$W \leftarrow Q_s(W)$, in place: one of the two levels around $W$, each the likelier the nearer it is.

    With $r = W - Q_d(W)$: a step from $Q_d(W)$ in the direction of $r$ with probability $|r|/\Delta$. Inside the grid
    the mean is $W$ and the variance $|r|\,(\Delta - |r|)$; a level stays, and what lies outside becomes the last one.
    """
    codes, grid = NearestLevel(bits).encode(weight)
    rest = (weight - grid.decode(codes)) / (2 * grid.scale)
    moved = codes + rest.sign() * (torch.rand_like(rest) < rest.abs())
    weight.copy_(grid.decode(moved.clamp(0, (1 << bits) - 1)))
