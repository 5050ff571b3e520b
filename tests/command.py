"""The command line, as its users run it."""

from __future__ import annotations

import contextlib
import io
import subprocess
import sys
from pathlib import Path

import pytest

from lowbit.cli import main


def lowbit(*arguments: str | Path, status: int = 0) -> subprocess.CompletedProcess[str]:
    """Run ``lowbit`` in a process of its own; it must end with ``status`` and without a traceback."""
    done = subprocess.run(
        [sys.executable, "-c", "from lowbit.cli import main; main()", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == status, done.stderr
    assert "Traceback" not in done.stderr
    return done


def called(*arguments: str | Path, status: int = 0) -> subprocess.CompletedProcess[str]:
    """The same in this process, which has imported torch already: for what is said, not for how a process starts."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as ended:
        main(list(map(str, arguments)))
    assert (ended.value.code or 0) == status, err.getvalue()
    return subprocess.CompletedProcess(arguments, status, out.getvalue(), err.getvalue())
