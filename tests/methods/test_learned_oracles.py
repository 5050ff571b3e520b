"""IR-Net, ReCU, AdaBin, LSQ and PACT against the formulas of their papers, and what their learned numbers do."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import oracles
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import lowbit
from lowbit import methods
from lowbit.errors import UsageError
from lowbit.layers import quantized_layers, start_epoch
from lowbit.methods.adabin import EqualizedWeight, LearnedPair
from lowbit.methods.irnet import DecayingSign, LibraWeight
from lowbit.methods.lsq import LearnedStep
from lowbit.methods.pact import ClippedReLU
from lowbit.methods.recu import ClampedWeight, StandardSign
from lowbit.quantizers.base import Quantizer
from lowbit.training.module import make_optimizer

SHAPES = ((4, 3, 3, 3), (5, 7), (1, 64, 3))
SHARPNESS = (0.1, 1.0, 10.0)


def run(quantizer: nn.Module, x: Tensor, g: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Forward and backward in the dtype of ``x``, as float64 arrays."""
    x = x.clone().requires_grad_()
    q = quantizer(x)
    q.backward(g)
    return q.detach().double().numpy(), x.grad.double().numpy()


def pair(shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Numbers off centre, of unequal sizes in each row, and a gradient."""
    sizes = torch.linspace(0.1, 2, shape[0], dtype=torch.float64).reshape(-1, *[1] * (len(shape) - 1))
    return torch.randn(shape, dtype=torch.float64) * sizes + 0.3, torch.randn(shape, dtype=torch.float64)


@pytest.mark.parametrize("t", SHARPNESS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_irnet(shape, t):
    w, g = pair(shape)
    weight, activation = LibraWeight(), DecayingSign()
    weight.sharpness = activation.sharpness = t
    q, gradient = run(weight, w, g)
    np.testing.assert_allclose(q, oracles.irnet_weight(w.numpy()))
    expected = oracles.irnet_weight_gradient(w.numpy(), g.numpy(), t)
    # The mean of a filter is rounded to float32.
    np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())
    q, gradient = run(activation, w, g)
    np.testing.assert_array_equal(q, oracles.sign(w.numpy()))
    np.testing.assert_allclose(gradient, g.numpy() * oracles.decaying_slope(w.numpy(), t), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("share", [0.0, 0.6, 0.9])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_recu(shape, share):
    w, g = pair(shape)
    w.view(-1)[1] = 9.0
    weight = ClampedWeight()
    weight.tau.fill_(tau := 0.85 + 0.14 * (math.exp(share) - 1) / (math.e - 1))
    q, gradient = run(weight, w, g)
    expected, _, free = oracles.recu_weight(w.numpy(), tau)
    assert not free.all()
    np.testing.assert_allclose(q, expected, rtol=1e-6)
    expected = oracles.recu_weight_gradient(w.numpy(), g.numpy(), tau)
    np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-6)
    q, gradient = run(StandardSign(), w, g)
    np.testing.assert_array_equal(q, oracles.sign(w.numpy()))
    np.testing.assert_allclose(gradient, oracles.recu_activation_gradient(w.numpy(), g.numpy()), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("t", SHARPNESS)
@pytest.mark.parametrize("per", ["filter", "layer"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_adabin_weights(shape, per, t):
    w, g = pair(shape)
    quantizer = EqualizedWeight(per)
    quantizer.sharpness = t
    q, gradient = run(quantizer, w, g)
    rows, gradients = (w.numpy(), g.numpy()) if per == "filter" else (w.numpy()[None], g.numpy()[None])
    for row, found in zip(rows, q.reshape(rows.shape), strict=True):
        expected = oracles.adabin_weight(row)
        np.testing.assert_allclose(found, expected, rtol=0, atol=2**-8 * np.abs(expected).max())
    expected = [oracles.adabin_weight_gradient(row, of, t) for row, of in zip(rows, gradients, strict=True)]
    np.testing.assert_allclose(gradient, np.stack(expected).reshape(shape), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 0.0), (0.75, 0.375), (-1.5, -0.25)])
def test_adabin_activations(alpha, beta):
    quantizer = LearnedPair().double()
    quantizer.load_state_dict({"alpha": torch.tensor(alpha), "beta": torch.tensor(beta)})
    x, g = pair((6, 5, 4))
    x[0, 0, :3] = torch.tensor([beta, beta + alpha, beta - alpha])
    u = (x.numpy() - beta) / abs(alpha)
    q, gradient = run(quantizer, x, g)
    signs, slope, of_q = oracles.sign(x.numpy() - beta), oracles.triangle(u), g.numpy()
    np.testing.assert_allclose(q, abs(alpha) * signs + beta, rtol=0, atol=2**-8 * (abs(alpha) + abs(beta)))
    np.testing.assert_allclose(gradient, of_q * slope, atol=1e-12)
    np.testing.assert_allclose(quantizer.beta.grad, np.sum(of_q * (1 - slope)))
    np.testing.assert_allclose(quantizer.alpha.grad, np.sum(of_q * (signs - u * slope)) * np.sign(alpha))


def differences(quantizer: Quantizer, name: str, x: Tensor, g: Tensor, step: float = 1e-3) -> float:
    """dL/d(parameter) of L = sum g q by central differences of the staircase itself."""
    parameter, losses = quantizer.get_parameter(name), []
    for move in (step, -2 * step):
        with torch.no_grad():
            parameter += move
            losses.append(float((g * quantizer(x)).sum()))
    with torch.no_grad():
        parameter += step
    return (losses[0] - losses[1]) / (2 * step)


def test_adabins_learned_pair_by_finite_differences_where_the_sign_is_flat():
    """Numbers more than alpha away from beta: the sign's estimator is 0 there, so the gradient is the true one."""
    quantizer = LearnedPair().double()
    x, g = 3 * oracles_signs(40) + torch.rand(40, dtype=torch.float64) * 0.5, torch.randn(40, dtype=torch.float64)
    run(quantizer, x, g)
    for name, parameter in quantizer.named_parameters():
        # A step of a quarter, and 1 and 0 at its ends and middle, lie on the levels' grid of 8 bits.
        assert float(parameter.grad) == pytest.approx(differences(quantizer, name, x, g, 0.25), rel=1e-4)


def oracles_signs(count: int) -> Tensor:
    return torch.from_numpy(oracles.sign(np.random.default_rng(0).normal(size=count)))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("bits", "signed"), [(2, True), (3, True), (8, True), (1, False), (2, False), (8, False)])
