"""The device and the precision that a run depends on."""

from __future__ import annotations

import ctypes

import torch

from lowbit.hardware import cpu_flags

# Lightning's names of the precisions.
PRECISIONS = {"bf16": "bf16-mixed", "float32": "32-true"}

# glibc's M_TRIM_THRESHOLD, M_TOP_PAD and M_MMAP_THRESHOLD (malloc.h), in bytes. A threshold of -1 is none: the largest
# that mallopt takes, an int, is less than a step of a wide network frees at once.
MALLOC_OPTIONS = ((-1, -1), (-2, 2**28), (-3, 2**25))


def auto_precision(device: torch.device) -> str:
    """``bf16`` where its products are fast: a GPU that has it, a CPU with AMX or AVX-512 BF16; else ``float32``."""
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    return "bf16" if {"amx_bf16", "avx512_bf16"} & cpu_flags() else "float32"


def device_name(device: torch.device) -> str:
    """Name of the GPU, or ``cpu``."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


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
