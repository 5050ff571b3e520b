"""AdaBin: the two values of a bit fit what they stand for."""

from __future__ import annotations

from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from lowbit.errors import check_choice
from lowbit.methods.base import Method, Recipe, registry
from lowbit.methods.irnet import SharpenedQuantizer, sharpen
from lowbit.quantizers import ste
from lowbit.quantizers.base import Grid, Quantizer, wide
from lowbit.quantizers.binary import binary_codes, centre, deviation

# Below it the distance of the two values would be no divisor any more.
LEAST = 2.0**-20


@registry.register
def adabin(per: Literal["filter", "layer"] = "filter") -> Method:
    r"""Weights and activations take two values each, $\beta - \alpha$ and $\beta + \alpha$, that need not be $\pm 1$.

    Forward: $q = \alpha\,\mathrm{sign}((x - \beta) / \alpha) + \beta$. For weights $\beta$ and $\alpha$ are mean and
    standard deviation (`EqualizedWeight`); for activations both are learned, one pair for the layer (`LearnedPair`).
    Backward: that of IR-Net for weights, with its schedule (see `irnet`), through mean and deviation as well; that of
    Bi-Real Net for activations.
    Block order: convolution, pooling, batch norm, quantizer. First and last layers stay in float; what the last one
    reads goes through a ReLU. The paper's nonlinearity between batch norm and quantizer, MaxOut (a slope for each sign
    and channel, both learned), is left out.
    Levels are rounded to 8 bits of the larger one (`short_integers`), which is ours, so that sums of products of levels
    are exact. With ``per=layer`` both sides are integer grids, packed as bits with integer sums. With ``per=filter``
    weights are a table for each filter: packed they become float32, and sums are float32 too. The paper's bit
    operations, which need correction terms for $\beta$, are not made use of.

    Args:
        per: weights have one pair for each output ``filter``, as in the authors' code, or one for the ``layer``.

    Source: Tu, Chen, Ren and Wang 2022, "AdaBin: Improving Binary Neural Networks with Adaptive Binary Sets", arXiv
    2208.08084, section 3, and the authors' code (github.com/huawei-noah/Efficient-Computing), whose gradients of
    activations belong to $\alpha\,(\mathrm{sign}(\cdot) + \beta)$, which is not the paper's function; here they are
    derived from the paper's. The paper reports 88.1 % on CIFAR-10 with ResNet-20, 92.3 % with VGG-small.

    Raises:
        UsageError: ``per`` is neither.
    """
    weight = partial(EqualizedWeight, per)
    weight()
    return Method(
        name="adabin",
        title="AdaBin",
        paper="Tu et al. 2022",
        url="https://arxiv.org/abs/2208.08084",
        bits_w=1,
        bits_a=1,
        block="conv_pool_bn_float_last",
        weight=weight,
        activation=LearnedPair,
        phases=sharpen,
        recipe=Recipe(
            optimizer="sgd",
            learning_rate=0.1,
            weight_decay=1e-4,
            decay_all=True,
            schedule="cosine",
            warmup=0.5,
            source="the authors' recipe for CIFAR-10 with some ten epochs in place of 400, for short runs, and half an "
            "epoch of warm-up, which is ours",
        ),
        recipes={
            "paper": Recipe(
                optimizer="sgd",
                learning_rate=0.1,
                weight_decay=1e-4,
                decay_all=True,
                schedule="cosine",
                epochs=400,
                source="the authors' code for CIFAR-10 (huawei-noah/Efficient-Computing, AdaBin): SGD 0.1 with "
                "momentum 0.9, decay 1e-4 of all parameters, cosine, batch 128, crop and flip. Its sharpness begins at "
                "0.001 and not at IR-Net's 0.1, which cannot be said here",
            ),
        },
    )


