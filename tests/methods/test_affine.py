"""Affine quantization: gradients, phases, post-training calibration, training, export."""

from __future__ import annotations

import copy
import warnings
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import lowbit
from lowbit import data, methods, models
from lowbit.errors import UsageError
from lowbit.exporter.verify import verify
from lowbit.layers import attach_rules, quantized_layers, start_epoch
from lowbit.methods import Method
from lowbit.methods.affine import AffineActivation, AffineWeight
from lowbit.quantizers.observers import Observer


def affine(**options: Any) -> Method:
    return methods.registry["affine"](**options)


def run(quantizer: nn.Module, x: Tensor, g: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Forward and backward in the dtype of ``x``, as float64 arrays."""
    x = x.clone().requires_grad_()
    q = quantizer(x)
    q.backward(g)
    return q.detach().double().numpy(), x.grad.double().numpy()


def seeing(bits: int, low: float, high: float) -> AffineActivation:
    """A quantizer in ``train()`` whose range is known and stays."""
    quantizer = AffineActivation(bits, "min_max")
    quantizer.bypass(torch.tensor([low, high]))
    quantizer.observer.frozen = True
    return quantizer


@pytest.mark.parametrize("shape", [(4, 3, 3, 3), (5, 7), (1, 64, 3)], ids=str)
@pytest.mark.parametrize("per", ["channel", "tensor"])
@pytest.mark.parametrize("bits", range(2, 9))
def test_weights(bits, per, shape):
    w = torch.randn(shape, dtype=torch.float64)
    w.view(-1)[:4] = torch.tensor([0.0, -0.0, 3.0, -3.0])
    w[-1] = 0 if len(w) > 1 else w[-1]
    g = torch.randn_like(w)
    q, gradient = run(AffineWeight(bits, per), w, g)
    rows = w.flatten(1).numpy()
    largest = np.abs(rows).max(axis=1 if per == "channel" else None, keepdims=True)
    step = np.where(largest > 0, largest / (2 ** (bits - 1) - 1), 1)
    expected = np.rint(rows / step) * step
    np.testing.assert_allclose(q.reshape(rows.shape), expected, rtol=1e-6)
    np.testing.assert_array_equal(gradient, g.numpy())
    # Symmetric: as many levels above 0 as below.
    np.testing.assert_array_equal(AffineWeight(bits, per)(-w).numpy(), -q)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("low_high", [(-1.0, 2.0), (0.0, 6.3), (-5.0, 0.0), (0.5, 1.0), (-0.37, 4.1)], ids=str)
@pytest.mark.parametrize("bits", range(2, 9))
def test_activations(bits, low_high, dtype):
    low, high = min(low_high[0], 0), max(low_high[1], 0)
    top = 2**bits - 1
    step = np.float32(np.float32(high) - np.float32(low)) / np.float32(top)
    zero = np.rint(np.float32(-low) / step)
    ends = [float(np.float32(-zero) * step), float(np.float32(top - zero) * step)]
    beside = [np.nextafter(np.float32(end), np.float32(side)) for end in ends for side in (-100, 100)]
    x = torch.tensor(
        [*ends, *beside, 0.0, -0.0, np.inf, -np.inf, 1e30, -1e30, *torch.randn(300).mul(3).tolist()], dtype=dtype
    )
    g = torch.randn_like(x)
    q, gradient = run(seeing(bits, *low_high), x, g)
    exact = x.numpy()
    expected = (np.clip(np.rint(exact / exact.dtype.type(step)) + zero, 0, top) - zero) * step
    np.testing.assert_allclose(q, expected, rtol=1e-6)
    inside = (exact >= ends[0]) & (exact <= ends[1])
    np.testing.assert_array_equal(gradient, g.double().numpy() * inside)
    assert 0 < inside.sum() < len(inside)


def test_an_activation_is_quantized_by_the_range_that_includes_it():
    quantizer = AffineActivation(8, "min_max")
    x = torch.tensor([-1.0, 0.0, 1.55])
    torch.testing.assert_close(quantizer(x), x, atol=1e-6, rtol=0)
    torch.testing.assert_close(quantizer(10 * x), 10 * x, atol=1e-5, rtol=0)
    assert quantizer.observer.batches == 2
    quantizer.eval()(100 * x)
    assert quantizer.observer.batches == 2


def test_without_data_there_is_a_warning_in_eval_only():
    quantizer = AffineActivation(2)
    with pytest.warns(UserWarning, match="has seen no data, so it takes the range -4 to 4"):
        _, grid = quantizer.eval().encode(torch.randn(3))
    # A step of 8/3; the zero point 1.5 goes to the even 2.
    assert (grid.scale.item(), grid.offset) == (pytest.approx(8 / 3), -2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quantizer.train()(torch.randn(3))
        quantizer.eval()(torch.randn(3))


REFUSED = {
    "bits_w": (1, "must be one of 2"),
    "bits_a": (9, "must be one of 2"),
    "per": ("layer", "must be one of channel, tensor"),
    "observer": ("max", "must be one of moving_average"),
    "percentile": (20.0, "must be above 50"),
    "ends": ("both", "must be one of quantized, float"),
    "delay": (0.9, "0 <= delay < freeze <= 1"),
    "freeze": (1.1, "0 <= delay < freeze <= 1"),
}


@pytest.mark.parametrize("option", REFUSED)
def test_options_out_of_range_are_refused_by_name(option):
    value, sentence = REFUSED[option]
    with pytest.raises(UsageError, match=f"{option} .*{value}.*{sentence}"):
        affine(**{option: value, **({"observer": "percentile"} if option == "percentile" else {})})


def small_net() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 6, 3),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 4),
    )


def observers(model: nn.Module) -> list[Observer]:
    return [module for module in model.modules() if isinstance(module, Observer)]


@pytest.mark.parametrize(
    ("ends", "bits"), [("quantized", [(4, 8), (4, 3), (4, 3)]), ("float", [(32, 32), (4, 3), (32, 32)])]
)
def test_first_and_last_layer(ends, bits):
    reports = lowbit.quantize_(small_net(), affine(bits_w=4, bits_a=3, ends=ends))
    assert [(report.bits_w, report.bits_a) for report in reports] == bits


def test_a_first_layer_named_by_an_override_reads_activations():
    first, *_ = lowbit.quantize_(small_net(), "float", overrides={"0": affine(bits_a=3)})
    assert (first.bits_w, first.bits_a) == (8, 3)
    first, *_ = lowbit.quantize_(small_net(), "float", overrides={"[0]": affine(bits_a=3)})
    assert (first.bits_w, first.bits_a) == (8, 8)


def test_phases():
    model = small_net()
    method = affine(delay=0.25, freeze=0.75)
    lowbit.quantize_(model, method)
    float_twin = copy.deepcopy(model)
    for layer in quantized_layers(float_twin):
        layer.weight_quantizer = layer.activation_quantizer = None
    for network in (model, float_twin):
        network[6].p = 0.0
    images = torch.randn(8, 3, 8, 8)
    norm = model[1]
    # Any order: a resumed run begins in the middle.
    for share in (0.5, 0.0, 0.75, 0.25, 0.9, 0.2):
        model.train()
        start_epoch(model, method, share)
        before, mean = [observer.batches.item() for observer in observers(model)], norm.running_mean.clone()
        output = model(images)
        saw = [observer.batches.item() - count for observer, count in zip(observers(model), before, strict=True)]
        assert saw == [int(share < 0.75)] * 3
        assert torch.equal(norm.running_mean, mean) == (share >= 0.75)
        assert torch.equal(output, float_twin(images)) == (share < 0.25)


def test_late_batch_norms_use_their_statistics_and_still_learn():
    model = small_net()
    method = affine(freeze=0.5)
    lowbit.quantize_(model, method)
    model.train()
    start_epoch(model, method, 0.5)
    model(torch.randn(4, 3, 8, 8)).sum().backward()
    assert not model[1].training
    assert model[1].weight.grad.abs().sum() > 0
    start_epoch(model, affine(freeze=1.0), 0.99)
    assert not model[1].training, "a method that never freezes leaves the mode to its user"


def test_calibration_sees_the_float_network_and_changes_nothing_else():
    model = small_net()
    lowbit.quantize_(model, affine(observer="min_max", bits_w=2, bits_a=2))
    model.train()
    model[6].eval()
    model(100 * torch.randn(4, 3, 8, 8))
    parameters = {name: tensor.clone() for name, tensor in model.state_dict().items() if "observer" not in name}
    batches = [torch.randn(5, 3, 8, 8) for _ in range(3)]
    lowbit.calibrate(model, iter([batches[0], (batches[1], torch.zeros(5)), [batches[2]]]))
    state = model.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in parameters.items())
    assert [model.training, model[1].training, model[6].training, model[3].training] == [True, True, False, True]
    assert all(q.enabled for q in quantizers(model))
    images = torch.cat(batches)
    twin = copy.deepcopy(model).eval()
    for layer in quantized_layers(twin):
        layer.weight_quantizer = layer.activation_quantizer = None
    read = [images, twin[:3](images), twin[:9](images)]
    for observer, x in zip(observers(model), read, strict=True):
        assert observer.batches == 3
        torch.testing.assert_close((observer.low, observer.high), (x.min(), x.max()))


def quantizers(model: nn.Module) -> list[nn.Module]:
    return [q for layer in quantized_layers(model) for q in (layer.weight_quantizer, layer.activation_quantizer)]


def test_layers_of_other_methods_compute_their_codes_during_calibration():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    lowbit.quantize_(model, affine(observer="min_max"), overrides={"1": "bnn"})
    x = torch.randn(9, 4)
    lowbit.calibrate(model, [x])
    expected = functional.linear(
        torch.where(functional.linear(x, model[0].weight, model[0].bias) >= 0, 1.0, -1.0),
        torch.where(model[1].weight >= 0, 1.0, -1.0),
        model[1].bias,
    )
    observer = observers(model)[1]
    torch.testing.assert_close((observer.low, observer.high), (expected.min(), expected.max()))


def test_what_cannot_be_calibrated_is_said_and_modes_come_back():
    model = small_net()
    with pytest.raises(UsageError, match="nothing to calibrate"):
        lowbit.calibrate(model, [torch.randn(2, 3, 8, 8)])
    lowbit.quantize_(model, "affine")
    model.train()
    for bad in ([], [torch.full((2, 3, 8, 8), torch.nan)]):
        with pytest.raises(UsageError, match=r"'0\.activation_quantizer\.observer' saw no batch"):
            lowbit.calibrate(model, bad)
    with pytest.raises(RuntimeError):
        lowbit.calibrate(model, [torch.randn(2, 5, 8, 8)])
    assert all(module.training for module in model.modules())
    assert all(q.enabled for q in quantizers(model))


def test_a_scale_for_each_channel_is_closer():
    """Channels whose sizes differ by 1000: with one scale the small ones drown."""
    w = torch.randn(8, 3, 3, 3) * torch.logspace(-3, 0, 8).reshape(-1, 1, 1, 1)
    errors = {
        per: ((AffineWeight(8, per)(w) - w).flatten(1).norm(dim=1) / w.flatten(1).norm(dim=1)).max().item()
        for per in ("channel", "tensor")
    }
    assert errors["channel"] < 0.01
    assert errors["tensor"] > 0.5


def two_moons(count: int) -> tuple[Tensor, Tensor]:
    t, side = 3.14 * torch.rand(count), torch.arange(count) % 2
    x = torch.stack([t.cos() + side - 0.5, t.sin() * (1 - 2 * side) + 0.25 * (2 * side - 1)], dim=1)
    return x + 0.05 * torch.randn(count, 2), side


def learn(model: nn.Module, method: Method, steps: int = 120) -> float:
    """Accuracy on fresh data after a plain loop."""
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    attach_rules(optimizer, model)
    inputs, labels = two_moons(256)
    for step in range(steps):
        model.train()
        start_epoch(model, method, step / steps)
        optimizer.zero_grad()
        functional.cross_entropy(model(inputs), labels).backward()
        optimizer.step()
    return accuracy(model, *two_moons(500))


@torch.no_grad()
def accuracy(model: nn.Module, inputs: Tensor, labels: Tensor) -> float:
    return (model.eval()(inputs).argmax(1) == labels).double().mean().item()


def moon_net() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(2, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 2)
    )


@pytest.mark.parametrize(
    "options", [{}, {"per": "tensor", "bits_w": 4}, {"delay": 0.3}, {"observer": "percentile"}], ids=str
)
def test_training_learns(options):
    method = affine(**{"bits_w": 3, "bits_a": 3, **options})
    model = moon_net()
    lowbit.quantize_(model, method)
    assert learn(model, method, steps=200) > 0.95


@cache
def trained_lenet() -> tuple[nn.Module, float]:
    """A float LeNet after 3 quick epochs on the digits, and its test accuracy."""
    torch.manual_seed(0)
    model = models.create("lenet", in_channels=1, width=0.3)
    train_on_digits(model, 3, affine())
    return model.eval(), accuracy(model, *digits_test())


def train_on_digits(model: nn.Module, epochs: int, method: Method) -> None:
    digits = data.load("digits")
    images, labels = torch.from_numpy(digits.preprocessing.normalise(digits.train_images)), digits.train_labels
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for epoch in range(epochs):
        model.train()
        start_epoch(model, method, epoch / epochs)
        for part in torch.randperm(len(images)).split(64):
            optimizer.zero_grad()
            functional.cross_entropy(model(images[part]).flatten(1), torch.from_numpy(labels)[part]).backward()
            optimizer.step()


@cache
def digits_test() -> tuple[Tensor, Tensor]:
    digits = data.load("digits")
    return torch.from_numpy(digits.preprocessing.normalise(digits.test_images)), torch.from_numpy(digits.test_labels)


def calibrated(**options: Any) -> nn.Module:
    """The LeNet, quantized without training."""
    model = copy.deepcopy(trained_lenet()[0])
    if options.get("fold"):
        assert lowbit.fold_batch_norms_(model) == ["0.norm", "1.norm", "2.norm"]
    lowbit.quantize_(model, affine(**options))
    digits = data.load("digits")
    images = torch.from_numpy(digits.preprocessing.normalise(digits.train_images[:256]))
    lowbit.calibrate(model, images.split(64))
    return model.eval()


# options: accuracy that may be lost (1 of the 359 test images is 0.0028)
LOSSES: dict[str, tuple[dict[str, Any], float]] = {
    "8 bits": ({}, 0.01),
    "8 bits, folded": ({"fold": True}, 0.01),
    "8 bits, folded, per tensor": ({"fold": True, "per": "tensor"}, 0.015),
    "8 bits, min_max": ({"observer": "min_max"}, 0.01),
    "8 bits, percentile": ({"observer": "percentile"}, 0.01),
    "8 bits, mse": ({"observer": "mse"}, 0.01),
    "4 bits": ({"bits_w": 4, "bits_a": 4, "observer": "mse"}, 0.05),
}


@pytest.mark.parametrize("case", LOSSES)
def test_post_training_quantization_loses_little(case):
    options, allowed = LOSSES[case]
    _, reference = trained_lenet()
    assert reference > 0.93
    assert accuracy(calibrated(**options), *digits_test()) >= reference - allowed


def test_two_bits_after_training_do_lose_and_training_repairs_it():
    """The first half says that the bounds above could fail."""
    _, reference = trained_lenet()
    model, method = calibrated(bits_w=2, bits_a=2), affine(bits_w=2, bits_a=2)
    before = accuracy(model, *digits_test())
    assert before < reference - 0.1
    train_on_digits(model, 2, method)
    assert accuracy(model, *digits_test()) > before + 0.08


EXPORTED: dict[str, dict[str, Any]] = {
    "8 bits": {},
    "8 bits, folded": {"fold": True},
    "8 bits, folded, per tensor": {"fold": True, "per": "tensor"},
    "4 bits, mse": {"bits_w": 4, "bits_a": 4, "observer": "mse"},
    "2 x 3 bits": {"bits_w": 2, "bits_a": 3},
    "7 x 2 bits, percentile": {"bits_w": 7, "bits_a": 2, "observer": "percentile", "fold": True},
    "float ends": {"ends": "float", "bits_w": 5, "bits_a": 5},
}


@pytest.mark.parametrize("case", EXPORTED)
def test_the_packed_model_gives_the_same(case):
    model = calibrated(**EXPORTED[case])
    images, _ = digits_test()
    exported = lowbit.export(model, images[:1])
    report = verify(model, exported.packed, images[:48])
    assert report.passed, report
    ops = [op["op"] for op in exported.packed.ops]
    inner = ["quant_conv2d", "max_pool", "quant_conv2d"]
    if "ends" in EXPORTED[case]:
        assert ops == ["conv2d", "max_pool", "affine", "relu", "threshold", *inner, "affine", "relu", "conv2d"]
    else:
        assert ops == ["threshold", *inner, "max_pool", "quant_conv2d", "quant_conv2d"]
        assert all(check.exact and check.different == 0 for check in report.layers)


def test_negative_activations_and_padding():
    """A LeakyReLU's zero point is inside the codes, so that the padding is neither the first code nor the last."""
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1),
        nn.LeakyReLU(0.5),
        nn.Conv2d(6, 5, 3, padding=2, stride=2),
        nn.Hardtanh(-2, 1),
        nn.Conv2d(5, 4, 2),
    )
    lowbit.quantize_(model, affine(bits_w=5, bits_a=6, observer="min_max"))
    images = torch.randn(6, 3, 9, 9)
    lowbit.calibrate(model, [images])
    grids = [layer.activation_quantizer.eval().encode(images)[1] for layer in quantized_layers(model)]
    assert all(0 < -grid.offset < 2**grid.bits - 1 for grid in grids)
    report = verify(model, lowbit.export(model, images[:1]).packed, images)
    assert report.passed, report


@pytest.mark.parametrize("fold", [False, True])
@pytest.mark.parametrize("observer", ["moving_average", "percentile"])
def test_a_saved_model_is_made_again(fold, observer):
    model = calibrated(fold=fold, observer=observer)
    again = models.create(
        "lenet", in_channels=1, width=0.3, method="affine", method_options={"fold": fold, "observer": observer}
    )
    again.load_state_dict(model.state_dict())
    images, _ = digits_test()
    with torch.no_grad():
        assert torch.equal(again.eval()(images[:16]).flatten(1), model(images[:16]).flatten(1))


@pytest.mark.parametrize("name", ["vgg_small", "nin", "lenet"])
def test_folded_float_weights_fit_the_model_without_norms(name):
    options: dict[str, Any] = {} if name == "nin" else {"width": 0.1}
    trained = models.create(name, **options)
    trained(torch.randn(4, 3, 32, 32))
    lowbit.fold_batch_norms_(trained.eval())
    folded = models.create(name, method="affine", method_options={"fold": True}, **options)
    missing, unexpected = folded.load_state_dict(trained.state_dict(), strict=False)
    assert not unexpected
    assert all("observer" in key for key in missing)
