"""Data sets: shapes, splits, hashes, and one sentence for each thing that can be wrong with a folder of images."""

from __future__ import annotations

import gzip
import os
import struct
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lowbit import data
from lowbit.data.augment import cutout, random_crop_flip
from lowbit.data.base import channel_statistics
from lowbit.data.fashion_mnist import DEBIAN, MOST_BYTES, fashion_mnist
from lowbit.errors import LowbitError, UsageError


def write_image(path: Path, shape: tuple[int, ...] = (32, 32, 3), seed: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, np.uint8)).save(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for part, count in (("train", 3), ("test", 2)):
        for label, name in enumerate(("ant", "bee")):
            for index in range(count):
                write_image(tmp_path / part / name / f"{index}.png", seed=10 * label + index)
    return tmp_path


def test_digits_are_stratified_and_fixed() -> None:
    digits = data.load("digits")
    assert digits.train_images.shape == (1438, 32, 32, 1)
    assert digits.test_images.shape == (359, 32, 32, 1)
    assert not digits.flip
    counts = Counter(digits.test_labels.tolist())
    assert min(counts.values()) >= 35
    assert digits.hash == data.load("digits").hash


def test_digits_pixels_are_what_preprocessing_makes() -> None:
    from sklearn.datasets import load_digits

    digits = data.load("digits")
    image = Image.fromarray(np.round(load_digits().images[0] * (255 / 16)).astype(np.uint8))
    pixels = digits.preprocessing.pixels(image)
    every = np.concatenate([digits.train_images, digits.test_images])
    assert (every == pixels).all(axis=(1, 2, 3)).any()


@pytest.mark.skipif(not DEBIAN.is_dir(), reason="Debian's dataset-fashion-mnist is not installed")
def test_fashion_mnist_from_debian(tmp_path: Path) -> None:
    clothes = fashion_mnist(tmp_path)
    assert clothes.train_images.shape == (60000, 32, 32, 1)
    assert clothes.test_images.shape == (10000, 32, 32, 1)
    assert clothes.preprocessing.mean == (0.286,)
    assert clothes.preprocessing.std == (0.353,)
    assert not clothes.train_images[:, :2].any()


def write_idx(path: Path, array: np.ndarray) -> None:
    header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
    path.write_bytes(gzip.compress(header + array.tobytes()))


def test_fashion_mnist_from_data_dir(tmp_path: Path) -> None:
    for part, count in (("train", 20), ("t10k", 10)):
        write_idx(tmp_path / f"{part}-images-idx3-ubyte.gz", np.full((count, 28, 28), 7, np.uint8))
        write_idx(tmp_path / f"{part}-labels-idx1-ubyte.gz", np.arange(count, dtype=np.uint8) % 10)
    clothes = data.load("fashion_mnist", tmp_path)
    assert clothes.train_images[:, 2:-2, 2:-2].min() == 7
    assert clothes.train_labels[:3].tolist() == [0, 1, 2]
    header = gzip.compress(b"")[:10]
    flat = gzip.compress(b"\0\0\x08\x01\0\0\0\x04four")
    endless = gzip.compress(b"\0\0\x08\x03" + bytes(MOST_BYTES))
    for damaged in (gzip.compress(b"\0\0\x08\x03short"), header + b"\xff no deflate stream", flat, endless):
        (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(damaged)
        with pytest.raises(LowbitError, match=r"train-images-idx3-ubyte.gz is damaged"):
            data.load("fashion_mnist", tmp_path)


def test_cifar10_copy(tmp_path: Path) -> None:
    archive = Path(os.environ.get("LOWBIT_DATA", "")) / "cifar10-jpeg.tar.xz"
    if not archive.is_file():
        pytest.skip("set LOWBIT_DATA to the folder that holds cifar10-jpeg.tar.xz")
    taken: Counter[Path] = Counter()
    with tarfile.open(archive, "r|xz") as tar:
        for member in tar:
            place = Path(member.name).parent
            if member.isfile() and taken[place] < 5:
                taken[place] += 1
                tar.extract(member, tmp_path, filter="data")
    root = next(tmp_path.rglob("train")).parent
    images = data.load("cifar10", root)
    assert images.train_images.shape == (50, 32, 32, 3)
    assert Counter(images.test_labels.tolist()) == dict.fromkeys(range(10), 5)
    assert images.flip


def test_folder(folder: Path) -> None:
    images = data.load(f"folder:{folder}")
    assert images.classes == ("ant", "bee")
    assert images.train_labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert images.test_images.shape == (4, 32, 32, 3)
    with Image.open(folder / "train" / "bee" / "1.png") as image:
        assert np.array_equal(images.train_images[4], images.preprocessing.pixels(image))
    assert (images.preprocessing.mean, images.preprocessing.std) == channel_statistics(images.train_images)


def test_folder_of_grey_images_stays_grey_until_one_has_colour(tmp_path: Path) -> None:
    for part in ("train", "test"):
        for name in "ab":
            write_image(tmp_path / part / name / "0.png", (28, 28))
    images = data.load(f"folder:{tmp_path}")
    assert images.preprocessing.mode == "L"
    assert images.train_images.shape == (2, 32, 32, 1)
    write_image(tmp_path / "train" / "a" / "1.png", (28, 28, 3))
    mixed = data.load(f"folder:{tmp_path}")
    assert mixed.preprocessing.mode == "RGB"
    assert (mixed.train_images[0] == images.train_images[0]).all()


def test_a_folder_takes_no_other_place(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"--data-dir is for registered data sets; 'folder:.*' names its"):
        data.load(f"folder:{folder}", data_dir=tmp_path)


def test_folder_resizes_on_request(folder: Path) -> None:
    write_image(folder / "train" / "bee" / "9.png", (20, 30, 3))
    with pytest.raises(LowbitError, match=r"9\.png is 30x20 pixels, but the first image is 32x32; give --image-size"):
        data.load(f"folder:{folder}")
    images = data.load(f"folder:{folder}", image_size=24)
    assert images.train_images.shape == (7, 24, 24, 3)
    with Image.open(folder / "train" / "bee" / "9.png") as image:
        assert np.array_equal(images.train_images[6], images.preprocessing.pixels(image))


def spoil_unreadable(folder: Path) -> None:
    (folder / "test" / "ant" / "0.png").write_bytes(b"no image")


def spoil_truncated(folder: Path) -> None:
    path = folder / "test" / "ant" / "0.png"
    path.write_bytes(path.read_bytes()[:-900])


def spoil_empty_class(folder: Path) -> None:
    for path in (folder / "train" / "bee").iterdir():
        path.unlink()


def spoil_missing_test(folder: Path) -> None:
    (folder / "test").rename(folder / "tests")


def spoil_classes_differ(folder: Path) -> None:
    write_image(folder / "test" / "cat" / "0.png")


def spoil_one_class(folder: Path) -> None:
    for part in ("train", "test"):
        for path in (folder / part / "bee").iterdir():
            path.unlink()
        (folder / part / "bee").rmdir()


def spoil_deep(folder: Path) -> None:
    Image.fromarray(np.zeros((32, 32), np.uint16)).save(folder / "train" / "ant" / "0.png")


def spoil_name(folder: Path) -> None:
    for part in ("train", "test"):
        (folder / part / "bee").rename(folder / part / "be\ne")


def spoil_kind(folder: Path) -> None:
    (folder / "train" / "ant" / "0.png").unlink()
    (folder / "train" / "ant" / "0.png").mkdir()


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (spoil_name, r"the class folder 'be\\ne' in .*train has control characters in its name; rename it"),
        (spoil_kind, r"train/ant/0\.png is no regular file; remove it"),
        (spoil_unreadable, r"test/ant/0\.png cannot be read as an image .*; replace or remove it"),
        (spoil_truncated, r"test/ant/0\.png cannot be read as an image"),
        (spoil_empty_class, r"class folder .*train/bee has no \.jpg or \.png image"),
        (spoil_missing_test, r"test is no folder; image data needs"),
        (spoil_classes_differ, r"class 'cat' is in .*test but not in .*train"),
        (spoil_one_class, r"train has one class alone, 'ant'; a network needs two"),
        (spoil_deep, r"train/ant/0\.png has more than 8 bits a pixel"),
    ],
)
def test_bad_folders_get_one_sentence(folder: Path, spoil: object, sentence: str) -> None:
    spoil(folder)  # type: ignore[operator]
    with pytest.raises(LowbitError, match=sentence) as caught:
        data.load(f"folder:{folder}")
    assert "\n" not in str(caught.value)


