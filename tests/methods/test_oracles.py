"""The binary methods against the formulas of their papers."""

from __future__ import annotations

import math

import numpy as np
import oracles
import pytest
import torch

from lowbit import methods
from lowbit.errors import UsageError
from lowbit.layers import RPReLU
from lowbit.quantizers import ste

DTYPES = (torch.float32, torch.float64, torch.bfloat16)
SHAPES = ((4, 3, 3, 3), (5, 7), (2, 6, 1, 1), (3, 2, 5), (6, 1, 3, 3), (1, 64, 3, 3))
QUANTIZERS = {
    "bnn weight": lambda: methods.registry["bnn"]().weight(),
    "bnn activation": lambda: methods.registry["bnn"]().activation(),
    "xnor_net activation": lambda: methods.registry["xnor_net"]().activation(),
    "bireal activation": lambda: methods.registry["bireal"]().activation(),
    "reactnet activation": lambda: methods.registry["reactnet"]().activation(),
}
GRADIENTS = {
    "exact": oracles.xnor_gradient_exact,
    "paper": oracles.xnor_gradient_paper,
    "constant": oracles.constant_alpha_gradient,
}


def edges(dtype: torch.dtype) -> list[float]:
    """Numbers where a sign or a window may go wrong, all of them exact in ``dtype``."""
    step, tiny = torch.finfo(dtype).eps, torch.finfo(dtype).smallest_normal
    return [0.0, -0.0, 1.0, -1.0, 1 + step, -1 - step, 1 - step / 2, step / 2 - 1, tiny, -tiny, 0.5, -0.5, 3.0, -3.0]


