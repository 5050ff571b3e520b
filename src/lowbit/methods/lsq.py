"""LSQ: the step of each grid is learned, together with the weights."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from lowbit.errors import check_choice
from lowbit.methods.base import Method, Recipe, registry
from lowbit.quantizers import ste
from lowbit.quantizers.affine import quantize
from lowbit.quantizers.base import Grid, Quantizer, wide

# Below it a step would be no divisor any more.
LEAST = 2.0**-30


@registry.register
def lsq(bits_w: int = 2, bits_a: int = 2) -> Method:
    r"""Uniform levels of few bits, whose step is a parameter of the layer and has a gradient of its own.

    Forward, backward: `LearnedStep` for weights, signed, and for activations, unsigned; one step for each.
    Block order: convolution, batch norm, ReLU, pooling, quantizer, as in the float twin, whose weights fit: the paper
    starts from a trained float network (``--recipe fine_tune --init-from runs/FLOAT``).
    First and last layers stay in float here. The paper gives them 8 bits, which a program can do by name:
    ``quantize_(model, "lsq", overrides={"fc": lsq(bits_w=8, bits_a=8)})``.

    Args:
        bits_w: of weights, 2 to 8.
        bits_a: of activations, 1 to 8.

    Source: Esser, McKinstry, Bablani, Appuswamy and Modha 2019, "Learned Step Size Quantization", arXiv 1902.08153,
    section 2.

    Raises:
        UsageError: a number of bits is none of these.
    """
    check_choice("bits_w of lsq", bits_w, range(2, 9))
    check_choice("bits_a of lsq", bits_a, range(1, 9))
    return Method(
        name="lsq",
        title="Learned Step Size Quantization",
        paper="Esser et al. 2019",
        url="https://arxiv.org/abs/1902.08153",
        bits_w=bits_w,
        bits_a=bits_a,
        block="conv_bn_act",
        weight=partial(LearnedStep, bits_w, signed=True),
        activation=partial(LearnedStep, bits_a, signed=False),
        recipe=FROM_SCRATCH,
        recipes={
            "fine_tune": FINE_TUNE,
            "paper": replace(
                FINE_TUNE,
                weight_decay=DECAY.get(bits_w, 1e-4),
                epochs=90,
                source="for ResNets on ImageNet, to be run with --init-from a float network: SGD 0.01 with momentum "
                "0.9, cosine, 90 epochs and decay 1e-4 as a reproduction reports them (hustzxd/LSQuantization); quoted "
                "from memory of the paper: half the decay for 3 bits, a quarter for 2, and for 8 bits one epoch at "
                "0.001. The size of a batch could not be looked up, nor whether decay reaches norms and steps, as it "
                "does here",
            ),
        },
    )


FROM_SCRATCH = Recipe(
    optimizer="sgd",
    learning_rate=0.05,
    weight_decay=1e-4,
    decay_all=True,
    schedule="cosine",
    warmup=1,
    source="the paper's SGD with momentum 0.9 and cosine, without its start from a float network and so with a larger "
    "rate, which is ours, in some ten epochs; decay reaches latent weights, norms and steps",
)
FINE_TUNE = Recipe(
    optimizer="sgd",
    learning_rate=0.01,
    weight_decay=1e-4,
    decay_all=True,
    schedule="cosine",
    source="the paper's recipe with some ten epochs in place of 90, for short runs, and with the decay that it has for "
    "4 bits",
)
# Of the paper's ResNet-18, by the bits of weights; 1e-4 for more.
DECAY = {2: 0.25e-4, 3: 0.5e-4}


class LearnedStep(Quantizer):
    r"""$q = s\,\mathrm{round}(\mathrm{clip}(x / s, -Q_N, Q_P))$ with a learned step $s$; halves go to even.

    With $b$ bits $Q_N = 2^{b-1}$, $Q_P = 2^{b-1} - 1$ (signed) or $Q_N = 0$, $Q_P = 2^b - 1$.

    Gradient: $\partial L/\partial x = g \cdot 1\{-Q_N < x / s < Q_P\}$ and
    $\frac{\partial L}{\partial s} = \frac{1}{\sqrt{N Q_P}} \sum g\,d$, where $d$ is
    $\mathrm{round}(x / s) - x / s$ inside that range, $-Q_N$ below and $Q_P$ above. $N$ counts the weights of the
    layer, or the features that one sample brings to it; some codes count the whole batch.
    Codes: $\mathrm{round}(\ldots) + Q_N$; grid ``s * (code - Q_N)``.

    $s$ begins as $2\,\mathrm{mean}|x| / \sqrt{Q_P}$ of what is read first in ``train()``: the weights, or the first
    batch. Until then weights take that step anew each time, and activations one that reaches up to 4; in ``eval()`` the
    latter gives a warning.

    Args:
        bits: b, 1 to 8; at least 2 if signed.
        signed: for weights, whose first axis is no batch.

    Attributes:
        step: the learned $s$, a scalar parameter. One that was moved below 2^-30 counts as that.
        started: bool scalar, a buffer: whether ``step`` has had its start.

    Source: Esser et al. 2019, arXiv 1902.08153, section 2.
    """

    started: Tensor

    def __init__(self, bits: int, signed: bool) -> None:
        super().__init__()
        self.bits = bits
        self.signed = signed
        self.lowest = -(1 << (bits - 1)) if signed else 0
        self.highest = self.lowest + (1 << bits) - 1
        self.step = nn.Parameter(torch.tensor(4 / self.highest))
        self.register_buffer("started", torch.tensor(False))

    def forward(self, x: Tensor) -> Tensor:
        if self.training and not self.started:
            self._start(x)
        return super().forward(x)

    def encode(self, x: Tensor) -> tuple[Tensor, Grid]:
        if self.started:
            step = self.step.detach()
        elif self.signed:
            step = self._first(x)
        else:
            step = self.step.detach()
            if not self.training:
                warnings.warn(UNSEEN, stacklevel=2)
        scale = step.float().clamp(min=LEAST)
        return quantize(x, scale, torch.full_like(scale, -self.lowest), self.bits), Grid(
            self.bits, 1, self.lowest, scale
        )

    def surrogate(self, x: Tensor) -> Tensor:
        numbers = wide(x)
        terms = numbers.numel() if self.signed or not x.dim() else numbers[0].numel()
        share = 1 / math.sqrt(max(terms, 1) * self.highest)
        step = ste.at_least(ste.map_gradient(self.step, lambda g: share * g), LEAST)
        steps = numbers / step
        rounded = ste.substitute(steps.detach().round(), steps)
        inside = (steps > self.lowest) & (steps < self.highest)
        ends = steps.detach().clamp(self.lowest, self.highest)
        return (torch.where(inside, rounded, ends) * step).to(x.dtype)

    @torch.no_grad()
    def _start(self, x: Tensor) -> None:
        first = self._first(x)
        if bool(first.isfinite()) and first > 0:
            self.step.copy_(first)
            self.started.fill_(True)

    def _first(self, x: Tensor) -> Tensor:
        return 2 * wide(x.detach()).abs().mean() / math.sqrt(self.highest)


UNSEEN = (
    "an activation quantizer has seen no data, so its step reaches up to 4; "
    "run a batch through the model in train() first"
)
