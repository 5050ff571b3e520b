"""Export of what is no integer grid: tables of levels, and XNOR-Net's K map."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from checks import checked, ops
from interpreter import Interpreter
from nets import CHAINS, Plain, Residual, Shared, awkward_, chain, coded_chain
from test_integer_grids import IMAGES, Affine, Coded, PerChannel, Sign, Ternary, quantize
from torch import Tensor, nn

import lowbit
from lowbit import methods, models
from lowbit.errors import UsageError
from lowbit.exporter.lower import FEW_BITS
from lowbit.exporter.verify import VerifyReport, verify
from lowbit.layers import quantized_layers
from lowbit.methods.hwgq import HalfWave
from lowbit.packed import PackedModel
from lowbit.quantizers.base import Grid


class Table(Coded):
    """The nearest of 2^k levels in unequal steps, some of them below 0."""

    def __init__(self, bits: int) -> None:
        super().__init__(bits)
        steps = torch.rand(1 << bits, generator=torch.Generator().manual_seed(bits)) + 0.1
        self.levels = (steps.cumsum(0) - steps.sum() / 3) * (3 / steps.sum())

    def encode(self, x: Tensor) -> tuple[Tensor, Grid]:
        bounds = (self.levels[1:] + self.levels[:-1]) / 2
        codes = torch.bucketize(x.detach(), bounds.to(x.dtype)).to(torch.uint8)
        return codes, Grid(self.bits, 1, 0, torch.ones(()), self.levels)


def lloyd_max(bits: int) -> Callable[[], HalfWave]:
    return lambda: HalfWave(bits, "lloyd_max")


# name: activations, weights, tensor that holds the weights
PAIRS: dict[str, tuple[Callable[[], Any], Callable[[], Any], str]] = {
    "1-bit table x binary": (lambda: Table(1), Sign, "weight_bits"),
    "1-bit half-wave table x binary": (lloyd_max(1), Sign, "weight_bits"),
    "2-bit half-wave table x binary": (lloyd_max(2), Sign, "weight_bits"),
    "3-bit table x ternary": (lambda: Table(3), Ternary, "weight_codes"),
    "8-bit table x 8 bits per channel": (lambda: Table(8), lambda: PerChannel(8), "weight_codes"),
    "2-bit table x 4-bit table": (lambda: Table(2), lambda: Table(4), "weight"),
    "5-bit affine x 2-bit table": (lambda: Affine(5, 0.21, 9), lambda: Table(2), "weight"),
    "binary x 2-bit table": (Sign, lambda: Table(2), "weight"),
    "4-bit table x float": (lambda: Table(4), lambda: None, "weight"),
    "binary x float": (Sign, lambda: None, "weight"),
}


def net(pair: str, *between: nn.Module, bias: bool = True, k_map: bool = False) -> nn.Module:
    """A float stem, two layers of the pair's grids with ``between`` between them, and a float head."""
    activation, weight, _ = PAIRS[pair]
    model = coded_chain(activation, weight, *between, bias=bias)
    for layer in quantized_layers(model):
        layer.k_map = k_map
    return model


def mapped(model: nn.Module) -> nn.Module:
    """``model`` made binary with K maps, and awkward."""
    lowbit.quantize_(model, methods.registry["xnor_net"](k_map=True))
    return awkward_(model)


def mapped_chain(*between: nn.Module, bias: bool = True) -> nn.Module:
    model = chain(*between, bias=bias)
    for index in (2, 3 + len(between)):
        model[index].k_map = True
    return model


def kinds(report: VerifyReport) -> list[tuple[str, bool]]:
    return [(check.what, check.exact) for check in report.layers]


@pytest.mark.parametrize("between", CHAINS.values(), ids=CHAINS)
@pytest.mark.parametrize("pair", PAIRS)
def test_chains_between_two_layers_of_tables(pair: str, between: list[nn.Module]) -> None:
    exported, report = checked(net(pair, *between, bias=len(between) != 1), IMAGES)
    pools = sum(isinstance(module, nn.MaxPool2d) for module in between)
    averages = [module for module in between if isinstance(module, nn.AvgPool2d)]
    codes = [*["avg_pool" for _ in averages], "threshold", *["max_pool"] * pools, "table_conv2d"]
    thresholds = [tensor for key, tensor in exported.packed.tensors.items() if key.endswith("thresholds")]
    if PAIRS[pair][0]().bits <= FEW_BITS:
        assert ops(exported)[: 4 + pools + len(averages) + 1] == ["conv2d", "threshold", "table_conv2d", *codes]
    else:  # what lies between is made in float, and all channels share their many thresholds
        assert [len(rows) for rows in thresholds] == [1, 1]
    assert kinds(report) == [("codes in", False), ("floats out", False)] * 2
    assert f"{ops(exported).index('table_conv2d')}.{PAIRS[pair][2]}" in exported.packed.tensors


