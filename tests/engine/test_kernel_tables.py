"""kernels_test.cpp, compiled and run: here for every instruction set of this CPU, and for aarch64 in qemu.

Debian's packages for the latter are g++-aarch64-linux-gnu and qemu-user. Where a CPU has AVX2 but not AVX-VNNI, or
AVX-512 but not AMX, the instructions that these add are computed by others, so that the loops around them run, too.
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
@pytest.mark.parametrize(("isa", "made_of"), [("avx_vnni", "avx2"), ("amx", "avx512_vpopcntdq")])
def test_a_table_with_its_instructions_made_of_others_equals_the_scalar_one(tmp_path, isa, made_of):
    if made_of not in _engine.available_isas():
        pytest.skip(f"needs a CPU with what {made_of} takes")
    header = Path(__file__).with_name(f"{isa}_made_of_{made_of}.h")
    made = ("-include", str(header), "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined")
    assert isa in equal_to_scalar(tmp_path, "g++", True, made, ())


@pytest.mark.skipif(
    not shutil.which("aarch64-linux-gnu-g++") or not shutil.which("qemu-aarch64"),
    reason="needs aarch64-linux-gnu-g++ and qemu-aarch64 (Debian: g++-aarch64-linux-gnu, qemu-user)",
)
def test_neon_equals_the_scalar_table(tmp_path):
    assert equal_to_scalar(tmp_path, "aarch64-linux-gnu-g++", False, ("-static",), ("qemu-aarch64",)) == ["neon"]
