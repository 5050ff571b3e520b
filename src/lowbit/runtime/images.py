"""Decoding of image files that may come from anywhere."""

from __future__ import annotations

from pathlib import Path

from PIL import Image, UnidentifiedImageError

from lowbit.errors import LowbitError
from lowbit.preprocessing import check_depth

MAX_PIXELS = 1 << 26
"""Larger images are refused before they are decoded: a small file can claim any size."""


def load_image(path: str | Path) -> Image.Image:
    """The image at ``path``, decoded completely.

    Raises:
        LowbitError: there is no file, it is no image, it is damaged or cut short, it has more than 8 bits a channel or
            more than `MAX_PIXELS` pixels.
    """
    try:
        with Image.open(path) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise LowbitError(f"{path} has {width}x{height} pixels, more than {MAX_PIXELS}; scale it down first")
            check_depth(image, path)
            image.load()
            return image.copy()
    except FileNotFoundError:
        raise LowbitError(f"{path} does not exist; give the path of an image") from None
    except UnidentifiedImageError:
        raise LowbitError(f"{path} is no image that Pillow can read; give a PNG or JPEG file") from None
    except Image.DecompressionBombError:
        raise LowbitError(f"{path} has more than {MAX_PIXELS} pixels; scale it down first") from None
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        raise LowbitError(f"{path} cannot be decoded ({error}); the file is damaged or cut short") from None
