"""WAGE: weights, activations, gradients and errors are all integers of few bits."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from lowbit.errors import check_choice
from lowbit.methods.base import Method, Recipe, registry
from lowbit.quantizers import ste
from lowbit.quantizers.base import Grid, Quantizer, wide

CODE_WIDTHS = range(2, 9)
TRAINING_WIDTHS = range(2, 17)


@registry.register
def wage(bits_w: int = 2, bits_a: int = 8, bits_g: int = 8, bits_e: int = 8) -> Method:
    r"""Integers in training too: weights, activations, errors and updates; no float copy of the weights, no batch norm.

    All four use $Q(x, k) = \mathrm{clip}(\sigma\,\mathrm{round}(x / \sigma), -1 + \sigma, 1 - \sigma)$ with the step
    $\sigma(k) = 2^{1-k}$, which gives $2^k - 1$ levels, and $\mathrm{Shift}(x) = 2^{\mathrm{round}(\log_2 x)}$. Halves
    are rounded to even, as in the authors' code.

    Forward: $Q(W, k_W) / \alpha$ for weights (`ShiftedWeight`), $Q(x, k_A)$ for activations (`ClippedActivation`).
    $\alpha = \max(\mathrm{Shift}(L_{min} / L_0), 1)$ stands in for batch norm: with $n$ weights to an output,
    $L_0 = \sqrt{6/n}$ bounds uniform weights that keep the variance behind a ReLU, and weights below
    $L_{min} = 1.5\,\sigma(k_W)$ would nearly all be rounded to 0. The paper divides a layer's result by $\alpha$ in
    front of the activation quantizer; here, as in the authors' code, $\alpha$ divides the weight. That is the same to
    the bit: division by a power of two is exact, and ReLU and pooling pass it on. What the last layer gives, which no
    quantizer reads, is so divided too.
    Backward: straight through both, inside the clip for activations. The error $e$, the gradient of a layer's result,
    becomes $Q(e / \mathrm{Shift}(\max|e|), k_E)$; the authors' code does this behind ReLU and pooling, so that errors
    which ReLU then blocks still count in the maximum.
    Update: $W \leftarrow \mathrm{clip}(W - \sigma(k_G)\,R(\eta\,g / \mathrm{Shift}(\max|g|)))$ to
    $\pm(1 - \sigma(k_G))$, in place of the optimizer's. $R$ rounds at random to a whole number next to it, on average
    to the number itself. So the rate $\eta$ counts steps of the grid, and the stored weights are integers of $k_G$
    bits throughout: they start as $Q(w, k_G)$ with $w$ uniform in $\pm\max(L_0, L_{min})$, and a projection puts
    weights from elsewhere on the grid. Most of an ordinary float network's become 0 there: after `quantize_` on a model
    of your own, call the method's ``initialise`` on each quantized layer's weight, as `lowbit.models.create` does.
    Block order: quantizer, convolution without a bias, pooling, ReLU. Behind a ReLU the negative codes go unused.
    All layers are quantized, the first and the last included; the first reads its input as it is, where the authors'
    code quantizes it as an activation, and the last gives float numbers, as it does there.
    Loss: half the sum of squares. The code sums it over the batch; the mean here differs by a factor that the shifts
    take out, but for the rounding of their exponents.

    Args:
        bits_w: $k_W$, of the weights that the network computes with, 2 to 8.
        bits_a: $k_A$, of activations, 2 to 8.
        bits_g: $k_G$, of updates and stored weights, 2 to 16. Below ``bits_w`` some levels of W are out of reach.
        bits_e: $k_E$, of errors, 2 to 16. More than 8 need ``--precision float32``: bfloat16 has 8 significant bits.

    Source: Wu, Li, Chen and Shi 2018, "Training and Inference with Integers in Deep Neural Networks", arXiv 1802.04680,
    section 3, and the authors' code (github.com/boluoweifenda/WAGE), which takes $\sqrt{3/n}$ where the paper has
    $\sqrt{6/n}$ in $L_0$, starts from weights of ``bits_w`` bits and clips the stored ones to the range of that grid. A
    log in it of a VGG-7 on CIFAR-10 ends with 92.74 % after 300 epochs; the best epoch for the test images has 93.11 %.

    Raises:
        UsageError: a number of bits is none of these.
    """
    for name, bits, widths in (
        ("bits_w", bits_w, CODE_WIDTHS),
        ("bits_a", bits_a, CODE_WIDTHS),
        ("bits_g", bits_g, TRAINING_WIDTHS),
        ("bits_e", bits_e, TRAINING_WIDTHS),
    ):
        check_choice(f"{name} of wage", bits, widths)
    recipe = Recipe(
        optimizer="sgd",
        learning_rate=8.0,
        momentum=0.0,
        schedule="step",
        milestones=(2 / 3, 5 / 6),
        gamma=1 / 8,
        source="the authors' code: rates 8, 1 and 1/8 in steps of the grid, from epochs 0, 200 and 250 of 300; here "
        "these fractions of some ten epochs, for short runs",
    )
    return Method(
        name="wage",
        title="WAGE",
        paper="Wu et al. 2018",
        url="https://arxiv.org/abs/1802.04680",
        bits_w=bits_w,
        bits_a=bits_a,
        bits_g=bits_g,
        block="conv_pool_act",
        weight=partial(ShiftedWeight, bits_w),
        activation=partial(ClippedActivation, bits_a),
        gradient=partial(quantize_error, bits=bits_e),
        skip_first=False,
        skip_last=False,
        skip_shortcuts=False,
        projection=partial(to_grid, bits=bits_g),
        update=partial(update, bits=bits_g),
        initialise=partial(initialise, bits_w=bits_w, bits_g=bits_g),
        loss="sum_of_squares",
        recipe=recipe,
        recipes={
            "paper": replace(
                recipe,
                epochs=300,
                source="the authors' code for CIFAR-10 (boluoweifenda/WAGE, source/Option.py and getData.py): rates 8, "
                "1 and 1/8 in steps of the grid, from epochs 0, 200 and 250 of 300, batch 128, no decay, crop and flip",
            )
        },
    )


def integers(x: Tensor, bits: int) -> Tensor:
    r"""$Q(x, k) / \sigma(k)$: whole numbers within $\pm(2^{k-1} - 1)$, in the dtype of ``x``; NaN stays NaN."""
    half = 1 << (bits - 1)
    return (x * half).round().clamp(1 - half, half - 1)


def step(bits: int) -> float:
    r"""$\sigma(k) = 2^{1-k}$, the distance of two levels."""
    return 2.0 ** (1 - bits)


def shift(x: Tensor) -> Tensor:
    r"""$\mathrm{Shift}(\max|x|) = 2^{\mathrm{round}(\log_2 \max|x|)}$, a scalar; 1 when all of ``x`` is 0.

    A number in ``x`` that is not finite gives one that is not.
    """
    largest = x.abs().amax().double()
    power = torch.where(largest == 0, 1, largest).log2().round().exp2()
    return power.to(x.dtype)


def start(fan_in: int) -> float:
    r"""$L_0 = \sqrt{6 / n}$, the bound of uniform weights that keep the variance behind a ReLU."""
    return math.sqrt(6 / fan_in)


def least(bits_w: int) -> float:
    r"""$L_{min} = \beta\,\sigma(k_W)$, $\beta = 1.5$: uniform weights below it would nearly all be rounded to 0."""
    return 1.5 * step(bits_w)


def layer_scale(fan_in: int, bits_w: int) -> float:
    r"""$\alpha = \max(\mathrm{Shift}(L_{min} / L_0), 1)$: what weights are too large by, as a power of two.

    Args:
        fan_in: n, the weights of one output filter.
        bits_w: $k_W$.

    Source: Wu et al. 2018, arXiv 1802.04680, section 3.
    """
    return 2.0 ** max(round(math.log2(least(bits_w) / start(fan_in))), 0)


class ShiftedWeight(Quantizer):
    r"""$q = Q(W, k) / \alpha$, $\alpha$ the power of two of the layer (see `layer_scale`).

    Gradient: $g$, in and outside of the clip. (Exact would be $g / \alpha$; `update` does not see a power of two.)
    Infinities are clipped, NaN becomes 0.
    Codes: $Q(W, k) / \sigma + 2^{k-1} - 1$; the largest code is not used. Grid
    ``sigma / alpha * (code - (2^(k-1) - 1))``: for 2 bits -1/2, 0 and 1/2, divided by alpha.

    Args:
        bits: k, 2 to 8.

    Source: Wu et al. 2018, arXiv 1802.04680, section 3.
    """

    signed = True

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.bits = bits

    def encode(self, x: Tensor) -> tuple[Tensor, Grid]:
        return _encode(x, self.bits, step(self.bits) / layer_scale(x[0].numel(), self.bits))


class ClippedActivation(Quantizer):
    r"""$q = Q(x, k)$.

    Gradient: $g \cdot 1\{|x| \le 1 - \sigma(k)\}$, both ends included.
    Infinities are clipped, NaN becomes 0.
    Codes: $Q(x, k) / \sigma + 2^{k-1} - 1$; the largest code is not used. Grid
    ``sigma * (code - (2^(k-1) - 1))``.

    Args:
        bits: k, 2 to 8.

    Source: Wu et al. 2018, arXiv 1802.04680, section 3.
    """

    signed = True

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.bits = bits

    def encode(self, x: Tensor) -> tuple[Tensor, Grid]:
        return _encode(x, self.bits, step(self.bits))

    def surrogate(self, x: Tensor) -> Tensor:
        end = 1 - step(self.bits)
        return ste.clip(x, -end, end)


def _encode(x: Tensor, bits: int, scale: float) -> tuple[Tensor, Grid]:
    top = (1 << (bits - 1)) - 1
    codes = integers(wide(x).nan_to_num(0.0, torch.inf, -torch.inf), bits) + top
    return codes.to(torch.uint8), Grid(bits, 1, -top, torch.tensor(scale, device=x.device))


def quantize_error(x: Tensor, bits: int) -> Tensor:
    r"""The identity, whose gradient $e$ becomes $Q(e / \mathrm{Shift}(\max|e|), k)$, the maximum over all of it.

    The size of the errors is lost and nothing depends on it: `update` divides it out as well. Where $e$ holds NaN or an
    infinity the result holds NaN, for the training's check to find.

    Args:
        x: any shape.
        bits: k.

    Source: Wu et al. 2018, arXiv 1802.04680, section 3.
    """
    return ste.map_gradient(x, partial(_shift_and_quantize, bits=bits))


def _shift_and_quantize(gradient: Tensor, bits: int) -> Tensor:
    error = wide(gradient)
    return integers(error / shift(error), bits) * step(bits)


@torch.no_grad()
def update(weight: Tensor, gradient: Tensor, rate: float, bits: int) -> None:
    r"""$W \leftarrow \mathrm{clip}(W - \sigma\,R(\eta\,g / \mathrm{Shift}(\max|g|)), -1 + \sigma, 1 - \sigma)$.

    $R$ rounds at random to one of the two whole numbers next to it, the upper one with the probability of the
    fraction, so that its mean is the number and its variance $f (1 - f)$, $f$ the fraction. A weight on the grid stays
    on it. A gradient with NaN or an infinity in it moves nothing.

    Args:
        weight: changed in place.
        gradient: of the weight's shape.
        rate: $\eta$, in steps of the grid.
        bits: k of the grid.

    Source: Wu et al. 2018, arXiv 1802.04680, section 3; the authors' code rounds $\eta\,g$ to 16 bits first.
    """
    g = wide(gradient)
    steps = rate * (g / shift(g))
    steps = (steps + torch.rand_like(steps)).floor().nan_to_num(0.0)
    end = 1 - step(bits)
    weight.sub_(steps * step(bits)).clamp_(-end, end)


@torch.no_grad()
def to_grid(weight: Tensor, bits: int) -> None:
    r"""$W \leftarrow Q(W, k)$, in place; what is on the grid stays where it is."""
    weight.copy_(integers(weight, bits) * step(bits))


@torch.no_grad()
def initialise(weight: Tensor, bits_w: int, bits_g: int) -> None:
    r"""$W \leftarrow Q(w, k_G)$ with $w$ uniform in $\pm L$, $L = \max(L_0, L_{min})$ (see `start` and `least`).

    Source: Wu et al. 2018, arXiv 1802.04680, section 3.
    """
    limit = max(start(weight[0].numel()), least(bits_w))
    weight.uniform_(-limit, limit)
    to_grid(weight, bits_g)
