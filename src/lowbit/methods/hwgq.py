"""Half-wave Gaussian quantization: activations on the levels that suit a rectified normal distribution best."""

from __future__ import annotations

from functools import cache, partial
from typing import Literal

import torch
from torch import Tensor

from lowbit.errors import check_choice
from lowbit.methods.base import Method, Recipe, registry
from lowbit.quantizers import ste
from lowbit.quantizers.base import Grid, Quantizer, wide
from lowbit.quantizers.binary import ScaledSign

Levels = Literal["uniform", "lloyd_max"]
Backward = Literal["clipped", "vanilla", "log_tailed"]

# Up to here it takes less time to compare with each bound than to search among them.
FEW_BITS = 3


@registry.register
def hwgq(bits_a: int = 2, levels: Levels = "uniform", backward: Backward = "clipped") -> Method:
    r"""Weights $\alpha\,\mathrm{sign}(W)$; activations the nearest of $2^k$ levels, chosen for a normal distribution.

    Problem: minimise $\int_0^\infty (Q(x) - x)^2 \varphi(x)\,dx$ over the levels of $Q$, $\varphi$ the density of
    $N(0, 1)$; what is below 0 becomes 0, as in a ReLU. A batch norm in front makes the inputs about normal.

    Forward, backward: `HalfWave` for activations; $\alpha\,\mathrm{sign}(W)$ per filter with the gradient of the
    identity for weights.
    Block order: convolution, pooling, batch norm, quantizer. First and last layers stay in float; what the last one
    reads goes through a ReLU, where the paper's goes through the activation quantizer.

    Args:
        bits_a: k, 1 to 8.
        levels: ``uniform`` steps, or the ``lloyd_max`` levels, which are closer but have no integer form: packed, their
            codes are looked up in a table and summed in float32.
        backward: ``clipped``, ``vanilla`` or ``log_tailed``, see `HalfWave`.

    Source: Cai, He, Sun and Vasconcelos 2017, "Deep Learning with Low Precision by Half-wave Gaussian Quantization",
    arXiv 1702.00953, sections 3 and 4. The paper reports 59.6 % top-1 with ResNet-18 on ImageNet for 2 bits.

    Raises:
        UsageError: an option is none of its choices.
    """
    make = partial(HalfWave, bits_a, levels, backward)
    make()
    return Method(
        name="hwgq",
        title="Half-wave Gaussian quantization",
        paper="Cai et al. 2017",
        url="https://arxiv.org/abs/1702.00953",
        bits_w=1,
        bits_a=bits_a,
        block="conv_pool_bn_float_last",
        weight=partial(ScaledSign, "identity"),
        activation=make,
        recipe=Recipe(
            optimizer="adamw",
            learning_rate=3e-3,
            weight_decay=1e-4,
            schedule="cosine",
            warmup=0.5,
            source="AdamW with a cosine in place of the authors' SGD with a line to zero over 200 epochs, for runs of "
            "some ten",
        ),
        recipes={
            "paper": Recipe(
                optimizer="sgd",
                learning_rate=0.01,
                weight_decay=5e-4,
                decay_all=True,
                schedule="linear",
                epochs=200,
                batch_size=100,
                source="the authors' Caffe code for a VGG on CIFAR-10 (zhaoweicai/hwgq, "
                "examples/cifar10/vgg-hwgq-3ne-clip-poly): SGD 0.01 with momentum 0.9 and a line to zero over 100,000 "
                "batches of 100, crop and flip, decay of all weights, latent ones too; here it reaches norms and "
                "biases as well, and 4 pixels of padding are ours",
            ),
        },
    )


