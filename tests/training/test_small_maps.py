"""Convolutions as matrix products against torch's own, and everything that must go to torch untouched."""

from __future__ import annotations

import contextlib

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import conv2d

from lowbit.hardware import cpu_flags
from lowbit.training.convolutions import FastConvolutions
from lowbit.training.small_maps import PIXELS_FORWARD, PIXELS_WEIGHT_GRADIENT, SmallMapConv2d

BF16 = torch.bfloat16
# Where a CPU has no products of bfloat16, torch rounds what it adds, too.
ROUNDINGS = 1 if cpu_flags() & {"amx_bf16", "avx512_bf16"} else 8


def autocast(dtype: torch.dtype = BF16) -> torch.autocast:
    return torch.autocast("cpu", dtype=dtype)


@pytest.fixture
def taken(spy_on):
    """Shapes of the convolutions that go this way."""
    return spy_on(SmallMapConv2d)


@st.composite
def convolutions(
    draw: st.DrawFn,
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, int], tuple[int, int], bool, bool]:
    """Shapes of x and weight, stride, padding, whether there is a bias, whether x lies channels last."""
    pair = lambda low, high: st.tuples(st.integers(low, high), st.integers(low, high))  # noqa: E731
    batch, inputs, outputs = (draw(st.integers(1, high)) for high in (3, 5, 4))
    size, kernel, stride, padding = draw(pair(1, 9)), draw(pair(1, 4)), draw(pair(1, 3)), draw(pair(0, 3))
    out = [(size[i] + 2 * padding[i] - kernel[i]) // stride[i] + 1 for i in range(2)]
    assume(min(out) > 0)
    assume(out[0] * out[1] <= PIXELS_WEIGHT_GRADIENT)
    return (batch, inputs, *size), (outputs, inputs, *kernel), stride, padding, draw(st.booleans()), draw(st.booleans())


def gradients(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    geometry: tuple[tuple[int, int], tuple[int, int]],
    g: Tensor | None,
    mode: bool,
) -> list[Tensor]:
    """Output and gradients, in float32; under the mode and autocast, or plain."""
    leaves = [leaf.detach().requires_grad_() for leaf in (x, weight, bias) if leaf is not None]
    layer_bias = leaves[2] if bias is not None else None
    with autocast() if mode else contextlib.nullcontext(), FastConvolutions() if mode else contextlib.nullcontext():
        y = torch.conv2d(leaves[0], leaves[1], layer_bias, *geometry, (1, 1), 1)
    assert y.dtype == (BF16 if mode else torch.float32)
    y.backward(torch.ones_like(y) if g is None else g.to(y.dtype))
    for leaf in leaves:
        assert leaf.grad.dtype == torch.float32
        assert leaf.grad.shape == leaf.shape
    return [y.detach().float(), *[leaf.grad for leaf in leaves]]


@settings(max_examples=100, deadline=None)
@given(convolutions(), st.integers(0, 1000))
def test_equal_to_float32_up_to_bfloat16_rounding(shapes, seed):
    """The operands are exact in bfloat16, so only results round: once, and once more for the bias."""
    x_shape, w_shape, *geometry, with_bias, channels_last = shapes
    generator = torch.Generator().manual_seed(seed)
    x, weight = (torch.randn(shape, generator=generator).to(BF16).float() for shape in (x_shape, w_shape))
    bias = torch.randn(w_shape[0], generator=generator).to(BF16).float() if with_bias else None
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    g = torch.randn(torch.conv2d(x, weight, None, *geometry).shape, generator=generator).to(BF16).float()
    results = gradients(x, weight, bias, geometry, g, mode=True)
    references = gradients(x, weight, bias, geometry, g, mode=False)
    absolute = [None if part is None else part.abs() for part in (x, weight, bias)]
    sizes = gradients(absolute[0], absolute[1], absolute[2], geometry, g.abs(), mode=False)
    for result, reference, size in zip(results, references, sizes, strict=True):
        assert ((result - reference).abs() <= ROUNDINGS * 2.0**-7 * size + 1e-6).all()


@pytest.mark.parametrize("wanted", [(True, False), (False, True)], ids=["x", "weight"])
def test_only_the_gradients_that_are_wanted(wanted):
    x, weight = torch.randn(2, 3, 4, 4), torch.randn(5, 3, 3, 3)
    x.requires_grad_(wanted[0])
    weight.requires_grad_(wanted[1])
    with autocast(), FastConvolutions():
        conv2d(x, weight, None, (1, 1), (1, 1), (1, 1), 1).sum().backward()
    assert (x.grad is not None, weight.grad is not None) == wanted


def test_a_part_of_a_larger_tensor(taken):
    """The windows are strides over memory: they start where the part starts."""
    whole = torch.randn(4, 6, 4, 4).to(BF16).float()
    conv = nn.Conv2d(3, 2, 3)
    for part in (whole[2:, :3], whole[1:2, 3:], whole.transpose(2, 3)[:, ::2], whole[:, :3].expand(4, 3, 4, 4)):
        with autocast():
            expected = conv(part)
            with FastConvolutions():
                torch.testing.assert_close(conv(part), expected, rtol=0.02, atol=0.02)
    assert len(taken) == 4


def layer(outputs: int = 4, kernel: int = 3, padding: int | str = 1, **options: object) -> nn.Conv2d:
    return nn.Conv2d(4, outputs, kernel, padding=padding, **options)  # type: ignore[arg-type]


SIDE = int(PIXELS_WEIGHT_GRADIENT**0.5)
SMALL = (2, 4, 4, 4)
TAKEN = {
    "plain": (layer(), SMALL),
    "no bias": (layer(bias=False), SMALL),
    "1x1": (layer(kernel=1, padding=0), SMALL),
    "more padding than kernel": (layer(kernel=1, padding=2), SMALL),
    "one pixel": (layer(kernel=4, padding=0), SMALL),
    "forward limit": (layer(), (1, 4, 1, PIXELS_FORWARD)),
    "above the forward limit": (layer(), (1, 4, 1, PIXELS_FORWARD + 1)),
    "weight gradient limit": (layer(), (1, 4, SIDE, SIDE)),
    "stride": (layer(stride=2), SMALL),
    "stride in one axis": (layer(stride=(1, 2)), SMALL),
    "circular": (layer(padding_mode="circular"), SMALL),
}
LEFT = {
    "large map": (layer(), (1, 4, SIDE, SIDE + 1)),
    "dilation": (layer(dilation=2), SMALL),
    "groups": (layer(groups=2), SMALL),
    "same": (layer(padding="same"), SMALL),
    "one image": (layer(), SMALL[1:]),
    "double": (layer().double(), SMALL),
}
CALLS = {
    "two arguments": lambda x, w: conv2d(x, w),
    "keywords": lambda x, w: conv2d(x, w, stride=1, padding=1),
    "numbers": lambda x, w: conv2d(x, w, None, 1, 1, 1, 1),
    "a number for padding": lambda x, w: conv2d(x, w, None, (1, 1), 1, (1, 1), 1),
    "lists": lambda x, w: conv2d(x, w, None, [1, 1], [1, 1], [1, 1], 1),
    "one padding": lambda x, w: conv2d(x, w, None, (1, 1), (1,), (1, 1), 1),
    "valid": lambda x, w: conv2d(x, w, None, (1, 1), "valid", (1, 1), 1),
    "conv1d": lambda x, w: torch.conv1d(x[:, :, 0], w[:, :, 0]),
}


@pytest.mark.parametrize(("conv", "shape"), TAKEN.values(), ids=TAKEN)
def test_small_maps_are_taken(conv, shape, taken):
    with autocast(), FastConvolutions():
        conv(torch.randn(shape)).float().sum().backward()
    assert len(taken) == 1


@pytest.mark.parametrize(("conv", "shape"), LEFT.values(), ids=LEFT)
def test_other_layers_are_left_to_torch(conv, shape, taken):
    x = torch.randn(shape, dtype=conv.weight.dtype)
    with autocast():
        expected = conv(x)
        with FastConvolutions():
            result = conv(x)
    assert result.dtype == expected.dtype
    assert torch.equal(result, expected)
    assert taken == []


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_other_calls_are_left_to_torch(call, taken):
    x, weight = torch.randn(2, 4, 4, 4), torch.randn(3, 4, 3, 3)
    with autocast():
        expected = call(x, weight)
        with FastConvolutions():
            assert torch.equal(call(x, weight), expected)
    assert taken == []


@pytest.mark.parametrize(
    "context",
    [contextlib.nullcontext, lambda: autocast(torch.float16), lambda: torch.autocast("cpu", enabled=False)],
    ids=["no autocast", "float16", "disabled"],
)
def test_only_under_bfloat16_autocast(context, taken):
    conv, x = layer(), torch.randn(SMALL)
    with context():
        expected = conv(x)
        with FastConvolutions():
            result = conv(x)
    assert torch.equal(result, expected)
    assert taken == []


def test_without_gradients_too(taken):
    conv, x = layer(), torch.randn(SMALL)
    with autocast(), torch.no_grad():
        expected = conv(x)
        with FastConvolutions():
            result = conv(x)
    assert taken == [x.shape]
    assert result.grad_fn is None
    torch.testing.assert_close(result, expected, rtol=0.02, atol=0.02)


def test_a_kernel_above_the_map_is_torchs_own_error():
    with autocast(), FastConvolutions(), pytest.raises(RuntimeError, match="Kernel size can't be greater"):
        layer(kernel=5, padding=0)(torch.randn(SMALL))


def test_the_mode_ends(taken):
    conv, x = layer(), torch.randn(SMALL)
    with autocast():
        with FastConvolutions():
            conv(x)
        conv(x)
    assert len(taken) == 1
