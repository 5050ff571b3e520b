"""Fixed point: every layer has its own Qm.n formats, and training meets its staircases in a chosen order."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, partial
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from lowbit.errors import UsageError, check_choice
from lowbit.methods.base import Method, Recipe, registry
from lowbit.quantizers import ste
from lowbit.quantizers.base import Grid, Quantizer, wide

if TYPE_CHECKING:
    from lowbit.layers.quantized import QuantizedLayer

Format = Literal["range", "sqnr"]
Rounding = Literal["nearest", "stochastic"]
Remedy = Literal["none", "p1", "p2", "p3"]

WIDTHS = range(2, 9)
MOMENTUM = 0.1
SMALLEST, LARGEST = 2.0**-100, 2.0**100


@registry.register
def fixed_point(
    bits_w: int = 8,
    bits_a: int = 8,
    format: Format = "range",
    rounding: Rounding = "nearest",
    remedy: Remedy = "none",
    top_layers: int = 1,
) -> Method:
    r"""Weights and activations in two's complement with a binary point of each layer's own; scales are shifts.

    Problem: with $k$ bits there is one choice left, the number $n$ of fractional bits. Many of them and large numbers
    overflow, few and small ones are rounded away; ``format`` says how the two are weighed. In training, the gradient
    that is passed back is that of a smooth function, which the layers no longer compute. This mismatch adds up from the
    top layer to the bottom one, so the gradients of the lowest layers are the worst.

    Format: $s = 2^{-n}$, the distance of two levels, is the smallest power of two that is at least $c\,v$. ``range``:
    $v = \max|x|$ and $c = 2^{1-k}$, so that the lowest level reaches the largest number, and the highest one misses it
    by a step at most. ``sqnr``: $v$ is the root mean square of the numbers that are not 0 (0 is on every grid), and
    $c$, solved by `sqnr_factor`, makes the squared error of normally distributed numbers the least.
    Forward, backward: `FixedPointWeight` for weights, `FixedPointActivation` for activations; biases stay float.
    Block order: convolution, batch norm, ReLU, pooling, so that a float network's weights fit (``--init-from``). All
    layers are quantized, the first and the last too; the first reads its input as it is. What follows a ReLU leaves the
    negative half of its codes unused.

    Remedies against the mismatch are phases of training, over the share of the epochs that is done. In ``eval()``, and
    so in every measurement, both sides are quantized at all times.

    - ``none``: both sides from the first step on.
    - ``p1``: activations stay float to the end. Weights learn through no staircase but their own.
    - ``p2``: as p1 for the first half; then all activations are quantized, and only the ``top_layers`` learn.
    - ``p3``: as p1 for the first half; then activations are quantized layer by layer from the bottom to the top, each
      for an equal share of the rest, and only what lies above the last quantized ones learns: no gradient ever passes a
      staircase of activations.

    Where only upper layers learn, the weights and biases of the quantized layers below are frozen, and the lowest layer
    that learns passes no gradient on. So the batch norms below stand still as well, but for their running statistics,
    unless a shortcut brings them a gradient. A plain loop calls `lowbit.layers.start_epoch` before each epoch,
    after it has made its optimizer; share 0 thaws everything.

    Args:
        bits_w: of weights, 2 to 8.
        bits_a: of activations, 2 to 8.
        format: ``range`` keeps the largest number inside, ``sqnr`` has the greatest ratio of signal to quantization
            noise for normally distributed numbers.
        rounding: ``nearest``, or in training ``stochastic``: up with the probability of the part that is rounded away.
        remedy: ``none``, ``p1``, ``p2`` or ``p3``.
        top_layers: how many layers learn in the second half of ``p2``.

    Source: Lin and Talathi 2016, "Overcoming Challenges in Fixed Point Training of Deep Convolutional Networks", arXiv
    1607.02241, for the mismatch and the remedies; Lin, Talathi and Annapureddy 2016, "Fixed Point Quantization of Deep
    Convolutional Networks", arXiv 1511.06393, for the format. The papers start from a trained float network. That the
    first half of p2 and p3 is p1 is chosen here, for a run that starts from nothing.

    Raises:
        UsageError: an option is none of its choices.
    """
    for name, bits in (("bits_w", bits_w), ("bits_a", bits_a)):
        check_choice(f"{name} of fixed_point", bits, WIDTHS)
    check_choice("format of fixed_point", format, ("range", "sqnr"))
    check_choice("rounding of fixed_point", rounding, ("nearest", "stochastic"))
    check_choice("remedy of fixed_point", remedy, ("none", "p1", "p2", "p3"))
    if top_layers < 1:
        raise UsageError(f"top_layers of fixed_point is {top_layers}, but must be at least 1")
    return Method(
        name="fixed_point",
        title="Fixed point",
        paper="Lin and Talathi 2016",
        url="https://arxiv.org/abs/1607.02241",
        bits_w=bits_w,
        bits_a=bits_a,
        block="conv_bn_act",
        weight=partial(FixedPointWeight, bits_w, format, rounding),
        activation=partial(FixedPointActivation, bits_a, format, rounding),
        skip_first=False,
        skip_last=False,
        skip_shortcuts=False,
        phases=None if remedy == "none" else partial(set_phase, remedy=remedy, top_layers=top_layers),
        recipe=Recipe(
            optimizer="adamw",
            learning_rate=3e-3,
            schedule="cosine",
            warmup=0.5,
            source="AdamW with a cosine from scratch, in place of the papers' fine-tuning of a trained network by SGD, "
            "so that it can be compared with the other methods; no complete published recipe was found",
        ),
    )


class FixedPoint(Quantizer):
    r"""$q = s\,\mathrm{clip}(\mathrm{round}(x / s), -2^{k-1}, 2^{k-1} - 1)$ with $s = 2^{-n}$.

    Rounding is exact, halves go to the even neighbour. ``stochastic`` rounding, in ``train()`` only, takes
    $\lfloor x/s \rfloor + 1$ with probability $x/s - \lfloor x/s \rfloor$, else $\lfloor x/s \rfloor$: its mean is $x$.
    The format, which is $s$, is chosen as `fixed_point` says.
    Codes: the integer $+ 2^{k-1}$; grid ``s * (code - 2^(k-1))``.

    Args:
        bits: k, 2 to 8: a sign, $m = k - 1 - n$ integer bits and $n$ fractional ones; either may be negative.
        format: ``range`` or ``sqnr``.
        rounding: ``nearest`` or ``stochastic``.
    """

    signed = True

    def __init__(self, bits: int, format: Format = "range", rounding: Rounding = "nearest") -> None:
        super().__init__()
        self.bits = bits
        self.format = format
        self.rounding = rounding

    def forward(self, x: Tensor) -> Tensor:
        draw = self.training and self.rounding == "stochastic"
        with torch.no_grad():
            values = self.decode(*self._encode(x, draw)).to(x.dtype)
        return ste.substitute(values, self.surrogate(x))

    def encode(self, x: Tensor) -> tuple[Tensor, Grid]:
        return self._encode(x, draw=False)

    def _encode(self, x: Tensor, draw: bool) -> tuple[Tensor, Grid]:
        x, half = wide(x), 1 << (self.bits - 1)
        step = self.step(x.detach())
        integers = (stochastic_round(x / step) if draw else (x / step).round()).clamp(-half, half - 1)
        return (integers + half).to(torch.uint8), Grid(self.bits, 1, -half, step)

    def step(self, x: Tensor) -> Tensor:
        """The distance of two levels, s = 2^-n, float32 ()."""
        raise NotImplementedError

    def statistic(self, x: Tensor) -> Tensor:
        """What the format depends on, v, float32 (); 0 when all of ``x`` is 0."""
        norm: Tensor
        if self.format == "range":
            norm = torch.linalg.vector_norm(x, torch.inf)
            return norm.float()
        # In float64, where the order of the sum cannot move it across a power of two, but for the rarest of ties.
        norm = torch.linalg.vector_norm(x, dtype=torch.float64)
        return (norm / x.count_nonzero().clamp(min=1).double().sqrt()).float()

    def step_for(self, statistic: Tensor) -> Tensor:
        """The step of the format that ``statistic`` asks for; that of 1 where it is 0."""
        factor = 2.0 ** (1 - self.bits) if self.format == "range" else sqnr_factor(self.bits)
        least = torch.where(statistic > 0, statistic, 1) * factor
        return power_of_two_above(least.clamp(SMALLEST, LARGEST))


class FixedPointWeight(FixedPoint):
    r"""`FixedPoint` in the format of the weight itself, chosen at each use.

    $q = s\,\mathrm{clip}(\mathrm{round}(W / s), -2^{k-1}, 2^{k-1} - 1)$, one $s = 2^{-n}$ for the layer.
    Gradient: $g$, also outside the range: a latent weight that is saturated can come back.
    """

    def step(self, x: Tensor) -> Tensor:
        return self.step_for(self.statistic(x))


class FixedPointActivation(FixedPoint):
    r"""`FixedPoint` in the format of the data seen: a moving average over batches in ``train()``, fixed in ``eval()``.

    $q = s\,\mathrm{clip}(\mathrm{round}(x / s), -2^{k-1}, 2^{k-1} - 1)$, one $s = 2^{-n}$ for the layer.
    Gradient: $g \cdot 1\{-2^{k-1} s \le x \le (2^{k-1} - 1)\,s\}$.
    The first batch sets the average, each later one moves it by a tenth of the way; a disabled quantizer looks on. As
    long as there was none, the format is that of numbers up to 1.

    Attributes:
        seen: the average, float32 (), saved with the model; 0 before the first batch.
        ends_gradient: passes none back in ``train()``, for phases in which nothing below learns.
    """

    seen: Tensor

    def __init__(self, bits: int, format: Format = "range", rounding: Rounding = "nearest") -> None:
        super().__init__(bits, format, rounding)
        self.register_buffer("seen", torch.zeros(()))
        self.ends_gradient = False

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.observe(x)
            x = x.detach() if self.ends_gradient else x
        return super().forward(x)

    def bypass(self, x: Tensor) -> Tensor:
        self.observe(x)
        return x

    def surrogate(self, x: Tensor) -> Tensor:
        half, step = 1 << (self.bits - 1), self.step(x)
        return torch.where((x >= -half * step) & (x <= (half - 1) * step), x, 0)

    @torch.no_grad()
    def observe(self, x: Tensor) -> None:
        """Take a batch into the average."""
        new = self.statistic(wide(x))
        self.seen.copy_(torch.where(self.seen > 0, self.seen.lerp(new, MOMENTUM), new))

    def step(self, x: Tensor) -> Tensor:
        return self.step_for(self.seen)


def set_phase(layers: Sequence[QuantizedLayer], done: float, *, remedy: Remedy, top_layers: int) -> None:
    """Switch the activation quantizers of ``layers`` and freeze weights, for the phase of ``remedy`` at share ``done``.

    Args:
        layers: all quantized layers of a model, from the bottom to the top.
        done: the share of the epochs that is done, 0 to below 1.
        remedy: ``p1``, ``p2`` or ``p3``.
        top_layers: how many learn in the second phase of ``p2``.
    """
    readers = [layer for layer in layers if layer.activation_quantizer is not None]
    enabled, lowest = 0, 0
    if remedy == "p2" and done >= 0.5:
        enabled, lowest = len(readers), max(0, len(layers) - top_layers)
    elif remedy == "p3" and done >= 0.5 and readers:
        # A share such as 6/10 falls short of its phase by rounding.
        enabled = min(len(readers), 1 + int((2 * done - 1) * len(readers) + 1e-9))
        lowest = layers.index(readers[enabled - 1])
    for index, layer in enumerate(layers):
        for parameter in layer.parameters(recurse=False):
            parameter.requires_grad_(index >= lowest)
        quantizer = layer.activation_quantizer
        if quantizer is not None:
            quantizer.enabled = layer in readers[:enabled]
        if isinstance(quantizer, FixedPointActivation):
            quantizer.ends_gradient = index == lowest > 0


def stochastic_round(x: Tensor) -> Tensor:
    """The integer below ``x`` or the one above, at random, with mean ``x``; an integer stays."""
    below = x.floor()
    return below + (torch.rand_like(x) < x - below)


def power_of_two_above(x: Tensor) -> Tensor:
    """The smallest power of two that is at least ``x``, exact; ``x`` is above 0 and normal."""
    mantissa, _ = torch.frexp(x)
    return torch.where(mantissa == 0.5, x, x / mantissa)


@cache
def sqnr_factor(bits: int) -> float:
    r"""The step $c$ which has, for $x \sim N(0, 1)$, the noise of the step $2c$.

    Between $c$ and $2c$ there is one power of two (or both ends are), and it has less noise than all others: finer
    steps overflow, coarser ones round more away. So it has the greatest ratio of signal to quantization noise.
    Found by bisection.

    Source: after Lin, Talathi and Annapureddy 2016, arXiv 1511.06393, who take the best steps of symmetric quantizers
    from a table; two's complement has one level more below than above.
    """
    low, high = 2.0**-bits / 8, 4.0
    for _ in range(60):
        step = (low + high) / 2
        low, high = (step, high) if _normal_noise(step, bits) > _normal_noise(2 * step, bits) else (low, step)
    return low


def _normal_noise(step: float, bits: int) -> float:
    """Mean squared error under N(0, 1) of rounding to the multiples of ``step`` that ``bits`` bits hold."""
    half = 1 << (bits - 1)
    levels = step * torch.arange(-half, half, dtype=torch.float64)
    ends = levels.new_tensor([-torch.inf, torch.inf])
    bounds = torch.cat([ends[:1], (levels[1:] + levels[:-1]) / 2, ends[1:]])
    density = (-(bounds**2) / 2).exp() / (2 * torch.pi) ** 0.5
    probability, moment = torch.special.ndtr(bounds).diff(), -density.diff()
    return float(1 - 2 * (levels * moment).sum() + (levels**2 * probability).sum())
