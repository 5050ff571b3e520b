"""Decoding of image files that may come from anywhere."""

from __future__ import annotations

import os
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from lowbit.errors import LowbitError, UsageError
from lowbit.preprocessing import MAX_PIXELS, open_image


def load_image(path: str | Path) -> Image.Image:
    """The image at ``path``, decoded completely.

    Raises:
        UsageError: there is no regular file.
        LowbitError: it is no image in one of `lowbit.preprocessing.FORMATS`, it is damaged or cut short, or
            `lowbit.preprocessing.check_image` refuses it.
        PermissionError: it may not be read.
    """
    if os.path.exists(path) and not os.path.isfile(path):
        raise UsageError(f"{path} is no regular file; give the path of an image")
    try:
        with open_image(path) as image:
            image.load()
            return image.copy()
    except FileNotFoundError:
        raise UsageError(f"{path} does not exist; give the path of an image") from None
    except UnidentifiedImageError:
        raise LowbitError(f"{path} is no image of a known format; give a PNG or JPEG file") from None
    except PermissionError:
        raise
    except Image.DecompressionBombError:
        raise LowbitError(f"{path} has more than {MAX_PIXELS} pixels; scale it down first") from None
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        raise LowbitError(f"{path} cannot be decoded ({error}); the file is damaged or cut short") from None
