"""Affine quantization of weights and activations, after training or during it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from lowbit.errors import UsageError, check_choice
from lowbit.methods.base import Method, Recipe, registry
from lowbit.quantizers import ste
from lowbit.quantizers.affine import Granularity, choose_qparams, dequantize, extremes, quantize
from lowbit.quantizers.base import Grid, Quantizer
from lowbit.quantizers.observers import MeanSquaredError, MinMax, MovingAverage, Observer, Percentile

if TYPE_CHECKING:
    from lowbit.layers.quantized import QuantizedLayer

WIDTHS = range(2, 9)
PIXEL_BITS = 8

ObserverName = Literal["moving_average", "min_max", "percentile", "mse"]


@registry.register
def affine(
    bits_w: int = 8,
    bits_a: int = 8,
    per: Granularity = "channel",
    observer: ObserverName = "moving_average",
    percentile: float = 99.99,
    ends: Literal["quantized", "float"] = "quantized",
    fold: bool = False,
    delay: float = 0.0,
    freeze: float = 0.9,
) -> Method:
    r"""Integers of 2 to 8 bits with a step and a zero point, for a trained network (post-training) or in training.

    Both sides use $x_q = \mathrm{clamp}(\mathrm{round}(x / s) + z, 0, 2^b - 1)$, which stands for $s\,(x_q - z)$. The
    range always contains 0, so that 0 is exactly a code and zero padding stays exact.

    Forward, backward: `AffineWeight`, symmetric, with a scale for each output channel; `AffineActivation`, asymmetric,
    with one scale for the tensor and a range that an observer learns. Gradients pass straight through inside the range
    and are 0 outside.
    Block order: convolution, batch norm, ReLU, pooling, quantizer, as in the float twin, so that its weights fit.
    First and last layer: quantized like the others; what the first reads goes through a quantizer of 8 bits, whatever
    ``bits_a`` is, for a pixel has 8. The network then computes with integers alone.

    **Batch norm.** The paper folds it into the weights and quantizes those. A scale for each channel makes that
    unnecessary: it moves with the channel's factor $\gamma / \sigma$, and the codes stay the same (mirrored where
    $\gamma < 0$). So batch norm remains a module here, which training needs, and becomes part of the thresholds at
    export, exactly; the paper's correction of batch statistics has no counterpart. With one scale for the tensor the
    two differ: ``fold`` gives the paper's order, in which the network has no norms. Its weights come from
    `lowbit.fold_batch_norms_`, or from ``lowbit calibrate``, which folds unless told otherwise.

    **After training**, from a float run: ``lowbit calibrate runs/FLOAT --method affine --out runs/INT8``. In a program:

    ```python
    lowbit.fold_batch_norms_(model.eval())          # only for fold; model is float, with batch norms
    lowbit.quantize_(model, "affine")               # or a Method: lowbit.methods.registry["affine"](bits_w=4)
    lowbit.calibrate(model, batches)                # a few hundred images; no weight changes
    lowbit.export(model.eval(), example_input).save("model.lowbit")
    ```

    **After training, the rest of a low-bit run**: ``lowbit calibrate runs/XNOR --out runs/XNOR-INT8`` makes 8-bit what
    its own method leaves in float, such as the first and the last layer; ``lowbit export runs/XNOR --rest int8`` does
    both, with ``observer=mse``, and says what it does to the accuracy. In a program the same two calls as above,
    `quantize_` and `calibrate`, on the trained low-bit model, without folding. ``lowbit train --init-from
    runs/XNOR-INT8``, by the method of runs/XNOR, goes on with these layers as they are: their weights learn, their
    ranges stay.

    **In training**, best from a float run: ``lowbit train --method affine --recipe fine_tune --init-from runs/FLOAT``.
    Until the share ``delay`` of the epochs is over the network is float and observers only look; from the share
    ``freeze`` on, observers and batch norm's statistics stay as they are. A plain training loop calls
    `lowbit.layers.start_epoch` for both.

    Args:
        bits_w: of weights, 2 to 8.
        bits_a: of activations, 2 to 8.
        per: what has a weight scale of its own: the output ``channel``, or the ``tensor``.
        observer: ``moving_average``, ``min_max``, ``percentile`` or ``mse``, see `lowbit.quantizers.observers`.
        percentile: of the observer of that name, above 50, up to 100.
        ends: first and last layer are ``quantized``, or stay ``float``.
        fold: the network has no batch norms: they were folded into the convolutions of a trained network.
        delay: share of the epochs before quantization begins, at least 0 and below ``freeze``.
        freeze: share of the epochs after which ranges and batch norm's statistics stay, up to 1, which is never.

    Source: Krishnamoorthi 2018, "Quantizing deep convolutional networks for efficient inference: A whitepaper", arXiv
    1806.08342; Jacob et al. 2017, "Quantization and Training of Neural Networks for Efficient
    Integer-Arithmetic-Only Inference", arXiv 1712.05877. By the whitepaper's abstract, 8 bits per channel stay within
    2 % of the float accuracy after training and within 1 % with training; 4-bit weights with training lose 2 to 10 %.

    Raises:
        UsageError: an option is none of its choices.
    """
    weight = partial(AffineWeight, bits_w, per)
    activation = partial(AffineActivation, bits_a, observer, percentile)
    weight(), activation()
    check_choice("ends of affine", ends, ("quantized", "float"))
    if not 0 <= delay < freeze <= 1:
        raise UsageError(f"delay and freeze of affine are {delay} and {freeze}, but must be 0 <= delay < freeze <= 1")
    return Method(
        name="affine",
        title="Affine quantization",
        paper="Krishnamoorthi 2018",
        url="https://arxiv.org/abs/1806.08342",
        bits_w=bits_w,
        bits_a=bits_a,
        block="conv_act" if fold else "conv_bn_act",
        skip_first=ends == "float",
        skip_last=ends == "float",
        skip_shortcuts=False,
        weight=weight,
        activation=activation,
        input=partial(AffineActivation, PIXEL_BITS, observer, percentile),
        phases=partial(set_phase, delay=delay, freeze=freeze),
        freeze_norms=freeze,
        recipe=FINE_TUNE if fold else FROM_SCRATCH,
        recipes={"fine_tune": FINE_TUNE},
    )


FROM_SCRATCH = Recipe(
    optimizer="sgd",
    learning_rate=0.1,
    weight_decay=5e-4,
    decay_all=True,
    schedule="cosine",
    warmup=1,
    source="the float twin's, for the comparison with it, where the whitepaper tunes a trained float network; the step "
    "follows the size of the weights, so decay reaches the latent weights too",
)
FINE_TUNE = Recipe(
    optimizer="sgd",
    learning_rate=1e-3,
    schedule="cosine",
    source="SGD with a small rate, from the weights of a float run, as the paper advises; rate, schedule and length "
    "are ours, for no complete published recipe was found",
)


class AffineWeight(Quantizer):
    r"""$q = s\,\mathrm{round}(W / s)$ with $s = \max|W| / (2^{b-1} - 1)$ for each output channel, or for the tensor.

    Gradient: $g$: no weight lies outside the range, and $s$ is taken for a constant.
    Codes: $\mathrm{round}(W / s) + 2^{b-1}$; grid ``s * (code - 2^(b-1))``, of which the lowest level is not used: 2
    bits are -s, 0, s.

    Args:
        bits: b, 2 to 8.
        per: ``channel`` or ``tensor``: what has a scale of its own.

    Raises:
        UsageError: an argument is none of its choices.

    Source: Krishnamoorthi 2018, arXiv 1806.08342, section 2.
    """

    signed = True

    def __init__(self, bits: int = 8, per: Granularity = "channel") -> None:
        super().__init__()
        check_choice("bits_w of affine", bits, WIDTHS)
        check_choice("per of affine", per, ("channel", "tensor"))
        self.bits = bits
        self.per = per

    def encode(self, x: Tensor) -> tuple[Tensor, Grid]:
        scale, zero_point = choose_qparams(*extremes(x, self.per), self.bits, symmetric=True)
        return quantize(x, scale, zero_point, self.bits), Grid(self.bits, 1, -(1 << (self.bits - 1)), scale)


class AffineActivation(Quantizer):
    r"""$q = s\,(\mathrm{clamp}(\mathrm{round}(x / s) + z, 0, 2^b - 1) - z)$, one $s$ and $z$ for the tensor.

    Gradient: $g \cdot 1\{-s z \le x \le s\,(2^b - 1 - z)\}$, the range of the grid.
    Codes: the clamped integers; grid ``s * (code - z)``.

    $s$ and $z$ follow from the range of the observer (see `lowbit.quantizers.affine.choose_qparams`), which looks at
    ``x`` in ``train()``, before it is quantized, and also where the layer bypasses the quantizer. Its state is saved
    with the weights. One that has seen nothing has the range -4 to 4; in ``eval()`` that gives a warning.

    Args:
        bits: b, 2 to 8.
        observer: its name among the method's options.
        percentile: for the observer of that name.

    Attributes:
        signed: True, though a grid whose range starts at 0 has no level below it.

    Raises:
        UsageError: an argument is none of its choices.

    Source: Krishnamoorthi 2018, arXiv 1806.08342, section 2.
    """

    signed = True

    def __init__(self, bits: int = 8, observer: ObserverName = "moving_average", percentile: float = 99.99) -> None:
        super().__init__()
        check_choice("bits_a of affine", bits, WIDTHS)
        check_choice("observer of affine", observer, OBSERVERS)
        self.bits = bits
        self.observer = OBSERVERS[observer](bits, percentile)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.observer.observe(x)
        return super().forward(x)

    def bypass(self, x: Tensor) -> Tensor:
        self.observer.observe(x)
        return x

    def encode(self, x: Tensor) -> tuple[Tensor, Grid]:
        if not self.training and not self.observer.batches:
            warnings.warn(UNSEEN, stacklevel=2)
        scale, zero_point = self._qparams()
        return quantize(x, scale, zero_point, self.bits), Grid(self.bits, 1, -int(zero_point), scale)

    def surrogate(self, x: Tensor) -> Tensor:
        scale, zero_point = self._qparams()
        ends = torch.tensor([0, (1 << self.bits) - 1], device=x.device)
        low, high = dequantize(ends, scale, zero_point).tolist()
        return ste.clip(x, low, high)

    def _qparams(self) -> tuple[Tensor, Tensor]:
        return choose_qparams(self.observer.low, self.observer.high, self.bits)


UNSEEN = (
    "an activation quantizer has seen no data, so it takes the range -4 to 4; "
    "run batches through the model in train(), or call lowbit.calibrate(model, batches)"
)
# Name: the observer for a grid of so many bits, and the percentile.
OBSERVERS: dict[str, Callable[[int, float], Observer]] = {
    "moving_average": lambda bits, percentile: MovingAverage(),
    "min_max": lambda bits, percentile: MinMax(),
    "percentile": lambda bits, percentile: Percentile(percentile),
    "mse": lambda bits, percentile: MeanSquaredError(bits),
}


def set_phase(layers: Sequence[QuantizedLayer], share: float, delay: float, freeze: float) -> None:
    """Quantizers are bypassed before the share ``delay`` of the epochs, observers frozen from ``freeze`` on."""
    for layer in layers:
        for quantizer in (layer.weight_quantizer, layer.activation_quantizer):
            if quantizer is not None:
                quantizer.enabled = share >= delay
        for module in layer.modules():
            if isinstance(module, Observer):
                module.frozen = share >= freeze
