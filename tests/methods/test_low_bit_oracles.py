"""Weights-only methods, DoReFa-Net and HWGQ against the formulas of their papers."""

from __future__ import annotations

import math

import numpy as np
import oracles
import pytest
import torch

from lowbit import methods
from lowbit.errors import UsageError
from lowbit.layers import QuantConv2d
from lowbit.methods.dorefa import quantize_gradient
from lowbit.methods.hwgq import HalfWave, lloyd_max_levels, uniform_step

SHAPES = ((4, 3, 3, 3), (5, 7), (1, 64, 3))
FORMS = ("clipped", "vanilla", "log_tailed")


def run(quantizer: torch.nn.Module, x: torch.Tensor, g: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Forward and backward in the dtype of ``x``, as float64 arrays."""
    x = x.clone().requires_grad_()
    q = quantizer(x)
    q.backward(g)
    return q.detach().double().numpy(), x.grad.double().numpy()


def weights(shape: tuple[int, ...]) -> torch.Tensor:
    """Normal, with zeros of both signs and numbers far outside."""
    w = torch.randn(shape, dtype=torch.float64)
    w.view(-1)[:6] = torch.tensor([0.0, -0.0, 1.0, -1.0, 4.0, -4.0])
    return w


PER_LAYER = {
    "twn": (lambda: methods.registry["twn"]().weight(), oracles.ternary),
    "dorefa, 1 bit": (lambda: methods.registry["dorefa"]().weight(), oracles.layer_sign),
}
PER_FILTER = {
    "twn": (lambda: methods.registry["twn"](per="filter").weight(), oracles.ternary),
    "hwgq": (lambda: methods.registry["hwgq"]().weight(), oracles.layer_sign),
}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", PER_LAYER)
def test_weights_with_one_scale_for_the_layer(name, shape):
    make, oracle = PER_LAYER[name]
    w, g = weights(shape), torch.randn(shape, dtype=torch.float64)
    q, gradient = run(make(), w, g)
    np.testing.assert_allclose(q, oracle(w.numpy()), rtol=1e-12)
    np.testing.assert_array_equal(gradient, g.numpy())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", PER_FILTER)
def test_weights_with_one_scale_for_each_filter(name, shape):
    make, oracle = PER_FILTER[name]
    w, g = weights(shape), torch.randn(shape, dtype=torch.float64)
    q, gradient = run(make(), w, g)
    np.testing.assert_allclose(q, np.stack([oracle(row) for row in w.numpy()]), rtol=1e-12)
    np.testing.assert_array_equal(gradient, g.numpy())


def test_ternary_ties_and_zeros():
    """The mean of |W| is 10/7, so that the threshold is 1 but for its rounding; all zeros stay zeros."""
    quantizer = methods.registry["twn"]().weight()
    w = torch.tensor([[4.0, -3.0, 1.5, 0.5, -0.25, 0.75, 0.0]])
    assert quantizer(w).sign().tolist() == [[1, -1, 1, 0, 0, 0, 0]]
    assert quantizer(w)[0, 0].item() == pytest.approx(8.5 / 3)
    assert quantizer(torch.zeros(2, 3)).tolist() == [[0.0] * 3] * 2


@pytest.mark.parametrize("gradient", ["exact", "paper"])
def test_bwn_has_the_weights_of_xnor_net(gradient):
    w, g = weights((4, 3, 3, 3)), torch.randn(4, 3, 3, 3, dtype=torch.float64)
    q, dw = run(methods.registry["bwn"](gradient=gradient).weight(), w, g)
    expected = {"exact": oracles.xnor_gradient_exact, "paper": oracles.xnor_gradient_paper}[gradient]
    np.testing.assert_allclose(q, oracles.xnor_forward(w.numpy()), rtol=1e-12)
    np.testing.assert_allclose(dw, expected(w.numpy(), g.numpy()), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("method", ["bwn", "binary_connect"])
def test_projections_clamp(method):
    w = 2 * weights((4, 3, 3, 3))
    expected = oracles.clamp(w.numpy().copy())
    methods.registry[method]().projection(w)
    np.testing.assert_array_equal(w.numpy(), expected)


STOCHASTIC = {
    "bnn activation": lambda: methods.registry["bnn"](stochastic=True).activation(),
    "binary_connect weight": lambda: methods.registry["binary_connect"](stochastic=True).weight(),
}


@pytest.mark.parametrize("name", STOCHASTIC)
def test_stochastic_signs(name):
    quantizer = STOCHASTIC[name]()
    x = torch.tensor([-math.inf, -1.5, -1.0, -0.6, -0.0, 0.0, 0.25, 0.9, 1.0, 2.0, math.inf])
    n = 4000
    many, g = x.repeat(n, 1), torch.randn(n, len(x))
    q, gradient = run(quantizer, many, g)
    assert set(np.unique(q)) == {-1.0, 1.0}
    p = oracles.hard_sigmoid(x.double().numpy())
    error = np.abs(q.mean(axis=0) - (2 * p - 1))
    assert np.all(error <= 5 * np.sqrt(4 * p * (1 - p) / n))
    np.testing.assert_array_equal(gradient, oracles.sign_gradient(many.double().numpy(), g.double().numpy()))
    np.testing.assert_array_equal(quantizer.eval()(x).numpy(), oracles.sign(x.numpy()))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("bits", range(2, 9))
def test_dorefa_weights(bits, shape):
    w, g = weights(shape), torch.randn(shape, dtype=torch.float64)
    q, gradient = run(methods.registry["dorefa"](bits_w=bits).weight(), w, g)
    np.testing.assert_allclose(q, oracles.dorefa_weight(w.numpy(), bits), atol=1e-6)
    np.testing.assert_allclose(gradient, oracles.dorefa_weight_gradient(w.numpy(), g.numpy()), rtol=1e-10)


def test_dorefa_weight_gradient_is_the_finite_difference_of_the_chain():
    """With the rounding left out and the largest weight, which sets the maximum, left alone."""
    quantizer = methods.registry["dorefa"](bits_w=4).weight()
    w = torch.randn(3, 5, dtype=torch.float64)
    w[0, 0] = 3.0
    g = torch.randn_like(w)
    step, largest = 1e-6, math.tanh(3.0)
    slope = (torch.tanh(w + step) - torch.tanh(w - step)) / (2 * step * largest)
    np.testing.assert_allclose(run(quantizer, w, g)[1], (g * slope).numpy(), rtol=1e-7, atol=1e-9)


def test_dorefa_weights_of_all_zeros_stay_finite():
    q, gradient = run(methods.registry["dorefa"](bits_w=3).weight(), torch.zeros(2, 3), torch.ones(2, 3))
    assert np.isfinite(q).all()
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize("bits", range(1, 9))
def test_dorefa_activations(bits):
    """Halves between levels, the ends of the window, infinities and random numbers."""
    halves = (torch.arange(2**bits - 1) + 0.5) / (2**bits - 1)
    ends = torch.tensor([0.0, -0.0, 1.0, 1.0 + 2**-22, -1e-30, -math.inf, math.inf, 7.0])
    x = torch.cat([halves, ends, torch.randn(200)]).double()
    g = torch.randn_like(x)
    q, gradient = run(methods.registry["dorefa"](bits_a=bits).activation(), x, g)
    np.testing.assert_allclose(q, oracles.dorefa_activation(x.numpy(), bits), rtol=1e-6)
    np.testing.assert_array_equal(gradient, oracles.dorefa_activation_gradient(x.numpy(), g.numpy()))


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_dorefa_gradients_by_mean_and_variance(bits):
    n = 3000
    g = torch.randn(3, 2, 3, dtype=torch.float64) * torch.tensor([1e-6, 1.0, 1e4]).double().view(3, 1, 1)
    g[1, 0, 0] = 0
    g = torch.cat([g, torch.zeros(1, 2, 3)]).float()
    x = torch.zeros(4 * n, 2, 3, requires_grad=True)
    y = quantize_gradient(x, bits)
    assert torch.equal(y, x)
    y.backward(g.repeat(n, 1, 1))
    drawn = x.grad.double().numpy().reshape(n, 4, 2, 3)
    mean, variance = oracles.dorefa_gradient_moments(g.double().numpy(), bits)
    largest = np.abs(mean).max(axis=(1, 2), keepdims=True)
    assert np.all(np.abs(drawn.mean(axis=0) - mean) <= 5 * np.sqrt(variance / n) + 1e-6 * largest)
    # The fourth moment of a choice between two neighbours is at most its variance times the square of their distance.
    step = 2 * largest / (2**bits - 1)
    assert np.all(np.abs(drawn.var(axis=0) - variance) <= 5 * step * np.sqrt(variance / n) + (1e-3 * step) ** 2)
    for sample in (1, 2):
        levels = drawn[:, sample] / (2 * largest[sample]) * (2**bits - 1) + (2**bits - 1) / 2
        np.testing.assert_allclose(levels, np.rint(levels), atol=1e-4)
        assert levels.min() > -0.5
        assert levels.max() < 2**bits - 0.5


def test_gradients_are_quantized_between_a_layer_and_what_reads_it():
    """The bias takes the sum of the quantized gradient; nothing is quantized in eval() or in other methods."""
    layer = QuantConv2d(1, 1, 1)
    x, g = torch.ones(1, 1, 2, 2), torch.tensor([[[[1.0, 0.3], [-0.2, 0.1]]]])
    layer.gradient_quantizer = methods.registry["dorefa"](bits_g=1).gradient
    layer(x).backward(g)
    assert layer.bias.grad.item() in (-4.0, -2.0, 0.0, 2.0, 4.0)
    layer.bias.grad = None
    layer.eval()(x).backward(g)
    assert layer.bias.grad.item() == pytest.approx(1.2)
    assert methods.registry["dorefa"]().gradient is None


@pytest.mark.parametrize("option", ["bits_w", "bits_a", "bits_g"])
@pytest.mark.parametrize("bits", [0, 9, 31])
def test_dorefa_refuses_other_widths(option, bits):
    with pytest.raises(UsageError, match=f"{option} of dorefa is '{bits}'"):
        methods.registry["dorefa"](**{option: bits})


def test_dorefa_in_float_is_float():
    method = methods.registry["dorefa"](bits_w=32, bits_a=32)
    assert (method.weight, method.activation, method.gradient) == (None, None, None)


@pytest.mark.parametrize("bits", range(1, 6))
@pytest.mark.parametrize("solve", [uniform_step, lloyd_max_levels])
def test_hwgq_levels_have_the_least_error(solve, bits):
    """No small move of the step, or of any one level, lowers the error under a half normal distribution."""
    found = solve(bits)
    directions = np.arange(2**bits)[None] if solve is uniform_step else np.eye(2**bits)[1:]
    levels = np.arange(2**bits) * found if solve is uniform_step else np.array(found)
    # Above 0 nothing is rounded to 0, whatever the distance.
    positive, least = levels[1:], oracles.half_normal_error(levels[1:])
    for direction in directions[:, 1:]:
        for move in (-0.01, 0.01):
            assert oracles.half_normal_error(positive + move * positive[0] * direction) > least


def test_hwgq_levels_of_the_paper():
    assert 0.538 < uniform_step(2) < 0.539
    np.testing.assert_allclose([uniform_step(k) for k in (1, 3, 4)], [0.798, 0.322, 0.184], atol=5e-4)
    np.testing.assert_allclose(lloyd_max_levels(2), [0, 0.318, 1.000, 1.894], atol=5e-4)
    assert lloyd_max_levels(1)[1] == pytest.approx(uniform_step(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("levels", ["uniform", "lloyd_max"])
@pytest.mark.parametrize("bits", [1, 2, 4])
def test_half_wave(bits, levels, form, dtype):
    quantizer = HalfWave(bits, levels, form)
    table = torch.tensor(quantizer.levels[1:], dtype=dtype)
    special = torch.tensor([0.0, -0.0, 1e-30, -1e-30, math.inf, -math.inf, 50.0], dtype=dtype)
    beyond = table[-1:] * (1 + 2**-20)
    midpoints = (table[1:] + table[:-1]) / 2
    ties = midpoints[midpoints.double() * 2 == table[1:].double() + table[:-1].double()]
    x = torch.cat([special, table, beyond, ties, torch.randn(300, dtype=dtype)])
    g = torch.randn_like(x)
    q, gradient = run(quantizer, x, g)
    exact, top = x.double().numpy(), quantizer.levels[-1]
    np.testing.assert_array_equal(q, oracles.half_wave(exact, np.array(quantizer.levels[1:])))
    expected = oracles.half_wave_gradient(exact, g.double().numpy(), top, form)
    np.testing.assert_allclose(gradient, expected, rtol=1e-6)
    assert quantizer(torch.tensor([math.nan], dtype=dtype)).item() == 0


@pytest.mark.parametrize("levels", ["uniform", "lloyd_max"])
def test_log_tailed_gradient_is_the_finite_difference_of_its_logarithm(levels):
    quantizer = HalfWave(2, levels, "log_tailed")
    top = quantizer.levels[-1]
    x = torch.tensor([top + 0.1, top + 1, top + 9], dtype=torch.float64)
    slope = (torch.log(x + 1e-6 - top + 1) - torch.log(x - 1e-6 - top + 1)) / 2e-6
    np.testing.assert_allclose(run(quantizer, x, torch.ones_like(x))[1], slope.numpy(), rtol=1e-7)


def test_a_table_of_levels_is_convolved_in_eval():
    layer = QuantConv2d(3, 4, 3, padding=1)
    method = methods.registry["hwgq"](levels="lloyd_max")
    layer.weight_quantizer, layer.activation_quantizer = method.weight(), method.activation()
    x = torch.randn(2, 3, 6, 6)
    expected = layer(x)
    found = layer.eval()(x)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("options", [{"bits_a": 0}, {"bits_a": 9}, {"levels": "log"}, {"backward": "clip"}], ids=str)
def test_hwgq_refuses_other_options(options):
    (name,) = options
    with pytest.raises(UsageError, match=f"{name} of hwgq is"):
        methods.registry["hwgq"](**options)
