"""Layers that a binary method leaves in float, made 8-bit by affine: the stem, the classifier and shortcuts."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from checks import checked, ops
from nets import awkward_
from torch import Tensor, nn

import lowbit
from lowbit import methods, models
from lowbit.preprocessing import Preprocessing

CIFAR = Preprocessing("RGB", (8, 8), 0, (0.4914, 0.4822, 0.4465), (0.247, 0.2435, 0.2616))


def images(count: int) -> Tensor:
    """Images of random pixels, normalised."""
    pixels = np.random.default_rng(0).integers(0, 256, (count, 8, 8, 3), np.uint8)
    return torch.from_numpy(CIFAR.normalise(pixels))


def with_int8_rest(model: nn.Module, inputs: Tensor) -> nn.Module:
    """Calibrated on the smallest and largest number of ``inputs``."""
    lowbit.quantize_(model, methods.registry["affine"](observer="min_max"))
    lowbit.calibrate(model, [inputs])
    return model.eval()


def resnet(shortcut: str) -> nn.Module:
    return awkward_(models.create("resnet20", 4, "xnor_net", image_size=8, width=0.5, shortcut=shortcut))


def test_the_first_layer_against_its_formula() -> None:
    """Codes, sums and scale by hand, in NumPy; the padded zero adds nothing, though no pixel is 0."""
    stem = nn.Conv2d(3, 5, 3, padding=1)
    model = nn.Sequential(stem, nn.BatchNorm2d(5), nn.Conv2d(5, 5, 1), nn.Flatten(), nn.Linear(320, 3))
    lowbit.quantize_(model, "xnor_net")
    x, w, b = images(2), stem.weight.detach().numpy(), stem.bias.detach().numpy()
    found = with_int8_rest(model, x)[0](x).detach().numpy()
    assert not (x == 0).any()
    x = x.numpy()
    step = (x.max() - x.min()) / np.float32(255)
    zero = np.rint(-x.min() / step)
    codes = np.clip(np.rint(x / step) + zero, 0, 255).astype(np.int64)
    w_step = np.abs(w).max(axis=(1, 2, 3)) / np.float32(127)
    integers = np.rint(w / w_step[:, None, None, None]).astype(np.int64)
    padded = np.pad(codes - int(zero), ((0, 0), (0, 0), (1, 1), (1, 1)))
    sums = np.zeros((2, 5, 8, 8), np.int64)
    for i, j in itertools.product(range(8), repeat=2):
        sums[:, :, i, j] = np.einsum("ncyx,ocyx->no", padded[:, :, i : i + 3, j : j + 3], integers)
    expected = sums.astype(np.float32) * (step * w_step)[:, None, None] + b[:, None, None]
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("shortcut", ["block", "conv"])
def test_a_residual_net_keeps_no_float_convolution(shortcut: str) -> None:
    x = images(3)
    before = lowbit.export(resnet(shortcut), x)
    exported, report = checked(with_int8_rest(resnet(shortcut), x), x)
    kinds = ops(exported)
    assert "conv2d" not in kinds
    assert kinds.count("quant_conv2d") == ops(before).count("conv2d") == 4  # stem, two shortcuts, classifier
    assert {check.layer for check in report.layers} >= {"stem.conv", "head.conv"}
    # What reads a float value in 8 bits has one row of thresholds for all channels.
    packed = exported.packed
    rows = [len(packed.tensors[f"{i}.thresholds"]) for i, op in enumerate(packed.ops) if op.get("bits") == 8]
    assert rows == [1] * 4
    of_weights = [
        sum(tensor.nbytes for name, tensor in each.packed.tensors.items() if name.endswith((".weight", "weight_codes")))
        for each in (before, exported)
    ]
    assert of_weights[1] <= 0.3 * of_weights[0]


def test_the_sums_of_the_stem_become_codes_by_exact_thresholds() -> None:
    """Up to 27 * 255 * 128 of them, too many to try: every code equals torch's, for gammas of every sign."""
    stem = (nn.Conv2d(3, 9, 3, padding=1), nn.BatchNorm2d(9), nn.MaxPool2d(2))
    model = nn.Sequential(*stem, nn.Conv2d(9, 6, 3), nn.Flatten(), nn.Linear(24, 3))
    lowbit.quantize_(model, "xnor_net")
    exported, report = checked(with_int8_rest(awkward_(model), images(24)), images(24))
    assert ops(exported)[:3] == ["threshold", "quant_conv2d", "max_pool"]
    assert [check.exact for check in report.layers if check.what == "codes in"][:2] == [True, True]