def test_images_larger_than_any_network_wants_are_not_decoded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lowbit.preprocessing.MAX_PIXELS", 100)
    with pytest.raises(LowbitError, match=r"0\.png has 32x32 pixels, more than 100; scale it down first"):
        data.load(f"folder:{folder}")


@pytest.mark.parametrize("spec", ["digit", "folder:", "files:/tmp", "folder:/no/such/place"])
def test_bad_specs(spec: str) -> None:
    with pytest.raises(UsageError):
        data.load(spec)


def test_image_size_is_for_folders() -> None:
    with pytest.raises(UsageError, match="--image-size"):
        data.load("digits", image_size=28)


@pytest.mark.parametrize("fraction", [0.1, 0.25])
def test_split_is_stratified(fraction: float) -> None:
    digits = data.load("digits")
    train, val = digits.split(fraction, seed=3)
    assert np.array_equal(np.sort(np.concatenate([train, val])), np.arange(1438))
    for label in range(10):
        size = (digits.train_labels == label).sum()
        assert (digits.train_labels[val] == label).sum() == round(fraction * size)
    assert np.array_equal(digits.split(fraction, seed=3)[1], val)
    assert not np.array_equal(digits.split(fraction, seed=4)[1], val)


def test_split_limits(folder: Path) -> None:
    images = data.load(f"folder:{folder}")
    assert len(images.split(0, seed=0)[1]) == 0
    with pytest.raises(UsageError, match="class 'ant'"):
        images.split(0.01, seed=0)
    with pytest.raises(UsageError, match="below 1"):
        images.split(1.0, seed=0)


