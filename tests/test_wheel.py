"""The wheel runs a packed file where there is no torch, and is complete without the SIMD kernels."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent / "engine"))
from packed_models import vgg

from lowbit.preprocessing import Preprocessing
from lowbit.runtime import Engine

ROOT = Path(__file__).parents[1]
HAS_BUILD_TOOLS = all(importlib.util.find_spec(name) for name in ("nanobind", "scikit_build_core"))


def run(*command, **options) -> str:
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True, **options)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    return result.stdout


def build_wheel(folder: Path, *settings: str) -> Path:
    isolation = ["--no-build-isolation"] if HAS_BUILD_TOOLS else []
    options = [option for setting in settings for option in ("-C", setting)]
    run(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", *isolation, "-w", folder, *options, ROOT)
    (wheel,) = folder.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def packed_file(tmp_path_factory):
    model = vgg(np.random.default_rng(1), (16, 24, "M"), 8, classes=3)
    model.preprocessing = Preprocessing("RGB", (8, 8), 0, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
    model.classes = ["ant", "bee", "cow"]
    path = tmp_path_factory.mktemp("packed") / "model.lowbit"
    model.save(path)
    return path


def for_other_machines(wheel: Path) -> Path:
    """The wheel as `make wheel` leaves it: its name says where it runs."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    run(
        sys.executable,
        "-m",
        "auditwheel",
        "repair",
        "-w",
        wheel.parent / "dist",
        wheel,
        env=os.environ | {"PATH": path},
    )
    (repaired,) = (wheel.parent / "dist").glob("*.whl")
    return repaired


def test_wheel_predicts_in_a_fresh_environment_without_torch(tmp_path, packed_file):
    wheel = for_other_machines(build_wheel(tmp_path))
    assert "-manylinux_2_" in wheel.name
    assert f"-{'abi3' if sys.version_info >= (3, 12) else 'cp311'}-" in wheel.name
    venv.create(tmp_path / "venv", with_pip=False)
    python = tmp_path / "venv" / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "-q", wheel)
    assert run(python, "-c", "import importlib.util as u; print(u.find_spec('torch'))", cwd=tmp_path).strip() == "None"
    picture = Image.fromarray(np.random.default_rng(2).integers(0, 256, (12, 9, 3), dtype=np.uint8))
    picture.save(tmp_path / "picture.png")
    command = [python.parent / "lowbit", "predict", packed_file, tmp_path / "picture.png", "--json"]
    (row,) = json.loads(run(*command, cwd=tmp_path))
    expected = Engine(packed_file).predict([picture])[0]
    assert row["class"] == ["ant", "bee", "cow"][expected.argmax()]
    assert row["probability"] == pytest.approx(expected.max(), abs=1e-4)
    (row,) = json.loads(run(command[0], "predict", "digits-1bit", tmp_path / "picture.png", "--json", cwd=tmp_path))
    assert row["class"] in "0123456789"
    listed = json.loads(run(command[0], "models", "--pretrained", "--json", cwd=tmp_path))
    assert "digits-1bit" in [each["name"] for each in listed]


def test_wheel_without_simd_kernels_runs_the_scalar_ones(tmp_path, packed_file):
    settings = ("cmake.define.LOWBIT_SIMD=OFF", "cmake.build-type=Debug", f"build-dir={tmp_path / 'build'}")
    wheel = build_wheel(tmp_path, *settings)
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    np.save(tmp_path / "x.npy", np.random.default_rng(3).normal(size=(2, 3, 8, 8)).astype(np.float32))
    code = f"""
import sys; sys.path.insert(0, {str(tmp_path / "site")!r})
import numpy as np
from lowbit import _engine
from lowbit.runtime import Engine
assert _engine.__file__.startswith({str(tmp_path)!r}) and _engine.available_isas() == ["scalar"]
engine = Engine({str(packed_file)!r})
np.save("logits.npy", engine(np.load("x.npy")))
print(engine.isa)
"""
    site = Path(np.__file__).parents[1]  # the wheel's dependencies, without this environment's editable lowbit
    code = f"import sys; sys.path.append({str(site)!r})\n{code}"
    assert run(sys.executable, "-I", "-S", "-c", code, cwd=tmp_path).strip() == "scalar"
    logits = np.load(tmp_path / "logits.npy")
    np.testing.assert_allclose(logits, Engine(packed_file)(np.load(tmp_path / "x.npy")), rtol=1e-4, atol=1e-4)
