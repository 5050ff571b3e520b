"""ReCU: latent weights far outside, which would never flip again, are brought back into reach."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lowbit.methods.base import Method, Recipe, registry
from lowbit.quantizers import ste
from lowbit.quantizers.base import Grid, Quantizer, wide
from lowbit.quantizers.binary import Signs, axes, binary_codes, centre, deviation

if TYPE_CHECKING:
    from lowbit.layers.quantized import QuantizedLayer

TAU = 0.85, 0.99


@registry.register
def recu() -> Method:
    r"""Signs of standardised weights, clamped to quantiles of their distribution that move outwards in training.

    Forward: `ClampedWeight` for weights, $\mathrm{sign}(x)$ for activations (`StandardSign`).
    Backward: straight through the sign of a weight, through its clamp and its standardisation; that of Bi-Real Net for
    activations.
    Schedule: $\tau$ rises from 0.85 to 0.99 along $A\,\exp(e / E) + B$ in epoch $e$ of $E$, counted from 0: a tight
    clamp at first, for a small error of quantization, a wide one in the end, for more information. `start_epoch` sets
    it before each epoch, from the share of the epochs alone; a plain loop calls it too. It moves no sign; of the
    values it changes the scale alone, and so the layer keeps its $\tau$ in a buffer, for evaluation.
    Block order, as in the authors' VGG-small: convolution, pooling, batch norm, Hardtanh, quantizer. First and last
    layers stay in float, and so do those of shortcuts. In the authors' ResNets a shortcut goes around each
    convolution: ``--set model.shortcut=conv``.

    Source: Xu, Lin, Liu, Chen, Shao, Gao, Tian and Ji 2021, "ReCU: Reviving the Dead Weights in Binary Neural
    Networks", arXiv 2103.12369, section 4, and the authors' code (github.com/z-hXu/ReCU), from which constants are
    taken that could not be looked up in the paper. The code reports 92.2 % on CIFAR-10 with VGG-small, 600 epochs.
    """
    return Method(
        name="recu",
        title="ReCU",
        paper="Xu et al. 2021",
        url="https://arxiv.org/abs/2103.12369",
        bits_w=1,
        bits_a=1,
        block="conv_pool_bn_hardtanh",
        weight=ClampedWeight,
        activation=StandardSign,
        phases=widen,
        recipe=Recipe(
            optimizer="sgd",
            learning_rate=0.1,
            weight_decay=5e-4,
            decay_all=True,
            schedule="cosine",
            warmup=0.5,
            source="the authors' recipe for CIFAR-10 with batch 128, some ten epochs in place of 600 and half an epoch "
            "of warm-up in place of five: for short runs, which need their steps",
        ),
        recipes={
            "paper": Recipe(
                optimizer="sgd",
                learning_rate=0.1,
                weight_decay=5e-4,
                decay_all=True,
                schedule="cosine",
                warmup=5,
                epochs=600,
                batch_size=256,
                source="the authors' code for ResNet-18 on CIFAR-10 (z-hXu/ReCU, cifar/run.sh): SGD 0.1 with momentum "
                "0.9, decay 5e-4 of all parameters, five epochs of warm-up, then a cosine",
            ),
        },
    )


class ClampedWeight(Quantizer):
    r"""$q = \alpha\,\mathrm{sign}(Z)$ with $Z = \mathrm{clamp}(V, Q_{1-\tau}, Q_\tau)$, $V$ the standardised weight.

    $V = 2\sqrt2\,(W - \bar W) / \sqrt{\sigma^2 + 10^{-5}}$ for each output filter, with the unbiased variance, which
    gives a Laplace distribution the scale $b = 2$. $Q_\tau = -b \ln(2 - 2\tau) = -Q_{1-\tau}$ is its quantile, with
    $b$ estimated as the mean of $|V|$ over the layer. $\alpha = \lVert Z\rVert_1 / n$ of each filter is the best
    scale of the signs; the authors' code has a learned one in its place, whose size the batch norm behind it takes out.

    Gradient: $\partial L/\partial V = \alpha\,g \cdot 1\{|V| \le Q_\tau\}$, and from there through the
    standardisation; $\alpha$ and $Q_\tau$ are constants. (The code's convolution is of the signs, and $\alpha$
    multiplies its result: the gradient has that factor too.)
    Codes: 1 where ``W`` is at least its filter's mean; grid ``alpha * (2 code - 1)``.

    Attributes:
        tau: scalar, a buffer; 0.85 until `widen` sets it.

    Source: Xu et al. 2021, arXiv 2103.12369, section 4.
    """

    bits = 1
    signed = True
    tau: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("tau", torch.tensor(TAU[0]))

    def encode(self, x: Tensor) -> tuple[Tensor, Grid]:
        x = x.detach()
        return binary_codes(centre(x)), Grid(1, 2, -1, self._alpha(self._clamped(x)).float())

    def surrogate(self, x: Tensor) -> Tensor:
        z = self._clamped(x)
        return (z * self._alpha(z.detach())).to(x.dtype)

    def _clamped(self, weight: Tensor) -> Tensor:
        centred = centre(wide(weight))
        v = centred * (2 * math.sqrt(2)) / (deviation(centred, correction=1).square() + 1e-5).sqrt()
        bound = -v.detach().abs().mean() * (2 - 2 * self.tau).log()
        return torch.where(v.abs() <= bound, v, bound * ste.signs(v))

    @staticmethod
    def _alpha(z: Tensor) -> Tensor:
        return z.abs().mean(dim=axes(z, "filter"), keepdim=True)


class StandardSign(Signs):
    r"""$q = \mathrm{sign}(x)$, with a gradient that knows the size of $x$.

    Gradient: with $u = x / \sqrt{\sigma^2 + 10^{-5}}$, $\sigma^2$ the unbiased variance of each sample (axis 0) of
    the batch, $\partial L/\partial u = g \max(2 - 2|u|, 0)$ (see `lowbit.quantizers.ste.sign_polynomial`), and from
    there through the variance. A sample of a single number is left as it is.
    Codes: 1 where ``x >= 0``; grid ``2 code - 1``.

    Source: the authors' code (github.com/z-hXu/ReCU); the estimator is that of Liu et al. 2018, arXiv 1808.00278.
    """

    def surrogate(self, x: Tensor) -> Tensor:
        numbers = wide(x)
        if x.dim() > 1 and x[0].numel() > 1:
            variance = numbers.var(dim=tuple(range(1, x.dim())), keepdim=True)
            numbers = numbers / (variance + 1e-5).sqrt()
        return ste.sign_polynomial(numbers).to(x.dtype)


def widen(layers: Sequence[QuantizedLayer], share: float) -> None:
    r"""$\tau = A\,e^{share} + B$, which is 0.85 at 0 and 0.99 at 1."""
    low, high = TAU
    for layer in layers:
        if isinstance(layer.weight_quantizer, ClampedWeight):
            layer.weight_quantizer.tau.fill_(low + (high - low) * math.expm1(share) / (math.e - 1))
