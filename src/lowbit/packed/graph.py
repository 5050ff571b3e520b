"""The op graph of a packed file: what every op may hold, and the value that it writes.

The graph may come from anywhere, so `check_graph` trusts nothing in it: every type, shape, range, spare bit and spare
key is checked before anything is computed or allocated from it. The shape of every value is inferred here and nowhere
else.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from lowbit.errors import LowbitError

WORD_BITS = 64

MAX_OPS = 1 << 12
MAX_EXTENT = 1 << 16
"""Largest height, width, channel count, kernel, stride, padding or dilation."""
MAX_VALUE = 1 << 24
"""Most elements of one value of one image, its padding included."""
MAX_VALUES = 1 << 27
"""Most elements of all values of one image together."""
MAX_WORK = 1 << 38
"""Most products for one image, over all ops. An element under the window of a pool or a mean counts as `POOL_WORK`."""
POOL_WORK = 1 << 8
MAX_WEIGHTS = 1 << 30
"""Most bytes of all weights and tables of channels as an engine lays them out, the channels of a group going on to a
multiple of `PANEL`."""
PANEL = 16
MAX_TAPS = 1 << 20
"""Most products in one sum: what a thread gathers for one stays small, and every accumulator of bits fits an int32."""
MAX_INTEGER = (1 << 15) - 1
"""Largest absolute value of an integer that a code stands for: the engine keeps them as int16."""
MAX_SUM = (1 << 31) - 2
"""Largest absolute value of a sum: it fits an int32, whose ends are left to thresholds that no sum reaches."""

Array = npt.NDArray[Any]
Op = dict[str, Any]

_TURNING = frozenset({"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"})


def is_plain(text: object) -> bool:
    """Whether this is text that files and terminals show as it is, in any script.

    It has no control characters, line ends, lone surrogates, nor marks that turn the direction of what comes next.
    """
    return isinstance(text, str) and not any(
        unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp") or unicodedata.bidirectional(character) in _TURNING
        for character in text
    )


@dataclass(frozen=True)
class Value:
    """What an op writes for one image: ``codes`` of ``bits`` bits or ``float`` numbers (bits 32), channels last."""

    kind: Literal["float", "codes"]
    height: int
    width: int
    channels: int
    bits: int = 32

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.height, self.width, self.channels

    @property
    def elements(self) -> int:
        return self.height * self.width * self.channels

    def __str__(self) -> str:
        kind = "float32" if self.kind == "float" else f"{self.bits}-bit codes"
        return f"{kind} {self.height}x{self.width}x{self.channels}"


@dataclass(frozen=True)
class OpCost:
    """What one op takes: bytes of its tensors as stored, the same with float32 weights, and products per image."""

    bytes: int
    float_bytes: int
    macs: int


def check_graph(input_shape: Sequence[Any], ops: Any, tensors: Mapping[str, Array]) -> list[Value]:
    """Check everything that the engine relies on.

    Args:
        input_shape: (channels, height, width) of one image.
        ops: the graph in execution order.
        tensors: NumPy arrays named ``"{op}.{name}"``.

    Returns:
        All values of the graph, the input first and the output last.

    Raises:
        LowbitError: one sentence that names the op and what is wrong with it.
    """
    channels, height, width = (check_integer("the input shape", extent, 1, MAX_EXTENT) for extent in input_shape)
    values = [Value("float", height, width, channels)]
    if not isinstance(ops, list) or not 1 <= len(ops) <= MAX_OPS:
        raise LowbitError(f"the graph must be a list of 1 to {MAX_OPS} ops")
    by_op = tensors_by_op(tensors)
    for index, op in enumerate(ops):
        if not isinstance(op, dict):
            raise LowbitError(f"op {index} is no JSON object")
        checker = _Checker(index, op, by_op.pop(str(index), {}), values)
        values.append(checker.check())
    for number, spare in by_op.items():
        raise LowbitError(f"tensor {f'{number}.{next(iter(spare))}'!r:.60} belongs to no op")
    if sum(value.elements for value in values) > MAX_VALUES:
        raise LowbitError(f"the values of one image have more than {MAX_VALUES} elements")
    work = sum(_work(op, values[op["inputs"][0]], value) for op, value in zip(ops, values[1:], strict=True))
    if work > MAX_WORK:
        raise LowbitError(f"one image takes {work} products, more than {MAX_WORK}")
    weights = sum(_weights(op, values[op["inputs"][0]], value) for op, value in zip(ops, values[1:], strict=True))
    if weights > MAX_WEIGHTS:
        raise LowbitError(f"laid out for the engine, weights take {weights} bytes, more than {MAX_WEIGHTS}")
    output = values[-1]
    if output.kind != "float":
        raise LowbitError(f"op {len(ops) - 1} writes the output, which must be float32, not {output}")
    return values


def tensors_by_op(tensors: Mapping[str, Array]) -> dict[str, dict[str, Array]]:
    """Tensors named ``"{op}.{name}"``: those of each op by their short names."""
    by_op: dict[str, dict[str, Array]] = {}
    for key, tensor in tensors.items():
        number, _, name = key.partition(".")
        by_op.setdefault(number, {})[name] = tensor
    return by_op


def _weights(op: Op, source: Value, value: Value) -> int:
    """What `MAX_WEIGHTS` limits. Groups with fewer channels and inputs than a kernel takes at once make a file grow.

    A channel has 4 bytes in a table for each of two numbers, threshold, and case of taps that see the image: along each
    axis at most one for each output, and one for each number of taps that either border hides.
    """
    if "channels" not in op:
        return 0
    groups, kernel = int(op["groups"]), op["kernel"]
    depth, channels = source.channels // groups, -(-int(op["channels"]) // groups // PANEL) * PANEL * groups
    each = 8 * -(-depth // WORD_BITS) if op["op"] == "binary_conv2d" else 4 * depth
    cases = math.prod(min(outputs, 2 * k + 2) for outputs, k in zip(value.shape[:2], kernel, strict=True))
    levels = 2 ** op["bits"] - 1 if "bits" in op else 0
    return channels * (int(math.prod(kernel)) * each + 4 * (2 + cases + levels))


def _work(op: Op, source: Value, value: Value) -> int:
    """What `MAX_WORK` limits. Windows without weights cost a file nothing, so that its size does not bound them."""
    each = source.channels // op["groups"] if "channels" in op else POOL_WORK
    return value.elements * math.prod(op["kernel"]) * each if "kernel" in op else 0


_GEOMETRY = ("kernel", "stride", "padding")
_WEIGHT_GRID = ("weight_width", "weight_multiplier", "weight_offset")
OPS: Mapping[str, Sequence[str]] = {
    "conv2d": (*_GEOMETRY, "dilation", "groups", "channels"),
    "table_conv2d": (*_GEOMETRY, "dilation", "groups", "channels"),
    "binary_conv2d": (*_GEOMETRY, "dilation", "groups", "channels"),
    "quant_conv2d": (*_GEOMETRY, "dilation", "groups", "channels", "input_multiplier", "input_offset", *_WEIGHT_GRID),
    "threshold": ("bits",),
    "max_pool": _GEOMETRY,
    "avg_pool": (*_GEOMETRY, "count_include_pad"),
    "abs_mean": (*_GEOMETRY, "dilation", "groups"),
    "affine": (),
    "relu": (),
    "prelu": (),
    "hardtanh": ("min", "max"),
    "add": (),
    "multiply": (),
}
"""All ops, and the attributes of each besides ``op``, ``inputs`` and ``source``."""
WEIGHTS = ("weight", "weight_bits", "weight_codes")
"""The tensors that hold an op's weights, one of which an op with products has."""


