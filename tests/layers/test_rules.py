"""Projections run when they are attached and after each step, and at no other time."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lowbit.convert import quantize_
from lowbit.layers import attach_rules, project_, quantized_twin
from lowbit.methods.xnor_net import ScaledSign
from lowbit.quantizers.binary import SignQuantizer


def network(projection) -> nn.Sequential:
    layers = [quantized_twin(nn.Linear(4, 4), ScaledSign(), SignQuantizer(), projection) for _ in range(2)]
    return nn.Sequential(*layers, nn.Linear(4, 2), quantized_twin(nn.Linear(2, 2), ScaledSign(), None))


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
        lambda p: torch.optim.Adam(p, lr=0.1),
        lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
    ],
    ids=["sgd", "adam", "fused adamw"],
)
def test_after_each_step(make):
    calls = []

    def projection(weight):
        assert not torch.is_grad_enabled()
        calls.append(weight)
        weight.clamp_(-0.01, 0.01)

    model = network(projection)
    optimizer = make(model.parameters())
    assert calls == []
    attach_rules(optimizer, model)
    latent = [model[0].weight, model[1].weight]
    for step in range(1, 4):
        assert len(calls) == 2 * step
        assert all(seen is expected for seen, expected in zip(calls[-2:], latent, strict=True))
        assert all(weight.abs().max() <= 0.01 for weight in latent)
        assert model[2].weight.abs().max() > 0.01
        for mode in (True, False):
            model.train(mode)(torch.randn(3, 4))
        with torch.no_grad():
            model(torch.randn(3, 4))
        assert len(calls) == 2 * step
        model.train()(torch.randn(3, 4)).square().sum().backward()
        assert len(calls) == 2 * step
        optimizer.step()
        optimizer.zero_grad()


def test_without_attaching_nothing_is_projected():
    calls = []
    model = network(calls.append)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.randn(3, 4)).sum().backward()
    optimizer.step()
    assert calls == []


def test_project_takes_a_shared_layer_once():
    calls = []
    model = network(calls.append)
    project_(nn.Sequential(model, model[0], nn.Sequential(model[1])))
    assert len(calls) == 2


def test_an_update_rule_stands_in_for_the_optimizer():
    calls = []

    def update(weight, gradient, rate):
        assert not torch.is_grad_enabled()
        calls.append((gradient.clone(), rate))
        weight.sub_(rate * gradient.sign())

    ruled = quantized_twin(nn.Linear(4, 4), ScaledSign(), SignQuantizer(), update=update)
    model = nn.Sequential(ruled, nn.Linear(4, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.25, weight_decay=0.5)
    attach_rules(optimizer, model)
    before = ruled.weight.detach().clone(), model[1].weight.detach().clone()
    model(torch.randn(3, 4)).square().sum().backward()
    gradient = ruled.weight.grad.clone()
    optimizer.step()
    ((seen, rate),) = calls
    assert rate == 0.25
    assert torch.equal(seen, gradient)
    assert torch.equal(ruled.weight.detach(), before[0] - 0.25 * gradient.sign())
    assert not torch.equal(model[1].weight.detach(), before[1])


@pytest.mark.parametrize("how", ["keyword", "position"])
def test_an_update_rule_waits_for_the_gradients_of_a_closure(how):
    """Lightning hands ``step`` a closure that clears the gradients and computes them anew."""
    seen = []

    def update(weight, gradient, rate):
        seen.append(gradient.clone())
        weight.zero_()

    layer = quantized_twin(nn.Linear(4, 4, bias=False), ScaledSign(), None, update=update)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.25)
    attach_rules(optimizer, layer)
    layer.weight.grad = torch.full_like(layer.weight, 7.0)

    def closure():
        optimizer.zero_grad()
        loss = (layer.weight * torch.eye(4)).sum()
        loss.backward()
        return loss

    before = layer.weight.trace().item()
    loss = optimizer.step(closure) if how == "position" else optimizer.step(closure=closure)
    assert loss.item() == pytest.approx(before)
    assert len(seen) == 1
    assert torch.equal(seen[0], torch.eye(4))
    assert not layer.weight.any()


def test_a_weight_without_gradient_is_left_alone():
    layer = quantized_twin(nn.Linear(4, 4), ScaledSign(), None, update=lambda *_: pytest.fail("called"))
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    attach_rules(optimizer, layer)
    optimizer.step()


@pytest.mark.filterwarnings("error")
def test_weights_that_are_not_trained_are_not_projected():
    model = network(lambda weight: weight.add_(1))
    frozen, elsewhere = model[0].weight.requires_grad_(False), model[1].weight
    before = [frozen.clone(), elsewhere.clone()]
    optimizer = torch.optim.SGD([frozen, *model[2].parameters()], lr=0.1)
    attach_rules(optimizer, model)
    model(torch.randn(3, 4)).sum().backward()
    optimizer.step()
    assert torch.equal(frozen, before[0])
    assert torch.equal(elsewhere, before[1])
    optimizer.add_param_group({"params": [elsewhere], "lr": 0.0})
    optimizer.step()
    assert torch.equal(elsewhere, before[1] + 1)


def test_an_optimizer_without_what_quantizers_learn_is_warned_of():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    before = torch.optim.SGD(model.parameters(), lr=0.1)
    quantize_(model, "lsq")
    with pytest.warns(UserWarning, match="what the quantizers of '1' learn; make it after quantize_"):
        attach_rules(before, model)
    attach_rules(torch.optim.SGD(model.parameters(), lr=0.1), model)
