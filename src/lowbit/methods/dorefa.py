"""DoReFa-Net: any number of bits for weights, activations and gradients."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from lowbit.errors import check_choice
from lowbit.methods.base import Method, Recipe, registry
from lowbit.quantizers import ste
from lowbit.quantizers.base import Grid, Quantizer, wide
from lowbit.quantizers.binary import ScaledSign

FLOAT = 32
WIDTHS = (*range(1, 9), FLOAT)


@registry.register
def dorefa(bits_w: int = 1, bits_a: int = 2, bits_g: int = 32) -> Method:
    r"""Weights, activations and gradients in any number of bits, by rounding on [0, 1].

    All three use $\mathrm{quantize}_k(r) = \mathrm{round}((2^k - 1)\,r) / (2^k - 1)$ for $r \in [0, 1]$, whose gradient
    is taken for 1; halves are rounded to even.

    Forward: `TanhWeight` for weights of 2 bits and more; $\mathrm{mean}|W|\,\mathrm{sign}(W)$, one mean for the layer,
    for 1 bit; `UnitActivation` for activations.
    Backward: the same; the gradient of each quantized layer's result is quantized by `quantize_gradient`.
    Block order: convolution, pooling, batch norm, quantizer. First and last layers stay in float; what the last one
    reads goes through a ReLU, where the paper's goes through the activation quantizer. With float activations:
    `conv_bn_act`.

    Args:
        bits_w: of weights, 1 to 8; 32 is float.
        bits_a: of activations, 1 to 8; 32 leaves them float, without clipping.
        bits_g: of gradients, 1 to 8; 32 is float.

    Source: Zhou et al. 2016, "DoReFa-Net", arXiv 1606.06160, sections 2.2 to 2.5. The paper reports 46.1 % top-1 with
    AlexNet on ImageNet for 1, 2 and 6 bits.

    Raises:
        UsageError: a number of bits is none of these.
    """
    for name, bits in (("bits_w", bits_w), ("bits_a", bits_a), ("bits_g", bits_g)):
        check_choice(f"{name} of dorefa", bits, WIDTHS)
    weights = {FLOAT: None, 1: partial(ScaledSign, "identity", per="layer")}
    return Method(
        name="dorefa",
        title="DoReFa-Net",
        paper="Zhou et al. 2016",
        url="https://arxiv.org/abs/1606.06160",
        bits_w=bits_w,
        bits_a=bits_a,
        bits_g=bits_g,
        block="conv_bn_act" if bits_a == FLOAT else "conv_pool_bn_float_last",
        weight=weights.get(bits_w, partial(TanhWeight, bits_w)),
        activation=None if bits_a == FLOAT else partial(UnitActivation, bits_a),
        gradient=None if bits_g == FLOAT else partial(quantize_gradient, bits=bits_g),
        recipe=Recipe(
            optimizer="adam",
            learning_rate=3e-3,
            schedule="cosine",
            warmup=0.5,
            source="the paper's Adam, with three times the rate and a cosine to zero in place of 200 epochs with one "
            "halving: for runs of some ten epochs",
        ),
        recipes={
            "paper": Recipe(
                optimizer="adam",
                learning_rate=1e-3,
                weight_decay=1e-7,
                schedule="step",
                milestones=(0.5,),
                gamma=0.5,
                epochs=200,
                augment=False,
                source="the reimplementation for SVHN (tensorpack, examples/DoReFa-Net/svhn-digit-dorefa.py), for the "
                "paper's own framework is not public: Adam 1e-3 halved after 100 of 200 epochs, batch 128, decay of "
                "the last layer, which reaches the first one here; its epsilon of 1e-5 and its changes of brightness "
                "and contrast cannot be said here. Its AlexNet on ImageNet has Adam 1e-4, divided by 5 at epochs 56 "
                "and 64 of 100",
            ),
        },
    )


class TanhWeight(Quantizer):
    r"""$q = 2\,\mathrm{quantize}_k\!\left(\frac{t}{2 \max|t|} + \frac12\right) - 1$ with $t = \tanh(W)$, for the layer.

    Gradient: $g\,(1 - t^2) / \max|t|$: rounding passes it on, the tanh keeps its own, and $\max|t|$ is a constant.
    Codes: $(2^k - 1)\,\mathrm{quantize}_k(\ldots)$; grid ``(2 code - (2^k - 1)) / (2^k - 1)``: odd multiples of a step,
    none of them 0.

    Args:
        bits: k, 2 to 8.

    Source: Zhou et al. 2016, arXiv 1606.06160, section 2.3.
    """

    signed = True

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.bits = bits

    def encode(self, x: Tensor) -> tuple[Tensor, Grid]:
        top = (1 << self.bits) - 1
        codes = (top * (self.surrogate(wide(x)) / 2 + 0.5)).round()
        return codes.to(torch.uint8), Grid(self.bits, 2, -top, torch.tensor(1 / top, device=x.device))

    def surrogate(self, x: Tensor) -> Tensor:
        t = torch.tanh(x)
        largest = t.detach().abs().max()
        return t / torch.where(largest > 0, largest, 1)


class UnitActivation(Quantizer):
    r"""$q = \mathrm{quantize}_k(\mathrm{clip}(x, 0, 1))$.

    Gradient: $g \cdot 1\{0 \le x \le 1\}$.
    Codes: $\mathrm{round}((2^k - 1)\,\mathrm{clip}(x, 0, 1))$; grid ``code / (2^k - 1)``.

    Args:
        bits: k, 1 to 8.

    Source: Zhou et al. 2016, arXiv 1606.06160, section 2.4.
    """

    signed = False

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.bits = bits

    def encode(self, x: Tensor) -> tuple[Tensor, Grid]:
        top = (1 << self.bits) - 1
        codes = (top * self.surrogate(wide(x))).round()
        return codes.to(torch.uint8), Grid(self.bits, 1, 0, torch.tensor(1 / top, device=x.device))

    def surrogate(self, x: Tensor) -> Tensor:
        return ste.clip(x, 0, 1)


def quantize_gradient(x: Tensor, bits: int) -> Tensor:
    r"""The identity, whose gradient is rounded at random to ``bits`` bits.

    Backward: $\partial L/\partial x = 2 m \left[\mathrm{quantize}_k\!\left(\frac{g}{2m} + \frac12 + N(k)\right) -
    \frac12\right]$ with $m = \max|g|$ over each sample of the batch (axis 0), and $N(k) = \sigma / (2^k - 1)$, $\sigma$
    uniform in $[-\frac12, \frac12)$. Its mean is $g$: the noise makes the rounding fair.

    Args:
        x: (N, ...).
        bits: k.

    Source: Zhou et al. 2016, arXiv 1606.06160, section 2.5.
    """
    return ste.map_gradient(x, partial(_round_at_random, top=(1 << bits) - 1))


def _round_at_random(gradient: Tensor, top: int) -> Tensor:
    g = gradient.float()
    largest = g.abs().amax(dim=tuple(range(1, g.dim())), keepdim=True)
    unit = g / (2 * torch.where(largest == 0, 1, largest)) + 0.5
    # The sum may round up to top + 1/2, which must not become one more level.
    codes = (top * unit + torch.rand_like(g) - 0.5).round().clamp(0, top)
    return 2 * largest * (codes / top - 0.5)
