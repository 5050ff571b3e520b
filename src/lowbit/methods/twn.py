"""Ternary Weight Networks: weights of three values, float activations."""

from __future__ import annotations

from functools import partial
from typing import Literal

import torch
from torch import Tensor

from lowbit.errors import check_choice
from lowbit.methods.base import Method, Recipe, registry
from lowbit.quantizers.base import Grid, Quantizer
from lowbit.quantizers.binary import axes


@registry.register
def twn(per: Literal["layer", "filter"] = "layer") -> Method:
    r"""$W \approx \alpha T$ with $T \in \{-1, 0, 1\}^n$; activations stay float.

    Problem: $\min \lVert W - \alpha T\rVert^2$ over $\alpha > 0$ and $T$. For a threshold $\Delta$ the best
    $\alpha$ is the mean of $|W_i|$ over $|W_i| > \Delta$, which leaves
    $\Delta^* = \arg\max \frac{1}{|I_\Delta|} (\sum_{i \in I_\Delta} |W_i|)^2$ with
    $I_\Delta = \{i : |W_i| > \Delta\}$. It has no closed form; uniform weights have $\frac{2}{3}$ of the mean of $|W|$,
    normal ones about $\frac{3}{4}$, and the paper takes 0.7 for all.

    Forward, backward: see `Ternary`.
    Block order: convolution, batch norm, ReLU, pooling. The last layer stays in float, as in the authors' code.

    Args:
        per: one threshold and one alpha for the ``layer``, as in the authors' Caffe code, or for each output
            ``filter``.

    Source: Li, Zhang and Liu 2016, "Ternary Weight Networks", arXiv 1605.04711, section 2.
    """
    return Method(
        name="twn",
        title="Ternary Weight Networks",
        paper="Li, Zhang and Liu 2016",
        url="https://arxiv.org/abs/1605.04711",
        bits_w=2,
        bits_a=32,
        block="conv_bn_act",
        weight=partial(Ternary, per),
        skip_first=False,
        recipe=Recipe(
            optimizer="adamw",
            learning_rate=3e-3,
            weight_decay=1e-4,
            schedule="cosine",
            warmup=0.5,
            source="AdamW with a cosine in place of the authors' SGD with steps over 150 epochs, for runs of some ten",
        ),
        recipes={
            "paper": Recipe(
                optimizer="sgd",
                learning_rate=0.1,
                schedule="step",
                milestones=(29 / 150, 59 / 150, 89 / 150, 119 / 150, 149 / 150),
                epochs=150,
                batch_size=100,
                source="the authors' later code for VGG-7 on CIFAR-10 (Thinklab-SJTU/twns, main_cifar10.py), for their "
                "Caffe settings of 2016 were not found: SGD 0.1 with momentum 0.9, divided by 10 when epochs 30, 60, "
                "90, 120 and 150 begin, batch 100; its weight decay of 1e-5 never reaches the optimizer",
            ),
        },
    )


class Ternary(Quantizer):
    r"""$q_i = \alpha$ where $W_i > \Delta$, $-\alpha$ where $W_i < -\Delta$, else 0.

    $\Delta = 0.7\,\mathrm{mean}|W|$; $\alpha$ is the mean of $|W_i|$ over $|W_i| > \Delta$.
    Gradient: $g_i$, for the latent weight takes the gradient of the ternary one (algorithm 1).
    Codes: $T + 1$; grid ``alpha * (code - 1)``.

    Args:
        per: what has one threshold and one alpha: the ``layer`` or each output ``filter``.

    Raises:
        UsageError: ``per`` is neither.

    Source: Li, Zhang and Liu 2016, arXiv 1605.04711, section 2.
    """

    bits = 2
    signed = True

    def __init__(self, per: Literal["layer", "filter"] = "layer") -> None:
        super().__init__()
        check_choice("what has one threshold", per, ("layer", "filter"))
        self.per = per

    def encode(self, x: Tensor) -> tuple[Tensor, Grid]:
        size, over = x.detach().abs(), axes(x, self.per)
        delta = 0.7 * size.mean(dim=over, keepdim=True)
        kept = size > delta
        count = kept.sum(dim=over, keepdim=True).clamp_(min=1)
        alpha = (size * kept).sum(dim=over, keepdim=True) / count
        return (x > delta).to(torch.uint8) + (x >= -delta), Grid(2, 1, -1, alpha)
