"""kernels_test.cpp, compiled and run: here for every instruction set of this CPU, and for aarch64 in qemu.

Debian's packages for the latter are g++-aarch64-linux-gnu and qemu-user. Where a CPU has AVX2 but not AVX-VNNI, the one
instruction that this adds is computed by others, so that the loops around it run everywhere.
"""

from __future__ import annotations

import platform
import shutil
import subprocess
from pathlib import Path

import pytest

from lowbit import _engine

ROOT = Path(__file__).parents[2]
KERNELS = ROOT / "engine" / "src" / "kernels"
NATIVE_IS_X86 = platform.machine() in ("x86_64", "AMD64")


def equal_to_scalar(
    folder: Path, compiler: str, x86: bool, options: tuple[str, ...], emulator: tuple[str, ...]
) -> list[str]:
    """The tables that ran and gave what the scalar one gives, the best first."""
    portable = {"scalar", "select"}
    names = {path.stem for path in KERNELS.glob("*.cpp")} - portable
    simd = sorted(names - {"neon"} if x86 else names & {"neon"})
    sources = [KERNELS / f"{name}.cpp" for name in (*sorted(portable), *simd)]
    definitions = [f"-DLOWBIT_{name.upper()}" for name in simd]
    includes = [f"-I{ROOT / 'engine' / folder}" for folder in ("src", "include")]
    flags = ["-std=c++20", "-O1", "-Wall", "-Wextra", "-Werror", "-ffp-contract=off", *options, *definitions, *includes]
    program = folder / "kernels_test"
    subprocess.run(
        [compiler, *flags, Path(__file__).with_name("kernels_test.cpp"), *sources, "-o", program], check=True
    )
    done = subprocess.run([*emulator, program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout.split()


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_every_table_of_this_cpu_equals_the_scalar_one(tmp_path):
    sanitizers = ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined")
    ran = equal_to_scalar(tmp_path, "g++", NATIVE_IS_X86, sanitizers, ())
    assert [*ran, "scalar"] == _engine.available_isas()


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
@pytest.mark.skipif("avx2" not in _engine.available_isas(), reason="needs a CPU with AVX2")
def test_avx_vnni_with_its_instruction_made_of_others_equals_the_scalar_table(tmp_path):
    made = ("-include", str(Path(__file__).with_name("made_of_avx2.h")), "-fsanitize=address,undefined")
    assert "avx_vnni" in equal_to_scalar(tmp_path, "g++", True, made, ())


@pytest.mark.skipif(
    not shutil.which("aarch64-linux-gnu-g++") or not shutil.which("qemu-aarch64"),
    reason="needs aarch64-linux-gnu-g++ and qemu-aarch64 (Debian: g++-aarch64-linux-gnu, qemu-user)",
)
def test_neon_equals_the_scalar_table(tmp_path):
    assert equal_to_scalar(tmp_path, "aarch64-linux-gnu-g++", False, ("-static",), ("qemu-aarch64",)) == ["neon"]
