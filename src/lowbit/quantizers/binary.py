"""The binary quantizers that several 1-bit methods share, and the projection that goes with them."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor

from lowbit.errors import check_choice
from lowbit.quantizers import ste
from lowbit.quantizers.base import Grid, Quantizer


class Signs(Quantizer):
    """What quantizers share whose values are signs: codes are 1 where ``x >= 0``, the grid is ``2 code - 1``."""

    bits = 1
    signed = True

    def encode(self, x: Tensor) -> tuple[Tensor, Grid]:
        return binary_codes(x), Grid(1, 2, -1, torch.ones((), device=x.device))


class SignQuantizer(Signs):
    r"""$q = \mathrm{sign}(x)$, no scale.

    Gradient: $g \cdot 1\{|x| \le 1\}$ (see `lowbit.quantizers.ste.sign`).
    Codes: 1 where ``x >= 0``; grid ``2 code - 1``.

    Args:
        stochastic: in ``train()``, $q = +1$ with probability $\mathrm{clip}((x+1)/2, 0, 1)$, else $-1$; the gradient is
            the same. `encode` and ``eval()`` stay deterministic.

    Source: Courbariaux, Hubara et al. 2016, arXiv 1602.02830, equations 1, 2 and 4.
    """

    def __init__(self, stochastic: bool = False) -> None:
        super().__init__()
        self.stochastic = stochastic

    def forward(self, x: Tensor) -> Tensor:
        if not (self.stochastic and self.training):
            return ste.sign(x)
        # P(threshold <= x) is the wanted probability; 1 is always reached, -1 never.
        return ste.sign(x, 1 - 2 * torch.rand_like(x, dtype=torch.float32))


class PolynomialSign(Signs):
    r"""$q = \mathrm{sign}(x)$, no scale.

    Gradient: $g\,\max(0, 2 - 2|x|)$ (see `lowbit.quantizers.ste.sign_polynomial`).

    Source: Liu et al. 2018, "Bi-Real Net", arXiv 1808.00278, section 3.
    """

    def forward(self, x: Tensor) -> Tensor:
        return ste.sign_polynomial(x)


class ScaledSign(Quantizer):
    r"""$q = \alpha\,\mathrm{sign}(W)$ with $\alpha = \lVert W\rVert_1 / n$ for each output filter of $n$ weights.

    Gradient ``exact``, through $\alpha$ and the straight-through sign:
    $\frac{\partial L}{\partial W_i} =
    \frac{\mathrm{sign}(W_i)}{n}\sum_j g_j\,\mathrm{sign}(W_j) + \alpha\,g_i\,1\{|W_i| \le 1\}$.
    Gradient ``paper`` (XNOR-Net's equation after 11, elementwise): $g_i\,(1/n + \alpha\,1\{|W_i| \le 1\})$.
    Gradient ``constant`` ($\alpha$ taken for a constant): $\alpha\,g_i\,1\{|W_i| \le 1\}$.
    Gradient ``identity``: $g_i$.

    Codes: 1 where ``W >= 0``; grid ``alpha * (2 code - 1)``.

    Args:
        gradient: which of the four.
        per: one alpha for each output ``filter``, or one for the ``layer`` ($n$ then counts all of its weights).

    Raises:
        UsageError: ``gradient`` or ``per`` is none of its choices.

    Source: Rastegari et al. 2016, arXiv 1603.05279, sections 3.1 and 3.2.
    """

    bits = 1
    signed = True

    def __init__(
        self,
        gradient: Literal["exact", "paper", "constant", "identity"] = "exact",
        per: Literal["filter", "layer"] = "filter",
    ) -> None:
        super().__init__()
        check_choice("gradient of alpha * sign(W)", gradient, ("exact", "paper", "constant", "identity"))
        check_choice("what has one alpha", per, ("filter", "layer"))
        self.gradient = gradient
        self.per = per

    def forward(self, x: Tensor) -> Tensor:
        if self.gradient == "identity":
            return super().forward(x)
        result: Tensor = _ScaledSign.apply(x, self._alpha(x), self.gradient)
        return result

    def encode(self, x: Tensor) -> tuple[Tensor, Grid]:
        return binary_codes(x), Grid(1, 2, -1, self._alpha(x))

    def _alpha(self, weight: Tensor) -> Tensor:
        dimensions = axes(weight, self.per)
        n = math.prod(weight.shape[d] for d in dimensions)
        norm: Tensor = torch.linalg.vector_norm(weight.detach(), 1, dimensions, keepdim=True)
        return norm / n


class _ScaledSign(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, alpha: Tensor, kind: str) -> Tensor:
        ctx.save_for_backward(weight, alpha)
        ctx.kind = kind
        return ste.signs(weight, scale=alpha)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        weight, alpha = ctx.saved_tensors
        n = weight.numel() // alpha.numel()
        through_sign = ste.window(gradient, weight).mul_(alpha)
        if ctx.kind == "constant":
            return through_sign, None, None
        if ctx.kind == "paper":
            return through_sign.add_(gradient, alpha=1 / n), None, None
        signs = ste.signs(weight)
        through_alpha = (gradient * signs).sum_to_size(alpha.shape).div_(n)
        return through_sign.add_(signs.mul_(through_alpha)), None, None


def axes(weight: Tensor, per: Literal["filter", "layer"]) -> tuple[int, ...]:
    """The axes that a statistic of a weight runs over: of each output filter, or of the whole layer."""
    return tuple(range(1 if per == "filter" else 0, weight.dim()))


def centre(weight: Tensor) -> Tensor:
    r"""$W - \mathrm{mean}(W)$ of each output filter, differentiable, in the dtype of ``weight``.

    The mean is one of float64, rounded to float32 whatever the dtype, so that a float64 copy of a network finds the
    same signs.
    """
    return weight - weight.mean(dim=axes(weight, "filter"), keepdim=True, dtype=torch.float64).float().to(weight.dtype)


def deviation(centred: Tensor, correction: int) -> Tensor:
    """The standard deviation of each output filter of a centred weight, kept apart from 0: 1 where all are equal.

    Args:
        centred: (filters, ...), of mean 0 in each filter.
        correction: what is taken from the number of weights before it divides: 1 for an unbiased variance.
    """
    count = max(centred[0].numel() - correction, 1)
    squares = centred.square().sum(dim=axes(centred, "filter"), keepdim=True)
    return torch.where(squares > 0, squares / count, 1).sqrt()


def binary_codes(x: Tensor) -> Tensor:
    """1 where ``x >= 0``, else 0, as uint8."""
    return (x >= 0).to(torch.uint8)


def clip_latent(weight: Tensor) -> None:
    r"""$W \leftarrow \mathrm{clip}(W, -1, 1)$, in place (algorithm 1 of BinaryConnect and of BNN)."""
    weight.clamp_(-1, 1)
