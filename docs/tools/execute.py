"""Run the Python blocks of a Markdown page, in order and in one namespace, and keep what they print."""

from __future__ import annotations

import contextlib
import io
import os
import re
from pathlib import Path

_BLOCK = re.compile(r"^```python\n(.*?)^```\n", re.DOTALL | re.MULTILINE)


def run_blocks(markdown: str, folder: Path, source: str) -> list[str]:
    """What each ```` ```python ```` block of ``markdown`` prints, run in ``folder``.

    An error is raised as it is; ``source`` and the line in the page stand in its traceback.
    """
    printed = []
    names: dict[str, object] = {"__name__": "__main__"}
    before = Path.cwd()
    os.chdir(folder)
    try:
        for match in _BLOCK.finditer(markdown):
            blank = "\n" * (markdown[: match.start()].count("\n") + 1)
            with contextlib.redirect_stdout(io.StringIO()) as output:
                exec(compile(blank + match[1], source, "exec"), names)
            printed.append(output.getvalue())
    finally:
        os.chdir(before)
    return printed


def with_output(markdown: str, printed: list[str]) -> str:
    """``markdown`` with each block followed by what it printed."""
    outputs = iter(printed)

    def append(match: re.Match[str]) -> str:
        text = next(outputs).rstrip()
        return match[0] + (f'\n```{{.text .output title="Output"}}\n{text}\n```\n' if text else "")

    return _BLOCK.sub(append, markdown)
