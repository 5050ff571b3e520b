"""Verify passes on what export wrote, and fails on anything else."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from interpreter import Interpreter
from nets import chain, quantized
from torch import nn

import lowbit
from lowbit import methods
from lowbit.errors import LowbitError, UsageError
from lowbit.exporter.verify import VerifyReport, verify
from lowbit.packed import PackedModel

IMAGES = torch.randn(24, 3, 16, 16, generator=torch.Generator().manual_seed(1))
MODEL = chain(nn.BatchNorm2d(7), nn.MaxPool2d(2), nn.BatchNorm2d(7))


@pytest.fixture
def packed() -> PackedModel:
    return copy.deepcopy(lowbit.export(MODEL, IMAGES[:1]).packed)


def run(packed: PackedModel, model: nn.Module = MODEL) -> VerifyReport:
    return verify(model, packed, IMAGES, engine=Interpreter(packed))


def tensor(packed: PackedModel, op: str, name: str) -> np.ndarray:
    index = next(i for i, o in enumerate(packed.ops) if o["op"] == op and f"{i}.{name}" in packed.tensors)
    packed.tensors[f"{index}.{name}"] = packed.tensors[f"{index}.{name}"].copy()
    return packed.tensors[f"{index}.{name}"]


def test_a_good_file_passes(packed: PackedModel, tmp_path) -> None:
    report = run(packed)
    assert report.passed
    assert report.images == report.agreement == 24
    assert report.logit_error < 1e-6
    assert report.to_dict()["passed"] is True
    packed.save(tmp_path / "m.lowbit")
    assert verify(MODEL, tmp_path / "m.lowbit", IMAGES).passed


class WithoutNumbers(Interpreter):
    def __call__(self, x: np.ndarray) -> np.ndarray:
        return super().__call__(x) * np.nan


def test_logits_that_are_no_numbers_fail(packed: PackedModel) -> None:
    report = verify(MODEL, packed, IMAGES, engine=WithoutNumbers(packed))
    assert not report.passed
    assert report.end_to_end_error == np.inf


def test_the_report_says_how_many_images_were_compared_end_to_end(packed: PackedModel) -> None:
    assert run(packed).end_to_end_images == 24
    tensor(packed, "binary_conv2d", "thresholds")[0] = 0
    assert run(packed).end_to_end_images < 24


def test_a_flipped_weight_bit_fails_where_it_is_felt(packed: PackedModel) -> None:
    tensor(packed, "binary_conv2d", "weight_bits")[0, 0, 0, 0] ^= np.uint64(1)
    tensor(packed, "binary_conv2d", "thresholds")[0] = 0
    report = run(packed)
    assert not report.passed
    assert [check.layer for check in report.layers if not check.passed] == ["6"]


def test_a_flipped_weight_bit_of_the_last_binary_layer_fails(packed: PackedModel) -> None:
    packed.tensors[f"{_last_binary(packed)}.weight_bits"].flat[0] ^= np.uint64(1)
    assert [(check.layer, check.what) for check in run(packed).layers if not check.passed] == [("6", "sums out")]


def test_a_shifted_integer_threshold_fails(packed: PackedModel) -> None:
    thresholds = tensor(packed, "binary_conv2d", "thresholds")
    inside = np.abs(thresholds) < 100
    thresholds[inside] += 2
    assert [check.layer for check in run(packed).layers if not check.passed] == ["6"]


@pytest.mark.parametrize(("shift", "passes"), [(1e-7, True), (1e-2, False)])
def test_a_shifted_float_threshold_fails_beyond_the_tolerance(packed: PackedModel, shift: float, passes: bool) -> None:
    tensor(packed, "threshold", "thresholds")[:] += np.float32(shift)
    assert run(packed).passed == passes


def test_a_wrong_head_fails(packed: PackedModel) -> None:
    index = len(packed.ops) - 1
    packed.tensors[f"{index}.weight"] *= np.float32(1.0001)
    report = run(packed)
    assert all(check.passed for check in report.layers)
    assert 1e-5 < report.logit_error < 1e-3
    assert not report.passed


def test_a_code_at_its_threshold_is_excused_and_counted() -> None:
    """A stem of 1x1 and weight 1 whose threshold is an image's very pixel: the next float32 number differs but may."""
    model = nn.Sequential(nn.Conv2d(1, 1, 1, bias=False), nn.BatchNorm2d(1), nn.Conv2d(1, 2, 1), nn.Flatten())
    lowbit.quantize_(model, "xnor_net", {"0": None, "2": "xnor_net"})
    model.eval()
    with torch.no_grad():
        model[0].weight.fill_(1)
        model[1].running_mean.fill_(0.5)
    packed = lowbit.export(model, torch.zeros(1, 1, 1, 1)).packed
    images = torch.tensor([0.5, 0.75, 0.25]).reshape(3, 1, 1, 1)
    thresholds = tensor(packed, "threshold", "thresholds")
    assert verify(model, packed, images, engine=Interpreter(packed)).layers[0].different == 0
    thresholds[:] = np.nextafter(np.float32(0.5), np.float32(1))
    (codes, _) = verify(model, packed, images, engine=Interpreter(packed)).layers
    assert (codes.compared, codes.different, codes.excused, codes.passed) == (3, 1, 1, True)
    thresholds[:] = 0.6
    (codes, _) = verify(model, packed, torch.full((1, 1, 1, 1), 0.55), engine=Interpreter(packed)).layers
    assert (codes.different, codes.excused, codes.passed) == (1, 0, False)


