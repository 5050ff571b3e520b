"""eval() of the quantized layers against convolution in int64, written out tap by tap."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lowbit.layers import QuantConv1d, QuantConv2d, QuantConv3d, QuantizedLayer, QuantLinear, quantized_twin
from lowbit.methods.xnor_net import ScaledSign
from lowbit.quantizers.base import Grid, Quantizer
from lowbit.quantizers.binary import SignQuantizer


class Uniform(Quantizer):
    """Codes 0 .. 2^bits - 1 of value ``scale * (multiplier * code + offset)``; one scale for each row of ``scales``."""

    def __init__(self, bits: int, multiplier: int, offset: int, scales: tuple[float, ...] = (0.1,)) -> None:
        super().__init__()
        self.bits, self.multiplier, self.offset, self.scales = bits, multiplier, offset, scales

    def encode(self, x: Tensor) -> tuple[Tensor, Grid]:
        scale = torch.tensor(self.scales)
        scale = scale.reshape(()) if len(scale) == 1 else scale.reshape(-1, *[1] * (x.dim() - 1))
        codes = ((x.float() / scale - self.offset) / self.multiplier).round().clamp(0, 2**self.bits - 1)
        return codes.to(torch.uint8), Grid(self.bits, self.multiplier, self.offset, scale)

    def forward(self, x: Tensor) -> Tensor:
        return self.decode(*self.encode(x)).to(x.dtype)


ARITHMETIC = {
    "binary": (SignQuantizer, SignQuantizer),
    "scaled": (ScaledSign, SignQuantizer),
    "2 bits, half-wave": (ScaledSign, lambda: Uniform(2, 1, 0, (0.7,))),
    "3 bits, no zero": (lambda: Uniform(3, 2, -7, (0.03,)), lambda: Uniform(3, 1, -3, (0.3,))),
    "8 bits": (lambda: Uniform(8, 1, -128, (0.01,)), lambda: Uniform(8, 1, -100, (0.02,))),
}

# (torch's layer, shape of one input)
LAYERS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "1d": (lambda: nn.Conv1d(5, 3, 3), (5, 11)),
    "1d stride": (lambda: nn.Conv1d(4, 6, 4, stride=3, padding=2, dilation=2, groups=2), (4, 17)),
    "2d": (lambda: nn.Conv2d(3, 5, 3), (3, 8, 7)),
    "2d 1x1": (lambda: nn.Conv2d(67, 2, 1), (67, 3, 3)),
    "2d padding": (lambda: nn.Conv2d(7, 4, 3, padding=1, bias=False), (7, 5, 6)),
    "2d more padding than kernel": (lambda: nn.Conv2d(2, 3, 2, padding=3), (2, 3, 3)),
    "2d stride": (lambda: nn.Conv2d(6, 4, (3, 2), stride=(2, 3), padding=(1, 0)), (6, 9, 10)),
    "2d dilation": (lambda: nn.Conv2d(3, 3, 3, padding=2, dilation=(2, 1)), (3, 9, 8)),
    "2d groups": (lambda: nn.Conv2d(6, 9, 3, padding=1, groups=3), (6, 5, 5)),
    "2d depthwise": (lambda: nn.Conv2d(5, 10, 3, padding=1, groups=5, bias=False), (5, 6, 6)),
    "2d same": (lambda: nn.Conv2d(3, 4, (3, 5), padding="same"), (3, 5, 5)),
    "2d circular": (lambda: nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"), (3, 5, 5)),
    "2d reflected": (lambda: nn.Conv2d(3, 4, 3, padding=2, padding_mode="reflect"), (3, 5, 5)),
    "3d": (lambda: nn.Conv3d(3, 4, (2, 3, 1), stride=(1, 2, 1), padding=(1, 1, 0), groups=1), (3, 4, 5, 3)),
    "3d groups": (lambda: nn.Conv3d(4, 4, 2, groups=2), (4, 3, 4, 3)),
    "linear": (lambda: nn.Linear(37, 5), (37,)),
    "linear, no bias": (lambda: nn.Linear(64, 3, bias=False), (64,)),
    "linear over a sequence": (lambda: nn.Linear(9, 4), (6, 9)),
}


def convolve(layer: nn.Module, x: np.ndarray, w: np.ndarray) -> np.ndarray:
    """Exact sums, int64, of integers ``x`` (N, C, ...) and ``w`` (O, C / groups, ...)."""
    if isinstance(layer, nn.Linear):
        return np.einsum("...i,oi->...o", x, w)
    axes = x.ndim - 2
    kernel = w.shape[2:]
    stride, dilation, groups = layer.stride, layer.dilation, layer.groups
    if layer.padding == "same":
        totals = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        padding = [(total // 2, total - total // 2) for total in totals]
    else:
        padding = [(p, p) for p in layer.padding]
    mode = {"zeros": "constant", "circular": "wrap", "reflect": "reflect"}[layer.padding_mode]
    x = np.pad(x, [(0, 0), (0, 0), *padding], mode=mode)
    out = [(x.shape[2 + i] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1 for i in range(axes)]
    result = np.zeros((x.shape[0], w.shape[0], *out), np.int64)
    inputs, outputs = w.shape[1], w.shape[0] // groups
    for group, tap in itertools.product(range(groups), np.ndindex(*kernel)):
        spans = [
            slice(tap[i] * dilation[i], tap[i] * dilation[i] + (out[i] - 1) * stride[i] + 1, stride[i])
            for i in range(axes)
        ]
        part = x[(slice(None), slice(group * inputs, (group + 1) * inputs), *spans)]
        rows = slice(group * outputs, (group + 1) * outputs)
        result[:, rows] += np.einsum("ni...,oi->no...", part, w[(rows, slice(None), *tap)])
    return result


def expected(layer: QuantizedLayer, x: Tensor) -> np.ndarray:
    """float32(acc) * (scale_x * scale_w), then + bias: one float32 rounding each."""
    x_codes, x_grid = layer.activation_quantizer.encode(x)
    w_codes, w_grid = layer.weight_quantizer.encode(layer.weight)
    x_integers = x_grid.multiplier * x_codes.numpy().astype(np.int64) + x_grid.offset
    w_integers = w_grid.multiplier * w_codes.numpy().astype(np.int64) + w_grid.offset
    sums = convolve(layer, x_integers, w_integers).astype(np.float32)
    scale = np.float32(x_grid.scale.numpy()) * w_grid.scale.detach().numpy().astype(np.float32).reshape(-1)
    channel_last = isinstance(layer, nn.Linear)
    shape = (-1,) if channel_last else (-1,) + (1,) * (sums.ndim - 2)
    result = sums * scale.astype(np.float32).reshape(shape)
    if layer.bias is not None:
        result = result + layer.bias.detach().numpy().reshape(shape)
    assert result.dtype == np.float32
    return result


@pytest.mark.parametrize("arithmetic", ARITHMETIC)
@pytest.mark.parametrize("name", LAYERS)
def test_eval_is_exact(name, arithmetic):
    make, shape = LAYERS[name]
    of_weight, of_activation = ARITHMETIC[arithmetic]
    layer = quantized_twin(make(), of_weight(), of_activation()).eval()
    x = torch.randn(3, *shape)
    with torch.no_grad():
        result = layer(x)
        np.testing.assert_array_equal(result.numpy(), expected(layer, x))
        torch.testing.assert_close(layer.train()(x), result, rtol=1e-4, atol=1e-4)


def test_scales_of_channels_reach_their_channels():
    scales = (1.0, 0.5, 3.0)
    layer = quantized_twin(nn.Conv2d(4, 3, 1), Uniform(4, 1, -8, scales), Uniform(4, 1, 0)).eval()
    x = torch.rand(2, 4, 3, 3)
    with torch.no_grad():
        np.testing.assert_array_equal(layer(x).numpy(), expected(layer, x))


def test_scale_and_bias_round_one_after_the_other():
    """The numbers are such that fused multiply-add, or scaling by x and w in turn, gives another float32."""
    layer = quantized_twin(nn.Linear(3, 1), Uniform(2, 1, 0, (1 / 3,)), Uniform(2, 1, 0, (0.1,))).eval()
    with torch.no_grad():
        layer.weight.fill_(1 / 3)
        layer.bias.fill_(-0.0999999)
        result = layer(torch.tensor([[0.1, 0.1, 0.1]])).item()
    s_x, s_w, b, total = np.float32(0.1), np.float32(1 / 3), np.float32(-0.0999999), np.float32(3)
    in_order = float(np.float32(np.float32(total * np.float32(s_x * s_w)) + b))
    fused = float(np.float32(float(total) * float(np.float32(s_x * s_w)) + float(b)))
    assert result == in_order
    assert result != fused


@pytest.mark.parametrize(
    ("fan_in", "dtype"),
    [(1 << 16, torch.float32), ((1 << 16) + 1, torch.float64)],
    ids=["sums up to 2^24", "sums above 2^24"],
)
def test_float64_where_float32_cannot_hold_the_sum(fan_in, dtype, monkeypatch):
    """Magnitudes of 16 on both sides: 2^16 products reach 2^24 exactly."""
    layer = quantized_twin(nn.Linear(fan_in, 1), Uniform(4, 1, 1), Uniform(4, 1, 1)).eval()
    seen = []
    transform = layer.transform
    monkeypatch.setattr(layer, "transform", lambda x, *rest: seen.append(x.dtype) or transform(x, *rest))
    x = 3 * torch.rand(2, fan_in)
    with torch.no_grad():
        np.testing.assert_array_equal(layer(x).numpy(), expected(layer, x))
    assert seen == [dtype]


def test_sums_above_2_to_the_24_are_exact():
    fan_in = 1001
    layer = quantized_twin(nn.Linear(fan_in, 4, bias=False), Uniform(8, 1, 0, (1.0,)), Uniform(8, 1, 0, (1.0,))).eval()
    with torch.no_grad():
        layer.weight.copy_(torch.randint(200, 256, layer.weight.shape))
        x = torch.randint(200, 256, (5, fan_in)).float()
        sums = x.long() @ layer.weight.long().T
        assert int(sums.min()) > 1 << 24
        # Odd sums have no float32: each must be the nearest one, not one that earlier roundings led to.
        assert (sums % 2 == 1).any()
        assert torch.equal(layer(x), sums.float())
        layer.train()
        assert math.isclose(float(layer(x)[0, 0]), float(sums[0, 0]), rel_tol=1e-5)


@pytest.mark.parametrize("name", ["1d", "2d padding", "linear"])
def test_eval_is_exact_under_autocast(name):
    make, shape = LAYERS[name]
    layer = quantized_twin(make(), Uniform(8, 1, -128, (0.01,)), Uniform(8, 1, -100, (0.02,))).eval()
    x = torch.randn(3, *shape)
    with torch.no_grad():
        alone = layer(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(layer(x), alone)
    assert alone.dtype == torch.float32


@pytest.mark.parametrize("shape", [(2, 3, 6, 6), (3, 6, 6)], ids=["batch", "one image"])
def test_a_single_image_without_batch_axis(shape):
    layer = quantized_twin(nn.Conv2d(3, 4, 3), ScaledSign(), SignQuantizer()).eval()
    x = torch.randn(shape)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), layer.train()(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("of_weight", "of_activation"), [(ScaledSign, None), (None, SignQuantizer), (None, None)], ids=["W", "A", "none"]
)
def test_a_side_without_quantizer_stays_float(of_weight, of_activation, training):
    plain = nn.Conv2d(3, 4, 3, padding=1)
    make = [None if quantizer is None else quantizer() for quantizer in (of_weight, of_activation)]
    layer = quantized_twin(plain, *make).train(training)
    x = torch.randn(2, 3, 5, 5)
    with torch.no_grad():
        weight = plain.weight if make[0] is None else make[0](plain.weight)
        read = x if make[1] is None else make[1](x)
        assert torch.equal(layer(x), nn.functional.conv2d(read, weight, plain.bias, padding=1))


@pytest.mark.parametrize(
    ("made", "plain", "shape"),
    [
        (QuantConv1d(3, 4, 3), nn.Conv1d, (2, 3, 8)),
        (QuantConv2d(3, 4, 3, padding=1), nn.Conv2d, (2, 3, 8, 8)),
        (QuantConv3d(3, 4, 2), nn.Conv3d, (2, 3, 4, 4, 4)),
        (QuantLinear(6, 4), nn.Linear, (2, 6)),
    ],
    ids=["1d", "2d", "3d", "linear"],
)
def test_a_layer_made_directly(made, plain, shape):
    """It is torch's layer until it is given quantizers."""
    assert isinstance(made, plain)
    x = torch.randn(shape)
    with torch.no_grad():
        for mode in (True, False):
            assert torch.equal(made.train(mode)(x), plain.forward(made, x))
        made.weight_quantizer, made.activation_quantizer = ScaledSign(), SignQuantizer()
        np.testing.assert_array_equal(made(x).numpy(), expected(made, x))


def test_training_reads_quantized_values():
    layer = quantized_twin(nn.Conv2d(3, 4, 3, padding=1), ScaledSign(), SignQuantizer())
    x = torch.randn(2, 3, 6, 6, requires_grad=True)
    output = layer(x)
    signs = torch.where(x >= 0, 1.0, -1.0)
    weight = layer.weight.abs().mean(dim=(1, 2, 3), keepdim=True) * torch.where(layer.weight >= 0, 1.0, -1.0)
    assert torch.allclose(output, nn.functional.conv2d(signs, weight, layer.bias, padding=1), atol=1e-6)
    output.sum().backward()
    assert (x.grad[x.abs() > 1] == 0).all()
    assert x.grad[x.abs() <= 1].count_nonzero() > 0
    assert layer.weight.grad.count_nonzero() > 0
