"""What a quantized layer's dropout drops is 0 behind the quantizer, so that eval() is the network that was trained."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import lowbit
from lowbit import models
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
