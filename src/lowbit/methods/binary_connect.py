"""BinaryConnect: weights are their signs, activations stay float."""

from __future__ import annotations

from functools import partial

from lowbit.methods.base import Method, Recipe, registry
from lowbit.quantizers.binary import SignQuantizer, clip_latent


@registry.register
def binary_connect(stochastic: bool = False) -> Method:
    r"""Weights are their signs, so that sums need no products; activations stay float.

    Problem: minimise the loss over $W \in \{-1, 1\}^n$; gradient steps far smaller than 2 gather in a latent float
    weight.

    Forward: $q = \mathrm{sign}(W)$, with sign(0) = +1.
    Backward: $\partial L/\partial W = g$, as long as $|W| \le 1$, which the clipping sees to (see `SignQuantizer`).
    After each step: $W \leftarrow \mathrm{clip}(W, -1, 1)$.
    Block order: convolution, pooling, batch norm, ReLU. All layers have binary weights, first and last too; the outputs
    of the last go through a batch norm. Loss: squared hinge. The paper scales the learning rate of each layer by its
    initialisation; that is left out.

    Args:
        stochastic: in training, weights are $+1$ with probability $\mathrm{clip}((W+1)/2, 0, 1)$, else $-1$. Evaluation
            takes their signs, where the paper's takes the latent float weights: a packed network has only the signs.

    Source: Courbariaux, Bengio and David 2015, "BinaryConnect", arXiv 1511.00363, sections 2.2 to 2.6 and algorithm 1.
    """
    return Method(
        name="binary_connect",
        title="BinaryConnect",
        paper="Courbariaux, Bengio and David 2015",
        url="https://arxiv.org/abs/1511.00363",
        bits_w=1,
        bits_a=32,
        block="conv_pool_bn_act",
        weight=partial(SignQuantizer, stochastic),
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
            source="the paper's Adam and the rate of its code, with a cosine to zero in place of 500 epochs of "
            "exponential decay, and with augmentation, so that signs settle within some ten epochs",
        ),
        recipes={
            "paper": Recipe(
                optimizer="adam",
                learning_rate=3e-3,
                schedule="exponential",
                gamma=2 / 3000,
                epochs=500,
                batch_size=50,
                augment=False,
                source="the authors' code for CIFAR-10 (MatthieuCourbariaux/BinaryConnect, cifar10.py, with "
                "stochastic=True): Adam from 3e-3 down to 2e-6 over 500 epochs, batch 50, no augmentation; its "
                "whitened images and its rates scaled by each layer's initialisation cannot be said here, and its best "
                "of 5,000 validation images is --val-fraction 0.1",
            ),
        },
    )
