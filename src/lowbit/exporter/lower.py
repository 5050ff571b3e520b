"""From captured steps to the ops of the packed file (docs/contract.md). Knows number grids, never methods."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from lowbit.errors import UsageError
from lowbit.exporter.capture import LAYERS, POINTWISE, Graph, Step, capture
from lowbit.exporter.copying import unwrapped
from lowbit.exporter.grids import (
    activation_grid,
    has_k_map,
    is_integer,
    is_quantized,
    largest_sum,
    scale_of_sums,
    weight_codes,
    widths,
)
from lowbit.exporter.ops import Array, bias_of, float_op, float_weight, integer_op, kind_of, stored, window_of
from lowbit.exporter.pools import move_pools
from lowbit.exporter.thresholds import Chain, Thresholds, find, floats, sums
from lowbit.layers import PReLU, QuantizedLayer
from lowbit.packed import PackedModel
from lowbit.preprocessing import Preprocessing

FEW_BITS = 4
"""Up to so many bits, every channel has thresholds of its own."""


@dataclass(frozen=True)
class ExportedPart:
    """What became of one module: its name and kind, whether it computes on bits, and how or why not."""

    name: str
    kind: str
    packed: bool
    note: str


@dataclass(frozen=True)
class Export:
    """A packed model, and what became of each part of the torch model, in the order of computation."""

    packed: PackedModel
    parts: tuple[ExportedPart, ...]

    def save(self, path: str | Path) -> None:
        """Write the packed file.

        Raises:
            LowbitError: the file cannot be written.
        """
        self.packed.save(path)


def export(
    model: nn.Module,
    example_input: Tensor,
    *,
    classes: Sequence[str] | None = None,
    preprocessing: Preprocessing | Mapping[str, Any] | None = None,
    provenance: Mapping[str, Any] | None = None,
) -> Export:
    """Pack ``model``, as it computes in ``eval()``, for the engine. The model is left as it was.

    Layers whose weights and activations both lie on integer grids become integer ops; what lies between them (scale,
    bias, batch norm, ReLU, max-pool) becomes thresholds that give the very codes of the torch model on this machine.
    Where either grid is a table of levels, and in a K map, codes stay codes but the result is computed in float32. All
    else is float32.

    Args:
        model: made by `lowbit.models.create`, or any module of the layers that the packed file knows.
        example_input: float32, (N, C, H, W) or (N, features): its size is the size that the packed model takes.
        classes: a name for each output.
        preprocessing: how an image becomes the input, so that ``lowbit predict`` needs nothing else.
        provenance: what else to remember (JSON); versions and the method's name are added.

    Raises:
        UsageError: something cannot be lowered; the message names the module or call.
    """
    graph = capture(model, example_input)
    if preprocessing is not None and not isinstance(preprocessing, Preprocessing):
        preprocessing = Preprocessing.from_dict(dict(preprocessing))
    if preprocessing is not None and preprocessing.shape != graph.input.shape:
        raise UsageError(f"preprocessing makes inputs {preprocessing.shape}, but the model takes {graph.input.shape}")
    if classes is not None and len(classes) != graph.output.shape[0]:
        raise UsageError(f"{len(classes)} class names are given, but the model has {graph.output.shape[0]} outputs")
    lowering = _Lowering(graph)
    with torch.no_grad():
        lowering.run()
    method = getattr(getattr(unwrapped(model), "method", None), "name", None)
    packed = PackedModel(
        input_shape=graph.input.shape,
        ops=lowering.ops,
        tensors=lowering.tensors,
        preprocessing=preprocessing,
        classes=None if classes is None else list(classes),
        provenance={"torch": torch.__version__, **({"method": method} if method else {}), **(provenance or {})},
    )
    return Export(packed, lowering.parts())


@dataclass(frozen=True)
class _Reading:
    """How a quantized layer reads: from ``root`` through pointwise modules and max-pools to its quantizer."""

    layer: Step
    root: Step
    between: tuple[Step, ...]


class _Lowering:
    """Writes ops. Layers that read the same codes share them; a float value is made only if it is read."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.ops: list[dict[str, Any]] = []
        self.tensors: dict[str, Array] = {}
        self.notes: dict[Step, list[tuple[bool, str]]] = defaultdict(list)
        self.float_readers: dict[Step, list[str]] = defaultdict(list)
        self.readings: dict[Step, _Reading] = {}
        self.thresholds: dict[Step, Thresholds] = {}
        self.fused: dict[Step, _Reading] = {}
        self.floats: dict[Step, int] = {graph.input: 0}
        self.codes: dict[Step, list[tuple[Thresholds, int]]] = defaultdict(list)

    def run(self) -> None:
        """Lower the whole graph.

        Raises:
            UsageError: a part has no op.
        """
        self._find_readings(*self._find_readers())
        self._find_thresholds()
        for step in self.graph.steps[1:]:
            if step in self.fused:
                self._layer_to_codes(step)
            elif not _is_between(step):
                self._float(step)
        self._float(self.graph.output)

    def parts(self) -> tuple[ExportedPart, ...]:
        """What became of each step."""
        return tuple(
            ExportedPart(
                step.source,
                kind_of(step),
                any(packed for packed, _ in self.notes[step]),
                "; ".join(dict.fromkeys(note for _, note in self.notes[step])),
            )
            for step in self.graph.steps[1:]
        )

    def _find_readers(self) -> tuple[dict[Step, bool], dict[Step, list[str]]]:
        """The quantized layers, and whether each reads float32 itself; and what else reads each float32 value.

        Raises:
            UsageError: a layer's sums do not fit 32 bits.
        """
        layers, read_as_float = {}, {self.graph.output: ["the output"]}
        for step in self.graph.steps[1:]:
            if is_quantized(step):
                layers[step] = _many_levels(step)
                if is_integer(step):
                    largest_sum(step)
                if has_k_map(step):
                    read_as_float.setdefault(step.inputs[0], []).append(f"the K map of '{step.source}'")
                if layers[step]:
                    read_as_float.setdefault(step.inputs[0], []).append(f"the quantizer of '{step.source}'")
            elif not _is_between(step):
                for value in step.inputs:
                    read_as_float.setdefault(value, []).append(f"'{step.source}'")
        return layers, read_as_float

    def _find_readings(self, layers: Mapping[Step, bool], read_as_float: Mapping[Step, list[str]]) -> None:
        """From where each layer reads, when the pools that are computed in float anyway have moved."""
        in_float: set[Step] = set()  # steps between layers that are computed in float
        for value, readers in read_as_float.items():
            self.float_readers[_root(value)] += readers
            while _is_between(value):
                in_float.add(value)
                (value,) = value.inputs
        move_pools(self.graph, in_float)
        self.readings = {
            step: _Reading(step, step.inputs[0], ()) if many else _trace_back(step, read_as_float, in_float)
            for step, many in layers.items()
        }

    def _find_thresholds(self) -> None:
        """Codes come of a layer's sums if all that reads it are layers with the same codes; else of its float value."""
        readers: dict[Step, list[_Reading]] = defaultdict(list)
        for reading in self.readings.values():
            readers[reading.root].append(reading)
        for root, readings in readers.items():
            alone = root not in self.float_readers and len({r.layer.inputs[0] for r in readings}) == 1
            if alone and is_quantized(root) and is_integer(root) and not has_k_map(root):
                found = [_thresholds(reading, from_sums=True) for reading in readings]
                if all(thresholds == found[0] for thresholds in found):
                    self.fused[root] = readings[0]
                    self.thresholds |= {r.layer: t for r, t in zip(readings, found, strict=True)}
                    continue
            self.thresholds |= {r.layer: _thresholds(r, from_sums=False) for r in readings}

    def _layer_to_codes(self, step: Step) -> None:
        reading = self.fused[step]
        thresholds = self.thresholds[reading.layer]
        self._note(step, True, f"{widths(step)}; sums become codes")
        name, attributes, tensors = integer_op(step)
        attributes["bits"] = activation_grid(reading.layer).bits
        value = self._op(name, step, [self._read_codes(step)], attributes, tensors | stored(thresholds))
        self._finish_codes(reading, thresholds, value)

    def _read_codes(self, layer: Step) -> int:
        """The value that holds the codes which ``layer`` reads."""
        thresholds, reading = self.thresholds[layer], self.readings[layer]
        for present, value in self.codes[layer.inputs[0]]:
            if present == thresholds:
                return value
        bits = {"bits": activation_grid(layer).bits}
        value = self._op("threshold", layer, [self._float(reading.root)], bits, stored(thresholds, shared=True))
        return self._finish_codes(reading, thresholds, value)

    def _finish_codes(self, reading: _Reading, thresholds: Thresholds, value: int) -> int:
        """Max-pools move behind the thresholds."""
        pools = iter(thresholds.pools)
        for step in reading.between:
            if isinstance(step.module, nn.MaxPool2d):
                self._note(step, True, "on codes")
                value = self._op("max_pool", step, [value], window_of(step.module), {"falling": next(pools).numpy()})
            else:
                self._note(step, True, f"inside the thresholds of '{reading.layer.source}'")
        self.codes[reading.layer.inputs[0]].append((thresholds, value))
        return value

    def _float(self, step: Step) -> int:
        """The value that holds the result of ``step`` in float32."""
        if step not in self.floats:
            self.floats[step] = self._layer_to_float(step) if _is_layer(step) else self._float_op(step)
        return self.floats[step]

    def _layer_to_float(self, step: Step) -> int:
        if is_quantized(step):
            return self._codes_to_float(step)
        module = cast(nn.Conv2d | nn.Linear, step.module)
        source = self._float(step.inputs[0])
        attributes, tensors, weights = float_weight(step)
        quantized = isinstance(module, QuantizedLayer) and module.weight_quantizer is not None
        note = f"{weights}; activations stay float32, for it has no quantizer for them"
        self._note(step, "weight" not in tensors, note if quantized else "float32: not quantized")
        return self._op("conv2d", step, [source], attributes, tensors | bias_of(module))

    def _codes_to_float(self, step: Step) -> int:
        quantizers = [f"the quantizer of '{r.layer.source}'" for r in self.readings.values() if r.root is step]
        readers = " and ".join(dict.fromkeys(self.float_readers[step] or quantizers))
        if is_integer(step):
            name, attributes, tensors = integer_op(step)
            tensors["scale"] = scale_of_sums(step).numpy()
            how = f"{widths(step)}; sums become float32"
        else:
            grid = activation_grid(step)
            attributes, tensors, weights = float_weight(step)
            name, tensors["levels"] = "table_conv2d", grid.decode(torch.arange(1 << grid.bits)).numpy()
            how = f"{weights}, {grid.bits}-bit activations; sums of levels are float32"
        bias = bias_of(cast(nn.Conv2d | nn.Linear, step.module))
        codes = [self._read_codes(step)]
        if not has_k_map(step):
            self._note(step, True, f"{how}, read by {readers}")
            return self._op(name, step, codes, attributes, tensors | bias)
        self._note(step, True, f"{how}, times the K map, read by {readers}")
        value = self._op(name, step, codes, attributes, tensors)
        window = {key: attributes[key] for key in ("kernel", "stride", "padding", "dilation", "groups")}
        means = self._op("abs_mean", step, [self._float(step.inputs[0])], window, {})
        return self._op("multiply", step, [value, means], {}, bias)

    def _float_op(self, step: Step) -> int:
        inputs = [self._float(value) for value in step.inputs]
        name, attributes, tensors = float_op(step)
        self._note(step, False, f"float32 {name}")
        return self._op(name, step, inputs, attributes, tensors)

    def _op(
        self, name: str, step: Step, inputs: list[int], attributes: Mapping[str, Any], tensors: Mapping[str, Array]
    ) -> int:
        index = len(self.ops)
        self.ops.append({"op": name, "inputs": inputs, "source": step.source, **attributes})
        self.tensors |= {f"{index}.{key}": np.ascontiguousarray(tensor) for key, tensor in tensors.items()}
        return index + 1

    def _note(self, step: Step, packed: bool, note: str) -> None:
        self.notes[step].append((packed, note))


