"""Whitening of the images' patches as a start of the first convolution."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

from lowbit import data
from lowbit.errors import UsageError
from lowbit.models import create
from lowbit.training import TrainConfig, train
from lowbit.training.batches import Normalise
from lowbit.training.whitening import FLOOR, freeze_first_layer_, whiten_first_layer_, whitening_filters

CPU = torch.device("cpu")


def by_numpy(images: np.ndarray, kernel: int, stride: int) -> tuple[np.ndarray, np.ndarray]:
    """Patches (P, C k k) of images (N, C, H, W), and the variances along their directions, the largest first."""
    windows = np.lib.stride_tricks.sliding_window_view(images, (kernel, kernel), (2, 3))[:, :, ::stride, ::stride]
    patches = windows.transpose(0, 2, 3, 1, 4, 5).reshape(-1, images.shape[1] * kernel**2).astype(np.float64)
    return patches, np.linalg.svd(patches - patches.mean(0), compute_uv=False) ** 2 / (len(patches) - 1)


@pytest.mark.parametrize(("kernel", "stride"), [(1, 1), (3, 1), (4, 2)])
def test_the_filters_make_patches_white(kernel: int, stride: int) -> None:
    random = np.random.default_rng(0)
    mixed = np.einsum("dc,nchw->ndhw", random.normal(size=(3, 3)), random.normal(size=(40, 3, 13, 11)))
    images = (mixed + np.roll(mixed, 1, 2) + np.roll(mixed, 1, 3)).astype(np.float32)  # neighbours are alike
    filters = whitening_filters(torch.from_numpy(images), nn.Conv2d(3, 8, kernel, stride)).numpy()
    patches, variances = by_numpy(images, kernel, stride)
    assert filters.shape == (3 * kernel**2, 3, kernel, kernel)
    responses = patches @ filters.reshape(len(filters), -1).T.astype(np.float64)
    assert np.allclose(np.cov(responses.T), np.diag(variances / (variances + FLOOR)), atol=1e-4)


def test_a_direction_without_variance_stays_finite() -> None:
    grey = torch.randn(50, 1, 8, 8).expand(-1, 3, -1, -1)
    assert whitening_filters(grey, nn.Conv2d(3, 8, 2)).isfinite().all()
    assert whitening_filters(torch.zeros(2, 3, 8, 8), nn.Conv2d(3, 8, 2)).isfinite().all()


@pytest.mark.parametrize("outputs", [4, 24, 100])
def test_each_filter_is_followed_by_its_negative(outputs: int) -> None:
    images = data.load("digits")
    normalise, odd = Normalise(images.preprocessing, CPU), np.arange(1, len(images.train_images), 2)
    conv = nn.Conv2d(1, outputs, 3, bias=False)
    before = conv.weight.detach().clone()
    whiten_first_layer_(nn.Sequential(conv, nn.ReLU(), nn.Conv2d(outputs, 2, 1)), images.train_images, odd, normalise)
    made = min(outputs, 2 * 9)
    assert torch.equal(conv.weight[0:made:2], -conv.weight[1:made:2])
    assert torch.equal(conv.weight[made:], before[made:])
    expected = whitening_filters(normalise(torch.from_numpy(images.train_images[odd])), nn.Conv2d(1, 8, 3)).flatten(1)
    alike = nn.functional.cosine_similarity(conv.weight[0:made:2].flatten(1), expected[: (made + 1) // 2]).abs()
    assert alike.min() > 0.98  # evenly spaced images give nearly the directions of all


FIRST_LAYERS = {
    "low bits": create("lenet", method="bnn", in_channels=1, image_size=16),
    "linear": nn.Linear(4, 2),
    "none": nn.ReLU(),
    "groups": nn.Conv2d(3, 3, 3, groups=3),
    "a large kernel": nn.Conv2d(1, 4, 17, padding=8),
    "a wide kernel": nn.Conv2d(1, 4, 3, padding=8, dilation=8),
}


@pytest.mark.parametrize("first", FIRST_LAYERS)
def test_another_first_layer_is_refused(first: str) -> None:
    channels = 3 if first == "groups" else 1
    images = np.zeros((2, 16, 16, channels), np.uint8)
    with pytest.raises(UsageError, match="recipe field whiten starts a first convolution in float"):
        whiten_first_layer_(FIRST_LAYERS[first], images, np.arange(2), lambda pixels: pixels)


UNMOVED = TrainConfig(
    out="white",
    method="xnor_net",
    model="lenet",
    model_options={"width": 0.25},
    overrides={"whiten": True, "learning_rate": 1e-12},
    epochs=1,
    progress=False,
)


def weights(run: Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(run / "model.safetensors")


def test_a_run_starts_from_it_unless_it_starts_from_weights(tmp_path: Path) -> None:
    config = replace(UNMOVED, out=tmp_path / "white")

    def first_layer(run: Path) -> torch.Tensor:
        return weights(run)["0.conv.weight"]

    white = first_layer(train(config).path)
    assert torch.allclose(white[0], -white[1], atol=1e-6)
    plain = first_layer(train(replace(config, out=tmp_path / "plain", overrides={"learning_rate": 1e-12})).path)
    assert not torch.allclose(plain[0], -plain[1], atol=1e-2)
    started = replace(config, out=tmp_path / "started", init_from=tmp_path / "plain")
    assert torch.allclose(first_layer(train(started).path), plain, atol=1e-6)


def test_a_frozen_first_layer_stays_while_the_others_learn(tmp_path: Path) -> None:
    overrides = {"whiten": True, "freeze_first": True, "weight_decay": 0.1}
    config = replace(UNMOVED, out=tmp_path / "frozen", overrides=overrides)
    frozen, start = weights(train(config).path), weights(train(replace(UNMOVED, out=tmp_path / "unmoved")).path)
    assert torch.allclose(frozen["0.conv.weight"], start["0.conv.weight"], atol=1e-6)
    assert not torch.allclose(frozen["1.conv.weight"], start["1.conv.weight"], atol=1e-3)
    again = weights(train(replace(config, out=tmp_path / "again", seed=1, init_from=tmp_path / "frozen")).path)
    assert torch.equal(again["0.conv.weight"], frozen["0.conv.weight"])
    assert not torch.equal(again["1.conv.weight"], frozen["1.conv.weight"])


def test_a_first_layer_of_low_bits_cannot_be_frozen() -> None:
    with pytest.raises(UsageError, match="freeze_first keeps a first layer in float"):
        freeze_first_layer_(create("lenet", method="bnn", in_channels=1, image_size=16))
    with pytest.raises(UsageError, match="freeze_first"):
        freeze_first_layer_(nn.ReLU())
