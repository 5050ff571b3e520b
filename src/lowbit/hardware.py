"""What a figure was measured on: the processor, and the versions of what computed it."""

from __future__ import annotations

import functools
import os
import platform
from importlib import metadata
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")

# What tells kinds of a CPU apart, by its entry in /proc/cpuinfo of x86.
KIND = {"family": "cpu family", "model": "model"}


def cpu_name() -> str:
    """Name of the CPU with its family and model, where it tells: virtual machines give many kinds one name."""
    name = _cpuinfo("model name")
    kind = ", ".join(f"{key} {value}" for key, entry in KIND.items() if (value := _cpuinfo(entry)))
    return (f"{name} ({kind})" if kind else name) or platform.processor() or platform.machine()


def cpu_flags() -> frozenset[str]:
    """Instruction set extensions, as Linux names them; empty on other systems."""
    return frozenset(_cpuinfo("flags").split())


def cpu_vendor() -> str:
    """Maker of an x86 CPU, as it names itself: ``GenuineIntel``, ``AuthenticAMD``; empty on other systems."""
    return _cpuinfo("vendor_id")


def versions(*packages: str) -> dict[str, str]:
    """Versions of Python, of lowbit and of ``packages``, by name."""
    found = {"python": platform.python_version()}
    for package in ("lowbit", *packages):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed as a package"
    return found


def machine(device: str = "cpu") -> dict[str, str | int | None]:
    """What a run records of where it was computed: CPU, processors, and the device's name."""
    return {"cpu": cpu_name(), "cores": os.cpu_count(), "device": device}


def _cpuinfo(key: str) -> str:
    """The first processor's entry in /proc/cpuinfo; empty where there is none."""
    return _entries().get(key, "")


@functools.cache
def _entries() -> dict[str, str]:
    try:
        lines = CPUINFO.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return {}
    pairs = (line.partition(":") for line in reversed(lines))  # so that the first processor's stay
    return {key.strip(): value.strip() for key, _, value in pairs}