def _is_layer(step: Step) -> bool:
    return type(step.module) in LAYERS


def _is_between(step: Step) -> bool:
    """Whether a step can be inside a chain of thresholds. What falls and then rises cannot: it is made in float."""
    return type(step.module) in (*POINTWISE, nn.MaxPool2d) and not _bends(step.module)


def _bends(activation: nn.Module | None) -> bool:
    """Whether it falls and then rises: its slope below zero is negative."""
    if isinstance(activation, nn.LeakyReLU):
        return activation.negative_slope < 0
    return isinstance(activation, nn.PReLU | PReLU) and bool((activation.weight < 0).any())


def _root(step: Step) -> Step:
    """The last step before ``step``, or itself, that is not inside a chain of thresholds."""
    while _is_between(step):
        (step,) = step.inputs
    return step


def _many_levels(layer: Step) -> bool:
    """Whether a layer's codes come by way of float32, where one row of thresholds serves all channels.

    Codes of more than `FEW_BITS` take that way where thresholds of each channel would be larger than what they spare:
    from any float, and from the sums of a layer of fewer bits, whose weights they would outweigh.
    """
    bits = activation_grid(layer).bits
    root = _root(layer.inputs[0])
    return bits > FEW_BITS and not (is_quantized(root) and is_integer(root) and _bits(root) >= bits)


