"""Ops that the engine runs together, part by part and in place, against the same ops one by one.

A value shows by a last op that copies it. That it is read once more may change what runs in place, so the same is done
for every value of a graph, and for the graph cut off behind every op.
"""

from __future__ import annotations

import copy

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from packed_models import Builder, coded, thresholds, window, words

from lowbit import _engine
from lowbit.runtime import Engine

POINTWISE = ("affine", "relu", "prelu", "hardtanh", "add", "add", "multiply", "threshold")
SAME = window((3, 3), padding=(1, 1), dilation=(1, 1))
OTHERS = ("conv2d", "binary_conv2d", "quant_conv2d", "max_pool", "avg_pool", "abs_mean")


@st.composite
def graphs(draw):
    """A net of up to ten random ops, whose values may be read by several."""
    channels = draw(st.sampled_from([1, 3, 16, 20, 64, 65, 130]))
    net = Builder((channels, draw(st.integers(3, 9)), draw(st.integers(3, 5))))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    for _ in range(draw(st.integers(2, 10))):
        values = values_of(net.model)
        of_floats = [number for number, value in enumerate(values) if value.kind == "float"]
        read = draw(st.sampled_from(of_floats[-4:]))
        value, kind = values[read], draw(st.sampled_from(POINTWISE + OTHERS))
        alike = [number for number in of_floats if values[number].shape == value.shape]
        append(net, rng, kind, read, draw(st.sampled_from(alike)), value, draw)
    return net.model


def values_of(model):
    """The values of a graph that may yet end with codes, or be empty."""
    whole = copy.copy(model)
    whole.ops = [*model.ops, {"op": "relu", "inputs": [0], "source": "end"}]
    return whole.values()[:-1]


def append(net, rng, kind, read, other, value, draw):
    """Append an op that reads ``read``, and ``other`` of its shape; codes are made first where it reads codes."""
    channels = value.channels
    per_channel = lambda *names: {name: rng.normal(size=channels).astype(np.float32) for name in names}  # noqa: E731
    if kind == "affine":
        net.op(kind, [read], per_channel("scale", "shift"))
    elif kind == "prelu":
        net.op(kind, [read], per_channel("slope"))
    elif kind == "hardtanh":
        net.op(kind, [read], min=-0.5, max=0.75)
    elif kind in ("relu", "add"):
        net.op(kind, [read] if kind == "relu" else draw(st.permutations([read, other])))
    elif kind == "multiply":
        net.op(kind, [read, other], per_channel("bias"))
    elif kind == "abs_mean":
        factors = net.op(kind, [read], groups=1, **SAME)
        net.op("multiply", [read, factors])
    elif kind == "threshold":
        bits = draw(st.sampled_from([1, 2]))
        net.op(kind, [read], thresholds(rng, np.float32, channels, bits, 1.0), bits=bits)
    elif kind.endswith("pool"):
        sizes = [((3, 3), (1, 1), (1, 1)), ((2, 2), (2, 2), (1, 1)), ((2, 1), (1, 1), (0, 0)), ((1, 2), (3, 1), (0, 0))]
        sizes.append(((1, 1), (1, 1), (0, 0)))  # fits any
        fitting = [size for size in sizes if value.shape[0] >= size[0][0] and value.shape[1] >= size[0][1]]
        shape = window(*draw(st.sampled_from(fitting)))
        net.op(kind, [read], **shape, **({"count_include_pad": False} if kind == "avg_pool" else {}))
    elif kind == "conv2d":
        out = draw(st.sampled_from([channels, 17]))
        weight = {"weight": rng.normal(size=(out, 1, 1, channels)).astype(np.float32)}
        net.op(kind, [read], weight, groups=1, channels=out, **window((1, 1), dilation=(1, 1)))
    else:
        bits = 1 if kind == "binary_conv2d" else 2
        codes = net.op("threshold", [read], thresholds(rng, np.float32, channels, bits, 1.0), bits=bits)
        of_codes(net, rng, kind, codes, channels, draw(st.sampled_from([channels, 48])))


