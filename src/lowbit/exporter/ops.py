"""Each step as the packed file stores it: the op's name, attributes and tensors (docs/contract.md)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from lowbit.errors import UsageError
from lowbit.exporter.capture import Step, as_pair
from lowbit.exporter.grids import activation_grid, is_binary, per_channel, weight_codes
from lowbit.exporter.thresholds import Thresholds
from lowbit.layers import PReLU, QuantizedLayer, Repeat, Shift
from lowbit.packed import WORD_BITS
from lowbit.quantizers.base import Grid

Array: TypeAlias = npt.NDArray[Any]
Lowered: TypeAlias = tuple[str, dict[str, Any], dict[str, Array]]


def kind_of(step: Step) -> str:
    """The torch class of a step, or ``add``."""
    return "add" if step.module is None else type(step.module).__name__


def integer_op(step: Step) -> Lowered:
    """Op, attributes and weight of a layer whose sums are integers."""
    of_input, (codes, of_weight) = activation_grid(step), weight_codes(step)
    attributes, weight = _convolution(step, codes)
    if is_binary(of_input) and is_binary(of_weight):
        return "binary_conv2d", attributes, {"weight_bits": _words(weight)}
    grids = {"input_multiplier": of_input.multiplier, "input_offset": of_input.offset, **_weight_grid(of_weight)}
    return "quant_conv2d", attributes | grids, {"weight_codes": _code_words(weight, of_weight.bits)}


def float_weight(step: Step) -> tuple[dict[str, Any], dict[str, Array], str]:
    """Attributes, weight and what to say of it, of a layer whose sums are float32. It is packed where it can be."""
    module = cast(nn.Conv2d | nn.Linear, step.module)
    if not isinstance(module, QuantizedLayer) or module.weight_quantizer is None:
        attributes, weight = _convolution(step, module.weight.detach())
        return attributes, {"weight": weight}, "float32 weights"
    codes, grid = weight_codes(step)
    if grid.levels is not None:
        attributes, weight = _convolution(step, grid.decode(codes))
        return attributes, {"weight": weight}, f"{grid.bits}-bit weights on a table of levels, stored as float32"
    attributes, weight = _convolution(step, codes)
    scale = {"weight_scale": per_channel(grid.scale, module).numpy()}
    if is_binary(grid):
        return attributes, {"weight_bits": _words(weight)} | scale, "1-bit weights"
    packed = {"weight_codes": _code_words(weight, grid.bits)}
    return attributes | _weight_grid(grid), packed | scale, f"{grid.bits}-bit weights"


def float_op(step: Step) -> Lowered:
    """A step between layers, on float32."""
    return _FLOAT_OPS[type(step.module)](step)


def bias_of(module: nn.Conv2d | nn.Linear) -> dict[str, Array]:
    """The tensor of a layer's bias, if it has one."""
    return {} if module.bias is None else {"bias": module.bias.detach().numpy()}


def stored(thresholds: Thresholds, shared: bool = False) -> dict[str, Array]:
    """The tensors of thresholds. ``shared`` allows one row for all channels, where they are alike."""
    values = thresholds.values.numpy()
    rows = values[:1] if shared and (values == values[:1]).all() else values
    return {"thresholds": rows, "falling": thresholds.falling.numpy()}


def window_of(module: nn.MaxPool2d | nn.AvgPool2d) -> dict[str, Any]:
    """The attributes of a pool's window."""
    kernel = as_pair(module.kernel_size)
    stride = kernel if module.stride is None else as_pair(module.stride)
    return {"kernel": list(kernel), "stride": list(stride), "padding": list(as_pair(module.padding))}


def _weight_grid(grid: Grid) -> dict[str, int]:
    return {"weight_width": grid.bits, "weight_multiplier": grid.multiplier, "weight_offset": grid.offset}


def _convolution(step: Step, weight: Tensor) -> tuple[dict[str, Any], Array]:
    """Attributes of a convolution, and its weight, or the weight's codes, channels last.

    A dense layer is a convolution whose kernel is the whole map that it reads.
    """
    module = step.module
    assert isinstance(module, nn.Conv2d | nn.Linear)
    if isinstance(module, nn.Conv2d):
        geometry = (module.stride, _padding(step.source, module), module.dilation, module.groups)
    else:
        weight = weight.reshape(-1, *step.inputs[0].shape)
        geometry = ((1, 1), (0, 0), (1, 1), 1)
    attributes = {
        "kernel": list(weight.shape[2:]),
        **dict(zip(("stride", "padding", "dilation"), map(list, geometry[:3]), strict=True)),
        "groups": geometry[3],
        "channels": weight.shape[0],
    }
    return attributes, np.ascontiguousarray(weight.permute(0, 2, 3, 1).numpy())


