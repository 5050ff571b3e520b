"""Binarized Neural Networks: sign on weights and activations, no scale."""

from __future__ import annotations

from functools import partial

from lowbit.methods.base import Method, Recipe, registry
from lowbit.quantizers.binary import SignQuantizer, clip_latent


@registry.register
def bnn(stochastic: bool = False) -> Method:
    r"""Weights and activations are their signs; latent weights are clipped to [-1, 1].

    Forward: $q = \mathrm{sign}(x)$ for weights and activations, with sign(0) = +1.
    Backward: $\partial L/\partial x = g \cdot 1\{|x| \le 1\}$ for both.
    After each step: $W \leftarrow \mathrm{clip}(W, -1, 1)$.
    Block order: convolution, pooling, batch norm, sign. The first layer has binary weights and reads the image as it
    is; the last layer is binary too, and its outputs go through a batch norm. Loss: squared hinge.

    Args:
        stochastic: in training, activations are $+1$ with probability $\mathrm{clip}((x+1)/2, 0, 1)$, else $-1$
            (equation 2), with the same gradient. Weights and evaluation stay deterministic, as in the paper's
            experiments with it.

    Source: Courbariaux, Hubara, Soudry, El-Yaniv and Bengio 2016, "Binarized Neural Networks", arXiv 1602.02830,
    section 1 and algorithm 1. The paper reports 10.15 % error on CIFAR-10.
    """
    return Method(
        name="bnn",
        title="Binarized Neural Networks",
        paper="Courbariaux, Hubara et al. 2016",
        url="https://arxiv.org/abs/1602.02830",
        bits_w=1,
        bits_a=1,
        block="conv_pool_bn",
        weight=SignQuantizer,
        activation=partial(SignQuantizer, stochastic),
        skip_first=False,
        skip_last=False,
        skip_shortcuts=False,
        projection=clip_latent,
        loss="squared_hinge",
        recipe=Recipe(
            optimizer="adam",
            learning_rate=3e-3,
            schedule="cosine",
            warmup=0.5,
            source="the paper's Adam, at three times the rate of its code, with a cosine to zero in place of 500 "
            "epochs of decay, and with augmentation, so that signs settle within some ten epochs",
        ),
        recipes={
            "paper": Recipe(
                optimizer="adam",
                learning_rate=1e-3,
                schedule="exponential",
                gamma=3e-4,
                epochs=500,
                batch_size=50,
                augment=False,
                source="the authors' Theano code for CIFAR-10 (MatthieuCourbariaux/BinaryNet, Train-time/cifar10.py): "
                "Adam from 1e-3 down to 3e-7 over 500 epochs, batch 50, images as they are; its rates scaled by each "
                "layer's initialisation cannot be said here, and its best of 5,000 validation images is --val-fraction "
                "0.1",
            ),
        },
    )
