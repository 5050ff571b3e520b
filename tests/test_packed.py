"""The packed file: it comes back as it was written, and nothing hostile passes."""

from __future__ import annotations

import json
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

sys.path.insert(0, str(Path(__file__).parent / "engine"))
from packed_models import Builder, coded, described_net, quant_net, table_net, window

from lowbit import _engine, packed
from lowbit.errors import LowbitError
from lowbit.exporter.bench import BenchResult, Layer, Row
from lowbit.packed import PackedModel
from lowbit.runtime import Engine
from lowbit.terminal import notes, print_rows


def coded_model() -> PackedModel:
    """A net on codes of several widths, behind a float convolution whose weights are ternary codes."""
    rng = np.random.default_rng(0)
    model = quant_net(rng)
    index = len(model.ops)
    grid, tensors = coded(rng, 2, 1, 3, 2, 1, -1)
    shape = window((1, 1), dilation=(1, 1))
    model.ops.append({"op": "conv2d", "inputs": [index], "source": "head", "groups": 1, "channels": 2, **grid, **shape})
    tensors["weight_scale"] = np.ones(2, np.float32)
    model.tensors |= {f"{index}.{name}": tensor for name, tensor in tensors.items()}
    return model


def table_model() -> PackedModel:
    return table_net(np.random.default_rng(0))


DATA = described_net().to_bytes()
CODED = coded_model().to_bytes()
TABLES = table_model().to_bytes()


def test_file_comes_back_as_it_was_written(tmp_path):
    model = described_net()
    model.save(tmp_path / "m.lowbit")
    again = packed.read(tmp_path / "m.lowbit")
    assert packed.parse(CODED).to_bytes() == CODED
    assert packed.parse(TABLES).to_bytes() == TABLES
    assert (again.input_shape, again.ops, again.classes) == (model.input_shape, model.ops, model.classes)
    assert (again.preprocessing, again.provenance) == (model.preprocessing, model.provenance)
    assert again.tensors.keys() == model.tensors.keys()
    for name, tensor in model.tensors.items():
        np.testing.assert_array_equal(again.tensors[name], tensor)
        assert again.tensors[name].dtype == tensor.dtype
    assert again.to_bytes() == model.to_bytes() == DATA


def test_shapes_and_costs_are_inferred():
    model = described_net()
    assert [str(value) for value in model.values()] == [
        "float32 4x4x3", "float32 4x4x5", "1-bit codes 4x4x5", "1-bit codes 4x4x3", "1-bit codes 2x2x3", "float32 1x1x2"
    ]  # fmt: skip
    costs = model.costs()
    assert [cost.macs for cost in costs] == [16 * 5 * 27, 0, 16 * 3 * 45, 0, 2 * 12]
    assert costs[0].bytes == costs[0].float_bytes == 5 * 27 * 4
    assert costs[2].bytes == 3 * 9 * 8 + 3 * 4 + 3
    assert costs[2].float_bytes == 3 * 45 * 4 + 3 * 4 + 3


def test_weight_codes_are_counted_as_stored():
    model = coded_model()
    costs = model.costs()
    assert str(model.values()[2]) == "3-bit codes 6x6x5"
    assert costs[1].macs == 36 * 5 * 27
    assert costs[1].bytes == 5 * 8 * 2 + 5 * 7 * 4 + 5  # 27 codes of 3 bits take two words
    assert costs[1].float_bytes == 5 * 27 * 4 + 5 * 7 * 4 + 5
    assert costs[-1].bytes == 2 * 8 + 2 * 4


def test_tables_and_maps_are_counted_as_stored():
    model = table_model()
    costs = model.costs()
    assert [str(value) for value in model.values()[4:7]] == ["float32 6x6x8", "float32 6x6x2", "float32 6x6x8"]
    assert [cost.macs for cost in costs[3:6]] == [36 * 8 * 27, 0, 0]
    assert costs[1].bytes == 4 * 4 + 6 * 9 * 8 + 2 * 6 * 4  # the table, a word for each tap, scale and bias
    assert costs[1].float_bytes == 4 * 4 + 6 * 27 * 4 + 2 * 6 * 4


