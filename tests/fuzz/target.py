"""What the fuzzer runs on a file, and how it changes files.

`exercise` loads a file with and without the checks of Python and runs what loads. `mutate` changes the JSON and the
tensors of a packed file, so that most of what it makes gets past the container.
"""

from __future__ import annotations

import json
import os
import random
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

sys.path.insert(0, str(Path(__file__).parents[1] / "engine"))
from packed_models import Builder, coded, thresholds, window, words

from lowbit import _engine, packed
from lowbit.errors import LowbitError
from lowbit.packed import PackedModel
from lowbit.packed.container import _open
from lowbit.packed.graph import _work
from lowbit.runtime import Engine

MOST_WORK, MOST_ELEMENTS = 1 << 24, 1 << 18
"""Of a network that is run: all others are only loaded."""


def exercise(data: bytes) -> str:
    """Load ``data`` and run it; says how far it came.

    Raises:
        AssertionError: the native engine refuses what Python passed, or an image's result depends on its neighbours.
        Exception: any other is a finding too.
    """
    choice = zlib.crc32(data)
    isas = _engine.available_isas()
    os.environ["LOWBIT_ISA"] = isas[choice % len(isas)]
    try:
        model = packed.parse(data)
    except LowbitError as error:
        str(error).encode()
        return "loaded unchecked" if _exercise_unchecked(data) else "refused"
    values = model.values()
    model.costs()
    if sum(value.elements for value in values) > MOST_ELEMENTS:
        return "large"
    try:
        engine = Engine(model, threads=1 + choice % 2)
    except LowbitError as error:
        raise AssertionError("the native engine refuses what Python passed") from error
    if (
        sum(_work(op, values[op["inputs"][0]], value) for op, value in zip(model.ops, values[1:], strict=True))
        > MOST_WORK
    ):
        return "large"
    image = np.random.default_rng(choice).normal(0, 3, (1, *model.input_shape)).astype(np.float32)
    with np.errstate(all="ignore"):
        outputs = engine(np.repeat(image, 1 + choice % 11, axis=0))
    for other in outputs[1:]:
        np.testing.assert_array_equal(other, outputs[0])
    return "run"


def _exercise_unchecked(data: bytes) -> bool:
    """Whatever the native engine accepts without the checks of Python must run without touching other memory."""
    try:
        text, tensors = _open(data)
        graph = json.loads(text)
        shape, ops = graph["input"]["shape"], graph["ops"]
        by_op = [
            {key.partition(".")[2]: tensor for key, tensor in tensors.items() if key.startswith(f"{index}.")}
            for index in range(len(ops))
        ]
        small = np.prod(shape, dtype=float) <= 1 << 12 and all(
            max(map(abs, np.ravel([op.get(name, 1) for name in ("kernel", "padding")]).tolist())) <= 8 for op in ops
        )
    except Exception:
        return False
    try:
        engine = _engine.Engine(shape, ops, by_op, 1)
    except (ValueError, TypeError, RuntimeError, MemoryError):
        return False
    if small:
        engine.run(np.ones((2, *shape), np.float32))
    return True


NUMBERS: list[Any] = [
    *(0, 1, 2, 3, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 256, 1000),
    *(
        -1,
        -2,
        -128,
        2**15 - 1,
        2**15,
        2**16,
        2**24,
        2**31 - 1,
        2**31,
        2**32 + 1,
        2**62,
        2**63,
        -(2**63),
        2**64,
        10**300,
    ),
    *(
        0.5,
        -0.0,
        1e-45,
        3.5e38,
        1e308,
        1e999,
        True,
        False,
        None,
        "",
        "conv2d",
        "\x1b[2J",
        "\ud800",
        [],
        {},
        [1, 1],
        [1],
    ),
]
WORDS = [0, 1, 0x80, 0xFF, 0x7F, 0x7F800000, 0x7FC00000, 0x80000000, 0xFF800000, 0x7FFFFFFF, 2**63, 2**64 - 1]