@pytest.mark.parametrize("pair", PAIRS)
def test_all_levels_of_a_table_are_used(pair: str) -> None:
    packed = lowbit.export(net(pair, nn.BatchNorm2d(7)), IMAGES).packed
    values, run = [IMAGES.permute(0, 2, 3, 1).numpy()], Interpreter(packed)
    for index, op in enumerate(packed.ops):
        values.append(run.run_op(index, [values[number] for number in op["inputs"]]))
    for value, made in zip(packed.values()[1:], values[1:], strict=True):
        if value.kind == "codes":
            assert len(np.unique(made)) > 2 ** (value.bits - 1)


@pytest.mark.parametrize("between", CHAINS.values(), ids=CHAINS)
@pytest.mark.parametrize("bias", [True, False])
def test_chains_between_two_layers_with_a_k_map(bias: bool, between: list[nn.Module]) -> None:
    """The codes come from float numbers, for K makes the sums' own order another one at each place."""
    exported, report = checked(mapped_chain(*between, bias=bias), IMAGES)
    names = ops(exported)
    assert names.count("binary_conv2d") == names.count("abs_mean") == names.count("multiply") == 2
    assert names.count("threshold") == 2
    assert names[names.index("binary_conv2d") + 1 :][0] in ("abs_mean", "affine")
    assert kinds(report) == [("codes in", False), ("sums out", True), ("floats out", False)] * 2
    assert [f"{names.index('multiply')}.bias" in exported.packed.tensors] == [bias]


@pytest.mark.parametrize("pair", PAIRS)
def test_a_k_map_on_a_table(pair: str) -> None:
    exported, report = checked(net(pair, nn.BatchNorm2d(7), k_map=True), IMAGES)
    assert ops(exported).count("table_conv2d") == ops(exported).count("multiply") == 2
    assert {what for what, _ in kinds(report)} == {"codes in", "floats out"}


GEOMETRIES = [
    {"kernel_size": 3, "stride": 2, "padding": 1},
    {"kernel_size": (3, 1), "stride": (1, 2), "padding": (2, 0)},
    {"kernel_size": 3, "padding": 2, "dilation": 2},
    {"kernel_size": 3, "padding": "same", "dilation": 3},
    {"kernel_size": (2, 3), "padding": (3, 5)},
    {"kernel_size": 3, "groups": 3, "padding": 3},
    {"kernel_size": 1, "groups": 9},
    {"kernel_size": (13, 14)},
]


@pytest.mark.parametrize("what", ["k map", "table"])
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("channels", [9, 72])
def test_strides_padding_dilation_and_groups(geometry: dict, channels: int, what: str) -> None:
    layer = nn.Conv2d(channels, channels, **geometry)
    model = nn.Sequential(nn.Conv2d(3, channels, 3), layer, nn.BatchNorm2d(channels), nn.Conv2d(channels, 2, 1))
    images = IMAGES[:, :, :15]
    if what == "k map":
        exported, _ = checked(mapped(model), images)
        (mean,) = (op for op in exported.packed.ops if op["op"] == "abs_mean")
        assert mean["groups"] == layer.groups
    else:
        model[1] = quantize(layer, HalfWave(2, "lloyd_max"), Sign())
        checked(awkward_(model), images)


@pytest.mark.parametrize("what", ["k map", "table"])
def test_a_first_layer_that_quantizes_the_image(what: str) -> None:
    layers = [nn.Conv2d(3, 9, 3), nn.BatchNorm2d(9), nn.Conv2d(9, 2, 1)]
    for index in (0, 2):
        layers[index] = quantize(layers[index], Table(3) if what == "table" else Sign(), Sign())
        layers[index].k_map = what == "k map"
    exported, report = checked(awkward_(nn.Sequential(*layers)), IMAGES)
    assert kinds(report)[0] == ("codes in", True)
    first = ["threshold", "table_conv2d"] if what == "table" else ["threshold", "binary_conv2d", "abs_mean", "multiply"]
    assert ops(exported)[: len(first)] == first