def _words(codes: Array) -> Array:
    """Bits (..., n) as words (..., ceil(n / 64)): LSB first, zeros in the tail."""
    spare = -codes.shape[-1] % WORD_BITS
    padded = np.pad(codes.astype(np.uint8), [(0, 0)] * (codes.ndim - 1) + [(0, spare)])
    return np.packbits(padded, axis=-1, bitorder="little").view("<u8").astype(np.uint64)


def _code_words(codes: Array, width: int) -> Array:
    """Codes (O, ...) of ``width`` bits as words (O, n): channel by channel, no gaps, LSB first, zeros in the tail."""
    bits = np.unpackbits(codes.astype(np.uint8)[..., None], axis=-1, count=width, bitorder="little")
    return _words(bits.reshape(len(codes), -1))


def _padding(name: str, module: nn.Conv2d) -> tuple[int, int]:
    if not isinstance(module.padding, str):
        return as_pair(module.padding)
    if module.padding == "valid":
        return 0, 0
    totals = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
    if any(total % 2 for total in totals):
        raise UsageError(
            f"'{name}' has padding 'same' with an even kernel, which pads one side more; give the padding in numbers"
        )
    return totals[0] // 2, totals[1] // 2


def _lower_norm(step: Step) -> Lowered:
    norm = cast(nn.BatchNorm2d, step.module)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    gamma = torch.ones_like(norm.running_var) if norm.weight is None else norm.weight.detach()
    beta = torch.zeros_like(norm.running_var) if norm.bias is None else norm.bias.detach()
    scale = gamma.double() / (norm.running_var.double() + norm.eps).sqrt()
    shift = beta.double() - norm.running_mean.double() * scale
    return "affine", {}, {"scale": scale.float().numpy(), "shift": shift.float().numpy()}


def _lower_hardtanh(step: Step) -> Lowered:
    clamp = cast(nn.Hardtanh, step.module)
    return "hardtanh", {"min": float(clamp.min_val), "max": float(clamp.max_val)}, {}


def _lower_max_pool(step: Step) -> Lowered:
    falling = {} if step.falling is None else {"falling": step.falling.numpy()}
    return "max_pool", window_of(cast(nn.MaxPool2d, step.module)), falling


def _lower_average(step: Step) -> Lowered:
    module = step.module
    if isinstance(module, nn.AvgPool2d):
        return "avg_pool", {**window_of(module), "count_include_pad": bool(module.count_include_pad)}, {}
    (_, *size), (_, *wanted) = step.inputs[0].shape, step.shape
    if any(n % m for n, m in zip(size, wanted, strict=True)):
        raise UsageError(
            f"'{step.source}' averages a {size[0]}x{size[1]} map to {wanted[0]}x{wanted[1]} in unequal windows; "
            "use AvgPool2d"
        )
    kernel = [n // m for n, m in zip(size, wanted, strict=True)]
    return "avg_pool", {"kernel": kernel, "stride": kernel, "padding": [0, 0], "count_include_pad": True}, {}


def _lower_slope(step: Step) -> Lowered:
    module = cast(nn.LeakyReLU | nn.PReLU | PReLU, step.module)
    slope = torch.tensor(module.negative_slope) if isinstance(module, nn.LeakyReLU) else module.weight.detach()
    return "prelu", {}, {"slope": slope.expand(step.shape[0]).numpy()}


def _lower_shift(step: Step) -> Lowered:
    shift = cast(Shift, step.module).bias.detach()
    return "affine", {}, {"scale": torch.ones_like(shift).numpy(), "shift": shift.numpy()}


def _lower_repeat(step: Step) -> Lowered:
    """A convolution of 1x1 with a group to each channel, every weight 1."""
    ones, pair = np.ones((step.shape[0], 1, 1, 1), np.float32), [1, 1]
    geometry = {"kernel": pair, "stride": pair, "padding": [0, 0], "dilation": pair}
    return "conv2d", geometry | {"groups": step.inputs[0].shape[0], "channels": step.shape[0]}, {"weight": ones}


_FLOAT_OPS: dict[type, Callable[[Step], Lowered]] = {
    type(None): lambda step: ("add", {}, {}),
    nn.BatchNorm1d: _lower_norm,
    nn.BatchNorm2d: _lower_norm,
    nn.ReLU: lambda step: ("relu", {}, {}),
    nn.ReLU6: _lower_hardtanh,
    nn.Hardtanh: _lower_hardtanh,
    nn.LeakyReLU: _lower_slope,
    nn.PReLU: _lower_slope,
    PReLU: _lower_slope,
    Shift: _lower_shift,
    Repeat: _lower_repeat,
    nn.MaxPool2d: _lower_max_pool,
    nn.AvgPool2d: _lower_average,
    nn.AdaptiveAvgPool2d: _lower_average,
}
