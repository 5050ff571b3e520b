"""PACT: activations are clipped where the network learns to clip them."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from lowbit.errors import UsageError, check_choice
from lowbit.methods.base import Method, Recipe, registry
from lowbit.methods.dorefa import TanhWeight
from lowbit.quantizers import ste
from lowbit.quantizers.affine import quantize
from lowbit.quantizers.base import Grid, Quantizer, wide
from lowbit.quantizers.binary import ScaledSign

# Below it a grid would be all zeros, and its step no float32.
LEAST = 2.0**-20


@registry.register
def pact(bits_w: int = 4, bits_a: int = 4, alpha: float = 10.0, decay: float = 2e-4) -> Method:
    r"""A ReLU that saturates at a learned level: activations in $[0, \alpha]$, on $2^k$ levels.

    Forward, backward: `ClippedReLU` for activations, one $\alpha$ for each layer; DoReFa-Net's weights, as in the
    paper: `TanhWeight` for 2 bits and more, $\mathrm{mean}|W|\,\mathrm{sign}(W)$ of the layer for 1 bit.
    Regularisation: the loss has the term $\frac{\lambda}{2} \alpha^2$ of each layer, which pulls $\alpha$ down from
    where nothing is clipped and it has no other gradient. Here its gradient $\lambda\,\alpha$ is added to that of
    $\alpha$ on its way back, whatever the optimizer; a reported loss does not count it.
    Block order: convolution, batch norm, ReLU, pooling, quantizer, as in the float twin, whose weights fit. The ReLU in
    front changes nothing but what a shortcut reads: in a residual network that is not quantized, where the paper's
    activation stands in its place. First and last layers stay in float.
    SAWB, the same authors' later quantizer for weights (arXiv 1807.06964), is left out.

    Args:
        bits_w: of weights, 1 to 8.
        bits_a: k, 1 to 8.
        alpha: where $\alpha$ begins in each layer, above 0. The paper wants it large; 10 is what open implementations
            take, for the paper's own number could not be looked up. With few bits and a short training, a start near
            the size of the activations, such as 3, wastes fewer levels.
        decay: $\lambda$, at least 0. The paper gives $\alpha$ the factor of the weights' own decay.

    Source: Choi, Wang, Venkataramani, Chuang, Srinivasan and Gopalakrishnan 2018, "PACT: Parameterized Clipping
    Activation for Quantized Neural Networks", arXiv 1805.06085, section 3.

    Raises:
        UsageError: an option is none of its choices.
    """
    check_choice("bits_w of pact", bits_w, range(1, 9))
    activation = partial(ClippedReLU, bits_a, alpha, decay)
    activation()
    return Method(
        name="pact",
        title="PACT",
        paper="Choi et al. 2018",
        url="https://arxiv.org/abs/1805.06085",
        bits_w=bits_w,
        bits_a=bits_a,
        block="conv_bn_act",
        weight=partial(ScaledSign, "identity", per="layer") if bits_w == 1 else partial(TanhWeight, bits_w),
        activation=activation,
        recipe=Recipe(
            optimizer="sgd",
            learning_rate=0.1,
            weight_decay=2e-4,
            schedule="cosine",
            warmup=1,
            source="the paper's SGD 0.1 with momentum 0.9 and decay 2e-4, with a warm-up and a cosine in place of "
            "steps over 200 epochs, for runs of some ten; latent weights are not decayed",
        ),
        recipes={
            "paper": Recipe(
                optimizer="sgd",
                learning_rate=0.1,
                weight_decay=2e-4,
                schedule="step",
                milestones=(60 / 200, 120 / 200),
                epochs=200,
                source="the paper's for ResNet-20 on CIFAR-10, as a reproduction gives it (github.com/App0lyon/PACT): "
                "SGD 0.1 with momentum 0.9, divided by 10 after epochs 60 and 120 of 200, decay 2e-4; batch 128 and "
                "crop and flip are quoted from memory. Decay spares latent weights here: decay_all would reach alpha, "
                "which has its own",
            ),
        },
    )


class ClippedReLU(Quantizer):
    r"""$q = s\,\mathrm{round}(y / s)$ with $y = \min(\max(x, 0), \alpha)$ and $s = \alpha / (2^k - 1)$.

    ```
      alpha ┤        ┌───
            ┤     ┌──┘
            ┤  ┌──┘       alpha is learned
          0 ┼──┘
    ```

    Gradient: $\partial L/\partial x = g \cdot 1\{0 \le x < \alpha\}$ and
    $\partial L/\partial\alpha = \sum g \cdot 1\{x \ge \alpha\} + \lambda\,\alpha$, the last term from the
    regularisation, added once for each backward pass, and as it is: a loss that is scaled (`torch.amp.GradScaler`) or
    summed over several passes wants ``decay=0`` and the optimizer's own decay of $\alpha$. NaN becomes 0.
    Codes: $\mathrm{round}(y / s)$; grid ``s * code``.

    Args:
        bits: k, 1 to 8.
        alpha: where $\alpha$ begins.
        decay: $\lambda$.

    Attributes:
        alpha: the learned $\alpha$, a scalar parameter. One that a step took below 2^-20 counts as that.

    Raises:
        UsageError: an argument is none of its choices.

    Source: Choi et al. 2018, arXiv 1805.06085, section 3.
    """

    signed = False

    def __init__(self, bits: int = 4, alpha: float = 10.0, decay: float = 2e-4) -> None:
        super().__init__()
        check_choice("bits_a of pact", bits, range(1, 9))
        if not alpha > 0:
            raise UsageError(f"alpha of pact is {alpha}, but must be above 0")
        if not decay >= 0:
            raise UsageError(f"decay of pact is {decay}, but must be at least 0")
        self.bits = bits
        self.decay = decay
        self.alpha = nn.Parameter(torch.tensor(float(alpha)))

    def encode(self, x: Tensor) -> tuple[Tensor, Grid]:
        scale = self.alpha.detach().float().clamp(min=LEAST) / ((1 << self.bits) - 1)
        return quantize(x, scale, torch.zeros_like(scale), self.bits), Grid(self.bits, 1, 0, scale)

    def surrogate(self, x: Tensor) -> Tensor:
        numbers = wide(x)
        alpha = ste.at_least(ste.map_gradient(self.alpha, lambda g: g + self.decay * self.alpha.detach()), LEAST)
        return torch.where(numbers < 0, 0, torch.where(numbers >= alpha, alpha, numbers)).to(x.dtype)
