"""XNOR-Net's K map: forward and backward against the paper's formula, in training and in eval()."""

from __future__ import annotations

import numpy as np
import oracles
import pytest
import torch
from torch import Tensor, nn

import lowbit
from lowbit import methods
from lowbit.layers import QuantizedLayer, quantized_twin

# in channels, out channels, kernel, stride, padding, dilation, groups
GEOMETRIES = [
    (3, 4, (3, 3), (1, 1), (1, 1), (1, 1), 1),
    (5, 2, (3, 1), (2, 3), (2, 0), (1, 1), 1),
    (2, 3, (2, 3), (1, 2), (3, 3), (2, 1), 1),
    (6, 9, (3, 3), (2, 2), (2, 2), (2, 2), 3),
    (4, 8, (1, 1), (1, 1), (0, 0), (1, 1), 4),
    (7, 3, (6, 5), (1, 1), (0, 0), (1, 1), 1),
]


def layer(make: type[nn.Module], *args: object, dtype: torch.dtype = torch.float64, **kwargs: object) -> QuantizedLayer:
    method = methods.registry["xnor_net"](k_map=True)
    plain = make(*args, **kwargs).to(dtype)
    return quantized_twin(plain, method.weight(), method.activation(), k_map=method.k_map)


def convolution(geometry: tuple, dtype: torch.dtype) -> tuple[QuantizedLayer, Tensor]:
    c_in, c_out, kernel, stride, padding, dilation, groups = geometry
    conv = layer(nn.Conv2d, c_in, c_out, kernel, stride, padding, dilation, groups, dtype=dtype)
    x = torch.randn(2, c_in, 6, 5, dtype=dtype)
    x.view(-1)[:4] = torch.tensor([0.0, -0.0, 2.5, -1.0])
    return conv, x


