"""How the C library handles the memory of long computations."""

from __future__ import annotations

import ctypes

# glibc's M_TRIM_THRESHOLD, M_TOP_PAD and M_MMAP_MAX (malloc.h): nothing is given back, the heap grows by 256 MiB at
# least, and all pieces lie in it. Thresholds in bytes would not do: the largest that mallopt takes are 2 GiB, less than
# a step of a wide network frees, and 32 MiB, less than one of its tensors has.
MALLOC_OPTIONS = ((-1, -1), (-2, 2**28), (-4, 0))


def keep_freed_memory() -> None:
    """Let the C library keep what training frees, in place of giving it back to the system at every step.

    A step on a CPU frees and takes the same hundreds of megabytes again; when each large piece is a mapping of its own,
    the system clears all of its pages each time. Acts on glibc only; the process then holds on to its largest use.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    for parameter, value in MALLOC_OPTIONS:
        mallopt(parameter, value)
