"""From an image to the network's input: the one place where that is said, for training, evaluation and deployment."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from lowbit.errors import LowbitError

DEEP_MODES = frozenset({"F", "I", "I;16", "I;16B", "I;16L", "I;16N"})
"""Modes of Pillow with more than 8 bits a channel, which a conversion would clip."""

MODES = frozenset({"1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV"})
"""Modes of Pillow that it converts to RGB and to grey."""

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
"""Formats of image files that are opened: Pillow's others are seldom tried, or start a program to decode."""

MAX_PIXELS = 1 << 26
"""Larger images are refused before they are decoded: a small file can claim any size."""

MAX_SIDE = 1 << 14
"""Pixels that a side of a network's input may have."""

Pixels = npt.NDArray[np.uint8]
Inputs = npt.NDArray[np.float32]


def check_image(image: Image.Image, name: object) -> None:
    """Refuse an image that cannot be converted to 8-bit RGB, or that a conversion would clip.

    Raises:
        LowbitError: it has more than 8 bits a channel, colours that Pillow does not convert, or more than `MAX_PIXELS`
            pixels; the message calls it ``name``.
    """
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise LowbitError(f"{name} has {width}x{height} pixels, more than {MAX_PIXELS}; scale it down first")
    if image.mode in DEEP_MODES:
        raise LowbitError(f"{name} has more than 8 bits a pixel; convert it to 8 bits")
    if image.mode not in MODES:
        raise LowbitError(f"{name} has colours of the kind {image.mode}; convert it to RGB")


@contextlib.contextmanager
def open_image(path: str | Path) -> Iterator[Image.Image]:
    """An image file in one of `FORMATS`, opened and not yet decoded, that `check_image` lets pass."""
    with Image.open(path, formats=FORMATS) as image:
        check_image(image, path)
        yield image


@dataclass(frozen=True)
class Preprocessing:
    """What is done to an image before the network sees it.

    The image is converted to ``mode``, resized (bilinear) to ``size`` when it has another size, padded on all sides by
    ``pad`` pixels of value 0, and normalised: ``(pixel / 255 - mean) / std``, channels first (`normalise` says how it
    rounds).

    Attributes:
        mode: ``"RGB"`` (3 channels) or ``"L"`` (1 channel).
        size: height and width before padding, in pixels.
        pad: zero pixels added on each side.
        mean, std: per channel, in units of the pixel range 0..1.

    Raises:
        LowbitError: a field is out of range, or the normalised pixels would not be finite.
    """

    mode: str
    size: tuple[int, int]
    pad: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        channels = {"RGB": 3, "L": 1}.get(self.mode)
        if channels is None:
            raise LowbitError(f"preprocessing mode is {self.mode!a:.40}, but must be RGB or L")
        if len(self.mean) != channels or len(self.std) != channels:
            raise LowbitError(f"preprocessing needs {channels} values of mean and of std for mode {self.mode}")
        if not all(1e-9 <= std <= 1e9 for std in self.std) or not all(abs(mean) <= 1e9 for mean in self.mean):
            raise LowbitError("preprocessing mean must lie in -1e9..1e9 and std in 1e-9..1e9")
        sides_fit = len(self.size) == 2 and all(1 <= side <= MAX_SIDE for side in self.size)
        if not (sides_fit and 0 <= self.pad <= 1 << 10):
            raise LowbitError(f"preprocessing size {self.size} with padding {self.pad} is out of range")

    @property
    def channels(self) -> int:
        return len(self.mean)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape of one network input: (channels, height, width)."""
        return self.channels, self.size[0] + 2 * self.pad, self.size[1] + 2 * self.pad

    def pixels(self, image: Image.Image) -> Pixels:
        """``image`` as uint8 of shape (height, width, channels), converted, resized and padded.

        Raises:
            LowbitError: see `check_image`.
        """
        check_image(image, "the image")
        converted = image.convert(self.mode)
        if converted.size != (self.size[1], self.size[0]):
            converted = converted.resize((self.size[1], self.size[0]), Image.Resampling.BILINEAR)
        array = np.asarray(converted, dtype=np.uint8).reshape(*self.size, self.channels)
        return np.pad(array, ((self.pad, self.pad), (self.pad, self.pad), (0, 0)))

    @property
    def scale_and_shift(self) -> tuple[Inputs, Inputs]:
        """``1 / (255 std)`` and ``mean / std`` of each channel, float32: see `normalise`."""
        std = np.asarray(self.std, np.float64)
        return (1.0 / (255.0 * std)).astype(np.float32), (np.asarray(self.mean, np.float64) / std).astype(np.float32)

    def normalise(self, pixels: Pixels) -> Inputs:
        """Pixels (N, H, W, C) uint8 to inputs (N, C, H, W) float32: ``pixel * (1 / (255 std)) - mean / std``."""
        scale, shift = self.scale_and_shift
        return np.ascontiguousarray((pixels.astype(np.float32) * scale - shift).transpose(0, 3, 1, 2))

    def __call__(self, images: Sequence[Image.Image]) -> Inputs:
        """Images to network inputs of shape (N, C, H, W), float32."""
        return self.normalise(np.stack([self.pixels(image) for image in images]))

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Preprocessing:
        """Inverse of `to_dict`, for data from a file.

        Raises:
            LowbitError: a field is missing, spare, of a wrong type or out of range.
        """
        try:
            height, width = data["size"]
            return cls(
                **{
                    **data,
                    "mode": str(data["mode"]),
                    "size": (operator.index(height), operator.index(width)),
                    "pad": operator.index(data["pad"]),
                    "mean": tuple(float(v) for v in data["mean"]),
                    "std": tuple(float(v) for v in data["std"]),
                }
            )
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            why = ascii(str(error))[1:-1]
            raise LowbitError(f"preprocessing is malformed ({why:.200}); write the file again") from None