def test_every_truncation_is_refused():
    for length in range(len(DATA)):
        with pytest.raises(LowbitError, match="write the file again"):
            packed.parse(DATA[:length])


@settings(max_examples=800, deadline=None)
@given(st.sampled_from([DATA, CODED, TABLES]), st.data(), st.integers(1, 255), st.integers(0, 255))
def test_flipped_bytes_are_refused_or_harmless(file, drawn, mask, other):
    """Whatever passes the checks must also run."""
    data, place = bytearray(file), st.integers(0, len(file) - 1)
    data[drawn.draw(place)] ^= mask
    data[drawn.draw(place)] ^= other
    try:
        model = packed.parse(bytes(data))
    except LowbitError:
        return
    Engine(model)(np.ones((2, *model.input_shape), np.float32))


def header_with(**changes) -> bytes:
    """The small file with entries of its JSON graph replaced."""
    tensors = safetensors.numpy.load(DATA)
    (length,) = struct.unpack_from("<Q", DATA)
    header = json.loads(json.loads(DATA[8 : 8 + length])["__metadata__"]["lowbit"])
    return safetensors.numpy.save(tensors, {"lowbit": json.dumps({**header, **changes})})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": 2}, "format version 2 is unknown"),
        ({"format": True}, "format version True is unknown"),
        ({"spare": 1}, "unknown entry 'spare'"),
        ({"input": {"shape": [3, 4]}}, "input shape"),
        ({"input": {"shape": [3, 4, 1 << 40]}}, "input shape"),
        ({"input": {"shape": [3, 4, 4.0]}}, "input shape"),
        ({"input": {"shape": [3, 4, 5]}}, "tensor|class names|preprocessing"),
        ({"ops": []}, "1 to 4096 ops"),
        ({"ops": {}}, "1 to 4096 ops"),
        ({"ops": [1]}, "op 0 is no JSON object"),
        (
            {"ops": [{"op": "hardtanh", "source": "0", "inputs": [0], "min": -1, "max": 10**400}]},
            "must be a finite float32 number",
        ),
        ({"classes": ["cat"]}, "1 class names"),
        ({"classes": [1, 2]}, "list of names"),
        ({"classes": ["cat", "\x1b[2Jdog"]}, "without control characters"),
        ({"classes": ["cat", "\u202edog"]}, "without control characters"),
        ({"provenance": {"run": "\ud800"}}, "no JSON.*surrogates not allowed"),
        ({"provenance": []}, "provenance"),
        ({"preprocessing": {"mode": "RGB"}}, "preprocessing is malformed"),
        ({"preprocessing": {"mode": "\x1b[2J", "size": [4, 4], "pad": 0, "mean": [0], "std": [1]}}, r"'\\x1b\[2J'"),
        (
            {"preprocessing": {"mode": "L", "size": [4, 4], "pad": 0, "mean": [0], "std": [1], "\x1b]": 1}},
            r"malformed \([^\x1b]*\\x1b",
        ),
        ({"preprocessing": {"mode": "L", "size": [4, 4], "pad": 0, "mean": [0], "std": [1]}}, "preprocessing makes"),
        (
            {"preprocessing": {"mode": "RGB", "size": [10**9, 4], "pad": 0, "mean": [0] * 3, "std": [1] * 3}},
            "out of range",
        ),
    ],
)
def test_hostile_headers_are_refused(changes, message):
    with pytest.raises(LowbitError, match=message):
        packed.parse(header_with(**changes), "x.lowbit")


def test_numbers_that_are_no_json_are_refused():
    with pytest.raises(LowbitError, match="NaN is not allowed"):
        packed.parse(header_with(provenance={"x": float("nan")}))
    with pytest.raises(LowbitError, match="no JSON"):
        packed.parse(header_with(provenance={"x": 123456789}).replace(b"123456789", b"1e9999999"))


def test_deep_nesting_is_refused():
    """Also where the parser still takes it, but a message that quotes it does not."""
    tensors = safetensors.numpy.load(DATA)
    for depth in (100_000, *range(800, 1000, 5)):
        for graph in ("[" * depth, '{"format": ' + "[" * depth + "]" * depth + "}"):
            with pytest.raises(LowbitError, match=r"no JSON|nested too deeply|is unknown"):
                packed.parse(safetensors.numpy.save(tensors, {"lowbit": graph}))


