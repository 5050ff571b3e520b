"""ReActNet: Bi-Real Net with learned shifts in front of the signs and around PReLUs."""

from functools import partial

from lowbit.methods.base import Method, Recipe, registry
from lowbit.quantizers.binary import PolynomialSign, ScaledSign


@registry.register
def reactnet(shifts: bool = True) -> Method:
    r"""Signs and PReLUs learn, by channel, where they bend.

    Forward: RSign, $\mathrm{sign}(x - \alpha_c)$, in front of each binary convolution with $s\,\mathrm{sign}(W)$,
    $s = \lVert W\rVert_1/n$ for each filter of $n$ weights; RPReLU behind the sum with the shortcut,
    $\mathrm{PReLU}(x - \gamma_c) + \zeta_c$ with the slope $\beta_c$ below zero. $\alpha$, $\beta$, $\gamma$ and
    $\zeta$ are learned.
    Backward: $g\,\max(0, 2 - 2|x - \alpha_c|)$ through the sign, as in Bi-Real Net; $s\,g \cdot 1\{|W| \le 1\}$ for the
    weights.
    Block order: shift, sign, convolution, batch norm, RPReLU. First and last layers and those of shortcuts stay in
    float. The model brings the shortcuts: ``patchnet``, ``poolnet``, or a ResNet with ``shortcut=conv``. The paper's
    distributional loss against a float teacher is an option of training (``--distill-from``), its first stage a run
    with float weights to start from.

    Args:
        shifts: learn $\gamma$ and $\zeta$ too. Without them ($\gamma = \zeta = 0$) a network with batch norms and
            identity shortcuts can still compute the same: the batch norm's shift stands for $\gamma$, and $\zeta$ goes
            into the next layers' shifts. A training step then makes fewer passes over memory.

    Source: Liu, Shen, Savvides and Cheng 2020, "ReActNet", arXiv 2003.03488, sections 4.2 to 4.4.
    """
    return Method(
        name="reactnet",
        title="ReActNet",
        paper="Liu et al. 2020",
        url="https://arxiv.org/abs/2003.03488",
        bits_w=1,
        bits_a=1,
        block="shift_conv_bn_rprelu" if shifts else "shift_conv_bn_prelu",
        weight=partial(ScaledSign, "constant"),
        activation=PolynomialSign,
        recipe=Recipe(
            optimizer="adamw",
            learning_rate=3e-3,
            schedule="linear",
            warmup=0.5,
            source="the paper's line to zero with AdamW at six times its rate, in one stage in place of two and "
            "without a teacher unless one is given: for runs of some ten epochs in place of 256",
        ),
        recipes={
            "paper": Recipe(
                optimizer="adam",
                learning_rate=5e-4,
                schedule="linear",
                epochs=256,
                batch_size=256,
                source="the authors' code for ImageNet (liuzechun/ReActNet, mobilenet/2_step2/run.sh, the long "
                "setting): the second of two steps, Adam 5e-4 with a line to zero and no decay, to be run with "
                "--distill-from a float network, whose logits are its only target, and --init-from the first step. "
                "That one has the same settings, float weights and decay 1e-5, and cannot be said here; nor can crops "
                "of random size and changes of colour",
            ),
            "fast": Recipe(
                optimizer="adamw",
                learning_rate=7.5e-3,
                schedule="linear",
                warmup=1,
                epochs=12,
                batch_size=64,
                average=0.2,
                crop=2,
                whiten=True,
                freeze_first=True,
                source="in the spirit of Jordan 2024, arXiv 2404.00498, for a network that has minutes: the first "
                "layer whitens the images' patches and is not trained, a triangle of rates, small crops, the last "
                "fifth of the steps averaged. Rate, batch and first layer were chosen by trainings of poolnet for half "
                "an epoch and one, on 45,000 images of CIFAR-10, tested on the other 5,000 of the train images",
            ),
        },
    )
