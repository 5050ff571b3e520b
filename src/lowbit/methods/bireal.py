"""Bi-Real Net: scaled binary weights, signs whose gradient is a piecewise polynomial, a shortcut around each layer."""

from functools import partial

from lowbit.methods.base import Method, Recipe, registry
from lowbit.quantizers.binary import PolynomialSign, ScaledSign


@registry.register
def bireal() -> Method:
    r"""$W \approx \alpha\,\mathrm{sign}(W)$ per filter, activations are their signs, with gradients of their own.

    Forward: $\mathrm{sign}(x) * (\alpha\,\mathrm{sign}(W))$, $\alpha = \lVert W\rVert_1/n$ for each filter of $n$
    weights.
    Backward: $g\,(2 + 2x)$ for $-1 \le x < 0$, $g\,(2 - 2x)$ for $0 \le x < 1$, else 0, for the activations;
    $\alpha\,g \cdot 1\{|W| \le 1\}$ for the weights, the "magnitude-aware" gradient.
    Block order: sign, convolution, batch norm; no other activation. First and last layers and those of shortcuts stay
    in float. The shortcut around each convolution, which keeps the sums that sign throws away, is the model's:
    ``patchnet`` and ``poolnet`` have it, ResNets have it with ``shortcut=conv``. The paper starts from a trained float
    network whose ReLU was replaced by a clip; here ``--init-from`` takes any.

    Source: Liu, Wu, Luo, Yang, Liu and Cheng 2018, "Bi-Real Net", arXiv 1808.00278, section 3.
    """
    return Method(
        name="bireal",
        title="Bi-Real Net",
        paper="Liu et al. 2018",
        url="https://arxiv.org/abs/1808.00278",
        bits_w=1,
        bits_a=1,
        block="conv_bn",
        weight=partial(ScaledSign, "constant"),
        activation=PolynomialSign,
        recipe=Recipe(
            optimizer="adamw",
            learning_rate=3e-3,
            schedule="linear",
            warmup=0.5,
            source="the line to zero of the authors' PyTorch code with AdamW at three times its rate, without its "
            "label smoothing, and in some ten epochs in place of 256, for short runs",
        ),
        recipes={
            "paper": Recipe(
                optimizer="adam",
                learning_rate=1e-3,
                schedule="linear",
                epochs=256,
                batch_size=512,
                label_smoothing=0.1,
                source="the authors' PyTorch code for ImageNet (liuzechun/Bi-Real-net, "
                "pytorch_implementation/BiReal18_34): Adam 1e-3 with a line to zero, no decay, from scratch; its crops "
                "of random size and its changes of colour cannot be said here. Their Caffe code of the paper has SGD "
                "0.01 with momentum 0.9 and no decay, divided by 10 after 100,000 and 140,000 of 180,000 batches",
            ),
        },
    )