def test_another_model_is_refused_or_fails(packed: PackedModel) -> None:
    with pytest.raises(LowbitError, match="layer '2'"):
        run(packed, nn.Sequential(nn.Conv2d(3, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()))
    with pytest.raises(UsageError, match=r"verify needs a float32 tensor of shape \(N, 3, 16, 16\), not"):
        verify(MODEL, packed, IMAGES[:, :1], engine=Interpreter(packed))


class _Spare(nn.Module):
    """Calls a binary layer a second time, on another map, and another layer, all for nothing in ``eval()``."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body, self.aux, self.head = (nn.Conv2d(channels, 4, 3, padding=1) for channels in (3, 4, 4, 4))
        self.pool = nn.MaxPool2d(2)

    def forward(self, x: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, ...]:
        h = self.stem(x)
        spare = self.aux(self.body(self.pool(h)))
        h = self.head(self.body(h))
        return (h, spare) if self.training else h


def test_what_the_output_does_not_need_is_not_missed() -> None:
    model = quantized(_Spare(), "bnn")
    packed = lowbit.export(model, IMAGES[:1]).packed
    report = run(packed, model)
    assert report.passed
    assert [check.layer for check in report.layers if check.what == "codes in"] == ["stem", "body", "head"][-2:]


def test_what_cancels_against_the_bias_may_differ_by_its_own_rounding() -> None:
    """Of one image, whose channels have one number each."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(25):
        model = nn.Sequential(nn.Flatten(), nn.Linear(48, 64), nn.Linear(64, 256), nn.Linear(256, 10)).eval()
        for layer in model[1:]:
            layer.weight.data = torch.randn(layer.weight.shape, generator=generator) / 8
            layer.bias.data = torch.randn(layer.bias.shape, generator=generator) / 2
        lowbit.quantize_(model, methods.registry["xnor_net"](k_map=True))
        image = torch.randn(1, 3, 4, 4, generator=generator)
        assert verify(model, lowbit.export(model, image).packed, image).passed


def test_a_long_float_sum_may_round_more() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 224 * 224, 3)).eval()
    image = torch.zeros(1, 3, 224, 224)
    report = verify(model, lowbit.export(model, image).packed, image)
    assert report.tolerance == pytest.approx(1e-5 * (3 * 224 * 224 / 65536) ** 0.5)
    assert report.to_dict()["tolerance"] == report.tolerance
    assert run(copy.deepcopy(lowbit.export(MODEL, IMAGES[:1]).packed)).tolerance == 1e-5


def test_what_is_no_packed_model_or_no_image_is_refused(packed: PackedModel) -> None:
    with pytest.raises(UsageError, match=r"not Export; give its \.packed"):
        verify(MODEL, lowbit.export(MODEL, IMAGES[:1]), IMAGES)
    for images in (IMAGES.numpy(), IMAGES[0], IMAGES[:0], IMAGES.permute(0, 2, 3, 1), IMAGES.double()):
        with pytest.raises(UsageError, match=r"verify needs a float32 tensor of shape \(N, 3, 16, 16\), not "):
            verify(MODEL, packed, images)


def _last_binary(packed: PackedModel) -> int:
    return max(i for i, op in enumerate(packed.ops) if op["op"] == "binary_conv2d")
