"""Data sets: one file each, found by name, loaded whole into memory as bytes."""

from __future__ import annotations

from pathlib import Path

from lowbit.data.base import ImageData, registry
from lowbit.errors import UsageError

__all__ = ["ImageData", "load", "registry"]

DEFAULT_DIR = Path("~/.cache/lowbit")


def load(spec: str, data_dir: str | Path | None = None, image_size: int | None = None) -> ImageData:
    """Load a data set.

    Args:
        spec: a registered name, or ``folder:PATH`` for ``PATH/train/CLASS/*.jpg|png`` and ``PATH/test/CLASS/...``.
        data_dir: where a registered data set lies or is downloaded to; ``~/.cache/lowbit`` when None.
        image_size: resize the images of a folder to this height and width.

    Raises:
        UsageError: no such data set or folder, or an option that it does not take.
        LowbitError: a file is missing, unreadable or of the wrong size, or a download failed.
    """
    kind, colon, path = spec.partition(":")
    if colon:
        if kind != "folder" or not path:
            raise UsageError(f"data '{spec}' is neither a data set's name nor folder:PATH")
        if data_dir is not None:
            raise UsageError(f"--data-dir is for registered data sets; '{spec}' names its folder itself: leave it out")
        from lowbit.data.folder import load_folder

        return load_folder(Path(path).expanduser(), image_size=image_size)
    function = registry[spec]
    if image_size is not None:
        raise UsageError(f"--image-size is for folder:PATH only; '{spec}' has its own size")
    return function(Path(data_dir if data_dir is not None else DEFAULT_DIR).expanduser())