def container(header, body=b"", length=None) -> bytes:
    """A safetensors container with this header, a JSON object or bytes."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + body


def placed(first, end, dtype="U8", shape=(4,), **more):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [first, end], **more}


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"", "JSONDecodeError"),
        (b"\xff\xfe{}", "UnicodeDecodeError"),
        (b"[]", "damaged one"),
        ({}, "KeyError"),
        ({"__metadata__": 1}, "TypeError"),
        ({"__metadata__": {"lowbit": 1}}, "no text"),
        ({"0.a": 1}, "tensor '0.a' is no JSON object"),
        ({"0.a": {"dtype": "U8"}}, "lacks the entry 'data_offsets'"),
        ({"0.a": placed(0, 8, spare=1)}, "unknown entry 'spare'"),
        ({"0.a": placed(0, 8, "F64", [1])}, "is of type 'F64', not F32, I32, U8, U64"),
        ({"0.a": placed(0, 8, ["U8"])}, "is of type"),
        ({"0.a": placed(0, 8, shape=[])}, "1 to 4 axes"),
        ({"0.a": placed(0, 8, shape=[1, 1, 1, 1, 8])}, "1 to 4 axes"),
        ({"0.a": placed(0, 8, shape=[8.0])}, "holds 8.0"),
        ({"0.a": placed(0, 8, shape=[-8])}, "holds -8"),
        ({"0.a": placed(0, 8, shape=[1 << 70])}, "holds 11805916"),
        ({"0.a": placed(0, 8, shape=[0])}, "holds 0"),
        ({"0.a": placed(0, 9, shape=[9])}, "holds 9"),
        ({"0.a": placed(8, 0, shape=[8])}, "has -8 bytes, not 8"),
        ({"0.a": placed(0, 8, shape=[7])}, "has 8 bytes, not 7"),
        ({"0.a": placed(0, 8, shape=[8]), "0.b": placed(4, 8)}, "overlap"),
        ({"0.a": placed(4, 8)}, "gaps"),
        ({"0.a": placed(0, 4)}, "take 4 bytes, but the file has 8"),
        ({}, "take 0 bytes, but the file has 8"),
    ],
)
def test_hostile_containers_are_refused(header, message):
    if isinstance(header, dict) and "KeyError" not in message:
        header = {"__metadata__": {"lowbit": "{}"}, **header}
    with pytest.raises(LowbitError, match=message):
        packed.parse(container(header, bytes(8)))
    with pytest.raises(LowbitError, match="header is too long"):
        packed.parse(container(header, bytes(8), length=1 << 63))


def test_tensors_at_odd_places_are_read_all_the_same():
    """A writer need not put wide types first; NumPy and the engine get aligned memory."""
    model, entries, body = described_net(), {}, b""
    for name, tensor in sorted(model.tensors.items(), key=lambda item: item[1].itemsize):
        dtype = {"float32": "F32", "int32": "I32", "uint8": "U8", "uint64": "U64"}[tensor.dtype.name]
        entries[name] = placed(len(body), len(body) + tensor.nbytes, dtype, tensor.shape)
        body += tensor.tobytes()
    (length,) = struct.unpack_from("<Q", DATA)
    text = json.loads(DATA[8 : 8 + length])["__metadata__"]
    again = packed.parse(container({"__metadata__": text, **entries}, body))
    assert all(tensor.flags.aligned for tensor in again.tensors.values())
    assert again.to_bytes() == DATA
    x = np.ones((1, 3, 4, 4), np.float32)
    np.testing.assert_array_equal(Engine(again)(x), Engine(model)(x))


def test_a_file_is_mapped_and_may_be_replaced_while_it_is_in_use(tmp_path):
    path = tmp_path / "m.lowbit"
    described_net().save(path)
    model = packed.read(path)
    assert not any(tensor.flags.owndata or tensor.flags.writeable for tensor in model.tensors.values())
    coded_model().save(path)
    assert model.to_bytes() == DATA
    assert packed.read(path).to_bytes() == CODED


@pytest.mark.parametrize("length", [0, 7, 8, 9, len(DATA) - 1])
def test_truncated_files_are_refused_by_their_size(tmp_path, length):
    path = tmp_path / "m.lowbit"
    path.write_bytes(DATA[:length])
    with pytest.raises(LowbitError, match=r"m\.lowbit: .*write the file again"):
        packed.read(path)


def change(index=None, /, tensor=None, **entries):
    """A change to the small model: entries of op ``index`` (...: gone), tensors replaced by what a function gives."""

    def apply(model: PackedModel) -> None:
        if index is not None:
            model.ops[index].update(entries)
            for key, value in entries.items():
                if value is ...:
                    del model.ops[index][key]
        for name, function in (tensor or {}).items():
            value = function(model.tensors.pop(name, None))
            if value is not None:
                model.tensors[name] = value

    return apply


def put(index, value):
    def apply(tensor):
        tensor = tensor.copy()
        tensor[index] = value
        return tensor

    return apply


def without_head(model: PackedModel) -> None:
    model.ops.pop()
    for name in ("weight_bits", "scale", "bias"):
        del model.tensors[f"4.{name}"]


HOSTILE = {
    "unknown op": (change(0, op="conv3d"), "op 0 is the unknown 'conv3d'"),
    "op of a wrong type": (change(0, op=["conv2d"]), "unknown"),
    "private method as op": (change(0, op="check"), "unknown"),
    "no source": (change(0, source=3), "source"),
    "source that a terminal would obey": (change(0, source="\x1b[2J"), r"'\\x1b\[2J'.* in printable characters"),
    "unknown attribute": (change(0, dilate=[1, 1]), "unknown entry 'dilate'"),
    "missing attribute": (change(0, stride=...), "lacks the entry 'stride'"),
    "later value as input": (change(1, inputs=[2]), "inputs"),
    "negative input": (change(1, inputs=[-1]), "inputs"),
    "two inputs": (change(1, inputs=[0, 1]), "1 input"),
    "float where codes are needed": (change(2, inputs=[1]), "needs 1-bit codes"),
    "codes where floats are needed": (change(1, inputs=[0]), "thresholds"),
    "stride 0": (change(0, stride=[0, 1]), "stride"),
    "stride as bool": (change(0, stride=[True, True]), "stride"),
    "negative padding": (change(0, padding=[-1, 0]), "padding"),
    "huge padding": (change(0, padding=[65536, 65536]), "pads its input"),
    "huge kernel": (change(0, kernel=[65536, 65536]), "does not fit"),
    "huge dilation": (change(0, dilation=[65536, 1]), "does not fit"),
    "huge channels": (change(0, channels=1 << 62), "channels"),
    "no channels": (change(0, channels=0), "channels"),
    "uneven groups": (change(0, groups=2), "unevenly"),
    "pool padded too far": (change(3, padding=[2, 2]), "half of the kernel"),
    "bits 0": (change(1, bits=0), "bits"),
    "bits 9": (change(1, bits=9), "bits"),
    "bits do not fit": (change(1, bits=2), "thresholds"),
    "missing tensor": (change(tensor={"0.weight": lambda t: None}), "lacks the tensor 'weight'"),
    "spare tensor": (change(tensor={"1.spare": lambda t: np.zeros(1)}), "spare tensor 'spare'"),
    "tensor of no op": (change(tensor={"9.weight": lambda t: np.zeros(1)}), "belongs to no op"),
    "tensor with a strange number": (change(tensor={"01.falling": lambda t: np.zeros(1)}), "belongs to no op"),
    "wrong dtype": (change(tensor={"0.weight": lambda t: t.astype(np.float64)}), "must be float32"),
    "wrong shape": (change(tensor={"0.weight": lambda t: t[:, :2]}), "must be float32 5x3x3x3"),
    "NaN weight": (change(tensor={"0.weight": put((0, 0, 0, 0), np.nan)}), "not finite"),
    "infinite bias": (change(tensor={"4.bias": put(0, np.inf)}), "not finite"),
    "NaN threshold": (change(tensor={"1.thresholds": put((0, 0), np.nan)}), "NaN"),
    "falling 2": (change(tensor={"1.falling": put(0, 2)}), "only 0 and 1"),
    "tail bit": (change(tensor={"2.weight_bits": put((0, 0, 0, 0), 1 << 5)}), "beyond its 5 channels"),
    "codes as output": (without_head, "must be float32"),
}  # fmt: skip


HOSTILE_CODES = {
    "float input": (change(1, inputs=[0]), "needs codes as input"),
    "width 0": (change(1, weight_width=0), "weight_width"),
    "width 9": (change(1, weight_width=9), "weight_width"),
    "width does not fit": (change(1, weight_width=8), "weight_codes' must be uint64 5x4"),
    "width of a float convolution": (change(6, weight_width=64), "weight_width"),
    "no grid": (change(1, input_offset=...), "lacks the entry 'input_offset'"),
    "no grid of a float convolution": (change(6, weight_offset=...), "lacks the entry 'weight_offset'"),
    "multiplier 0": (change(1, input_multiplier=0), "input_multiplier"),
    "multiplier as float": (change(1, weight_multiplier=1.0), "weight_multiplier"),
    "huge multiplier": (change(1, weight_multiplier=1 << 62), "weight_multiplier"),
    "least offset": (change(1, input_offset=-(1 << 63)), "input_offset"),
    "huge offset": (change(1, weight_offset=1 << 100), "weight_offset"),
    "integers beyond 16 bits": (change(1, input_multiplier=200), "an integer of the input's grid passes 32767"),
    "sums beyond 32 bits": (change(1, input_multiplier=128, weight_multiplier=4000), "a sum can reach"),
    "bits 9 of codes": (change(1, bits=9), "bits"),
    "no bits": (change(1, bits=...), "lacks the entry 'bits'"),
    "huge channels of codes": (change(1, channels=1 << 62), "channels"),
    "huge dilation of codes": (change(1, dilation=[65536, 1]), "does not fit"),
    "tail bit of codes": (change(tensor={"1.weight_codes": put((0, 1), 1 << 17)}), "beyond its 27 codes"),
    "signed codes": (change(tensor={"1.weight_codes": lambda t: t.astype(np.int64)}), "must be uint64"),
    "both weights": (change(tensor={"6.weight_bits": lambda t: np.zeros((2, 1, 1, 1), np.uint64)}), "spare tensor"),
    "thresholds and scale": (change(tensor={"1.scale": lambda t: np.ones(5, np.float32)}), "spare tensor 'scale'"),
}  # fmt: skip
HOSTILE_TABLES = {
    "table of floats": (change(1, inputs=[0]), "needs codes as input"),
    "no table": (change(tensor={"1.levels": lambda t: None}), "lacks the tensor 'levels'"),
    "table of another width": (change(tensor={"1.levels": lambda t: t[:2]}), "levels' must be float32 4, but"),
    "NaN in the table": (change(tensor={"1.levels": put(1, np.nan)}), "'levels' holds a number that is not finite"),
    "table for floats": (change(1, op="conv2d", inputs=[0]), "spare tensor 'levels'"),
    "table with thresholds": (change(1, bits=1), "unknown entry 'bits'"),
    "grid without codes": (change(1, weight_width=1), "unknown entry 'weight_width'"),
    "no grid of a table's weights": (change(9, weight_width=...), "lacks the entry 'weight_width'"),
    "mean of codes": (change(4, inputs=[1]), "needs float32 as input"),
    "mean in uneven groups": (change(4, groups=4), "4 groups divide 6 channels unevenly"),
    "mean in no groups": (change(4, groups=0), "groups"),
    "mean in more groups than channels": (change(4, groups=12), "12 groups divide 6 channels unevenly"),
    "huge window of a mean": (change(4, kernel=[65536, 65536]), "does not fit"),
    "huge padding of a mean": (change(4, padding=[65536, 65536]), "pads its input"),
    "mean with channels": (change(4, channels=6), "unknown entry 'channels'"),
    "factors of another size": (change(4, stride=[2, 1]), "whose shapes do not fit"),
    "factors that divide unevenly": (change(4, groups=3), "8 by float32 6x6x3, whose shapes do not fit"),
    "more factors than numbers": (change(5, inputs=[5, 4]), "whose shapes do not fit"),
    "one number to multiply": (change(5, inputs=[4]), "must list 2 inputs"),
    "codes to multiply": (change(5, inputs=[3, 3]), "needs float32"),
    "bias of another size": (change(tensor={"5.bias": lambda t: t[:2]}), "bias' must be float32 8"),
    "infinite bias of a product": (change(tensor={"5.bias": put(0, -np.inf)}), "not finite"),
}  # fmt: skip
CASES = {name: (described_net, *case) for name, case in HOSTILE.items()}
CASES |= {name: (table_model, *case) for name, case in HOSTILE_TABLES.items()}
CASES |= {name: (coded_model, *case) for name, case in HOSTILE_CODES.items()}


@pytest.mark.parametrize("name", CASES)
def test_hostile_graphs_are_refused(name):
    make, apply, message = CASES[name]
    model = make()
    apply(model)
    with pytest.raises(LowbitError, match=message):
        packed.validate(model)


@pytest.mark.parametrize("name", CASES)
def test_native_engine_is_safe_without_the_checks_of_python(name):
    """Whatever the native engine accepts unchecked must run without touching memory that is not its own."""
    make, apply, _ = CASES[name]
    model = make()
    apply(model)
    tensors = [model.op_tensors(index) for index in range(len(model.ops))]
    try:
        engine = _engine.Engine(model.input_shape, model.ops, tensors, 1)
    except (ValueError, TypeError, RuntimeError):
        return
    engine.run(np.ones((2, *model.input_shape), np.float32))


def test_thresholds_out_of_order_are_refused():
    net = Builder((2, 3, 3))
    table, falling = np.array([[1, 2, 3], [3, 2, 1]], np.float32), np.array([0, 1], np.uint8)
    net.op("threshold", tensors={"thresholds": table, "falling": falling}, bits=2)
    net.op("relu", inputs=[0])
    packed.validate(net.model)
    net.model.tensors["0.falling"] = falling[::-1].copy()
    with pytest.raises(LowbitError, match="must not decrease"):
        packed.validate(net.model)


def test_a_pool_of_floats_may_say_which_channels_fall():
    net = Builder((2, 4, 4))
    net.op("max_pool", tensors={"falling": np.array([0, 1], np.uint8)}, **window((2, 2), (2, 2)))
    x = np.arange(32, dtype=np.float32).reshape(1, 2, 4, 4)
    np.testing.assert_array_equal(Engine(net.model)(x), [[[[5, 7], [13, 15]], [[16, 18], [24, 26]]]])
    for falling, message in (([0, 2], "only 0 and 1"), ([0, 1, 0], "uint8 2, but is uint8 3")):
        net.model.tensors["0.falling"] = np.array(falling, np.uint8)
        with pytest.raises(LowbitError, match=message):
            packed.validate(net.model)


def test_names_are_no_markup_to_what_commands_print(capsys):
    name = "[/b] [red]layer[/red]"
    print_rows("a [/b] file", [{"source": name}], False)
    notes.print(f"{name} written")
    layer = Layer(name, "conv2d", "tile", 1.0, 1, 1)
    result = BenchResult("a [/b] file", "scalar", 1, 1, (Row(name, 1.0, 1.0, 1.0),), (layer,))
    Console(width=300).print(result.render())
    printed = capsys.readouterr()
    assert printed.out.count(name) == 3
    assert printed.out.count("a [/b] file") == 2
    assert f"{name} written" in printed.err


def test_what_is_the_same_in_all_rows_has_no_column_of_a_brief_table(capsys):
    rows = [{"row": name, "seed": 0, "taught by": "", "state": "done"} for name in ("a", "b")]
    print_rows("Rows", rows, False, brief=True)
    same, *table = capsys.readouterr().out.splitlines()
    assert same == "All rows: seed 0, state done."
    assert not {"seed", "state", "taught"} & set(" ".join(table).split())
    for options, printed in (({"brief": True}, rows[:1]), ({}, rows)):
        print_rows("Rows", printed, False, **options)
        assert {"seed", "state", "taught"} <= set(capsys.readouterr().out.split())


@pytest.mark.parametrize("bits", [1, 8])
def test_channels_may_share_the_thresholds_of_floats(bits):
    rng = np.random.default_rng(0)
    row = np.sort(rng.normal(size=(1, 2**bits - 1))).astype(np.float32)
    images = rng.normal(size=(2, 3, 4, 21)).astype(np.float32)
    net = Builder((21, 3, 4))
    net.op("threshold", tensors={"thresholds": row, "falling": np.zeros(21, np.uint8)}, bits=bits)
    net.op("relu", inputs=[0])
    found = Engine(net.model).run_op(0, [images])
    np.testing.assert_array_equal(found, (images[..., None] >= row[0]).sum(axis=-1))
    for rows in (2, 22):
        net.model.tensors["0.thresholds"] = np.repeat(row, rows, axis=0)
        with pytest.raises(LowbitError, match="'thresholds' must be float32 21x"):
            packed.validate(net.model)
    tensors = [net.model.op_tensors(index) for index in range(2)]
    with pytest.raises(ValueError, match="'thresholds' has the wrong type or shape"):
        _engine.Engine(net.model.input_shape, net.model.ops, tensors, 1)


def test_small_file_cannot_ask_for_much_memory():
    net = Builder((1, 4096, 4096))
    for _ in range(20):
        net.op("relu")
    with pytest.raises(LowbitError, match="elements"):
        packed.validate(net.model)
    net = Builder((1, 1024, 1024))
    weight = np.zeros((64, 1, 1, 1), np.float32)
    net.op("conv2d", tensors={"weight": weight}, groups=1, channels=64, **window((1, 1), dilation=(1, 1)))
    with pytest.raises(LowbitError, match="elements"):
        packed.validate(net.model)


def test_small_file_of_many_groups_cannot_ask_for_much_memory():
    """Nothing is laid out for it. Python and the native engine count alike, to the byte."""
    for groups, wrong in ((4096, False), (4097, True)):
        net = Builder((groups, 1, 1))
        codes = np.zeros((groups, 1), np.float32)
        net.op("threshold", tensors={"thresholds": codes, "falling": np.zeros(groups, np.uint8)}, bits=1)
        shape = window((1, 2046), padding=(0, 1023), dilation=(1, 1))
        tensors = {"weight_bits": np.zeros((groups, 1, 2046, 1), np.uint64), "scale": np.ones(groups, np.float32)}
        net.op("binary_conv2d", inputs=[1], tensors=tensors, groups=groups, channels=groups, **shape)
        given = [net.model.op_tensors(index) for index in range(2)]
        if not wrong:
            packed.validate(net.model)
            continue
        with pytest.raises(LowbitError, match=r"weights take 1074003968 bytes, more than 1073741824"):
            packed.validate(net.model)
        with pytest.raises(ValueError, match="the weights take too much memory"):
            _engine.Engine(net.model.input_shape, net.model.ops, given, 1)


def test_small_file_cannot_ask_for_much_time():
    """Nothing in the file grows with a pool's window. Python and the native engine count alike, to the element."""
    for width, wrong in ((1024, False), (1025, True)):
        net = Builder((1, 2047, width))
        net.op("max_pool", **window((1024, 1)))
        tensors = [net.model.op_tensors(0)]
        if not wrong:
            packed.validate(net.model)
            _engine.Engine(net.model.input_shape, net.model.ops, tensors, 1)
            continue
        with pytest.raises(LowbitError, match="more than 274877906944"):
            packed.validate(net.model)
        with pytest.raises(ValueError, match="too many products"):
            _engine.Engine(net.model.input_shape, net.model.ops, tensors, 1)


def test_file_errors_name_the_file_and_the_mend(tmp_path):
    with pytest.raises(LowbitError, match=r"none\.lowbit is no file; `lowbit export"):
        packed.read(tmp_path / "none.lowbit")
    with pytest.raises(LowbitError, match="is no file"):
        packed.read(tmp_path)
    (tmp_path / "text.lowbit").write_text("hello")
    with pytest.raises(LowbitError, match=r"text\.lowbit: not a packed file.*write the file again"):
        packed.read(tmp_path / "text.lowbit")
    (tmp_path / "file").write_text("")
    with pytest.raises(LowbitError, match="cannot write"):
        described_net().save(tmp_path / "file" / "m.lowbit")
