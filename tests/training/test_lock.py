"""One process to a run folder; a killed one keeps nobody out."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from lowbit.errors import LowbitError
from lowbit.training import TrainConfig, train
from lowbit.training.lock import LOCK, sole_process


def test_a_second_process_is_refused_in_a_sentence(tmp_path: Path) -> None:
    out = tmp_path / "run"
    with sole_process(out), pytest.raises(LowbitError, match=r"another process is at work in .*run; wait"):
        train(TrainConfig(out=out, method="float", model="lenet", resume=True, progress=False))
    assert not out.exists()


def test_the_lock_of_a_killed_process_keeps_nobody_out(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys\nfrom pathlib import Path\nfrom lowbit.training.lock import sole_process\n"
        "with sole_process(Path(sys.argv[1])): os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False).returncode == -9
    assert (tmp_path / LOCK).is_file()
    with sole_process(tmp_path) as abandoned:
        assert abandoned
        (tmp_path / "kept").touch()
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(LowbitError, match="cannot write"), sole_process(tmp_path / "file" / "run"):
        pass
