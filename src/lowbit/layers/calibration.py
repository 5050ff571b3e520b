"""Post-training quantization: observers look at data, no weight changes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from lowbit.errors import UsageError
from lowbit.layers.rules import quantized_layers
from lowbit.quantizers.observers import Observer


@torch.no_grad()
def calibrate(model: nn.Module, batches: Iterable[Tensor | Sequence[Tensor]]) -> None:
    """Let the observers of ``model`` look at ``batches``, and nothing else; what they saw before is forgotten.

    The layers that they belong to compute in float meanwhile, and everything else as in ``eval()``: batch norms use
    their running statistics, dropout is off. Afterwards all modules are in the modes they were in.

    Args:
        model: quantized by a method whose activations have observers, such as ``affine``.
        batches: inputs of the model, or sequences such as (inputs, labels) that begin with them. A few hundred images
            are enough.

    Raises:
        UsageError: the model has no observers, or one saw no batch of finite numbers.
    """
    observers = {name: module for name, module in model.named_modules() if isinstance(module, Observer)}
    if not observers:
        raise UsageError("the model has nothing to calibrate; quantize it by a method with observers, such as 'affine'")
    layers = [
        layer for layer in quantized_layers(model) if any(isinstance(module, Observer) for module in layer.modules())
    ]
    quantizers = [q for layer in layers for q in (layer.weight_quantizer, layer.activation_quantizer) if q is not None]
    training = {module: module.training for module in model.modules()}
    enabled = {quantizer: quantizer.enabled for quantizer in quantizers}
    frozen = {observer: observer.frozen for observer in observers.values()}
    model.eval()
    for layer in layers:
        layer.training = True
    for quantizer in quantizers:
        quantizer.train()
        quantizer.enabled = False
    for observer in observers.values():
        observer.reset()
        observer.frozen = False
    try:
        for batch in batches:
            model(batch if isinstance(batch, Tensor) else batch[0])
    finally:
        for module, mode in training.items():
            module.training = mode
        for quantizer, state in enabled.items():
            quantizer.enabled = state
        for observer, state in frozen.items():
            observer.frozen = state
    unseen = next((name for name, observer in observers.items() if not observer.batches), None)
    if unseen is not None:
        raise UsageError(f"'{unseen}' saw no batch of finite numbers; calibrate with more data")