def test_dense_layers_on_features_and_on_a_flattened_map() -> None:
    layers = [nn.Linear(20, 33), nn.BatchNorm1d(33), nn.Linear(33, 70), nn.BatchNorm1d(70), nn.Linear(70, 3)]
    exported, _ = checked(mapped(nn.Sequential(*layers)), torch.randn(9, 20))
    assert ops(exported)[-2:] == ["affine", "conv2d"]
    exported, _ = checked(mapped(Plain()), IMAGES)
    hidden = [op for op in exported.packed.ops if op["source"] == "hidden"]
    assert [op["op"] for op in hidden] == ["threshold", "binary_conv2d", "abs_mean", "multiply"]
    assert hidden[2]["kernel"] == [4, 4]
    model = Plain()
    lowbit.quantize_(model, methods.registry["hwgq"](levels="lloyd_max"))
    checked(awkward_(model), IMAGES)


@pytest.mark.parametrize("make", [lambda: mapped, lambda: tabled], ids=["k map", "table"])
def test_shortcuts_and_shared_results(make: Callable) -> None:
    body = [Residual(6, 6, 1), Residual(6, 10, 2), Residual(10, 10, 1)]
    checked(
        make()(nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), *body, nn.AdaptiveAvgPool2d(2), nn.Conv2d(10, 4, 2))),
        IMAGES,
    )
    for alike in (True, False):
        checked(make()(Shared(alike)), IMAGES)


def tabled(model: nn.Module) -> nn.Module:
    lowbit.quantize_(model, methods.registry["hwgq"](levels="lloyd_max"))
    return awkward_(model)


@pytest.mark.parametrize(
    "method",
    [methods.registry["xnor_net"](k_map=True), methods.registry["hwgq"](levels="lloyd_max", bits_a=3)],
    ids=["k map", "table"],
)
@pytest.mark.parametrize("name", list(models.registry))
def test_every_model(name: str, method: methods.Method) -> None:
    options = {"width": 0.07} if "width" in models.registry.options(name) else {}
    model = awkward_(models.create(name, method=method, **options))
    images = torch.randn(3, 3, 32, 32)
    exported, report = checked(model, images)
    quantized_layers = {n for n, m in model.named_modules() if getattr(m, "activation_quantizer", None) is not None}
    assert {check.layer for check in report.layers} == quantized_layers
    alone, together = lowbit.Engine(exported.packed), lowbit.Engine(exported.packed, threads=2)
    np.testing.assert_array_equal(
        np.concatenate([alone(image[None]) for image in images.numpy()]), together(images.numpy())
    )


def test_a_layer_that_reads_integers_keeps_its_thresholds_beside_a_table() -> None:
    """Only the layer with the table computes in float32; the binary layer in front gives it codes from its sums."""
    model = chain(nn.BatchNorm2d(7), nn.MaxPool2d(2))
    model[5].activation_quantizer = HalfWave(2, "lloyd_max")
    exported, report = checked(model, IMAGES)
    assert ops(exported)[:5] == ["conv2d", "threshold", "binary_conv2d", "max_pool", "table_conv2d"]
    assert [str(value) for value in exported.packed.values()[3:5]] == ["2-bit codes 14x14x7", "2-bit codes 7x7x7"]
    assert kinds(report) == [("codes in", False), ("codes in", True), ("floats out", False)]


def test_a_layer_in_front_of_a_k_map_gives_floats_and_exact_codes() -> None:
    model = chain(nn.BatchNorm2d(7), nn.MaxPool2d(2))
    model[5].k_map = True
    exported, report = checked(model, IMAGES)
    assert ops(exported)[2:8] == ["binary_conv2d", "max_pool", "threshold", "binary_conv2d", "affine", "abs_mean"]
    assert kinds(report)[1:4] == [("sums out", True), ("codes in", True), ("sums out", True)]


def test_the_report_says_what_became_of_each_part() -> None:
    parts = {part.name: part for part in lowbit.export(mapped_chain(nn.BatchNorm2d(7)), IMAGES).parts}
    assert parts["2"].note == (
        "1-bit weights and activations; sums become float32, times the K map, read by the K map of '4'"
    )
    assert parts["3"].note == "inside the thresholds of '4'; float32 affine"
    parts = {part.name: part for part in lowbit.export(net("2-bit half-wave table x binary"), IMAGES).parts}
    assert parts["2"].packed
    assert (
        parts["2"].note == "1-bit weights, 2-bit activations; sums of levels are float32, read by the quantizer of '3'"
    )
    parts = {part.name: part for part in lowbit.export(net("2-bit table x 4-bit table"), IMAGES).parts}
    assert parts["2"].note.startswith("4-bit weights on a table of levels, stored as float32, 2-bit activations")