def weights(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Normal weights, some of them replaced by edges."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    flat, special = w.view(-1), torch.tensor(edges(dtype), dtype=dtype)
    count = min(len(special), flat.numel() // 2)
    flat[torch.randperm(flat.numel(), generator=generator)[:count]] = special[:count]
    return w


def run(quantizer: torch.nn.Module, x: torch.Tensor, g: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Forward and backward, as float64 arrays; dtype and shape must be those of ``x``."""
    x = x.clone().requires_grad_()
    q = quantizer(x)
    q.backward(g)
    assert q.dtype == x.grad.dtype == x.dtype
    assert q.shape == x.grad.shape == x.shape
    return array(q), array(x.grad)


def array(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().double().numpy()


def window_size(weight: np.ndarray, g: np.ndarray) -> np.ndarray:
    """What the terms of a ScaledSign gradient add up to when none cancels: rounding errors are relative to it."""
    axes = tuple(range(1, weight.ndim))
    return np.mean(np.abs(weight), axes, keepdims=True) * np.abs(g) + np.mean(np.abs(g), axes, keepdims=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", QUANTIZERS)
def test_sign(name, dtype):
    x = torch.cat([torch.tensor([*edges(dtype), math.inf, -math.inf], dtype=dtype), weights((200,), dtype)])
    g = torch.randn(x.shape).to(dtype)
    q, gradient = run(QUANTIZERS[name](), x, g)
    np.testing.assert_array_equal(q, oracles.sign(array(x)))
    if name.startswith(("bireal", "reactnet")):
        expected = oracles.bireal_sign_gradient(array(x), array(g))
        np.testing.assert_allclose(gradient, expected, rtol=4 * torch.finfo(dtype).eps)
    else:
        np.testing.assert_array_equal(gradient, oracles.sign_gradient(array(x), array(g)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_window_stops_an_infinite_gradient_outside(dtype):
    x = torch.tensor([2.0, 1.0, -1.0, -math.inf], dtype=dtype)
    g = torch.full_like(x, math.inf)
    assert ste.window(g, x).tolist() == [0, math.inf, math.inf, 0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("gradient", GRADIENTS)
def test_scaled_sign(gradient, shape, dtype):
    w = weights(shape, dtype)
    g = torch.randn(shape).to(dtype)
    method = methods.registry["bireal"]() if gradient == "constant" else methods.registry["xnor_net"](gradient=gradient)
    q, dw = run(method.weight(), w, g)
    eps = torch.finfo(dtype).eps
    np.testing.assert_allclose(q, oracles.xnor_forward(array(w)), rtol=4 * eps)
    error = np.abs(dw - GRADIENTS[gradient](array(w), array(g)))
    assert np.all(error <= 4 * eps * window_size(array(w), array(g)))


def test_the_two_gradients_differ():
    w, g = weights((4, 3, 3, 3), torch.float64), torch.randn(4, 3, 3, 3, dtype=torch.float64)
    exact, paper = (run(methods.registry["xnor_net"](gradient=name).weight(), w, g)[1] for name in ("exact", "paper"))
    assert np.abs(exact - paper).max() > 0.01


@pytest.mark.parametrize("seed", range(5))
def test_scaled_sign_is_the_nearest_binary_filter(seed):
    w = torch.randn(3, 2, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    q = array(methods.registry["xnor_net"]().weight()(w))
    best = np.stack([oracles.xnor_best_approximation(row) for row in array(w)])
    np.testing.assert_allclose(q, best, rtol=1e-12)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_exact_gradient_is_autograd_through_the_definition(shape):
    """alpha = mean |W|, times a sign that passes the gradient on where |W| <= 1."""
    w = torch.randn(shape, dtype=torch.float64)
    w.view(-1)[:4] = torch.tensor([1.0, -1.0, 1.5, -1.5])
    g = torch.randn_like(w)
    defined = w.clone().requires_grad_()
    alpha = defined.abs().mean(dim=tuple(range(1, w.dim())), keepdim=True)
    passed = torch.where(w.abs() <= 1, defined, 0)
    signs = torch.sign(w) + passed - passed.detach()
    (alpha * signs).backward(g)
    _, dw = run(methods.registry["xnor_net"]().weight(), w, g)
    np.testing.assert_allclose(dw, array(defined.grad), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("shape", SHAPES[:4], ids=str)
def test_exact_gradient_through_alpha_is_the_finite_difference(shape):
    """sign is flat away from 0, so differences of L = sum g q see alpha alone; the rest is straight-through."""
    quantizer = methods.registry["xnor_net"]().weight()
    w = torch.randn(shape, dtype=torch.float64)
    w += 0.1 * torch.sign(w)
    g = torch.randn_like(w)
    step = 1e-5
    differences = np.zeros(w.numel())
    for i in range(w.numel()):
        move = torch.zeros_like(w)
        move.view(-1)[i] = step
        differences[i] = float((g * (quantizer(w + move) - quantizer(w - move))).sum()) / (2 * step)
    alpha = oracles.xnor_alpha(array(w)).reshape(-1, *[1] * (w.dim() - 1))
    through_sign = alpha * oracles.sign_gradient(array(w), array(g))
    _, dw = run(quantizer, w, g)
    np.testing.assert_allclose(dw - through_sign, differences.reshape(shape), atol=1e-8)


@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("clamp", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_xnor_net_projection_centres_then_clamps(shape, clamp, center):
    w = 2 * weights(shape, torch.float64)
    expected = array(w).copy()
    if center:
        expected = oracles.center(expected)
    if clamp:
        expected = oracles.clamp(expected)
    projection = methods.registry["xnor_net"](center=center, clamp=clamp).projection
    if projection is None:
        assert not center
        assert not clamp
        return
    projection(w)
    np.testing.assert_allclose(array(w), expected, rtol=1e-12, atol=1e-14)


def test_bnn_projection_clamps():
    w = 2 * weights((4, 3, 3, 3), torch.float64)
    expected = oracles.clamp(array(w))
    methods.registry["bnn"]().projection(w)
    np.testing.assert_array_equal(array(w), expected)


def test_an_unknown_gradient_is_refused():
    with pytest.raises(UsageError, match=r"gradient of alpha \* sign\(W\) is 'papper'"):
        methods.registry["xnor_net"](gradient="papper").weight()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(5, 3, 4, 2), (6, 3)], ids=str)
def test_rprelu_and_its_gradients(shape, dtype):
    """Against the formula, and against central differences of it, which are exact where no bend lies between."""
    x, g = (torch.randn(shape, dtype=torch.float64).to(dtype) for _ in range(2))
    act = RPReLU(3).double()
    gamma, slope, zeta = (torch.randn(3, dtype=torch.float64).to(dtype).double() for _ in range(3))
    with torch.no_grad():
        for module, values in zip(act, (-gamma, slope, zeta), strict=True):
            next(module.parameters()).copy_(values)
    y, dx = run(act, x, g)
    parts = [array(x), array(gamma), array(slope), array(zeta)]
    eps = torch.finfo(dtype).eps
    size = max(np.abs(part).max() for part in parts) ** 2
    np.testing.assert_allclose(y, oracles.rprelu(*parts), atol=8 * eps * size)
    assert [p.grad.dtype for p in act.parameters()] == [torch.float64] * 3
    found = [dx, -array(act[0].bias.grad), array(act[1].weight.grad), array(act[2].bias.grad)]
    for position, gradient in enumerate(found):
        for index in np.ndindex(gradient.shape):
            ends = []
            for move in (1e-6, -1e-6):
                moved = [part.copy() for part in parts]
                moved[position][index] += move
                ends.append(np.sum(array(g) * oracles.rprelu(*moved)))
            expected = (ends[0] - ends[1]) / 2e-6
            assert abs(gradient[index] - expected) <= 1e-6 + 40 * eps * size * x.numel()
