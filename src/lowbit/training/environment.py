"""The device and the precision that a run depends on."""

from __future__ import annotations

import torch

from lowbit.hardware import cpu_flags, cpu_vendor

# Lightning's names of the precisions.
PRECISIONS = {"bf16": "bf16-mixed", "float32": "32-true"}


def auto_precision(device: torch.device) -> str:
    """``bf16`` where it is faster than ``float32``: a GPU that has it, a CPU with AMX, AMD's with AVX-512 BF16.

    Intel's AVX-512 BF16 alone, as in a virtual machine that hides AMX, is slower than their float32.
    """
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    fast = {"amx_bf16", "avx512_bf16"} if cpu_vendor() == "AuthenticAMD" else {"amx_bf16"}
    return "bf16" if fast & cpu_flags() else "float32"


def device_name(device: torch.device) -> str:
    """Name of the GPU, or ``cpu``."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
