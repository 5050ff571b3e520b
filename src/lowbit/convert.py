"""quantize_: make a network low-bit by naming a published method."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from lowbit import methods
from lowbit.errors import UsageError
from lowbit.layers import project_, quantized_twin
from lowbit.layers.quantized import is_quantizable
from lowbit.methods import Method


@dataclass(frozen=True)
class LayerReport:
    """What became of one layer: its name, kind, bits of weights and activations, and why it stayed float, if it did."""

    name: str
    kind: str
    bits_w: int
    bits_a: int
    note: str = ""


def resolve_method(method: str | Method) -> Method:
    """A `Method` from its registered name, with default options; a `Method` is returned as it is."""
    return methods.registry[method]() if isinstance(method, str) else method


def quantize_(
    model: nn.Module,
    method: str | Method,
    overrides: Mapping[str, str | Method | None] | None = None,
) -> list[LayerReport]:
    """Replace the convolution and linear layers of ``model`` by their quantized twins, in place.

    Parameters, hooks and names stay as they are, so an optimizer or a state dict made before still fits. Layers that share
    one module stay shared. The method says whether the first and the last layer stay float.

    Args:
        model: any module; its layers are visited in the order of ``named_modules()``.
        method: registered name, or a `Method` made with options.
        overrides: from a layer's name, or a pattern such as ``"features.*"``, to another method, or to None for
            float. The last match wins.

    Returns:
        One report per convolution and linear layer.

    Raises:
        UsageError: the method is unknown, an override matches no layer, or the model has no layer to quantize.
    """
    method = resolve_method(method)
    layers = [(name, module) for name, module in model.named_modules() if is_quantizable(module)]
    if not layers or not layers[0][0]:
        raise UsageError(
            "the model has no Conv1d, Conv2d, Conv3d or Linear inside; wrap a single layer in nn.Sequential"
        )
    overrides = overrides or {}
    for pattern in overrides:
        if not any(fnmatch.fnmatchcase(name, pattern) for name, _ in layers):
            raise UsageError(f"override '{pattern}' matches no layer; layers: {', '.join(name for name, _ in layers)}")
    reports = []
    for index, (name, layer) in enumerate(layers):
        chosen, note = _choose(name, index, len(layers), method, overrides)
        kind = type(layer).__name__
        if chosen.weight is None and chosen.activation is None:
            reports.append(LayerReport(name, kind, 32, 32, note))
            continue
        reads_image = index == 0 and name not in overrides
        twin = quantized_twin(
            layer,
            chosen.weight() if chosen.weight else None,
            chosen.activation() if chosen.activation and not reads_image else None,
            chosen.projection,
        )
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, twin)
        reports.append(LayerReport(name, kind, chosen.bits_w, 32 if reads_image else chosen.bits_a, note))
    project_(model)
    return reports


_FLOAT = "float"


def _choose(
    name: str, index: int, count: int, method: Method, overrides: Mapping[str, str | Method | None]
) -> tuple[Method, str]:
    matches = [pattern for pattern in overrides if fnmatch.fnmatchcase(name, pattern)]
    if matches:
        override = overrides[matches[-1]]
        return resolve_method(override or _FLOAT), f"by override '{matches[-1]}'"
    if index == 0 and method.skip_first:
        return resolve_method(_FLOAT), "first layer"
    if index == count - 1 and method.skip_last:
        return resolve_method(_FLOAT), "last layer"
    return method, ""
