"""Files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from lowbit.errors import LowbitError

PARTIAL = ".partial"  # how names of unfinished files end


@contextlib.contextmanager
def write_whole(path: Path) -> Iterator[IO[bytes]]:
    """Open a file for writing that appears under ``path`` complete or not at all.

    The bytes go to a temporary file beside it, are flushed to the disk, and take the name in one step, which is flushed
    as well. A link stays: what it points to is written.

    Raises:
        LowbitError: the disk is full, the folder cannot be written, or ``path`` is a folder or a device; what was
            there is untouched.
    """
    temporary = None
    try:
        if path.exists() and not path.is_file():
            raise LowbitError(f"{path} is {'a folder' if path.is_dir() else 'no regular file'}; choose another name")
        target = Path(os.path.realpath(path))
        target.parent.mkdir(parents=True, exist_ok=True)
        unfinished = target.with_name(f".{target.name}.{secrets.token_hex(4)}{PARTIAL}")
        with unfinished.open("xb") as file:
            temporary = unfinished
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
        temporary = None
        _flush_names(target.parent)
    except OSError as error:
        raise LowbitError(
            f"cannot write {path}: {error.strerror or error}; free some space or choose another place"
        ) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def _flush_names(folder: Path) -> None:
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def remove_partial_files(*folders: Path) -> None:
    """Delete what a killed process left unfinished in ``folders``, in which nobody else may be writing."""
    for folder in folders:
        for path in folder.glob(f".*{PARTIAL}"):
            path.unlink()
