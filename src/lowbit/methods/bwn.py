"""Binary-Weight-Networks: binary weights with one scale per filter, float activations."""

from __future__ import annotations

from functools import partial
from typing import Literal

from lowbit.methods.base import Method, Recipe, registry
from lowbit.quantizers.binary import ScaledSign, clip_latent


@registry.register
def bwn(gradient: Literal["exact", "paper"] = "exact") -> Method:
    r"""$W \approx \alpha\,\mathrm{sign}(W)$ per filter; activations stay float.

    Problem: the nearest scaled binary filter, $\min \lVert W - \alpha B\rVert^2$ over $\alpha > 0$ and
    $B \in \{-1, 1\}^n$; `xnor_net` derives $B^* = \mathrm{sign}(W)$, $\alpha^* = \lVert W\rVert_1/n$.

    Forward: $x * (\alpha\,\mathrm{sign}(W))$.
    Backward: see `ScaledSign`.
    After each step: $W \leftarrow \mathrm{clip}(W, -1, 1)$, as in the authors' code, which keeps weights inside the
    window of the gradient.
    Block order: convolution, batch norm, ReLU, pooling. First and last layers stay in float.

    Args:
        gradient: ``exact`` differentiates through alpha; ``paper`` is the paper's shorter form.

    Source: Rastegari, Ordonez, Redmon and Farhadi 2016, "XNOR-Net", arXiv 1603.05279, section 3.1. The paper reports
    60.8 % top-1 with ResNet-18 on ImageNet.
    """
    return Method(
        name="bwn",
        title="Binary-Weight-Networks",
        paper="Rastegari et al. 2016",
        url="https://arxiv.org/abs/1603.05279",
        bits_w=1,
        bits_a=32,
        block="conv_bn_act",
        weight=partial(ScaledSign, gradient),
        projection=clip_latent,
        recipe=Recipe(
            optimizer="adamw",
            learning_rate=3e-3,
            weight_decay=1e-4,
            schedule="cosine",
            warmup=0.5,
            source="xnor_net's, so that the two can be compared: AdamW with a cosine in place of the SGD with steps of "
            "the authors' code, and for runs of some ten epochs",
        ),
        recipes={
            "paper": Recipe(
                optimizer="sgd",
                learning_rate=0.01,
                weight_decay=5e-4,
                decay_all=True,
                schedule="step",
                milestones=(18 / 55, 29 / 55, 43 / 55, 52 / 55),
                gamma=10**-0.5,
                epochs=55,
                source="the authors' Torch code for AlexNet on ImageNet (allenai/XNOR-Net, train.lua and README): SGD "
                "with momentum 0.9 and batch 128, 55 epochs of 2,500 batches each, the rate 0.01, 0.005, 0.001, 0.0005 "
                "and 0.0001 from epochs 1, 19, 30, 44 and 53, its factors of 1/2 and 1/5 in turn evened out here; "
                "decay of all parameters, which ends there with epoch 29 and goes on here",
            ),
        },
    )
