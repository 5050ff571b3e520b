"""One process to a folder."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from lowbit.errors import LowbitError

LOCK = ".lock"
# Seconds to wait for one that is ending.
PATIENCE = 0.5


@contextlib.contextmanager
def sole_process(folder: Path) -> Iterator[bool]:
    """Make ``folder`` and keep other processes out of it; afterwards it is removed if it is still empty.

    The operating system holds the lock for this process and drops it when the process ends, however it ends: a lock
    file that a killed process left behind keeps nobody out.

    Yields:
        Whether there was such a lock file, so that what else is there may be half-done.

    Raises:
        LowbitError: another process is in there, or the folder cannot be written.
    """
    path = folder / LOCK
    lock = FileLock(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        abandoned = path.exists()
        lock.acquire(timeout=PATIENCE)
    except Timeout:
        raise LowbitError(
            f"another process is at work in {folder}; wait until it has ended, or choose another folder"
        ) from None
    except OSError as error:
        raise LowbitError(f"cannot write {folder}: {error.strerror or error}; choose another place") from error
    try:
        yield abandoned
    finally:
        # Removed while it is held: who opened it in this moment sees that it is gone, and tries again.
        path.unlink(missing_ok=True)
        lock.release()
        with contextlib.suppress(OSError):
            folder.rmdir()


def visible(folder: Path) -> set[str]:
    """Names of what is in ``folder``, without the lock and the unfinished files of `lowbit.files.write_whole`."""
    return {entry.name for entry in folder.iterdir() if not entry.name.startswith(".")}
