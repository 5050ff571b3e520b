"""What a method does to latent weights at each optimizer step, outside autograd: update rules and projections."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from lowbit.layers.quantized import QuantizedLayer


@torch.no_grad()
def project_(model: nn.Module) -> None:
    """Apply each quantized layer's projection to its latent weight, in place, once."""
    _project(quantized_layers(model))


@torch.no_grad()
def update_(model: nn.Module, optimizer: Optimizer) -> None:
    """Move each latent weight whose layer has an update rule by that rule, and take its gradient from the optimizer.

    The rule gets the weight, its gradient and the learning rate of the weight's group; the optimizer then passes over
    the weight, which has no gradient left.
    """
    for module, rate in _trained(model, optimizer):
        weight = module.weight
        if module.update is not None and weight.grad is not None:
            module.update(weight, weight.grad, rate)
            weight.grad = None


@torch.no_grad()
def _project(layers: Iterable[QuantizedLayer]) -> None:
    for layer in layers:
        if layer.projection is not None:
            layer.projection(layer.weight)


def _trained(model: nn.Module, optimizer: Optimizer) -> list[tuple[QuantizedLayer, float]]:
    """The quantized layers whose latent weights ``optimizer`` moves, with their learning rates."""
    rates = {parameter: group["lr"] for group in optimizer.param_groups for parameter in group["params"]}
    layers = quantized_layers(model)
    return [(layer, rates[w]) for layer in layers if (w := layer.weight).requires_grad and w in rates]


def attach_rules(optimizer: Optimizer, model: nn.Module) -> None:
    """Project the latent weights that ``optimizer`` trains, and let their method's rules act at each of its steps.

    Update rules stand in for the optimizer's own; projections follow it. Weights that it does not have, or that need no
    gradient, stay as they are. A plain training loop needs this one line beside `quantize_`. Evaluation and export do
    neither: what they see is what the last step left. Where ``step`` is given a closure, which computes the gradients
    only then, update rules act after it. Warns where the optimizer trains a layer's weight, but not what its quantizers
    learn.
    """
    trained = {parameter for group in optimizer.param_groups for parameter in group["params"]}
    for name, module in named_quantized_layers(model).items():
        learned = {parameter for parameter in module.parameters() if parameter.requires_grad} - {module.bias}
        if module.weight in trained and not learned <= trained:
            what = f"the optimizer does not have what the quantizers of '{name}' learn"
            warnings.warn(f"{what}; make it after quantize_, unless another one has it", stacklevel=2)
            break

    def before(_: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        me, closure = (*args, kwargs.get("closure"))[:2]
        if closure is None:
            update_(model, optimizer)
            return args, kwargs

        def compute_and_update() -> Any:
            loss = closure()
            update_(model, optimizer)
            return loss

        return (me,), {**kwargs, "closure": compute_and_update}

    def after(*_: Any) -> None:
        _project(layer for layer, _ in _trained(model, optimizer))

    after()
    optimizer.register_step_pre_hook(before)
    optimizer.register_step_post_hook(after)


def named_quantized_layers(model: nn.Module) -> dict[str, QuantizedLayer]:
    """The quantized layers of ``model`` by name, each once, in the order of ``named_modules()``."""
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLayer)}


def quantized_layers(model: nn.Module) -> list[QuantizedLayer]:
    """The quantized layers of ``model``, each once, in the order of ``modules()``."""
    return list(named_quantized_layers(model).values())