def test_lsq(bits, signed, shape):
    v, g = pair(shape)
    quantizer = LearnedStep(bits, signed).double()
    lowest, highest = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    q, gradient = run(quantizer, v, g)
    s = 2 * float(v.abs().mean()) / math.sqrt(highest)
    assert quantizer.step.item() == pytest.approx(s)
    expected, of_step, of_v = oracles.lsq_parts(v.numpy(), float(torch.tensor(s).float()), lowest, highest)
    np.testing.assert_allclose(q, expected, rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(gradient, g.numpy() * of_v, rtol=1e-12)
    terms = v.numel() if signed else v[0].numel()
    scale = 1 / math.sqrt(terms * highest)
    assert float(quantizer.step.grad) == pytest.approx(scale * float(np.sum(g.numpy() * of_step)), rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("signed", [True, False])
def test_lsqs_step_by_finite_differences(signed):
    """The staircase's own slope in s counts levels; LSQ's is less by x / s, where rounding passes the gradient on."""
    quantizer = LearnedStep(3, signed).double()
    x, g = torch.randn(1, 50, dtype=torch.float64), torch.randn(1, 50, dtype=torch.float64)
    quantizer(x)
    s, ends = quantizer.step.item(), (quantizer.lowest, quantizer.highest)
    x = x[((x / s).frac().abs() - 0.5).abs() > 0.05][None]
    g = g[:, : x.numel()]
    run(quantizer, x, g)
    inside = (x / s > ends[0]) & (x / s < ends[1])
    unscaled = float(quantizer.step.grad) * math.sqrt(x.numel() * ends[1])
    slope = unscaled + float((g * x / s)[inside].sum())
    assert slope == pytest.approx(differences(quantizer, "step", x, g), rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("alpha", [0.5, 2.0, 10.0])
def test_pact(alpha, bits):
    quantizer = ClippedReLU(bits, alpha, decay=0.25).double()
    x, g = 4 * torch.randn(300, dtype=torch.float64), torch.randn(300, dtype=torch.float64)
    x[:6] = torch.tensor([0.0, -0.0, alpha, -1e-30, math.inf, -math.inf])
    q, gradient = run(quantizer, x, g)
    finite, of_q = np.clip(x.numpy(), -1e6, 1e6), g.numpy()
    np.testing.assert_allclose(q, oracles.pact_activation(finite, alpha, bits), rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(gradient, np.where((finite >= 0) & (finite < alpha), of_q, 0))
    assert float(quantizer.alpha.grad) == pytest.approx(np.sum(of_q[finite >= alpha]) + 0.25 * alpha)


def test_pacts_alpha_by_finite_differences_of_the_clip():
    quantizer = ClippedReLU(4, 1.0, decay=0.0).double()
    x, g = torch.linspace(-1, 3, 41).double() + 0.013, torch.randn(41, dtype=torch.float64)
    run(quantizer, x, g)
    clip = nn.Module.__new__(ClippedReLU)
    clip.__dict__ = {**quantizer.__dict__, "forward": quantizer.surrogate}
    assert float(quantizer.alpha.grad) == pytest.approx(differences(clip, "alpha", x, g), rel=1e-6)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.floats(-4, 4, width=32), min_size=12, max_size=12), st.floats(0.125, 8), st.integers(-3, 3))
def test_properties(numbers: list[float], size: float, power: int):
    """Levels of weights follow their size; rising inputs give rising outputs; inside a range no error passes half a
    step.
    """
    w = torch.tensor(numbers, dtype=torch.float64).reshape(2, 6)
    rising = w.flatten().sort()[0]
    with torch.no_grad():
        assert torch.equal(EqualizedWeight()(w * 2.0**power), EqualizedWeight()(w) * 2.0**power)
        assert torch.equal(LibraWeight()(w * 2.0**power), LibraWeight()(w))
        assert bool((LearnedPair()(rising).diff() >= 0).all())
        for quantizer in (LearnedStep(4, signed=False), ClippedReLU(3, size)):
            q = quantizer(rising)
            assert bool((q.diff() >= 0).all())
            step = float(quantizer.encode(rising)[1].scale)
            inside = (rising >= 0) & (rising <= step * (2**quantizer.bits - 1))
            assert bool(((q - rising)[inside].abs() <= step / 2 * (1 + 1e-5)).all())


def net() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 3)
    )