def k_of(x: np.ndarray, geometry: tuple) -> tuple[np.ndarray, list[np.ndarray]]:
    """K for every output channel, and dK/dA of each group."""
    _, c_out, *window, groups = geometry
    parts = [oracles.xnor_k_map(part, *window) for part in np.split(x, groups, axis=1)]
    return np.stack([k for k, _ in parts], axis=1).repeat(c_out // groups, axis=1), [slope for _, slope in parts]


def without_k(conv: nn.Module, x: Tensor) -> Tensor:
    """sign(x) convolved with alpha sign(W), by torch."""
    signs, weight = (
        torch.from_numpy(oracles.sign(x.numpy())),
        oracles.xnor_forward(conv.weight.detach().double().numpy()),
    )
    options = (conv.stride, conv.padding, conv.dilation, conv.groups)
    return nn.functional.conv2d(signs.double(), torch.from_numpy(weight), None, *options)


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_forward_and_backward_in_training(geometry: tuple) -> None:
    conv, x = convolution(geometry, torch.float64)
    k, slopes = k_of(x.numpy(), geometry)
    unscaled = without_k(conv, x)
    x.requires_grad_()
    y = conv(x)
    expected = unscaled.numpy() * k + conv.bias.detach().numpy()[:, None, None]
    np.testing.assert_allclose(y.detach().numpy(), expected, rtol=1e-12, atol=1e-12)

    g = torch.randn_like(y)
    y.backward(g)
    # Product rule: g K reaches x through the sign and its window, g y through A and |x|.
    through_sign = torch.nn.grad.conv2d_input(
        x.shape,
        torch.from_numpy(oracles.xnor_forward(conv.weight.detach().numpy())),
        g * torch.from_numpy(k),
        *(conv.stride, conv.padding, conv.dilation, conv.groups),
    )
    values = x.detach().numpy()
    of_k = np.split((g * unscaled).numpy(), len(slopes), axis=1)
    of_a = [np.einsum("noyx,yxhw->nhw", part, slope) for part, slope in zip(of_k, slopes, strict=True)]
    channels = values.shape[1] // len(slopes)
    through_k = np.repeat(np.stack(of_a, axis=1) / channels, channels, axis=1) * np.sign(values)
    expected = oracles.sign_gradient(values, through_sign.numpy()) + through_k
    np.testing.assert_allclose(x.grad.numpy(), expected, rtol=1e-10, atol=1e-12)
    assert np.abs(through_k).max() > 1e-3


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_gradient_of_k_is_the_finite_difference(geometry: tuple) -> None:
    """Away from 0 the signs stand still, so differences see K alone."""
    conv, x = convolution(geometry, torch.float64)
    x = x + 0.1 * torch.sign(x) + 0.05
    g = torch.randn_like(conv(x))
    x.requires_grad_()
    (conv.magnitudes(x) * (g * without_k(conv, x.detach()))).sum().backward()
    step = 1e-6
    for index in range(0, x.numel(), 7):
        move = torch.zeros_like(x).view(-1)
        move[index] = step
        move = move.view_as(x)
        with torch.no_grad():
            slope = float((g * (conv(x + move) - conv(x - move))).sum()) / (2 * step)
        assert x.grad.view(-1)[index].item() == pytest.approx(slope, abs=1e-7)


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_roundings_in_eval_come_in_the_stated_order(geometry: tuple) -> None:
    """float32(acc) * scale, then times K, then plus bias."""
    conv, x = convolution(geometry, torch.float32)
    conv.eval()
    with torch.no_grad():
        k = conv.magnitudes(x).numpy()
        found = conv(x).numpy()
        assert torch.equal(conv(x.requires_grad_()), torch.from_numpy(found))
    signs = torch.from_numpy(np.where(conv.weight.detach().numpy() >= 0, 1.0, -1.0))
    options = (conv.stride, conv.padding, conv.dilation, conv.groups)
    sums = nn.functional.conv2d(torch.from_numpy(oracles.sign(x.detach().numpy())), signs, None, *options)
    alpha = conv.weight_quantizer.encode(conv.weight)[1].scale.numpy()[..., 0]
    expected = sums.float().numpy() * alpha * k + conv.bias.detach().numpy()[:, None, None]
    assert found.dtype == expected.dtype == np.float32
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_allclose(k * np.ones((1, geometry[1], 1, 1)), k_of(x.detach().numpy(), geometry)[0], rtol=1e-6)


def test_eval_has_no_gradient_through_k_and_ignores_autocast() -> None:
    conv, x = convolution(GEOMETRIES[0], torch.float32)
    expected = conv.eval()(x.requires_grad_())
    expected.sum().backward()
    assert x.grad is None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(conv(x), expected)


def test_a_linear_layer_has_one_number_per_sample() -> None:
    linear = layer(nn.Linear, 10, 4)
    x = torch.randn(3, 2, 10, dtype=torch.float64)
    weight = oracles.xnor_forward(linear.weight.detach().numpy())
    k = np.sum(np.abs(x.numpy()), axis=-1, keepdims=True) / 10
    expected = (oracles.sign(x.numpy()) @ weight.T) * k + linear.bias.detach().numpy()
    np.testing.assert_allclose(linear(x).detach().numpy(), expected, rtol=1e-12)
    np.testing.assert_allclose(linear.eval().float()(x.float()).detach().numpy(), expected, rtol=1e-5, atol=1e-5)


def test_one_and_three_dimensions_and_an_image_without_batch_axis() -> None:
    """A box over all axes; of constant magnitude inside the image, K counts the taps inside."""
    for make, shape in ((nn.Conv1d, (2, 4, 6)), (nn.Conv3d, (2, 4, 3, 4, 5))):
        conv = layer(make, 4, 6, 3, padding=1, groups=2)
        k = conv.magnitudes(torch.full(shape, -2.0, dtype=torch.float64))
        axes = len(shape) - 2
        assert k.shape == (2, 6, *shape[2:])
        assert k[(0, 0, *[1] * axes)].item() == pytest.approx(2)
        assert k[(0, 0, *[0] * axes)].item() == pytest.approx(2 * (2 / 3) ** axes)
    conv, x = convolution(GEOMETRIES[3], torch.float64)
    assert torch.equal(conv(x[1]), conv(x[1:2])[0])


def test_float_activations_have_no_k() -> None:
    """The first layer reads the image as it is; a quantizer that a schedule has switched off quantizes nothing."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 2, 3))
    method = methods.registry["xnor_net"](k_map=True)
    lowbit.quantize_(model, method, {"[0]": method})
    assert [getattr(module, "k_map", None) for module in model] == [True, True, None]
    x = torch.randn(2, 3, 9, 9)
    first, second = model[0], model[1]
    weight = first.weight_quantizer(first.weight)
    for training in (True, False):
        assert torch.equal(first.train(training)(x), nn.functional.conv2d(x, weight, first.bias))
    x = torch.randn(2, 4, 9, 9)
    second.activation_quantizer.enabled = False
    weight = second.weight_quantizer(second.weight)
    assert torch.equal(second(x), nn.functional.conv2d(x, weight, second.bias))


def test_k_is_off_unless_asked_for() -> None:
    assert not methods.registry["xnor_net"]().k_map
    assert not any(methods.registry[name]().k_map for name in methods.registry)
