"""Fuzz the packed file's loader and the engine, guided by the coverage of both.

    pip install atheris nanobind
    python tests/fuzz/fuzz_packed.py --minutes 10

Needs clang with its sanitizers, cmake and ninja. The engine is built in build/fuzz with the address and
undefined-behaviour sanitizers; lowbit's Python is instrumented as it is imported. Files that reach new code are added
to build/fuzz/corpus, findings are left in build/fuzz/finding-*; give such a file as an argument to see one again.
"""

from __future__ import annotations

import argparse
import collections
import importlib.util
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
BUILD = ROOT / "build" / "fuzz"
CORPUS = Path(__file__).with_name("corpus")
SANITIZERS = "-fsanitize=address,undefined,fuzzer-no-link -fno-sanitize=vptr,function -fno-sanitize-recover=undefined"


def build() -> Path:
    """The native module, instrumented."""
    options = ["-DCMAKE_CXX_COMPILER=clang++", "-DCMAKE_BUILD_TYPE=None", f"-DCMAKE_CXX_FLAGS=-O1 -g {SANITIZERS}"]
    configure = ["cmake", "-S", ROOT, "-B", BUILD, "-G", "Ninja", f"-DPython_EXECUTABLE={sys.executable}", *options]
    subprocess.run(configure, check=True, stdout=subprocess.DEVNULL)
    subprocess.run(["cmake", "--build", BUILD], check=True)
    return next(BUILD.glob("_engine*.so"))


def run(module: Path, options: list[str]) -> int:
    """Run this file again, with the sanitizers loaded before Python and the instrumented module in place."""
    atheris = Path(importlib.util.find_spec("atheris").origin).parent
    runtime = atheris.parent / "asan_with_fuzzer.so"
    hook = next(atheris.glob("custom_mutator.*.so"))  # libFuzzer looks for a mutator when it is loaded, not later
    environment = os.environ | {
        "LD_PRELOAD": f"{runtime}:{hook}",
        "LOWBIT_FUZZ": str(module),
        "PYTHONPATH": str(ROOT / "src"),
        "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
    }
    return subprocess.run([sys.executable, __file__, *options], env=environment, check=False).returncode


def fuzz() -> None:
    import atheris

    with atheris.instrument_imports(include=["lowbit.packed", "lowbit.runtime", "lowbit.preprocessing"]):
        import lowbit

        spec = importlib.util.spec_from_file_location("lowbit._engine", os.environ["LOWBIT_FUZZ"])
        lowbit._engine = sys.modules["lowbit._engine"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(lowbit._engine)
        from target import exercise, mutate
    counts: collections.Counter[str] = collections.Counter()

    def one_input(data: bytes) -> None:
        counts[exercise(data)] += 1
        if counts.total() % 1000 == 0:
            print(counts.total(), dict(counts), flush=True)

    def change(data: bytes, most: int, seed: int) -> bytes:
        rng = random.Random(seed)
        changed = mutate(bytes(data), rng) if rng.random() < 0.8 else None
        return atheris.Mutate(data, most) if changed is None or len(changed) > most else changed

    atheris.Setup(sys.argv, one_input, custom_mutator=change)
    atheris.Fuzz()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("file", nargs="*", help="Run these files instead.")
    arguments = parser.parse_args()
    module = build()
    limits = ["-timeout=20", "-rss_limit_mb=4096", "-malloc_limit_mb=2048", f"-artifact_prefix={BUILD}/finding-"]
    if arguments.file:
        return run(module, [*limits, *arguments.file])
    shutil.copytree(CORPUS, BUILD / "corpus", dirs_exist_ok=True)
    seconds = int(arguments.minutes * 60)
    return run(
        module, [*limits, f"-max_total_time={seconds}", "-max_len=16384", "-print_final_stats=1", str(BUILD / "corpus")]
    )


if __name__ == "__main__":
    if "LOWBIT_FUZZ" in os.environ:
        fuzz()
    else:
        raise SystemExit(main())