@pytest.mark.parametrize("name", ["irnet", "recu", "adabin"])
def test_phases_follow_from_the_share_alone_and_leave_evaluation_alone(name):
    model, method = net(), methods.registry[name]()
    lowbit.quantize_(model, method)
    images = torch.randn(2, 3, 9, 9)
    [layer] = quantized_layers(model)
    seen = []
    for epoch in (3, 0, 9, 3):
        start_epoch(model.train(), method, epoch / 10)
        weight, activation = layer.weight_quantizer, layer.activation_quantizer
        model[0].zero_grad()
        model(images).sum().backward()
        seen.append(model[0].weight.grad.clone())
        if name == "recu":
            a = (0.99 - 0.85) / (math.e - 1)
            assert weight.tau.item() == pytest.approx(a * math.e ** (epoch / 10) + 0.85 - a)
            assert "3.weight_quantizer.tau" in model.state_dict()
            continue
        for quantizer in (weight, activation)[: 2 if name == "irnet" else 1]:
            assert quantizer.sharpness == pytest.approx(oracles.decaying_sharpness(epoch, 10))
        model.eval()
        with torch.no_grad():
            other = [model(images), setattr(weight, "sharpness", 3.0), model(images)]
        assert torch.equal(other[0], other[2])
    if name == "irnet":
        assert torch.equal(seen[0], seen[3])
        assert not torch.equal(seen[0], seen[1])