def mutate(data: bytes, rng: random.Random) -> bytes | None:
    """``data`` with a few changes to its graph and its tensors; None when it is no packed file."""
    try:
        text, tensors = _open(data)
        graph = json.loads(text)
    except Exception:
        return None
    for _ in range(1 + rng.randrange(3)):
        change = rng.choice(
            [_grow, _grow, _change_number, _change_number, _change_tensor, _change_tensor, _change_list]
        )
        try:
            change(graph, tensors, rng)
        except (LowbitError, LookupError, TypeError, ValueError, AttributeError, OverflowError):
            continue  # the graph is no longer one that this change knows how to handle
    tensors = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
    return bytes(safetensors.numpy.save(tensors, {"lowbit": json.dumps(graph, separators=(",", ":"))}))


def _leaves(node: Any) -> list[tuple[Any, Any]]:
    """Every place of a JSON object: a list or dict, and a key of it."""
    keys = list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ()
    return [place for key in keys for place in [(node, key), *_leaves(node[key])]]


def _change_number(graph: Any, tensors: dict[str, Any], rng: random.Random) -> None:
    node, key = rng.choice(_leaves(graph["ops"] if rng.random() < 0.9 else graph))
    if type(node[key]) is int and rng.random() < 0.5:
        node[key] += rng.choice([-1, 1, 2, 8])
    else:
        node[key] = rng.choice(NUMBERS)


def _change_tensor(graph: Any, tensors: dict[str, Any], rng: random.Random) -> None:
    name = rng.choice(sorted(tensors))
    tensor = tensors[name].copy()
    kind = rng.randrange(8)
    if kind == 0:
        del tensors[name]
    elif kind == 1:
        tensors[rng.choice(sorted(tensors))] = tensor
    elif kind == 2:
        tensors[name] = np.moveaxis(tensor, 0, -1) if rng.random() < 0.5 else tensor[: rng.randrange(1, 4)]
    elif kind == 3:
        tensors[name] = tensor.view(rng.choice([np.uint8, np.float32, np.int32]))
    else:
        flat = tensor.reshape(-1)
        bits = flat.view(f"u{flat.itemsize}")
        place = rng.randrange(flat.size)
        mask = (1 << 8 * flat.itemsize) - 1
        bits[place] = (int(bits[place]) ^ 1 << rng.randrange(64) if kind < 6 else rng.choice(WORDS)) & mask
        tensors[name] = tensor


def _change_list(graph: Any, tensors: dict[str, Any], rng: random.Random) -> None:
    """Drop the last op, or an entry of one, or say an op twice."""
    ops = graph["ops"]
    index = rng.randrange(len(ops))
    kind = rng.randrange(3)
    if kind == 0:
        ops.pop()
        for name in [name for name in tensors if name.startswith(f"{len(ops)}.")]:
            del tensors[name]
    elif kind == 1:
        del ops[index][rng.choice(sorted(ops[index]))]
    else:
        number = len(ops)
        ops.append(dict(ops[index]))
        tensors |= {f"{number}.{k[len(str(index)) + 1 :]}": t for k, t in tensors.items() if k.startswith(f"{index}.")}


def _grow(graph: Any, tensors: dict[str, Any], rng: random.Random) -> None:
    """Append a valid random op, behind a random value; a map of floats ends the network."""
    if len(graph["ops"]) > 12:
        raise LowbitError("long enough")
    net = Builder(graph["input"]["shape"])
    net.model.ops, net.model.tensors = graph["ops"], tensors
    graph["classes"] = graph["preprocessing"] = None
    values = _values_of(net.model)
    numbers = np.random.default_rng(rng.randrange(1 << 32))
    _append(net, len(values) - 1 - min(rng.randrange(4), len(values) - 1), values, rng, numbers)
    values = _values_of(net.model)
    if values[-1].kind == "codes":
        _append(net, len(values) - 1, values, rng, numbers, "table_conv2d")


def _values_of(model: PackedModel) -> list[Any]:
    """The values of a network whose last one may be codes."""
    end = PackedModel(model.input_shape, [*model.ops], {**model.tensors})
    end.ops.append({"op": "relu", "inputs": [0], "source": "end"})
    return end.values()[:-1]


