"""quantize_: make a network low-bit by naming a published method."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from lowbit import methods
from lowbit.errors import UsageError
from lowbit.layers import QuantizedLayer, Shortcut, Stem, project_, quantized_layers, quantized_twin
from lowbit.layers.quantized import is_quantizable, obstacle
from lowbit.methods import Method

FLOAT = 32

DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)


@dataclass(frozen=True)
class LayerReport:
    """What became of one layer: its name, torch class, bits of weights and activations (32: float), and why it is not
    as the method says, if it is not.
    """

    name: str
    kind: str
    bits_w: int
    bits_a: int
    note: str = ""


def resolve_method(method: str | Method) -> Method:
    """A `Method` from its registered name, with default options; a `Method` is returned as it is.

    Raises:
        UsageError: it is neither.
    """
    made = methods.registry[method]() if isinstance(method, str) else method
    if not isinstance(made, Method):
        raise UsageError(f"{made!r} is no method; give a name or a Method, such as lowbit.methods.registry['bnn']()")
    return made


def quantize_(
    model: nn.Module,
    method: str | Method,
    overrides: Mapping[str, str | Method | None] | None = None,
) -> list[LayerReport]:
    """Replace the convolution and linear layers of ``model`` by their quantized twins, in place.

    Parameters, hooks and names stay; the method's projection is applied once to the latent weights. An optimizer or a
    state dict made before still fits where the method's quantizers hold nothing of their own; `lsq`, `pact` and
    `adabin` learn parameters, for which the optimizer is made afterwards. A module that reads ``layer.weight`` itself,
    or keeps its layers in a plain list beside their names, goes on with the float layer.

    A layer that stands under several names stays one layer, reported under its first name. The method says whether the
    first layer (with a `lowbit.layers.Stem`: all of its layers), the last one and those of shortcuts
    (`lowbit.layers.Shortcut`) stay float. A first layer that does not reads its input through the method's quantizer
    for inputs, or as it is where the method has none; one whose full name an override gives is a layer like any other.

    A dropout that stands in an `nn.Sequential` right in front of a layer whose activations are quantized (a flattening
    may stand between) moves into the layer, behind the quantizer, and an identity takes its place. In front of it the
    dropped zeros would be quantized, and the sign of 0 is +1: a network in ``eval()`` would not be the one that was
    trained. Anywhere else, as in a ``forward`` of your own, it stays: take it out there and set the layer's
    ``dropout``. So it does in front of a layer that stands in several places.

    Layers that are quantized already stay as they are, though they count as first and last ones. So a second call
    quantizes what the first has left in float: ``quantize_(model, "affine")`` and then `lowbit.calibrate` give a
    trained binary network an 8-bit stem, classifier and shortcuts.

    Args:
        model: any module; its layers are visited in the order of ``named_modules()``, which is taken for the order of
            the network. Subclasses of torch's layers, which may compute anything, stay as they are, and so do layers
            whose weight a hook computes or whose ``forward`` was replaced.
        method: registered name, or a `Method` made with options.
        overrides: from a layer's name, or a pattern such as ``"features.*"``, to another method, or to None for
            float. The last match wins.

    Returns:
        One report per convolution and linear layer that was not quantized before, in order; at the end those that
        could not be.

    Raises:
        UsageError: the method is unknown, an override matches no layer, or the model has no layer to quantize. The
            model is then unchanged.
    """
    method = resolve_method(method)
    overrides = {} if overrides is None else overrides
    if not isinstance(overrides, Mapping):
        raise UsageError(f"overrides are {overrides!r}, but must map layers' names to methods or None")
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if is_quantizable(module) or isinstance(module, QuantizedLayer):
            names.setdefault(module, []).append(name)
    if not any(is_quantizable(layer) for layer in names) or model in names:
        raise UsageError(
            "all Conv1d, Conv2d, Conv3d and Linear inside the model are quantized already"
            if names and model not in names
            else "the model has no Conv1d, Conv2d, Conv3d or Linear inside; wrap a single layer in nn.Sequential"
        )
    everything = [name for layer, aliases in names.items() if is_quantizable(layer) for name in aliases]
    for pattern in overrides:
        if not any(_matches(name, pattern) for name in everything):
            raise UsageError(f"override '{pattern}' matches no layer; layers: {', '.join(everything)}")
    in_stems, in_shortcuts = (
        {layer for part in model.modules() if isinstance(part, kind) for layer in part.modules()}
        for kind in (Stem, Shortcut)
    )
    choices = {
        layer: _choose(
            aliases, i == 0 or layer in in_stems, i == len(names) - 1, layer in in_shortcuts, method, overrides
        )
        for i, (layer, aliases) in enumerate(names.items())
        if is_quantizable(layer)
    }
    first = next(iter(names))
    reports: list[LayerReport] = []
    for layer, (chosen, note) in choices.items():
        aliases = names[layer]
        reads_input = layer is first and not any(name in overrides for name in aliases)
        of_weight = chosen.weight() if chosen.weight else None
        make = chosen.input if reads_input else chosen.activation
        of_activation = make() if make else None
        for quantizer in (of_weight, of_activation):
            if quantizer is not None and not (weight := layer.get_parameter("weight")).is_meta:
                quantizer.to(weight.device)
        bits_w, bits_a = (FLOAT if quantizer is None else quantizer.bits for quantizer in (of_weight, of_activation))
        reports.append(LayerReport(aliases[0], type(layer).__name__, bits_w, bits_a, note))
        if of_weight is None and of_activation is None and chosen.gradient is None:
            continue
        twin = quantized_twin(
            layer,
            of_weight,
            of_activation,
            projection=chosen.projection,
            gradient_quantizer=chosen.gradient,
            update=chosen.update,
            k_map=chosen.k_map,
        )
        for name in aliases:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, twin)
        if of_activation is not None and len(aliases) == 1:
            twin.dropout = _take_dropout(model, aliases[0])
        project_(twin)
    reports += [
        LayerReport(name, type(module).__name__, FLOAT, FLOAT, why)
        for name, module in model.named_modules()
        if (why := obstacle(module))
    ]
    for module in model.modules():
        if isinstance(module, (nn.TransformerEncoder, nn.TransformerEncoderLayer)) and quantized_layers(module):
            # In eval() torch's fused kernel would read the weights past the twins; this alone keeps it away, and nested
            # tensors, which are for it.
            module.activation_relu_or_gelu = 0
            module.use_nested_tensor = False
    return reports


def _take_dropout(model: nn.Module, name: str) -> nn.Module | None:
    """The dropout in front of the layer ``name`` of an `nn.Sequential`, where an identity takes its place."""
    path, _, child = name.rpartition(".")
    parent = model.get_submodule(path)
    if not isinstance(parent, nn.Sequential):
        return None
    # Not named_children(), which leaves out what has been there before.
    parts = list(parent._modules.items())
    elementwise = False
    for place, part in reversed(parts[: list(parent._modules).index(child)]):
        if isinstance(part, nn.Dropout if elementwise else DROPOUTS):
            parent.register_module(place, nn.Identity())
            return type(part)(part.p).train(part.training)
        if not isinstance(part, (nn.Identity, nn.Flatten)):
            return None
        elementwise |= isinstance(part, nn.Flatten)
    return None


def _matches(name: str, pattern: str) -> bool:
    return name == pattern or fnmatch.fnmatchcase(name, pattern)


def _choose(
    aliases: Sequence[str],
    first: bool,
    last: bool,
    in_shortcut: bool,
    method: Method,
    overrides: Mapping[str, str | Method | None],
) -> tuple[Method, str]:
    """The method of a layer, and why it is not the model's own."""
    matches = [pattern for pattern in overrides if any(_matches(name, pattern) for name in aliases)]
    if matches:
        override = overrides[matches[-1]]
        return resolve_method("float" if override is None else override), f"by override '{matches[-1]}'"
    for left_out, kind in (
        (method.skip_first and first, "first layer"),
        (method.skip_last and last, "last layer"),
        (method.skip_shortcuts and in_shortcut, "shortcut"),
    ):
        if left_out:
            return resolve_method("float"), kind
    return method, ""
