"""Winograd's convolutions against torch's own, and which convolutions go this way."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lowbit.training import winograd
from lowbit.training.convolutions import FastConvolutions
from lowbit.training.winograd import SMALLEST_HARMONIC_MEAN, WinogradConv2d

ONE = ((1, 1), (1, 1))
shapes = st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 4), st.integers(1, 10), st.integers(1, 10))


def all_three(convolve, x: Tensor, weight: Tensor, g: Tensor) -> tuple[Tensor, ...]:
    """Output and both gradients."""
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    y = convolve(x, weight, *ONE)
    return (y.detach(), *torch.autograd.grad(y, (x, weight), g))


def direct(x: Tensor, weight: Tensor, stride: tuple[int, int], padding: tuple[int, int]) -> Tensor:
    return torch.conv2d(x, weight, None, stride, padding)


@settings(max_examples=100, deadline=None)
@given(shapes, st.booleans(), st.sampled_from([1, 300, winograd.CHUNK]), st.integers(0, 1000))
def test_equal_to_the_direct_sum(shape, channels_last, chunk, seed):
    """In float64 all but exactly, for any number of chunks; in float32 as far as it rounds."""
    n, inputs, outputs, height, width = shape
    generator = torch.Generator().manual_seed(seed)
    x, weight, g = (
        torch.randn(size, generator=generator, dtype=torch.float64)
        for size in ((n, inputs, height, width), (outputs, inputs, 3, 3), (n, outputs, height, width))
    )
    if channels_last:
        x, g = (part.contiguous(memory_format=torch.channels_last) for part in (x, g))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(winograd, "CHUNK", chunk)
        results = all_three(WinogradConv2d.apply, x, weight, g)
        rounded = all_three(WinogradConv2d.apply, x.float(), weight.float(), g.float())
    references = all_three(direct, x, weight, g)
    sizes = all_three(direct, x.abs(), weight.abs(), g.abs())
    for result, in_float32, reference, size in zip(results, rounded, references, sizes, strict=True):
        assert result.shape == reference.shape
        assert ((result - reference).abs() <= 1e-12 * size.max()).all()
        assert in_float32.dtype == torch.float32
        assert ((in_float32 - reference).abs() <= 1e-4 * size.max()).all()


def test_rounding_at_the_size_that_layers_have():
    torch.manual_seed(0)
    x, weight, g = torch.randn(8, 256, 8, 8), torch.randn(256, 256, 3, 3), torch.randn(8, 256, 8, 8)
    references = all_three(direct, x.double(), weight.double(), g.double())
    for result, reference in zip(all_three(WinogradConv2d.apply, x, weight, g), references, strict=True):
        assert (result - reference).square().mean().sqrt() < 1e-5 * reference.square().mean().sqrt()


def test_gradients_are_those_of_finite_differences():
    torch.manual_seed(0)
    x = torch.randn(2, 3, 5, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4, 3, 3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, weight: WinogradConv2d.apply(x, weight, *ONE), (x, weight))


@pytest.mark.parametrize("wanted", [(True, False), (False, True)], ids=["x", "weight"])
def test_only_the_gradients_that_are_wanted(wanted):
    x, weight = torch.randn(2, 3, 4, 4), torch.randn(5, 3, 3, 3)
    x.requires_grad_(wanted[0])
    weight.requires_grad_(wanted[1])
    WinogradConv2d.apply(x, weight, *ONE).sum().backward()
    assert (x.grad is not None, weight.grad is not None) == wanted


@pytest.fixture
def taken(spy_on):
    """Shapes of the convolutions that go this way."""
    return spy_on(WinogradConv2d)


WIDE = SMALLEST_HARMONIC_MEAN


def layer(inputs: int = WIDE, outputs: int = WIDE, kernel: int = 3, padding: int = 1, **options: object) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, padding=padding, **options)  # type: ignore[arg-type]


TAKEN = {
    "plain": (layer(), 4),
    "no bias": (layer(bias=False), 4),
    "odd": (layer(), 11),
    "narrow to wide": (layer(WIDE * 2 // 3, WIDE * 2), 4),
}
LEFT = {
    "few channels": (layer(WIDE - 1), 4),
    "a tile for two by two pixels": (layer(), 2),
    "kernel": (layer(kernel=5, padding=2), 4),
    "padding": (layer(padding=0), 6),
    "stride": (layer(stride=2), 8),
    "dilation": (layer(dilation=2, padding=2), 4),
    "groups": (layer(groups=2), 4),
    "double": (layer().double(), 4),
}


@pytest.mark.parametrize(("conv", "side"), TAKEN.values(), ids=TAKEN)
def test_wide_layers_are_taken(conv, side, taken):
    x = torch.randn(2, conv.in_channels, side, side)
    expected = conv(x)
    with FastConvolutions():
        y = conv(x)
    assert taken == [x.shape]
    assert y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    of = torch.randn_like(y)
    for gradient, torchs in zip(
        torch.autograd.grad(y, list(conv.parameters()), of),
        torch.autograd.grad(expected, list(conv.parameters()), of),
        strict=True,
    ):
        assert (gradient - torchs).abs().max() <= 1e-4 * torchs.abs().max()


@pytest.mark.parametrize(("conv", "side"), LEFT.values(), ids=LEFT)
def test_other_layers_are_left_to_torch(conv, side, taken):
    x = torch.randn(2, conv.in_channels, side, side, dtype=conv.weight.dtype)
    expected = conv(x)
    with FastConvolutions():
        assert torch.equal(conv(x), expected)
    assert taken == []


def test_without_gradients_no_window_is_kept(taken):
    conv, x = layer(), torch.randn(2, WIDE, 4, 4)
    with FastConvolutions(), torch.no_grad():
        y = conv(x)
    assert taken == [x.shape]
    assert y.grad_fn is None
    torch.testing.assert_close(y, conv(x), rtol=1e-4, atol=1e-4)


def test_not_under_autocast_or_without_images(taken):
    conv, x = layer(), torch.randn(2, WIDE, 4, 4)
    with FastConvolutions():
        with torch.autocast("cpu", torch.bfloat16):
            conv(x)
        assert conv(x[:0]).shape == (0, WIDE, 4, 4)
    assert taken == []


@pytest.mark.parametrize("shape", [(2, WIDE, 0, 4), (2, WIDE - 1, 4, 4)], ids=["no pixels", "other channels"])
def test_what_torch_refuses_it_refuses_in_its_own_words(shape):
    conv, x = layer(), torch.randn(shape)
    with pytest.raises(RuntimeError) as torchs:
        conv(x)
    with FastConvolutions(), pytest.raises(RuntimeError) as ours:
        conv(x)
    assert str(ours.value) == str(torchs.value)