def _append(net: Builder, number: int, values: list[Any], rng: random.Random, numbers: Any, kind: str = "") -> None:
    value = values[number]
    height, width, channels = value.shape
    floats = [
        "conv2d",
        "threshold",
        "max_pool",
        "avg_pool",
        "abs_mean",
        "affine",
        "relu",
        "hardtanh",
        "add",
        "multiply",
    ]
    codes = ["binary_conv2d"] * (2 * (value.bits == 1)) + ["quant_conv2d", "table_conv2d", "max_pool"]
    kind = kind or rng.choice(floats if value.kind == "float" else codes)
    kernel, stride = [rng.choice([1, 1, 2, 3, 5]) for _ in "hw"], [rng.choice([1, 1, 2, 3]) for _ in "hw"]
    padding = [rng.randrange(4), rng.randrange(4)]
    if kind.endswith("pool"):
        padding = [min(p, k // 2) for p, k in zip(padding, kernel, strict=True)]
    dilation = [rng.choice([1, 1, 2]) for _ in "hw"]
    for axis, extent in enumerate((height, width)):
        kernel[axis] = kernel[axis] if dilation[axis] * (kernel[axis] - 1) < extent + 2 * padding[axis] else 1
        padding[axis] = min(padding[axis], kernel[axis] // 2) if kind.endswith("pool") else padding[axis]
    geometry = window(kernel, stride, padding)
    if kind == "threshold":
        bits = rng.choice([1, 1, 2, 4, 8])
        net.op(kind, [number], thresholds(numbers, np.float32, channels, bits, 2.0), bits=bits)
    elif kind.endswith("pool"):
        falling = numbers.integers(0, 2, channels, dtype=np.uint8)
        attributes = {"count_include_pad": rng.random() < 0.5} if kind == "avg_pool" else {}
        falls = kind == "max_pool" and (value.kind == "codes" or rng.random() < 0.5)
        net.op(kind, [number], {"falling": falling} if falls else {}, **geometry, **attributes)
    elif kind == "abs_mean":
        groups = rng.choice([g for g in range(1, channels + 1) if channels % g == 0])
        net.op(kind, [number], groups=groups, dilation=dilation, **geometry)
    elif kind == "affine":
        tensors = {name: numbers.normal(size=channels).astype(np.float32) for name in ("scale", "shift")}
        net.op(kind, [number], tensors)
    elif kind in ("relu", "hardtanh"):
        net.op(kind, [number], **({"min": -1, "max": 1.5} if kind == "hardtanh" else {}))
    elif kind in ("add", "multiply"):
        same = [n for n, v in enumerate(values) if v == value]
        net.op(kind, [number, rng.choice(same)])
    else:
        groups = rng.choice([g for g in (1, 1, 2, 3, channels) if channels % g == 0])
        out, depth = groups * rng.choice([1, 2, 3, 8, 16, 17, 33, 64, 65]), channels // groups
        if out > 200:
            out = groups
        terms = kernel[0] * kernel[1] * depth
        attributes = {**geometry, "dilation": dilation, "groups": groups, "channels": out}
        tensors = {"bias": numbers.normal(size=out).astype(np.float32)} if rng.random() < 0.5 else {}
        if kind in ("conv2d", "table_conv2d"):
            form = rng.choice(["weight", "weight_bits", "weight_codes"])
            scale = {"weight_scale": np.ones(out, np.float32)}
            if kind == "table_conv2d":
                tensors["levels"] = numbers.normal(size=2**value.bits).astype(np.float32)
        else:
            form, scale = {"binary_conv2d": "weight_bits", "quant_conv2d": "weight_codes"}[kind], {}
            if rng.random() < 0.6:
                bits = rng.choice([1, 1, 1, 2, 8])
                tensors = thresholds(numbers, np.int32, out, bits, terms**0.5 * 2**value.bits)
                attributes["bits"] = bits
            else:
                tensors["scale"] = np.ones(out, np.float32)
        if form == "weight":
            tensors["weight"] = numbers.normal(size=(out, *kernel, depth)).astype(np.float32)
        elif form == "weight_bits":
            tensors |= {"weight_bits": words(numbers, out, *kernel, depth=depth), **scale}
        else:
            grid, coded_tensors = coded(numbers, out, 1, terms, rng.choice([1, 2, 3, 8]), 1, -1)
            attributes |= grid
            tensors |= {**coded_tensors, **scale}
        if kind == "quant_conv2d":
            attributes |= {"input_multiplier": 1, "input_offset": rng.choice([0, -1, -(2 ** (value.bits - 1))])}
        net.op(kind, [number], tensors, **attributes)