class EqualizedWeight(SharpenedQuantizer):
    r"""$q = \alpha\,\mathrm{sign}(Z) + \beta$ with $Z = (W - \beta) / \alpha$, $\beta = \bar W$.

    $\alpha = \lVert W - \beta\rVert_2 / \sqrt n$, the (biased) standard deviation of the $n$ weights of a filter.

    Gradient: through all of $\alpha$, $\beta$ and $Z$, with that of $k \tanh(t Z)$ in place of the sign's:
    $\partial q/\partial W = \alpha\,k\,t\,(1 - \tanh^2(t Z))\,\partial Z/\partial W +
    \mathrm{sign}(Z)\,\partial\alpha/\partial W + \partial\beta/\partial W$. In a filter of equal weights $\alpha$ is a
    constant.
    Codes: 1 where ``W >= beta``; a table of two levels for each filter, or for the layer an integer grid.

    Args:
        per: what has one pair: each output ``filter``, or the ``layer``.

    Raises:
        UsageError: ``per`` is neither.

    Source: Tu et al. 2022, arXiv 2208.08084, section 3.2.
    """

    bits = 1
    signed = True

    def __init__(self, per: Literal["filter", "layer"] = "filter") -> None:
        super().__init__()
        check_choice("per of adabin", per, ("filter", "layer"))
        self.per = per

    def encode(self, x: Tensor) -> tuple[Tensor, Grid]:
        rows = self._rows(x.detach()).double()
        centred = centre(rows)
        alpha, beta = centred.square().mean(dim=1).sqrt(), rows.mean(dim=1)
        codes = binary_codes(centred).reshape(x.shape)
        integers, unit = short_integers(beta - alpha, beta + alpha)
        if self.per == "layer":
            return codes, integer_grid(integers[0], unit[0])
        return codes, Grid(1, 1, 0, torch.ones((), device=x.device), integers * unit[:, None])

    def surrogate(self, x: Tensor) -> Tensor:
        rows = self._rows(x)
        centred = centre(rows)
        alpha, beta = deviation(centred, correction=0), rows.mean(dim=1, keepdim=True)
        return (alpha * ste.tanh_sign(centred / alpha, self.sharpness) + beta).reshape(x.shape).to(x.dtype)

    def _rows(self, weight: Tensor) -> Tensor:
        """(filters, n), or the layer as one filter."""
        return wide(weight).reshape(len(weight) if self.per == "filter" else 1, -1)


class LearnedPair(Quantizer):
    r"""$q = \alpha\,\mathrm{sign}(u) + \beta$ with $u = (x - \beta) / \alpha$; $\alpha$ and $\beta$ are learned.

    Gradient, with $d(u) = \max(2 - 2|u|, 0)$ for that of the sign: $\partial L/\partial x = g\,d(u)$,
    $\partial L/\partial\beta = \sum g\,(1 - d(u))$ and
    $\partial L/\partial\alpha = \sum g\,(\mathrm{sign}(u) - u\,d(u))$.
    Codes: 1 where ``x >= beta``; an integer grid of two levels.

    Attributes:
        alpha, beta: scalar parameters, which begin as 1 and 0. A negative $\alpha$ gives the same function as
            $|\alpha|$; one below 2^-20 in size counts as that.

    Source: Tu et al. 2022, arXiv 2208.08084, section 3.3.
    """

    bits = 1
    signed = True

    def __init__(self) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.tensor(1.0))
        self.beta = nn.Parameter(torch.tensor(0.0))

    def encode(self, x: Tensor) -> tuple[Tensor, Grid]:
        alpha, beta = self.alpha.detach().abs().clamp(min=LEAST).float(), self.beta.detach().float()
        return (wide(x) >= beta).to(torch.uint8), integer_grid(*short_integers(beta - alpha, beta + alpha))

    def surrogate(self, x: Tensor) -> Tensor:
        alpha = ste.at_least(self.alpha.abs(), LEAST)
        return (alpha * ste.sign_polynomial((wide(x) - self.beta) / alpha) + self.beta).to(x.dtype)


def short_integers(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Pairs of levels as whole numbers of 8 bits and a sign, float32 (..., 2), and what 1 stands for, float32 (...).

    The unit is the power of two that brings the larger level of a pair to 128 .. 256. Products of such levels are whole
    numbers, whose sums are exact; with all of float32's bits, sums of a few equal products would drift.
    """
    levels = torch.stack([low, high], dim=-1).float()
    largest = levels.abs().amax(dim=-1)
    unit = (torch.where(largest > 0, largest, 1).log2().ceil() - 8).exp2()
    return (levels / unit[..., None]).round(), unit


def integer_grid(integers: Tensor, unit: Tensor) -> Grid:
    """Code 0 is the first of two whole numbers, code 1 the second, which is made at least one more."""
    low, high = (int(number) for number in integers)
    return Grid(1, max(high - low, 1), low, unit)
