"""Torch's own layers with a quantizer in front (activations), one inside (weights) and one behind (gradients)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from lowbit.errors import UsageError
from lowbit.quantizers.base import Quantizer, wide

# Every integer up to here has an exact float32.
EXACT_FLOAT32 = 1 << 24

UpdateRule: TypeAlias = Callable[[Tensor, Tensor, float], None]


class QuantizedLayer(nn.Module):
    """A convolution or linear layer of torch that quantizes what it reads.

    In ``train()``: ``layer(Qa(x), Qw(W)) + bias``, differentiable; the gradient of the result is quantized before it is
    passed back, when the method says so. Where the layer has a dropout, it stands between ``Qa`` and the convolution:
    what it drops is 0, which no sign gives.
    In ``eval()``, when both sides are quantized: the exact integer sums ``acc`` of ``multiplier * code + offset`` over
    the taps inside the image, then ``float32(acc) * (scale_x * scale_w) + bias``, each step one float32 rounding. Sums
    that could pass 2^24 are taken in float64, which holds them exactly. This is the reference of the integer contract:
    its result is float32, under autocast too, and has no gradient with respect to ``x`` or the weight. (Of a latent
    weight in another type it is rounded to that type.)
    A table of levels has no integer form: when either side has one, the decoded values are convolved in float64, and
    the sum is rounded once, before the bias. When one side alone is quantized, the fake-quantized values are convolved
    as in training.

    With a K map the result is multiplied by `magnitudes` of ``x`` before the bias is added, again one rounding each. A
    layer whose activations are float leaves it out.

    Made directly, such as ``QuantConv2d(3, 8, 3)``, it is torch's layer until its quantizers are set; `quantized_twin`
    makes it from a layer.

    Attributes:
        weight_quantizer, activation_quantizer: None leaves that side in float.
        gradient_quantizer: applied to the result in ``train()``: the identity, with a gradient of its own.
        dropout: applied in ``train()`` to what the activation quantizer gives, or None.
        projection: applied to the latent ``weight`` after each step (see `attach_rules`).
        update: moves the latent ``weight`` in place of the optimizer, given weight, gradient and learning rate.
        k_map: whether the result is scaled by the size of what was read, as XNOR-Net's K does.
    """

    weight: Tensor
    bias: Tensor | None
    weight_quantizer: Quantizer | None
    activation_quantizer: Quantizer | None
    gradient_quantizer: Callable[[Tensor], Tensor] | None
    dropout: nn.Module | None
    projection: Callable[[Tensor], None] | None
    update: UpdateRule | None
    k_map: bool
    reset_parameters: Callable[[], None]  # torch's

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # Set here and not on the class: a class attribute would hide the submodule of the same name.
        self.weight_quantizer = None
        self.activation_quantizer = None
        self.gradient_quantizer = None
        self.dropout = None
        self.projection = None
        self.update = None
        self.k_map = False

    def transform(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The layer's own linear map, with the given weight and bias."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        if not self.training and self.weight_quantizer is not None and self.activation_quantizer is not None:
            return self._coded_forward(x, self.activation_quantizer, self.weight_quantizer)
        values, weight = self._fake(self.activation_quantizer, x), self._fake(self.weight_quantizer, self.weight)
        if self.dropout is not None:
            values = self.dropout(values)
        if self.k_map and not self._bypassed(self.activation_quantizer):
            result = self._biased(self.transform(values, weight, None) * self.magnitudes(x))
        else:
            result = self.transform(values, weight, self.bias)
        return self.gradient_quantizer(result) if self.training and self.gradient_quantizer is not None else result

    def magnitudes(self, x: Tensor) -> Tensor:
        r"""XNOR-Net's K: the mean of $|x|$ over all that an output sums, the zeros of the padding among them.

        The mean over the channels convolved with a box filter is the layer's own linear map of $|x|$ with every weight
        1 / fan-in, so stride, padding and dilation are the layer's own, and each group has the mean of its channels.

        Returns:
            (N, 1, ...) with the layer's output sizes, or (N, output channels, ...) where there are several groups.
            Differentiable.
        """
        groups = getattr(self, "groups", 1)
        box = torch.full_like(self.weight[:groups], 1 / self.weight[0].numel())
        means = self.transform(x.abs(), box, None)
        channel_axis = 1 - self.weight.dim()
        return means if groups == 1 else means.repeat_interleave(len(self.weight) // groups, dim=channel_axis)

    def _bypassed(self, quantizer: Quantizer | None) -> bool:
        return quantizer is None or (self.training and not quantizer.enabled)

    def _fake(self, quantizer: Quantizer | None, x: Tensor) -> Tensor:
        if quantizer is None:
            return x
        result: Tensor = quantizer.bypass(x) if self._bypassed(quantizer) else quantizer(x)
        return result

    def _coded_forward(self, x: Tensor, of_activation: Quantizer, of_weight: Quantizer) -> Tensor:
        x_codes, x_grid = of_activation.encode(x)
        w_codes, w_grid = of_weight.encode(self.weight)
        with torch.autocast(x.device.type, enabled=False):
            if x_grid.levels is None and w_grid.levels is None:
                largest_sum = x_grid.magnitude * w_grid.magnitude * self.weight[0].numel()
                exact = torch.float32 if largest_sum <= EXACT_FLOAT32 else torch.float64
                integers = x_grid.integers(x_codes).to(exact), w_grid.integers(w_codes).to(exact)
                result = self.transform(*integers, None).float() * self._shaped(x_grid.scale * w_grid.scale)
            else:
                values = x_grid.decode(x_codes).double(), w_grid.decode(w_codes).double()
                result = self.transform(*values, None).float()
            if self.k_map:
                result = result * self.magnitudes(wide(x.detach()))
        return self._biased(result).to(self.weight.dtype)

    def _biased(self, result: Tensor) -> Tensor:
        return result if self.bias is None else result + self._shaped(self.bias)

    def _shaped(self, per_channel: Tensor) -> Tensor:
        """Numbers of the output channels, or one for all, so that they broadcast over a result."""
        return per_channel.reshape((-1,) + (1,) * (self.weight.dim() - 2))


class _QuantConv(QuantizedLayer):
    _conv_forward: Callable[[Tensor, Tensor, Tensor | None], Tensor]

    def transform(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return self._conv_forward(x, weight, bias)


class QuantConv1d(_QuantConv, nn.Conv1d):
    """`torch.nn.Conv1d` with quantizers; x: (N, C, L). See `QuantizedLayer`."""


class QuantConv2d(_QuantConv, nn.Conv2d):
    """`torch.nn.Conv2d` with quantizers; x: (N, C, H, W). See `QuantizedLayer`."""


class QuantConv3d(_QuantConv, nn.Conv3d):
    """`torch.nn.Conv3d` with quantizers; x: (N, C, D, H, W). See `QuantizedLayer`."""


class QuantLinear(QuantizedLayer, nn.Linear):  # type: ignore[misc]
    """`torch.nn.Linear` with quantizers; x: (..., in_features). See `QuantizedLayer`."""

    def transform(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return nn.functional.linear(x, weight, bias)


_TWINS: dict[type[nn.Module], type[QuantizedLayer]] = {
    nn.Conv1d: QuantConv1d,
    nn.Conv2d: QuantConv2d,
    nn.Conv3d: QuantConv3d,
    nn.Linear: QuantLinear,
}


def quantized_twin(
    layer: nn.Module,
    weight_quantizer: Quantizer | None,
    activation_quantizer: Quantizer | None,
    projection: Callable[[Tensor], None] | None = None,
    gradient_quantizer: Callable[[Tensor], Tensor] | None = None,
    update: UpdateRule | None = None,
    k_map: bool = False,
) -> QuantizedLayer:
    """The quantized twin of ``layer``, with the very same parameters, hooks and training mode.

    The twin shares ``layer``'s tables of parameters and hooks, so it takes its place; ``layer`` itself is not changed.

    Args:
        layer: of torch's own type; a subclass may compute something else and is refused.
        weight_quantizer, activation_quantizer: None leaves that side in float.
        projection: changes the latent weight in place, outside autograd (see `attach_rules`).
        gradient_quantizer: the identity, which quantizes the gradient of what the layer gives.
        update: moves the latent weight in place of the optimizer (see `attach_rules`).
        k_map: scale the result by the size of what was read (see `QuantizedLayer.magnitudes`).

    Raises:
        UsageError: ``layer`` is neither `nn.Conv1d`, `nn.Conv2d`, `nn.Conv3d` nor `nn.Linear`, is quantized already, or
            is no longer as torch made it (see `obstacle`).
    """
    if not is_quantizable(layer):
        why = obstacle(layer) if type(layer) in _TWINS else "Conv1d, Conv2d, Conv3d and Linear can"
        raise UsageError(f"a {type(layer).__name__} cannot be quantized; {why}")
    twin_type = _TWINS[type(layer)]
    twin = twin_type.__new__(twin_type)
    twin.__dict__.update(layer.__dict__)
    twin._compiled_call_impl = None  # of torch's Module.compile, which would go on calling the layer
    twin._modules = dict(layer._modules)
    twin.weight_quantizer = weight_quantizer
    twin.activation_quantizer = activation_quantizer
    twin.projection = projection
    twin.gradient_quantizer = gradient_quantizer
    twin.dropout = None
    twin.update = update
    twin.k_map = k_map
    return twin.train(layer.training)


def is_quantizable(module: nn.Module) -> bool:
    """Whether `quantized_twin` takes ``module``."""
    return type(module) in _TWINS and not obstacle(module)


def obstacle(module: nn.Module) -> str:
    """Why a convolution or linear layer, not quantized before, cannot be; empty where it can.

    A subclass may compute anything. Where a hook computes the weight, as torch's ``weight_norm``, ``spectral_norm`` and
    ``prune`` do, there is no latent weight to project, and a ``forward`` of the layer's own would go on computing in
    float.
    """
    if not isinstance(module, tuple(_TWINS)) or isinstance(module, QuantizedLayer):
        return ""
    if type(module) not in _TWINS:
        return "a subclass of torch's layer, left as it is"
    if "weight" not in module._parameters:
        return "a hook computes its weight: left as it is; torch's remove_weight_norm and prune.remove take it off"
    if "forward" in vars(module):
        return "its forward was replaced: left as it is"
    return ""
