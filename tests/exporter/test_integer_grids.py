"""Export of every kind of integer grid, by small quantizers that no method has."""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
from checks import checked, ops
from interpreter import Interpreter
from nets import CHAINS, awkward_, coded_chain
from torch import Tensor, nn

import lowbit
from lowbit.errors import UsageError
from lowbit.exporter.verify import verify
from lowbit.layers import QuantizedLayer
from lowbit.layers.quantized import quantized_twin
from lowbit.packed import PackedModel
from lowbit.quantizers.base import Grid, Quantizer

IMAGES = torch.randn(6, 3, 16, 16, generator=torch.Generator().manual_seed(1))


class Coded(Quantizer):
    """What `encode` says, without a gradient."""

    signed = True

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.bits = bits

    @property
    def top(self) -> int:
        return (1 << self.bits) - 1

    def forward(self, x: Tensor) -> Tensor:
        return self.decode(*self.encode(x)).to(x.dtype)


class Steps(Coded):
    """k bits on [0, 1]: multiplier 1, offset 0."""

    def encode(self, x: Tensor) -> tuple[Tensor, Grid]:
        codes = (x.clamp(0, 1) * self.top).round().to(torch.uint8)
        return codes, Grid(self.bits, 1, 0, torch.tensor(1 / self.top))


class OddLevels(Coded):
    """k bits on [-1, 1]: multiplier 2, offset -(2^k - 1)."""

    def encode(self, x: Tensor) -> tuple[Tensor, Grid]:
        t = x.detach().tanh()
        codes = ((t / (2 * t.abs().max()) + 0.5) * self.top).round().to(torch.uint8)
        return codes, Grid(self.bits, 2, -self.top, torch.tensor(1 / self.top))


class Affine(Coded):
    """multiplier 1, offset -zero_point, one scale."""

    def __init__(self, bits: int, scale: float, zero_point: int) -> None:
        super().__init__(bits)
        self.scale, self.zero_point = scale, zero_point

    def encode(self, x: Tensor) -> tuple[Tensor, Grid]:
        codes = ((x / self.scale).round() + self.zero_point).clamp(0, self.top).to(torch.uint8)
        return codes, Grid(self.bits, 1, -self.zero_point, torch.tensor(self.scale))


class PerChannel(Coded):
    """multiplier 1, offset -2^(k-1), a scale to each output channel."""

    def encode(self, x: Tensor) -> tuple[Tensor, Grid]:
        w, half = x.detach(), 1 << (self.bits - 1)
        scale = w.abs().amax(dim=tuple(range(1, w.dim())), keepdim=True) / max(half - 1, 1)
        return ((w / scale).round() + half).clamp(0, self.top).to(torch.uint8), Grid(self.bits, 1, -half, scale)


class Ternary(Coded):
    """-1, 0 and 1, a scale to each output channel; the fourth code is not used."""

    def __init__(self) -> None:
        super().__init__(2)

    def encode(self, x: Tensor) -> tuple[Tensor, Grid]:
        w = x.detach()
        dims = tuple(range(1, w.dim()))
        far = w.abs() > 0.7 * w.abs().mean(dim=dims, keepdim=True)
        scale = (w.abs() * far).sum(dim=dims, keepdim=True) / far.sum(dim=dims, keepdim=True)
        return (w.sign() * far + 1).to(torch.uint8), Grid(2, 1, -1, scale)


class Sign(Coded):
    def __init__(self) -> None:
        super().__init__(1)

    def encode(self, x: Tensor) -> tuple[Tensor, Grid]:
        return (x >= 0).to(torch.uint8), Grid(1, 2, -1, torch.tensor(0.3))


# name: activations, weights, op
PAIRS: dict[str, tuple[Callable[[], Coded], Callable[[], Coded], str]] = {
    "binary x binary": (Sign, Sign, "binary_conv2d"),
    "2-bit steps x binary": (lambda: Steps(2), Sign, "quant_conv2d"),
    "1-bit steps x binary": (lambda: Steps(1), Sign, "quant_conv2d"),
    "binary x ternary": (Sign, Ternary, "quant_conv2d"),
    "3-bit steps x 2-bit odd levels": (lambda: Steps(3), lambda: OddLevels(2), "quant_conv2d"),
    "8-bit steps x 8-bit odd levels": (lambda: Steps(8), lambda: OddLevels(8), "quant_conv2d"),
    "8-bit affine x 8 bits per channel": (lambda: Affine(8, 0.05, 100), lambda: PerChannel(8), "quant_conv2d"),
    "5-bit affine x 3 bits per channel": (lambda: Affine(5, 0.21, 9), lambda: PerChannel(3), "quant_conv2d"),
    "7-bit affine x ternary": (lambda: Affine(7, 0.03, 0), Ternary, "quant_conv2d"),
}