def test_weights_alone_on_a_table_are_stored_as_float32() -> None:
    model = awkward_(nn.Sequential(nn.Conv2d(3, 7, 3), nn.ReLU(), nn.Conv2d(7, 4, 3)))
    for index in (0, 2):
        model[index] = quantize(model[index], None, Table(2))
    exported, _ = checked(model, IMAGES)
    assert not exported.parts[0].packed
    assert "stored as float32" in exported.parts[0].note
    assert len(np.unique(exported.packed.tensors["0.weight"])) == 4


class OddTable(Coded):
    def __init__(self, levels: Callable[[Tensor], Tensor]) -> None:
        super().__init__(1)
        self.make = levels

    def encode(self, x: Tensor) -> tuple[Tensor, Grid]:
        return (x > 0).to(torch.uint8), Grid(1, 1, 0, torch.ones(()), self.make(x))


REFUSED = {
    "a long table": (lambda x: torch.zeros(3), "'2' has activations on a table of (3,) levels; only a table of 2"),
    "not finite": (lambda x: torch.tensor([0.0, torch.inf]), "only a table of 2 finite levels"),
    "a table of the data": (lambda x: torch.stack([x.min(), x.max()]), "'2' scales its activations by channel or by"),
}


@pytest.mark.parametrize(("levels", "message"), REFUSED.values(), ids=REFUSED)
def test_tables_that_cannot_be_lowered_are_refused_by_name(levels: Callable[[Tensor], Tensor], message: str) -> None:
    model = chain()
    model[2].activation_quantizer = OddTable(levels)
    with pytest.raises(UsageError) as error:
        lowbit.export(model, IMAGES)
    assert message in str(error.value)


def test_a_k_map_of_an_activation_with_a_slope() -> None:
    exported, _ = checked(mapped_chain(nn.LeakyReLU(0.1)), IMAGES)
    assert "prelu" in ops(exported)


def index_of(packed: PackedModel, kind: str) -> int:
    return next(i for i, op in enumerate(packed.ops) if op["op"] == kind)


def change_window(packed: PackedModel) -> None:
    """Of the same size, but other pixels."""
    packed.ops[index_of(packed, "abs_mean")] |= {"kernel": [1, 1], "padding": [0, 0]}


def change_map(packed: PackedModel) -> None:
    """A K map of another layer's codes: of their float numbers, before batch norm."""
    packed.ops[index_of(packed, "abs_mean")]["inputs"] = [1]
    packed.ops[index_of(packed, "abs_mean")] |= {"kernel": [1, 1], "padding": [0, 0]}


def change_bias(packed: PackedModel) -> None:
    packed.tensors[f"{index_of(packed, 'multiply')}.bias"] *= np.float32(1.001)


def change_scale(packed: PackedModel) -> None:
    packed.tensors[f"{index_of(packed, 'binary_conv2d')}.scale"] *= np.float32(1.0000002)


@pytest.mark.parametrize("tamper", [change_window, change_map, change_bias, change_scale])
def test_verify_fails_where_a_k_map_is_tampered_with(tamper: Callable[[PackedModel], None]) -> None:
    model = mapped_chain(nn.BatchNorm2d(7))
    packed = copy.deepcopy(lowbit.export(model, IMAGES).packed)
    assert verify(model, packed, IMAGES).passed
    tamper(packed)
    report = verify(model, packed, IMAGES)
    assert not report.passed
    what = "sums out" if tamper is change_scale else "floats out"
    assert ("2", what) in [(check.layer, check.what) for check in report.layers if not check.passed]


@pytest.mark.parametrize("name", ["levels", "weight_scale", "weight_bits", "bias"])
def test_verify_fails_where_a_table_is_tampered_with(name: str) -> None:
    model = net("2-bit half-wave table x binary", nn.BatchNorm2d(7))
    packed = copy.deepcopy(lowbit.export(model, IMAGES).packed)
    tensor = packed.tensors[f"2.{name}"] = packed.tensors[f"2.{name}"].copy()
    if name == "weight_bits":
        tensor[0, 0, 0, 0] ^= np.uint64(0b1110)
    else:
        tensor *= np.float32(1.0001)
    report = verify(model, packed, IMAGES)
    assert ("2", "floats out") in [(check.layer, check.what) for check in report.layers if not check.passed]


def test_the_terminal_says_which_results_are_only_close() -> None:
    from rich.console import Console

    model = mapped_chain(nn.BatchNorm2d(7))
    console = Console(width=140, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(verify(model, lowbit.export(model, IMAGES).packed, IMAGES).render())
    text = console.export_text()
    assert "floats out" in text
    assert "close" in text
