"""A folder of images: PATH/train/CLASS/*.jpg|png and PATH/test/CLASS/*."""

from __future__ import annotations

import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path

import numpy as np
from PIL import Image

from lowbit.data.base import ImageData, Labels, channel_statistics, pad_pixels
from lowbit.errors import LowbitError, UsageError
from lowbit.packed.graph import is_plain
from lowbit.preprocessing import MAX_SIDE, Pixels, Preprocessing, open_image

EXTENSIONS = frozenset({".jpg", ".jpeg", ".png"})
GREY = frozenset({"1", "L", "LA"})


@dataclass(frozen=True)
class Part:
    """Images (N, H, W, C) uint8 and labels (N,) of one side of a data set."""

    images: Pixels
    labels: Labels


def load_folder(path: Path, image_size: int | None = None) -> ImageData:
    """Load image folders; images of 28x28 are padded to 32x32, others keep their size.

    Args:
        path: holds ``train`` and ``test``, each with one folder per class, the same in both.
        image_size: resize all images to this height and width (bilinear); None demands that they have one size.

    Raises:
        UsageError: the folder does not exist or has no ``train`` or ``test``.
        LowbitError: an image is unreadable or of another size, a class folder is empty, or the classes differ.
    """
    train, test, classes, mode = read_folder(path, image_size)
    height, width = train.images.shape[1:3]
    pad = 2 if (height, width) == (28, 28) else 0
    return ImageData(
        name="folder",
        train_images=pad_pixels(train.images, pad),
        train_labels=train.labels,
        test_images=pad_pixels(test.images, pad),
        test_labels=test.labels,
        classes=classes,
        preprocessing=Preprocessing(mode, (height, width), pad, *channel_statistics(train.images)),
        flip=True,
    )


def read_folder(path: Path, image_size: int | None = None) -> tuple[Part, Part, tuple[str, ...], str]:
    """Train part, test part, class names in alphabetical order, and mode (``"L"`` if no image has colour)."""
    if image_size is not None and not 1 <= image_size <= MAX_SIDE:
        raise UsageError(f"--image-size is {image_size}, but must be from 1 to {MAX_SIDE}")
    listed = {part: _list_classes(path, part) for part in ("train", "test")}
    classes = tuple(listed["train"])
    if len(classes) == 1:
        raise LowbitError(f"{path / 'train'} has one class alone, '{classes[0]}'; a network needs two to tell apart")
    differing = set(classes) ^ set(listed["test"])
    if differing:
        name = min(differing)
        have, lack = ("train", "test") if name in listed["train"] else ("test", "train")
        raise LowbitError(f"class '{name}' is in {path / have} but not in {path / lack}; both need the same classes")
    files = {part: [file for name in classes for file in listed[part][name]] for part in listed}
    labels = {part: np.repeat(np.arange(len(classes)), [len(listed[part][name]) for name in classes]) for part in files}
    every = files["train"] + files["test"]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        decoded = list(pool.map(_decode, every, repeat(image_size), chunksize=256))
    channels = max(array.shape[2] for array in decoded)
    images = _stack(every, decoded, channels)
    cut = len(files["train"])
    train, test = Part(images[:cut], labels["train"]), Part(images[cut:], labels["test"])
    return train, test, classes, "L" if channels == 1 else "RGB"


def _list_classes(path: Path, part: str) -> dict[str, list[Path]]:
    """Image files of each class under ``path/part``, classes and files in alphabetical order."""
    folder = path / part
    if not folder.is_dir():
        raise UsageError(f"{folder} is no folder; image data needs {path}/train/CLASS/*.jpg|png and {path}/test/CLASS/")
    classes = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))
    if not classes:
        raise LowbitError(f"{folder} has no class folders; put the images in {folder}/CLASS/")
    for name in classes:
        if not is_plain(name):
            raise LowbitError(f"the class folder {name!a} in {folder} has control characters in its name; rename it")
    listed = {}
    for name in classes:
        entries = sorted(entry.path for entry in os.scandir(folder / name))
        listed[name] = [Path(entry) for entry in entries if os.path.splitext(entry)[1].lower() in EXTENSIONS]
        if not listed[name]:
            raise LowbitError(f"class folder {folder / name} has no .jpg or .png image; fill it or remove the class")
    return listed


def _decode(path: Path, image_size: int | None) -> Pixels:
    """One image as (H, W, 1) when it is grey, else (H, W, 3)."""
    try:
        if not path.is_file():
            raise LowbitError(f"{path} is no regular file; remove it")
        with open_image(path) as image:
            mode = "L" if image.mode in GREY else "RGB"
            width, height = (image_size, image_size) if image_size else image.size
            channels = (0.0,) * len(mode)
            return Preprocessing(mode, (height, width), 0, channels, tuple(1.0 for _ in channels)).pixels(image)
    except PermissionError:
        raise
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise LowbitError(f"{path} cannot be read as an image ({error}); replace or remove it") from None


def _stack(paths: Iterable[Path], decoded: list[Pixels], channels: int) -> Pixels:
    """All images in one array; grey ones get three equal channels beside coloured ones."""
    height, width = decoded[0].shape[:2]
    images = np.empty((len(decoded), height, width, channels), np.uint8)
    for slot, path, array in zip(images, paths, decoded, strict=True):
        if array.shape[:2] != (height, width):
            raise LowbitError(
                f"{path} is {array.shape[1]}x{array.shape[0]} pixels, but the first image is {width}x{height}; "
                "give --image-size N to resize all images to NxN"
            )
        slot[...] = array
    return images
