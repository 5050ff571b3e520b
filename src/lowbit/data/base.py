"""What a data set is once it is loaded: arrays of bytes, labels, class names and how an image becomes an input."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt

from lowbit.errors import LowbitError, UsageError
from lowbit.preprocessing import Pixels, Preprocessing
from lowbit.registry import Registry

Labels = npt.NDArray[np.int64]


@dataclass(frozen=True)
class ImageData:
    """Train and test images in memory.

    Attributes:
        name: registered name, or ``folder``.
        train_images, test_images: uint8 (N, H, W, C), already resized and padded to the network's input.
        train_labels, test_labels: int64 (N,), indices into ``classes``.
        classes: class names.
        preprocessing: what made these pixels, and the normalisation that is still to come.
        flip: whether a mirrored image still shows its class, so that augmentation may flip.

    Raises:
        LowbitError: arrays of the wrong type or shape, or labels outside the classes.
    """

    name: str
    train_images: Pixels
    train_labels: Labels
    test_images: Pixels
    test_labels: Labels
    classes: tuple[str, ...]
    preprocessing: Preprocessing
    flip: bool

    def __post_init__(self) -> None:
        channels, height, width = self.preprocessing.shape
        for part, images, labels in (
            ("train", self.train_images, self.train_labels),
            ("test", self.test_images, self.test_labels),
        ):
            if images.dtype != np.uint8 or images.shape != (len(images), height, width, channels):
                raise LowbitError(
                    f"{part} images of {self.name} are {images.dtype} {images.shape}, "
                    f"not uint8 (N, {height}, {width}, {channels})"
                )
            if labels.dtype != np.int64 or labels.shape != (len(images),):
                raise LowbitError(f"{part} labels of {self.name} are {labels.dtype} {labels.shape}, not int64 (N,)")
            if not len(labels) or labels.min() < 0 or labels.max() >= len(self.classes):
                raise LowbitError(f"{part} labels of {self.name} are empty or outside 0..{len(self.classes) - 1}")

    @cached_property
    def hash(self) -> str:
        """SHA-256 over images and labels, in hexadecimal."""
        digest = hashlib.sha256()
        for array in (self.train_images, self.train_labels, self.test_images, self.test_labels):
            digest.update(f"{array.dtype}{array.shape}".encode())
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()

    def split(self, val_fraction: float, seed: int) -> tuple[Labels, Labels]:
        """Indices of the train images that train and of those that validate, the same fraction of each class.

        Args:
            val_fraction: in [0, 1); 0 leaves the second array empty.
            seed: chooses the images.

        Returns:
            Two sorted index arrays, disjoint, together all train images.

        Raises:
            UsageError: the fraction is out of range, or leaves a class without an image on one side.
        """
        if not 0 <= val_fraction < 1:
            raise UsageError(f"--val-fraction is {val_fraction}, but must be at least 0 and below 1")
        return stratified_split(self.train_labels, self.classes, val_fraction, seed)


def stratified_split(
    labels: Labels, classes: Sequence[str], fraction: float, seed: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Sorted indices (rest, chosen), where ``chosen`` holds ``round(fraction * n)`` of each class with n images."""
    random = np.random.default_rng(seed)
    chosen = np.zeros(len(labels), bool)
    for label, name in enumerate(classes):
        members = np.flatnonzero(labels == label)
        count = round(fraction * len(members))
        if fraction > 0 and not 0 < count < len(members):
            raise UsageError(
                f"--val-fraction {fraction} takes {count} of the {len(members)} train images of class '{name}'; "
                "choose one that leaves images on both sides"
            )
        chosen[random.permutation(members)[:count]] = True
    return np.flatnonzero(~chosen), np.flatnonzero(chosen)


def channel_statistics(images: Pixels) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel of uint8 (N, H, W, C), in units of 0..1, rounded to 4 places.

    A channel that never changes gets a deviation of 1.
    """
    axes = (0, 1, 2)
    mean = images.mean(axes, dtype=np.float64)
    variance = np.square(images, dtype=np.uint16).mean(axes, dtype=np.float64) - mean**2
    std = np.sqrt(np.maximum(variance, 0)) / 255
    std[std < 1e-4] = 1.0
    return tuple(np.round(mean / 255, 4).tolist()), tuple(np.round(std, 4).tolist())


def pad_pixels(images: Pixels, pad: int) -> Pixels:
    """Zero pixels on all four sides of (N, H, W, C), as `Preprocessing` does to one image."""
    return np.pad(images, ((0, 0), (pad, pad), (pad, pad), (0, 0)))


registry: Registry[Callable[[Path], ImageData]] = Registry("lowbit.data", "data set")