def quantize(layer: nn.Module, activation: Quantizer | None, weight: Quantizer | None) -> QuantizedLayer:
    return quantized_twin(layer, weight, activation).eval()


def net(pair: str, *between: nn.Module, bias: bool = True) -> nn.Module:
    """A float stem, two layers of the pair's grids with ``between`` between them, and a float head."""
    activation, weight, _ = PAIRS[pair]
    return coded_chain(activation, weight, *between, bias=bias)


@pytest.mark.parametrize("between", CHAINS.values(), ids=CHAINS)
@pytest.mark.parametrize("pair", PAIRS)
def test_chains_between_two_layers_of_codes(pair: str, between: list[nn.Module]) -> None:
    exported, report = checked(net(pair, *between, bias=len(between) != 1), IMAGES)
    assert ops(exported).count(PAIRS[pair][2]) == 2
    averages = any(isinstance(module, nn.AvgPool2d) for module in between)
    assert [check.exact for check in report.layers] == ([False, True, False, True] if averages else [False, True, True])


@pytest.mark.parametrize("pair", PAIRS)
def test_codes_of_a_net_are_not_all_alike(pair: str) -> None:
    """The thresholds of every level are tried, or nearly."""
    model = net(pair, nn.BatchNorm2d(7))
    packed = lowbit.export(model, IMAGES).packed
    values, run = [IMAGES.permute(0, 2, 3, 1).numpy()], Interpreter(packed)
    for index, op in enumerate(packed.ops):
        values.append(run.run_op(index, [values[number] for number in op["inputs"]]))
    for value, made in zip(packed.values()[1:], values[1:], strict=True):
        if value.kind == "codes":
            assert len(np.unique(made)) > 2 ** (value.bits - 1)


GEOMETRIES = [
    {"kernel_size": (3, 1), "stride": (1, 2), "padding": (2, 0)},
    {"kernel_size": 3, "padding": 2, "dilation": 2},
    {"kernel_size": 3, "groups": 3, "padding": 3},
]


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("pair", PAIRS)
def test_a_first_layer_that_quantizes_the_image_needs_no_float_op(pair: str, geometry: dict) -> None:
    activation, weight, op = PAIRS[pair]
    layers = [nn.Conv2d(3, 9, **geometry), nn.BatchNorm2d(9), nn.Conv2d(9, 2, **geometry | {"groups": 1})]
    model = awkward_(
        nn.Sequential(*(m if i == 1 else quantize(m, activation(), weight()) for i, m in enumerate(layers)))
    )
    exported, report = checked(model, IMAGES)
    assert ops(exported) == ["threshold", op, op]
    assert all(check.exact for check in report.layers)


def test_dense_layers_whose_sums_pass_the_integers_of_float32() -> None:
    layers = [nn.Linear(20, 1000), nn.ReLU(), nn.Linear(1000, 9), nn.BatchNorm1d(9), nn.Linear(9, 3)]
    model = awkward_(nn.Sequential(*layers))
    for index in (2, 4):
        model[index] = quantize(model[index], Steps(8), OddLevels(8))
    model[2].weight.data.abs_()
    model[3].running_mean.fill_(300)
    model[3].running_var.fill_(1e4)
    features = torch.randn(40, 20)
    exported, _ = checked(model, features)
    assert ops(exported) == ["conv2d", "relu", "threshold", "quant_conv2d", "quant_conv2d"]
    sums = model[2](model[1](model[0](features))).sub(model[2].bias) * 255 * 255
    assert sums.max() > 1 << 24


