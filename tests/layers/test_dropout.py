"""What a quantized layer's dropout drops is 0 behind the quantizer, so that eval() is the network that was trained."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import lowbit
from lowbit import methods, models
from lowbit.layers import QuantConv2d, QuantLinear, quantized_layers

P = 0.4


def seen_by_transform(layer: nn.Module, x: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    seen = []
    transform = type(layer).transform
    monkeypatch.setattr(type(layer), "transform", lambda self, x, *rest: seen.append(x) or transform(self, x, *rest))
    layer(x)
    return seen[0].detach().numpy()


@pytest.mark.parametrize("method", ["xnor_net", "bnn", "dorefa", "hwgq", "lsq"])
def test_dropped_inputs_add_nothing_and_the_others_are_scaled(method, monkeypatch):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 64), nn.Dropout(P), nn.Linear(64, 8), nn.Linear(8, 2))
    lowbit.quantize_(model, method)
    layer = model[2]
    assert isinstance(model[1], nn.Identity)
    x = torch.randn(50, 64)
    quantized = layer.activation_quantizer(x).detach().numpy()
    read = seen_by_transform(layer, x, monkeypatch)
    kept = np.isclose(read, quantized / (1 - P))
    assert np.all(kept | (read == 0))
    if method in ("xnor_net", "bnn"):
        assert 1 - P - 0.05 < kept.mean() < 1 - P + 0.05


def test_forward_and_backward_against_numpy():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 5), nn.Dropout(P), nn.Linear(5, 4, bias=False), nn.Linear(4, 4))
    lowbit.quantize_(model, "xnor_net")
    layer = model[2]
    x = torch.randn(7, 5, requires_grad=True)
    torch.manual_seed(1)
    mask = nn.functional.dropout(torch.ones(7, 5), P).numpy()
    torch.manual_seed(1)
    y = layer(x)
    gradient = torch.randn(y.shape)
    y.backward(gradient)
    values, weight = x.detach().numpy(), layer.weight.detach().numpy()
    binary = np.abs(weight).mean(1, keepdims=True) * np.where(weight >= 0, 1, -1)
    np.testing.assert_allclose(y.detach(), (np.where(values >= 0, 1, -1) * mask) @ binary.T, rtol=1e-5, atol=1e-6)
    expected = (gradient.numpy() @ binary) * mask * (np.abs(values) <= 1)
    np.testing.assert_allclose(x.grad, expected, rtol=1e-5, atol=1e-6)


def test_outputs_in_training_have_the_mean_that_eval_gives():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5), nn.Linear(40, 6), nn.Linear(6, 2))
    lowbit.quantize_(model, "xnor_net")
    layer, x = model[2], torch.randn(1, 40)
    trained = layer.train()(x.expand(20_000, -1)).detach()
    standard_error = trained.std(0) / len(trained) ** 0.5
    assert torch.all((trained.mean(0) - layer.eval()(x)[0]).abs() < 5 * standard_error)


def test_the_dropouts_of_nin_move_in_where_it_is_binary():
    binary, plain = models.create("nin", method="xnor_net", width=0.1), models.create("nin", width=0.1)
    inside = [layer.dropout.p for layer in quantized_layers(binary) if layer.dropout is not None]
    assert inside == [0.5, 0.5]
    assert not any(type(child) is nn.Dropout for block in binary for child in block.children())
    assert sum(type(child) is nn.Dropout for block in plain for child in block.children()) == 2


def test_a_dropout_stays_where_no_activation_is_quantized():
    model = nn.Sequential(nn.Linear(3, 3), nn.Dropout(P), nn.Linear(3, 3), nn.Dropout(P), nn.Linear(3, 2))
    lowbit.quantize_(model, "bwn")
    assert isinstance(model[2], QuantLinear)
    assert model[2].dropout is None
    assert [type(model[i]) for i in (1, 3)] == [nn.Dropout] * 2


def test_a_dropout_behind_the_layer_or_apart_from_it_stays():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 3), nn.Dropout2d(P), nn.ReLU(), nn.Conv2d(4, 4, 1))
    lowbit.quantize_(model, "xnor_net", overrides={"4": "xnor_net"})
    assert isinstance(model[2], nn.Dropout2d)
    assert all(layer.dropout is None for layer in model if isinstance(layer, QuantConv2d))


@pytest.mark.parametrize("between", [[nn.Flatten()], [nn.Identity()], [nn.Identity(), nn.Flatten()]])
def test_what_changes_no_number_may_stand_between(between):
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(P), *between, nn.Linear(4, 3), nn.Linear(3, 2))
    lowbit.quantize_(model, "xnor_net")
    assert model[-2].dropout.p == P
    assert isinstance(model[1], nn.Identity)


def test_channels_are_not_dropped_behind_a_flattening():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Dropout2d(P), nn.Flatten(), nn.Linear(16, 3), nn.Linear(3, 2))
    lowbit.quantize_(model, "xnor_net")
    assert isinstance(model[1], nn.Dropout2d)
    assert model[3].dropout is None


@pytest.mark.filterwarnings("ignore:an activation quantizer has seen no data")
@pytest.mark.parametrize("method", sorted(methods.registry))
def test_a_dropout_in_place_can_be_trained_with_every_method(method):
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(P, inplace=True), nn.Linear(4, 3), nn.Linear(3, 2))
    lowbit.quantize_(model, method)
    model(torch.randn(5, 4)).sum().backward()
    assert all(parameter.grad is not None for parameter in model[2].parameters())


def test_one_dropout_in_two_places_moves_from_both():
    drop = nn.Dropout(P)
    model = nn.Sequential(nn.Linear(4, 4), drop, nn.Linear(4, 4), drop, nn.Linear(4, 4), nn.Linear(4, 2))
    lowbit.quantize_(model, "xnor_net")
    assert [model[2].dropout.p, model[4].dropout.p] == [P, P]
    assert [type(model[i]) for i in (1, 3)] == [nn.Identity] * 2


def test_neighbours_are_those_of_the_place():
    pool = nn.MaxPool2d(1)
    parts = (nn.Conv2d(3, 4, 1), pool, nn.Dropout(P), pool, nn.Conv2d(4, 4, 1), nn.Conv2d(4, 2, 1))
    model = nn.Sequential(*parts)
    lowbit.quantize_(model, "xnor_net")
    assert isinstance(model[2], nn.Dropout)
    assert model[4].dropout is None


def test_a_layer_in_two_places_keeps_what_stands_in_front():
    twice = nn.Linear(4, 4)
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(P), twice, nn.ReLU(), twice, nn.Linear(4, 2))
    lowbit.quantize_(model, "xnor_net")
    assert isinstance(model[1], nn.Dropout)
    assert model[2] is model[4]
    assert model[2].dropout is None


def test_calibration_sees_no_dropout():
    def ranges(p: float) -> list[torch.Tensor]:
        torch.manual_seed(0)
        model = models.create("nin", method="affine", width=0.1, dropout=p)
        torch.manual_seed(1)
        lowbit.calibrate(model, torch.rand(2, 4, 3, 32, 32))
        return [value for name, value in model.named_buffers() if "activation_quantizer" in name]

    with_dropout, without = ranges(0.5), ranges(0.0)
    assert len(without) > 9
    assert all(map(torch.equal, with_dropout, without))