def of_codes(net, rng, kind, read, channels, out):
    """Append a 3x3 convolution of codes, of 1 bit or of 2, to floats."""
    grid, weight = {}, {"weight_bits": words(rng, out, 3, 3, depth=channels)}
    if kind == "quant_conv2d":
        grid, weight = coded(rng, out, 3, channels, 2, 2, -3)
        grid |= {"input_multiplier": 1, "input_offset": 0}
    weight |= {name: rng.normal(0, 0.05, out).astype(np.float32) for name in ("scale", "bias")}
    return net.op(kind, [read], weight, groups=1, channels=out, **grid, **SAME)


def showing(model, number, cut):
    """The net with a last op that copies a value; ``cut``: and without the ops behind what wrote it."""
    shown, value = copy.copy(model), values_of(model)[number]
    shown.ops = list(model.ops[:number] if cut else model.ops)
    last = len(shown.ops)
    shown.tensors = {key: tensor for key, tensor in model.tensors.items() if int(key.split(".")[0]) < last}
    if value.kind == "float":
        shown.ops.append({"op": "hardtanh", "inputs": [number], "source": "copy", "min": -1e30, "max": 1e30})
        return shown
    one = {"groups": value.channels, "channels": value.channels, **window((1, 1), dilation=(1, 1))}
    shown.ops.append({"op": "table_conv2d", "inputs": [number], "source": "copy", **one})
    shown.tensors[f"{last}.weight"] = np.ones((value.channels, 1, 1, 1), np.float32)
    shown.tensors[f"{last}.levels"] = np.arange(1 << value.bits, dtype=np.float32)
    return shown


@pytest.mark.parametrize("name", _engine.available_isas())
@settings(max_examples=12, deadline=None)
@given(
    model=graphs(),
    seed=st.integers(0, 99),
    batch=st.sampled_from([0, 1, 3]),
    threads=st.integers(1, 2),
    strip_bytes=st.sampled_from([None, 1, 500]),
)
def test_every_value_is_what_the_ops_give_one_by_one(name, model, seed, batch, threads, strip_bytes):
    same_as_one_by_one(model, name, seed, batch, threads, strip_bytes)


@pytest.mark.parametrize("name", _engine.available_isas())
@pytest.mark.parametrize("order", [(3, 1), (1, 3)])
def test_a_convolution_that_its_threshold_and_a_later_sum_read(name, order):
    net, rng = Builder((20, 4, 5)), np.random.default_rng(0)
    one = window((1, 1), dilation=(1, 1)) | {"groups": 1, "channels": 20}
    first = net.op("conv2d", [0], {"weight": rng.normal(size=(20, 1, 1, 20)).astype(np.float32)}, **one)
    codes = net.op("threshold", [first], thresholds(rng, np.float32, 20, 1, 1.0), bits=1)
    weight = {"weight_bits": words(rng, 20, 1, 1, depth=20), "scale": rng.normal(size=20).astype(np.float32)}
    sums = net.op("binary_conv2d", [codes], weight, **one)
    assert (first, sums) == (1, 3)
    net.op("add", list(order))
    same_as_one_by_one(net.model, name, 0, 2, 1)


@pytest.mark.parametrize("name", _engine.available_isas())
@pytest.mark.parametrize("kind", ["binary_conv2d", "quant_conv2d"])
@pytest.mark.parametrize("channels", [20, 64, 80, 100])
@pytest.mark.parametrize("first", [True, False])
def test_a_convolution_adds_a_shortcut_that_is_read_again_or_not(name, kind, channels, first):
    net, rng = Builder((channels, 7, 5)), np.random.default_rng(0)
    shortcut, bits = 0, 1 if kind == "binary_conv2d" else 2
    for _ in range(3):
        codes = net.op("threshold", [shortcut], thresholds(rng, np.float32, channels, bits, 1.0), bits=bits)
        sums = of_codes(net, rng, kind, codes, channels, channels)
        added = net.op("add", [sums, shortcut] if first else [shortcut, sums])
        again = net.op("add", [added, shortcut])
        shortcut = net.op("relu", [again])
    for batch, threads in ((1, 1), (3, 2)):
        same_as_one_by_one(net.model, name, 0, batch, threads)


