"""XNOR-Net: binary weights with one scale per filter, binary activations."""

from __future__ import annotations

from functools import partial
from typing import Literal

from torch import Tensor

from lowbit.methods.base import Method, Recipe, registry
from lowbit.quantizers.binary import ScaledSign, SignQuantizer


def project(weight: Tensor, center: bool, clamp: bool) -> None:
    """Subtract from a latent weight its mean over the input channels and clip it to [-1, 1], as far as asked for."""
    if center and weight.shape[1] > 1:
        weight.sub_(weight.mean(dim=1, keepdim=True))
    if clamp:
        weight.clamp_(-1, 1)


@registry.register
def xnor_net(
    gradient: Literal["exact", "paper"] = "exact",
    center: bool = True,
    clamp: bool = True,
    relu: bool = False,
    k_map: bool = False,
) -> Method:
    r"""$W \approx \alpha\,\mathrm{sign}(W)$ per filter, activations are their signs.

    Problem: minimise $J(\alpha, B) = \lVert W - \alpha B\rVert^2 = \alpha^2 n - 2\alpha W^\top B + W^\top W$ over
    $\alpha > 0$, $B \in \{-1, 1\}^n$, for each output filter of $n$ weights. $B^* = \mathrm{sign}(W)$ maximises
    $W^\top B$, and $\partial J/\partial\alpha = 0$ gives $\alpha^* = W^\top B^*/n = \lVert W\rVert_1/n$.

    Forward: $\mathrm{sign}(x) * (\alpha\,\mathrm{sign}(W))$. With ``k_map`` this is multiplied by $K = \bar A * k$:
    $\bar A$ is the mean of $|x|$ over the input channels, $k$ a box filter of $1/(k_w k_h)$ with the convolution's own
    stride, zero padding and dilation. So each output gets the mean of all the $|x|$ that it sums, by the same least
    squares as $\alpha$. Each group of channels has its own $K$; in a linear layer it is one number per sample.
    Backward: see `ScaledSign` for the weights; $g \cdot 1\{|x| \le 1\}$ for the activations. $K$ is differentiated
    through, as $\alpha$ is, with $d|x|/dx = \mathrm{sign}(x)$ and 0 at 0. The paper does not say; some codes leave this
    part out.
    After each step (the projection of the authors' follow-up code): centre $W$ over its input channels, then clip it to
    [-1, 1]. A filter with a single input channel (a depthwise convolution) is not centred: nothing would be left of it.
    Block order: batch norm, sign, convolution (, ReLU), pooling. First and last layers stay in float. Dropout comes
    behind the sign, as in the code of 2018: what it drops adds nothing. $K$ is left out unless asked for, as in the
    authors' code: the paper found that it adds less than 1 % of top-1 accuracy with AlexNet on ImageNet.

    Args:
        gradient: ``exact`` differentiates through alpha; ``paper`` is the paper's shorter form.
        center: subtract from each latent weight the mean over the input channels, per filter and tap.
        clamp: clip the latent weights to [-1, 1].
        relu: a ReLU after each convolution, as in the NIN of 2018.
        k_map: scale each result by K, the mean magnitude of what it sums.

    Source: Rastegari, Ordonez, Redmon and Farhadi 2016, "XNOR-Net", arXiv 1603.05279, section 3; K in section 3.2,
    what it is worth on page 12.
    """

    return Method(
        name="xnor_net",
        title="XNOR-Net",
        paper="Rastegari et al. 2016",
        url="https://arxiv.org/abs/1603.05279",
        bits_w=1,
        bits_a=1,
        block="bn_act_conv_relu" if relu else "bn_act_conv",
        weight=partial(ScaledSign, gradient),
        activation=SignQuantizer,
        projection=partial(project, center=center, clamp=clamp) if center or clamp else None,
        k_map=k_map,
        recipe=Recipe(
            optimizer="adamw",
            learning_rate=3e-3,
            weight_decay=1e-4,
            schedule="cosine",
            warmup=0.5,
            source="AdamW with a cosine in place of the authors' Adam with steps, and of the SGD and Adam over 300 "
            "epochs of the 2018 codes, for runs of some ten epochs; decay spares latent weights, whose size means "
            "little",
        ),
        recipes={
            "paper": Recipe(
                optimizer="adam",
                learning_rate=1e-3,
                weight_decay=5e-4,
                decay_all=True,
                schedule="step",
                milestones=(18 / 55, 29 / 55, 43 / 55, 52 / 55),
                gamma=10**-0.5,
                epochs=55,
                batch_size=800,
                source="the authors' Torch code for AlexNet on ImageNet (allenai/XNOR-Net, train.lua and README): Adam "
                "with batch 800, 55 epochs of 1,500 batches each, the rate 1e-3, 5e-4, 1e-4, 5e-5 and 1e-5 from epochs "
                "1, 19, 30, 44 and 53, its factors of 1/2 and 1/5 in turn evened out here; decay of all parameters, "
                "which ends there with epoch 29 and goes on here",
            ),
            "bin_vgg16": Recipe(
                optimizer="sgd",
                learning_rate=0.1,
                schedule="step",
                milestones=(0.5, 2 / 3, 5 / 6),
                epochs=300,
                source="BIN_VGG16, 2018: SGD 0.1, momentum 0.9, divided by 10 at epochs 150, 200 and 250",
            ),
            "nin": Recipe(
                optimizer="adam",
                learning_rate=0.01,
                weight_decay=1e-5,
                schedule="step",
                milestones=(120 / 320, 200 / 320, 240 / 320, 280 / 320),
                epochs=320,
                augment=False,
                source="the 2018 NIN: Adam 0.01, weight decay 1e-5, divided by 10 at epochs 120, 200, 240 and 280. Its "
                "code multiplied the gradients of latent weights by the n weights of a filter before the decay was "
                "added, so that these decayed by an n-th of it: here not at all",
            ),
        },
    )