LEARNED = {
    "lsq": {"3.weight_quantizer.step", "3.activation_quantizer.step"},
    "pact": {"3.activation_quantizer.alpha"},
    "adabin": {"3.activation_quantizer.alpha", "3.activation_quantizer.beta"},
}


@pytest.mark.parametrize("name", LEARNED)
def test_learned_numbers_reach_the_optimizer_and_rest_in_eval(name):
    model, method = net(), methods.registry[name]()
    lowbit.quantize_(model, method)
    own = {key: value for key, value in model.named_parameters() if "quantizer" in key}
    assert set(own) == LEARNED[name]
    optimizer = make_optimizer(model, method.recipe)
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    assert all(any(parameter is other for other in held) for parameter in own.values())
    model(torch.randn(2, 3, 9, 9))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    model.eval()(100 * torch.randn(2, 3, 9, 9))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_step_that_has_seen_nothing():
    quantizer = LearnedStep(2, signed=False)
    with pytest.warns(UserWarning, match="has seen no data, so its step reaches up to 4"):
        _, grid = quantizer.eval().encode(torch.randn(3))
    assert grid.decode(torch.tensor([3])).item() == pytest.approx(4)
    quantizer.train()(torch.zeros(2, 3))
    assert not quantizer.started, "zeros say nothing of the size"
    quantizer(torch.ones(2, 3))
    quantizer(9 * torch.ones(2, 3))
    assert quantizer.step.item() == pytest.approx(2 / math.sqrt(3))
    again = LearnedStep(2, signed=False)
    again.load_state_dict(quantizer.state_dict())
    again(9 * torch.ones(2, 3))
    assert torch.equal(again.step, quantizer.step)


@pytest.mark.parametrize("value", [-1.0, 0.0])
def test_learned_numbers_that_fell_too_far_stay_finite_and_can_come_back(value):
    for quantizer, name in ((LearnedStep(2, True), "step"), (ClippedReLU(2), "alpha"), (LearnedPair(), "alpha")):
        x = torch.randn(4, 5)
        quantizer(x)
        with torch.no_grad():
            quantizer.get_parameter(name).fill_(value)
        q, gradient = run(quantizer, x, torch.ones(4, 5))
        assert np.isfinite(q).all()
        assert np.isfinite(gradient).all()
        assert quantizer.get_parameter(name).grad.isfinite()


def test_filters_of_equal_weights_stay_finite():
    for quantizer in (LibraWeight(), ClampedWeight(), EqualizedWeight()):
        q, gradient = run(quantizer, torch.full((2, 3), 0.7), torch.randn(2, 3))
        assert np.isfinite(q).all()
        assert np.isfinite(gradient).all()


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("lsq", {"bits_w": 1}, "bits_w of lsq is '1'"),
    ("lsq", {"bits_a": 9}, "bits_a of lsq is '9'"),
    ("pact", {"bits_w": 0}, "bits_w of pact is '0'"),
    ("pact", {"bits_a": 9}, "bits_a of pact is '9'"),
    ("pact", {"alpha": 0.0}, "alpha of pact is 0.0, but must be above 0"),
    ("pact", {"decay": -1.0}, "decay of pact is -1.0, but must be at least 0"),
    ("adabin", {"per": "channel"}, "per of adabin is 'channel'"),
]


@pytest.mark.parametrize(("name", "options", "sentence"), REFUSED)
def test_options_out_of_range_are_refused_by_name(name, options, sentence):
    with pytest.raises(UsageError, match=sentence):
        methods.registry[name](**options)