def check_keys(what: str, found: Mapping[str, Any], wanted: set[str]) -> None:
    """Refuse entries of a JSON object that are not ``wanted``, and those that are missing."""
    for key in found:
        if key not in wanted:
            raise LowbitError(f"{what} has the unknown entry {key!r:.60}")
    for key in sorted(wanted):
        if key not in found:
            raise LowbitError(f"{what} lacks the entry '{key}'")


def check_integer(what: str, number: Any, low: int, high: int) -> int:
    """``number`` from a JSON object, when it is an integer from ``low`` to ``high``."""
    if not isinstance(number, int) or isinstance(number, bool) or not low <= number <= high:
        raise LowbitError(f"{what} holds {number!r:.40} where an integer from {low} to {high} is needed")
    return number


class _Checker:
    """Checks one op against docs/contract.md and infers the value that it writes."""

    def __init__(self, index: int, op: Op, tensors: Mapping[str, Array], values: Sequence[Value]) -> None:
        self.op = op
        self.tensors = dict(tensors)
        self.values = values
        kind, source = op.get("op"), op.get("source")
        self.name = f"op {index} ({kind!s:.20}, from {source!r:.60})"
        if not isinstance(kind, str) or kind not in OPS:
            raise LowbitError(f"op {index} is the unknown {kind!r:.40}; this lowbit knows {', '.join(OPS)}")
        if not isinstance(source, str) or not source.isprintable():
            raise LowbitError(
                f"{self.name} must name its source, the module that it came from, in printable characters"
            )

    def check(self) -> Value:
        kind = self.op["op"]
        wanted = {"op", "inputs", "source", *OPS[kind]}
        if kind in ("binary_conv2d", "quant_conv2d") and "thresholds" in self.tensors:
            wanted.add("bits")
        if kind in ("conv2d", "table_conv2d") and "weight_codes" in self.tensors:
            wanted.update(_WEIGHT_GRID)
        check_keys(self.name, self.op, wanted)
        inputs = self._inputs(2 if kind in ("add", "multiply") else 1)
        value: Value = getattr(self, f"_{kind}")(*inputs)
        for name in self.tensors:
            raise LowbitError(f"{self.name} has the spare tensor {name!r:.60}")
        if value.elements > MAX_VALUE:
            raise LowbitError(f"{self.name} writes {value}, more than {MAX_VALUE} elements")
        return value

    def _inputs(self, count: int) -> list[Value]:
        numbers = self.op["inputs"]
        if not isinstance(numbers, list) or len(numbers) != count:
            raise LowbitError(f"{self.name} must list {count} input{'s' if count > 1 else ''}")
        return [self.values[check_integer(f"{self.name}, inputs,", n, 0, len(self.values) - 1)] for n in numbers]

    def _need(self, value: Value, kind: str, bits: int | None = None) -> None:
        if value.kind != kind or (bits is not None and value.bits != bits):
            wanted = "float32" if kind == "float" else "codes" if bits is None else f"{bits}-bit codes"
            raise LowbitError(f"{self.name} needs {wanted} as input, not {value}")

    def _pair(self, name: str, low: int) -> tuple[int, int]:
        pair = self.op[name]
        if not isinstance(pair, list) or len(pair) != 2:
            raise LowbitError(f"{self.name}: '{name}' must be a list of two integers")
        what = f"{self.name}, {name},"
        return check_integer(what, pair[0], low, MAX_EXTENT), check_integer(what, pair[1], low, MAX_EXTENT)

    def _number(self, name: str) -> float:
        number = self.op[name]
        if (
            isinstance(number, bool)
            or not isinstance(number, int | float)
            # Python's own numbers: NumPy overflows where it is given an int of hundreds of digits.
            or not abs(number) <= float(np.finfo(np.float32).max)
        ):
            raise LowbitError(f"{self.name}: '{name}' must be a finite float32 number")
        return float(number)

    def _window(self, value: Value, dilation: tuple[int, int]) -> tuple[int, int]:
        """Height and width of what a sliding window over ``value`` writes."""
        kernel, stride, padding = self._pair("kernel", 1), self._pair("stride", 1), self._pair("padding", 0)
        padded = [extent + 2 * p for extent, p in zip((value.height, value.width), padding, strict=True)]
        if math.prod(padded) * value.channels > MAX_VALUE:
            raise LowbitError(f"{self.name} pads its input to more than {MAX_VALUE} elements")
        spans = [d * (k - 1) + 1 for k, d in zip(kernel, dilation, strict=True)]
        if spans[0] > padded[0] or spans[1] > padded[1]:
            raise LowbitError(
                f"{self.name}: a window of {spans[0]}x{spans[1]} does not fit into {padded[0]}x{padded[1]}"
            )
        height, width = ((e - span) // s + 1 for e, span, s in zip(padded, spans, stride, strict=True))
        return height, width

    def _tensor(self, name: str, dtype: type, *shape: int) -> Array:
        tensor = self.tensors.pop(name, None)
        if tensor is None:
            raise LowbitError(f"{self.name} lacks the tensor '{name}'")
        if tensor.dtype != dtype or tensor.shape != shape:
            wanted = f"{np.dtype(dtype).name} {'x'.join(map(str, shape))}"
            found = f"{tensor.dtype.name} {'x'.join(map(str, tensor.shape)) or 'scalar'}"
            raise LowbitError(f"{self.name}: tensor '{name}' must be {wanted}, but is {found}")
        return tensor

    def _floats(self, name: str, *shape: int) -> None:
        if not np.isfinite(self._tensor(name, np.float32, *shape)).all():
            raise LowbitError(f"{self.name}: tensor '{name}' holds a number that is not finite")

    def _weight_bits(self, channels: int, kernel: tuple[int, int], depth: int) -> None:
        bits = self._tensor("weight_bits", np.uint64, channels, *kernel, -(-depth // WORD_BITS))
        tail = depth % WORD_BITS
        if tail and np.any(bits[..., -1] >> np.uint64(tail)):
            raise LowbitError(f"{self.name}: tensor 'weight_bits' has bits set beyond its {depth} channels")

    def _weight_codes(self, channels: int, terms: int) -> int:
        """Check packed codes, ``terms`` to a channel; returns the largest absolute value of their integers."""
        width = check_integer(f"{self.name}, weight_width,", self.op["weight_width"], 1, 8)
        words = self._tensor("weight_codes", np.uint64, channels, -(-terms * width // WORD_BITS))
        tail = terms * width % WORD_BITS
        if tail and np.any(words[:, -1] >> np.uint64(tail)):
            raise LowbitError(f"{self.name}: tensor 'weight_codes' has bits set beyond its {terms} codes")
        return self._largest_integer("weight", width)

    def _largest_integer(self, which: str, bits: int) -> int:
        """The largest absolute value of ``multiplier * code + offset`` over codes of ``bits`` bits."""
        what = f"{self.name}, {which}"
        multiplier = check_integer(f"{what}_multiplier,", self.op[f"{which}_multiplier"], 1, MAX_INTEGER)
        offset = check_integer(f"{what}_offset,", self.op[f"{which}_offset"], -MAX_INTEGER, MAX_INTEGER)
        largest = max(abs(offset), abs(multiplier * ((1 << bits) - 1) + offset))
        if largest > MAX_INTEGER:
            raise LowbitError(f"{self.name}: an integer of the {which}'s grid passes {MAX_INTEGER}")
        return largest

    def _falling(self, channels: int) -> npt.NDArray[np.bool_]:
        falling = self._tensor("falling", np.uint8, channels)
        if falling.max() > 1:
            raise LowbitError(f"{self.name}: tensor 'falling' must hold only 0 and 1")
        return falling.astype(bool)

    def _thresholds(self, dtype: type, channels: int, rows: int) -> int:
        """Check thresholds; ``rows`` is how many there should be, 1 where all channels share them. Returns the bits."""
        bits = check_integer(f"{self.name}, bits,", self.op["bits"], 1, 8)
        thresholds = self._tensor("thresholds", dtype, rows, 2**bits - 1)
        if np.isnan(thresholds).any():
            raise LowbitError(f"{self.name}: tensor 'thresholds' holds a NaN")
        falling = self._falling(channels)
        ordered = np.where(falling[:, None], thresholds[:, ::-1], thresholds)
        if np.any(ordered[:, 1:] < ordered[:, :-1]):
            raise LowbitError(
                f"{self.name}: thresholds must not decrease in rising channels nor increase in falling ones"
            )
        return bits

    def _convolution(self, value: Value) -> tuple[int, int, int, int, tuple[int, int]]:
        """(output height, width, channels, input channels per group, kernel) of a convolution of ``value``."""
        height, width = self._window(value, self._pair("dilation", 1))
        channels = check_integer(f"{self.name}, channels,", self.op["channels"], 1, MAX_EXTENT)
        kernel, depth = self._pair("kernel", 1), self._depth(value.channels, channels)
        return height, width, channels, depth, kernel

    def _depth(self, *channels: int) -> int:
        """Input channels of each group, the groups dividing all of ``channels``, those of the input first."""
        groups = check_integer(f"{self.name}, groups,", self.op["groups"], 1, MAX_EXTENT)
        if any(count % groups for count in channels):
            raise LowbitError(
                f"{self.name}: {groups} groups divide {' and '.join(map(str, channels))} channels unevenly"
            )
        depth = channels[0] // groups
        if math.prod(self._pair("kernel", 1)) * depth > MAX_TAPS:
            raise LowbitError(f"{self.name} sums more than {MAX_TAPS} products")
        return depth

    def _conv2d(self, value: Value) -> Value:
        self._need(value, "float")
        return self._float_convolution(value)

    def _table_conv2d(self, value: Value) -> Value:
        self._need(value, "codes")
        self._floats("levels", 2**value.bits)
        return self._float_convolution(value)

    def _float_convolution(self, value: Value) -> Value:
        height, width, channels, depth, kernel = self._convolution(value)
        if "weight_bits" in self.tensors:
            self._weight_bits(channels, kernel, depth)
            self._floats("weight_scale", channels)
        elif "weight_codes" in self.tensors:
            self._weight_codes(channels, math.prod(kernel) * depth)
            self._floats("weight_scale", channels)
        else:
            self._floats("weight", channels, *kernel, depth)
        if "bias" in self.tensors:
            self._floats("bias", channels)
        return Value("float", height, width, channels)

    def _binary_conv2d(self, value: Value) -> Value:
        self._need(value, "codes", 1)
        height, width, channels, depth, kernel = self._convolution(value)
        self._weight_bits(channels, kernel, depth)
        return self._transformed(height, width, channels)

    def _quant_conv2d(self, value: Value) -> Value:
        self._need(value, "codes")
        height, width, channels, depth, kernel = self._convolution(value)
        terms = math.prod(kernel) * depth
        largest = terms * self._weight_codes(channels, terms) * self._largest_integer("input", value.bits)
        if largest > MAX_SUM:
            raise LowbitError(f"{self.name}: a sum can reach {largest}, more than {MAX_SUM}, which fits an int32")
        return self._transformed(height, width, channels)

    def _transformed(self, height: int, width: int, channels: int) -> Value:
        """What sums become: codes by thresholds, or floats by scale and bias."""
        if "thresholds" in self.tensors:
            return Value("codes", height, width, channels, self._thresholds(np.int32, channels, channels))
        self._floats("scale", channels)
        if "bias" in self.tensors:
            self._floats("bias", channels)
        return Value("float", height, width, channels)

    def _threshold(self, value: Value) -> Value:
        self._need(value, "float")
        shared = "thresholds" in self.tensors and self.tensors["thresholds"].shape[:1] == (1,)
        rows = 1 if shared else value.channels
        return Value("codes", *value.shape, self._thresholds(np.float32, value.channels, rows))

    def _pool(self, value: Value) -> Value:
        height, width = self._window(value, (1, 1))
        if any(2 * p > k for p, k in zip(self._pair("padding", 0), self._pair("kernel", 1), strict=True)):
            raise LowbitError(f"{self.name}: padding may be at most half of the kernel")
        return Value(value.kind, height, width, value.channels, value.bits)

    def _max_pool(self, value: Value) -> Value:
        if value.kind == "codes" or "falling" in self.tensors:
            self._falling(value.channels)
        return self._pool(value)

    def _avg_pool(self, value: Value) -> Value:
        self._need(value, "float")
        if not isinstance(self.op["count_include_pad"], bool):
            raise LowbitError(f"{self.name}: 'count_include_pad' must be true or false")
        return self._pool(value)

    def _abs_mean(self, value: Value) -> Value:
        self._need(value, "float")
        height, width = self._window(value, self._pair("dilation", 1))
        return Value("float", height, width, value.channels // self._depth(value.channels))

    def _affine(self, value: Value) -> Value:
        self._need(value, "float")
        self._floats("scale", value.channels)
        self._floats("shift", value.channels)
        return value

    def _relu(self, value: Value) -> Value:
        self._need(value, "float")
        return value

    def _prelu(self, value: Value) -> Value:
        self._need(value, "float")
        self._floats("slope", value.channels)
        return value

    def _hardtanh(self, value: Value) -> Value:
        self._need(value, "float")
        if self._number("min") > self._number("max"):
            raise LowbitError(f"{self.name}: 'min' is above 'max'")
        return value

    def _add(self, left: Value, right: Value) -> Value:
        self._need(left, "float")
        self._need(right, "float")
        if left != right:
            raise LowbitError(f"{self.name} adds {left} to {right}, whose shapes differ")
        return left

    def _multiply(self, left: Value, right: Value) -> Value:
        self._need(left, "float")
        self._need(right, "float")
        if left.shape[:2] != right.shape[:2] or left.channels % right.channels:
            raise LowbitError(f"{self.name} multiplies {left} by {right}, whose shapes do not fit")
        if "bias" in self.tensors:
            self._floats("bias", left.channels)
        return left


def cost_of(op: Op, tensors: Mapping[str, Array], source: Value, value: Value) -> OpCost:
    """The cost of an op that reads ``source`` first and writes ``value``."""
    stored = sum(tensor.nbytes for tensor in tensors.values())
    if "channels" not in op:
        return OpCost(stored, stored, 0)
    weights = op["channels"] * math.prod(op["kernel"]) * (source.channels // op["groups"])
    packed = sum(tensors[name].nbytes for name in WEIGHTS if name in tensors)
    return OpCost(stored, stored - packed + weights * 4, weights * value.height * value.width)
