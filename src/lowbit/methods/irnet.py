"""IR-Net: balanced binary weights, and a gradient that becomes the sign's own during training."""

from __future__ import annotations

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

SHARPNESS = 0.1, 10.0


@registry.register
def irnet() -> Method:
    r"""Signs of centred and standardised weights times a power of two; signs of activations; a gradient in motion.

    Forward: `LibraWeight` for weights, $\mathrm{sign}(x)$ for activations (`DecayingSign`).
    Backward (error decay estimator), for both: the gradient of $k \tanh(t x)$, which is
    $g\,k\,t\,(1 - \tanh^2(t x))$, with $t = t_{min}\,(t_{max} / t_{min})^{e / E}$ in epoch $e$ of $E$, counted from 0,
    $t_{min} = 0.1$, $t_{max} = 10$ and $k = \max(1/t, 1)$. So training begins with about the identity's gradient, which
    moves all weights, and ends near the sign's, which is accurate. `start_epoch` sets $t$ before each epoch, from the
    share of the epochs alone; a plain loop calls it too. It changes no value, so evaluation does not depend on it.
    (The authors' code for ResNet-20 has $t_{min} = 0.001$; for what the network reads, the numbers are the paper's.)
    Block order, as in the authors' VGG-small: convolution, pooling, batch norm, Hardtanh, quantizer. First and last
    layers stay in float, and so do those of shortcuts. In the authors' ResNet-20 a shortcut goes around each
    convolution: ``--set model.shortcut=conv``.

    Source: Qin, Gong, Liu, Shen, Wei, Yu and Song 2019, "Forward and Backward Information Retention for Accurate Binary
    Neural Networks", arXiv 1909.10788, section 3, and the authors' code (github.com/htqin/IR-Net).
    """
    return Method(
        name="irnet",
        title="IR-Net",
        paper="Qin et al. 2019",
        url="https://arxiv.org/abs/1909.10788",
        bits_w=1,
        bits_a=1,
        block="conv_pool_bn_hardtanh",
        weight=LibraWeight,
        activation=DecayingSign,
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
                source="the authors' code for ResNet-20 on CIFAR-10 (htqin/IR-Net, CIFAR-10/ResNet20/1w1a/trainer.py): "
                "SGD 0.1 with momentum 0.9, decay 1e-4 of all parameters, cosine, batch 128, crop and flip. Its "
                "sharpness there begins at 0.001 and not at 0.1, which cannot be said here; its VGG-small has rate "
                "0.007 and 300 epochs",
            ),
        },
    )


class SharpenedQuantizer(Quantizer):
    """A quantizer whose gradient gets closer to the sign's own.

    Attributes:
        sharpness: t, 0.1 until `sharpen` sets it. It is not saved: it follows from the epoch.
    """

    sharpness: float = SHARPNESS[0]


class LibraWeight(SharpenedQuantizer):
    r"""$q = 2^s\,\mathrm{sign}(Z)$ with $Z = (W - \bar W) / \sigma(W - \bar W)$ for each output filter of $n$ weights.

    $\sigma$ is the unbiased standard deviation, and $s = \mathrm{round}(\log_2(\lVert Z\rVert_1 / n))$. Centring
    balances the signs, for the most information; the power of two is a shift in hardware.

    Gradient: $\partial L/\partial Z = g\,2^s\,k\,t\,(1 - \tanh^2(t Z))$, and from there through $\sigma$ and the mean;
    $s$ is a constant. In a filter of equal weights $\sigma$ is taken for 1.
    Codes: 1 where ``W`` is at least its filter's mean; grid ``2^s * (2 code - 1)``.

    Source: Qin et al. 2019, arXiv 1909.10788, sections 3.2 and 3.3.
    """

    bits = 1
    signed = True

    def encode(self, x: Tensor) -> tuple[Tensor, Grid]:
        x = x.detach()
        return binary_codes(centre(x)), Grid(1, 2, -1, self._scale(self._standardised(x)).float())

    def surrogate(self, x: Tensor) -> Tensor:
        z = self._standardised(x)
        return (ste.tanh_sign(z, self.sharpness) * self._scale(z.detach())).to(x.dtype)

    @staticmethod
    def _standardised(weight: Tensor) -> Tensor:
        centred = centre(wide(weight))
        return centred / deviation(centred, correction=1)

    @staticmethod
    def _scale(z: Tensor) -> Tensor:
        size = z.abs().mean(dim=axes(z, "filter"), keepdim=True)
        return torch.where(size > 0, size, 1).log2().round().exp2()


class DecayingSign(SharpenedQuantizer, Signs):
    r"""$q = \mathrm{sign}(x)$.

    Gradient: $g\,k\,t\,(1 - \tanh^2(t x))$ with $k = \max(1/t, 1)$ (see `lowbit.quantizers.ste.tanh_sign`).
    Codes: 1 where ``x >= 0``; grid ``2 code - 1``.

    Source: Qin et al. 2019, arXiv 1909.10788, section 3.3.
    """

    def forward(self, x: Tensor) -> Tensor:
        return ste.tanh_sign(x, self.sharpness)


def sharpen(layers: Sequence[QuantizedLayer], share: float) -> None:
    r"""$t = t_{min}\,(t_{max} / t_{min})^{share}$ for all quantizers whose gradient has a sharpness."""
    low, high = SHARPNESS
    for layer in layers:
        for quantizer in (layer.weight_quantizer, layer.activation_quantizer):
            if isinstance(quantizer, SharpenedQuantizer):
                quantizer.sharpness = low * (high / low) ** share