def crop_flip_one_by_one(images: np.ndarray, generator: torch.Generator, pad: int, flip: bool) -> np.ndarray:
    """The slow, obvious reference: one image at a time, same draws."""
    count, height, width, _ = images.shape
    offsets = torch.randint(2 * pad + 1, (2, count, 1), generator=generator).numpy()
    mirrored = torch.randint(2, (count, 1), generator=generator).numpy()
    result = np.empty_like(images)
    for i in range(count):
        padded = np.pad(images[i], ((pad, pad), (pad, pad), (0, 0)))
        top, left = int(offsets[0, i, 0]), int(offsets[1, i, 0])
        crop = padded[top : top + height, left : left + width]
        result[i] = crop[:, ::-1] if flip and mirrored[i, 0] else crop
    return result


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
@pytest.mark.parametrize(("shape", "pad"), [((40, 8, 6, 3), 4), ((5, 7, 7, 1), 2), ((3, 4, 4, 3), 0)])
def test_augmentation_equals_the_reference(flip: bool, dtype: type, shape: tuple[int, ...], pad: int) -> None:
    images = np.random.default_rng(0).integers(1, 255, shape).astype(dtype)
    fast = random_crop_flip(torch.from_numpy(images), torch.Generator().manual_seed(5), pad=pad, flip=flip)
    slow = crop_flip_one_by_one(images, torch.Generator().manual_seed(5), pad, flip)
    assert fast.is_contiguous()
    assert np.array_equal(fast.numpy(), slow)


def cutout_one_by_one(inputs: np.ndarray, generator: torch.Generator, side: int) -> np.ndarray:
    """The slow, obvious reference: pixel by pixel, same draws."""
    count, _, height, width = inputs.shape
    tops = torch.randint(height, (count, 1), generator=generator).numpy()[:, 0] - side // 2
    lefts = torch.randint(width, (count, 1), generator=generator).numpy()[:, 0] - side // 2
    result = inputs.copy()
    for i, row, column in np.ndindex(count, height, width):
        if 0 <= row - tops[i] < side and 0 <= column - lefts[i] < side:
            result[i, :, row, column] = 0
    return result


@pytest.mark.parametrize(
    ("shape", "side"), [((40, 3, 8, 6), 4), ((5, 1, 7, 7), 3), ((9, 2, 5, 5), 20), ((3, 1, 4, 4), 1)]
)
def test_cutout_equals_the_reference(shape: tuple[int, ...], side: int) -> None:
    inputs = np.random.default_rng(0).uniform(1, 2, shape).astype(np.float32)
    slow = cutout_one_by_one(inputs, torch.Generator().manual_seed(5), side)
    given = torch.from_numpy(inputs)
    fast = cutout(given, torch.Generator().manual_seed(5), side)
    assert fast is given
    assert np.array_equal(fast.numpy(), slow)


def test_augmentation_reaches_every_offset() -> None:
    spot = torch.zeros(4000, 9, 9, 1, dtype=torch.uint8)
    spot[:, 4, 4] = 1
    moved = random_crop_flip(spot, torch.Generator().manual_seed(0))
    assert moved.sum() == 4000
    counts = moved.sum(0, dtype=torch.int64).flatten()
    assert counts.min() > 20