@pytest.mark.parametrize("name", _engine.available_isas())
@pytest.mark.parametrize("kind", ["conv2d", "binary_conv2d", "quant_conv2d"])
@pytest.mark.parametrize("sizes", [((3, 3), (2, 2), (1, 1)), ((2, 3), (3, 1), (1, 0))])
def test_pools_follow_a_convolution_strip_by_strip(name, kind, sizes):
    net, rng, channels = Builder((20, 23, 7)), np.random.default_rng(0), 20
    shape = window(*sizes)
    floats = {name: rng.normal(size=channels).astype(np.float32) for name in ("scale", "shift", "slope")}
    if kind == "conv2d":
        weight = {"weight": rng.normal(size=(channels, 3, 3, channels)).astype(np.float32)}
        made = net.op(kind, [0], weight, groups=1, channels=channels, **SAME)
    else:
        bits = 1 if kind == "binary_conv2d" else 2
        read = net.op("threshold", [0], thresholds(rng, np.float32, channels, bits, 1.0), bits=bits)
        made = of_codes(net, rng, kind, read, channels, channels)
    codes = net.op("threshold", [made], thresholds(rng, np.float32, channels, 1, 1.0), bits=1)
    falling = {"falling": rng.integers(0, 2, channels).astype(np.uint8)}
    pooled = net.op("max_pool", [codes], falling, **shape)
    scaled = net.op("affine", [made], {"scale": floats["scale"], "shift": floats["shift"]})
    net.op("max_pool", [net.op("prelu", [scaled], {"slope": floats["slope"]})], falling, **shape)
    net.op("add", [of_codes(net, rng, "binary_conv2d", pooled, channels, channels), pooled + 3])
    same_as_one_by_one(net.model, name, 0, 2, 2, 1)


@pytest.mark.parametrize("name", _engine.available_isas())
@pytest.mark.parametrize("strip_bytes", [1, 1 << 20])
@pytest.mark.parametrize("again", [True, False])
def test_a_pool_is_read_as_codes_and_by_a_shortcut_with_a_norm(name, strip_bytes, again):
    """As in a ResNet whose pool lies in front of its norm: the shortcut's norm runs with the threshold of the codes."""
    net, rng, channels = Builder((3, 22, 18)), np.random.default_rng(0), 64
    weight = {"weight": rng.normal(size=(channels, 3, 3, 3)).astype(np.float32)}
    made = net.op("conv2d", [0], weight, groups=1, channels=channels, **SAME)
    pooled = net.op("max_pool", [made], {"falling": np.zeros(channels, np.uint8)}, **window((3, 3), (2, 2), (1, 1)))
    codes = net.op("threshold", [pooled], thresholds(rng, np.float32, channels, 1, 1.0), bits=1)
    sums = of_codes(net, rng, "binary_conv2d", codes, channels, channels)
    norm = {name: rng.normal(size=channels).astype(np.float32) for name in ("scale", "shift")}
    added = net.op("add", [sums, net.op("relu", [net.op("affine", [pooled], norm)])])
    net.op("add", [added, pooled if again else added])
    for batch, threads in ((1, 1), (3, 2)):
        same_as_one_by_one(net.model, name, 0, batch, threads, strip_bytes)


def same_as_one_by_one(model, name, seed, batch, threads, strip_bytes=None):
    x = np.random.default_rng(seed).normal(size=(batch, *model.input_shape)).astype(np.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOWBIT_ISA", name)
        if strip_bytes is not None:
            patch.setenv("LOWBIT_STRIP_BYTES", str(strip_bytes))
        alone = Engine(showing(model, len(model.ops), cut=False))
        values = [np.ascontiguousarray(x.transpose(0, 2, 3, 1))]
        for index, op in enumerate(model.ops):
            values.append(alone.run_op(index, [values[number] for number in op["inputs"]]))
        for number, value in enumerate(values):
            for cut in (False, True):
                found = Engine(showing(model, number, cut), threads=threads)(x).reshape(
                    value.transpose(0, 3, 1, 2).shape
                )
                np.testing.assert_array_equal(found, value.transpose(0, 3, 1, 2))