@pytest.mark.parametrize("weight", [Ternary(), OddLevels(4), PerChannel(8)], ids=lambda q: type(q).__name__)
def test_weights_alone_are_stored_as_codes(weight: Coded) -> None:
    layers = [nn.Conv2d(3, 7, 3, groups=1), nn.ReLU(), nn.Conv2d(7, 4, 3)]
    model = awkward_(nn.Sequential(*layers))
    for index in (0, 2):
        model[index] = quantize(model[index], None, weight)
    exported, report = checked(model, IMAGES)
    assert ops(exported) == ["conv2d", "relu", "conv2d"]
    assert exported.packed.ops[0]["weight_width"] == weight.bits
    assert exported.packed.tensors["0.weight_codes"].shape == (7, -(-27 * weight.bits // 64))
    assert exported.parts[0].note.startswith(f"{weight.bits}-bit weights; activations stay float32")
    assert report.agreement == len(IMAGES)


def test_readers_with_other_grids_get_codes_of_their_own() -> None:
    class Fork(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = quantize(nn.Conv2d(3, 6, 3), Affine(8, 0.03, 128), PerChannel(8))
            self.left = quantize(nn.Conv2d(6, 4, 1), Steps(2), Sign())
            self.right = quantize(nn.Conv2d(6, 4, 1), Steps(3), Sign())

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            return self.left(x) + self.right(x)

    exported, _ = checked(awkward_(Fork()), IMAGES)
    assert ops(exported) == [
        "threshold",
        "quant_conv2d",
        "threshold",
        "quant_conv2d",
        "threshold",
        "quant_conv2d",
        "add",
    ]


def test_the_report_says_the_bits() -> None:
    parts = {part.name: part.note for part in lowbit.export(net("2-bit steps x binary"), IMAGES).parts}
    assert parts["2"] == "1-bit weights, 2-bit activations; sums become codes"


def flip_weight(packed: PackedModel, index: int) -> None:
    packed.tensors[f"{index}.weight_codes"][:, 0] ^= np.uint64(0o44444)


def shift_thresholds(packed: PackedModel, index: int) -> None:
    thresholds = packed.tensors[f"{index}.thresholds"]
    thresholds[np.abs(thresholds.astype(np.int64)) < 1 << 30] += 40


def shift_grid(packed: PackedModel, index: int) -> None:
    packed.ops[index]["input_offset"] += 1


@pytest.mark.parametrize("tamper", [flip_weight, shift_thresholds, shift_grid])
def test_verify_fails_on_a_tampered_file(tamper: Callable[[PackedModel, int], None]) -> None:
    model = net("5-bit affine x 3 bits per channel", nn.BatchNorm2d(7))
    packed = copy.deepcopy(lowbit.export(model, IMAGES).packed)
    assert verify(model, packed, IMAGES).passed
    tamper(packed, next(i for i, op in enumerate(packed.ops) if op["op"] == "quant_conv2d"))
    report = verify(model, packed, IMAGES)
    assert not report.passed
    assert [(check.layer, check.what) for check in report.layers if not check.passed] == [("4", "codes in")]


class OddGrid(Coded):
    """Some grid, whatever the data."""

    def __init__(self, grid: Grid, by_data: bool = False) -> None:
        super().__init__(grid.bits)
        self.grid, self.by_data = grid, by_data

    def encode(self, x: Tensor) -> tuple[Tensor, Grid]:
        grid = self.grid
        if self.by_data:
            grid = Grid(grid.bits, grid.multiplier, int(x.max()), grid.scale)
        return x.clamp(0, 1).to(torch.uint8), grid


REFUSED = {
    "nine bits": (OddGrid(Grid(9, 1, 0, torch.ones(()))), "'2' has a grid of 9 bits, 1 * code + 0"),
    "no multiplier": (OddGrid(Grid(2, 0, 1, torch.ones(()))), "'2' has a grid of 2 bits, 0 * code + 1"),
    "large integers": (OddGrid(Grid(2, 1, 40000, torch.ones(()))), "'2' has a grid of 2 bits, 1 * code + 40000"),
    "an offset of the data": (OddGrid(Grid(2, 1, 0, torch.ones(())), True), "'2' scales its activations by channel or"),
    "scales by channel": (OddGrid(Grid(2, 1, 0, torch.ones(7, 1, 1))), "'2' scales its activations by channel or"),
}


@pytest.mark.parametrize(("quantizer", "message"), REFUSED.values(), ids=REFUSED)
def test_grids_without_an_integer_op_are_refused_by_name(quantizer: Coded, message: str) -> None:
    model = net("2-bit steps x binary")
    model[2].activation_quantizer = quantizer
    with pytest.raises(UsageError) as error:
        lowbit.export(model, IMAGES)
    assert message in str(error.value)


def test_sums_that_may_overflow_are_refused_by_name() -> None:
    model = nn.Sequential(quantize(nn.Linear(33100, 2), Steps(8), OddLevels(8)))
    with pytest.raises(UsageError, match="'0' has sums up to 2152327500, more than 32 bits hold"):
        lowbit.export(model, torch.zeros(1, 33100))