def _bits(layer: Step) -> int:
    """Of a weight and of what it is multiplied with, together."""
    return weight_codes(layer)[1].bits + activation_grid(layer).bits


def _trace_back(layer: Step, read_as_float: Container[Step], in_float: Container[Step]) -> _Reading:
    """Walk back from a layer to the value that its thresholds start from.

    That is the sums of the quantized layer before it, or a max-pool of those sums that is computed in float anyway.
    Without such a layer it is the nearest value that is computed in float anyway, such as a stem's pooled map, a
    quarter of the numbers.
    """
    between: list[Step] = []
    (step,) = layer.inputs
    from_sums = is_quantized(_root(step))
    while _is_between(step) and (from_sums or step not in read_as_float):
        if step in in_float and isinstance(step.module, nn.MaxPool2d) and not _is_between(step.inputs[0]):
            break
        between.append(step)
        (step,) = step.inputs
    return _Reading(layer, step, tuple(reversed(between)))


def _thresholds(reading: _Reading, from_sums: bool) -> Thresholds:
    """The thresholds of the codes that a layer reads, from the sums of the layer before it or from a float value."""
    levels = (1 << activation_grid(reading.layer).bits) - 1
    root, channels = reading.root, reading.root.shape[0]
    scale = scale_of_sums(root) if from_sums else None
    bias = getattr(root.module, "bias", None) if from_sums else None
    quantizer = cast(QuantizedLayer, reading.layer.module).activation_quantizer
    assert quantizer is not None

    def shaped(numbers: Tensor, rank: int) -> Tensor:
        return numbers.reshape(-1, channels, *(1,) * (rank - 2))

    def run(numbers: Tensor) -> list[Tensor]:
        # The arithmetic of QuantizedLayer in eval(): one rounding for the scale, one for the bias.
        value = numbers if scale is None else numbers * scale
        value = value if bias is None else value + bias
        traces = []
        for step in reading.between:
            if isinstance(step.module, nn.MaxPool2d):
                traces.append(value.clone() if step.falling is None else value.where(step.falling == 0, -value))
            else:
                assert step.module is not None
                value = step.module(shaped(value, step.rank)).reshape(-1, channels)
        codes, _ = quantizer.encode(shaped(value, reading.layer.rank))
        return [*traces, codes.reshape(-1, channels)]

    chain = Chain(run, channels, levels, f"what '{reading.layer.source}' reads of '{root.source}'")
    return find(chain, sums(largest_sum(root)) if from_sums else floats())