class HalfWave(Quantizer):
    r"""$q = 0$ for $x \le 0$, else the nearest of the levels above 0; halfway between two it is the lower one.

    ```
     q_max ┤       ┌───   uniform, 2 bits: 0, D, 2D, 3D
           ┤    ┌──┘
           ┤    │         the first step rises at 0: a level next to 0 is never rounded to 0
         0 ┼────┘
    ```

    Gradient: $g \cdot 1\{0 < x \le q_{max}\}$ (``clipped``), $g \cdot 1\{x > 0\}$ (``vanilla``), or ``log_tailed``,
    which is ``clipped`` up to $q_{max}$ and $g / (x - \tau)$ above, $\tau = q_{max} - 1$.
    $+\infty$ becomes $q_{max}$, NaN becomes 0; the authors' code gives 0 for both.
    Codes: the number of the level; grid ``D * code``, or a table of levels.

    Args:
        bits: k, 1 to 8.
        levels: ``uniform`` or ``lloyd_max``.
        backward: ``clipped``, ``vanilla`` or ``log_tailed``.

    Raises:
        UsageError: an argument is none of its choices.

    Source: Cai et al. 2017, arXiv 1702.00953, sections 3.2 and 4.
    """

    signed = False

    def __init__(self, bits: int = 2, levels: Levels = "uniform", backward: Backward = "clipped") -> None:
        super().__init__()
        check_choice("bits_a of hwgq", bits, range(1, 9))
        check_choice("levels of hwgq", levels, ("uniform", "lloyd_max"))
        check_choice("backward of hwgq", backward, ("clipped", "vanilla", "log_tailed"))
        self.bits = bits
        self.backward_form = backward
        self.step = uniform_step(bits) if levels == "uniform" else None
        # Through float32, so that the gradient ends exactly where the values do.
        exact = lloyd_max_levels(bits) if self.step is None else torch.arange(1 << bits) * torch.tensor(self.step)
        self.levels: list[float] = torch.as_tensor(exact, dtype=torch.float32).tolist()

    def encode(self, x: Tensor) -> tuple[Tensor, Grid]:
        x = wide(x)
        levels = torch.tensor(self.levels, dtype=x.dtype, device=x.device)
        # Code k where bounds[k - 1] < x <= bounds[k], the first bound being 0; NaN lies above none.
        bounds = torch.cat([levels[:1], (levels[1:-1] + levels[2:]) / 2])
        # In the layout of x, which the next convolution would otherwise have to restore.
        codes = torch.zeros_like(x, dtype=torch.uint8)
        if self.bits <= FEW_BITS:
            for bound in bounds:
                codes += (x > bound).view(torch.uint8)
        else:
            numbers = x.nan_to_num(0.0, torch.inf, -torch.inf).contiguous()
            codes.copy_(torch.bucketize(numbers, bounds, out_int32=True))
        scale = torch.tensor(1.0 if self.step is None else self.step, device=x.device)
        return codes, Grid(self.bits, 1, 0, scale, levels.float() if self.step is None else None)

    def surrogate(self, x: Tensor) -> Tensor:
        top = self.levels[-1]
        half_wave = x.relu()
        if self.backward_form == "vanilla":
            return half_wave
        clipped = ste.clip(half_wave, 0, top)
        return clipped if self.backward_form == "clipped" else clipped + (x - top).relu().log1p()


@cache
def uniform_step(bits: int) -> float:
    r"""The step $D$ whose multiples $D, \ldots, (2^k - 1) D$ have the least mean squared error for a half normal $x$.

    Where the error is least, its derivative is 0: $D \sum_i i^2 p_i = \sum_i i\,m_i$, with $p_i$ and $m_i$ the
    probability and the first moment of what is rounded to $i D$. The bounds between levels are midpoints, where both
    levels err alike, so their own movement adds nothing. The root is found by bisection.

    Source: Cai et al. 2017, arXiv 1702.00953, section 3.2.
    """
    multiples = torch.arange(1, 1 << bits, dtype=torch.float64)
    low, high = 0.0, 2.0
    for _ in range(60):
        step = (low + high) / 2
        probability, moment = _cells(step * multiples)
        too_small = step * (multiples**2 * probability).sum() < (multiples * moment).sum()
        low, high = (step, high) if too_small else (low, step)
    return low


@cache
def lloyd_max_levels(bits: int) -> tuple[float, ...]:
    r"""0 and the $2^k - 1$ levels above it of least mean squared error for a half normal $x$, rising.

    Each level is then the mean of what is rounded to it, $l_i = m_i / p_i$ (see `uniform_step`). Lloyd's method repeats
    this assignment, slowly; Newton's method solves it in a few steps from quantiles of the best density of many levels,
    $\varphi^{1/3}$, which is that of $N(0, 3)$.

    Source: Lloyd 1982, "Least squares quantization in PCM"; Panter and Dite 1951 for the density.
    """

    def residual(levels: Tensor) -> Tensor:
        probability, moment = _cells(levels)
        return moment / probability - levels

    count = (1 << bits) - 1
    quantiles = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    levels = 3**0.5 * torch.special.ndtri(0.5 + quantiles / 2)
    while (error := residual(levels)).abs().max() > 1e-9:
        slope = torch.autograd.functional.jacobian(residual, levels)  # type: ignore[no-untyped-call]
        levels = levels - torch.linalg.solve(slope, error)
    return (0.0, *levels.tolist())


def _cells(levels: Tensor) -> tuple[Tensor, Tensor]:
    """Probability and first moment, under N(0, 1), of what is rounded to each of ``levels``, rising and above 0."""
    ends = levels.new_tensor([0.0, torch.inf])
    bounds = torch.cat([ends[:1], (levels[1:] + levels[:-1]) / 2, ends[1:]])
    density = (-(bounds**2) / 2).exp() / (2 * torch.pi) ** 0.5
    return torch.special.ndtr(bounds).diff(), -density.diff()
