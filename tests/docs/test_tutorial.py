"""The Python on the executed pages runs as it stands there."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.parametrize("name", ["tutorial.md", "backpropagation.md"])
def test_the_page_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(DOCS / "tools"))
    from execute import run_blocks, with_output

    monkeypatch.setenv("LOWBIT_TUTORIAL_EPOCHS", "1")
    markdown = (DOCS / name).read_text(encoding="utf-8")
    printed = run_blocks(markdown, tmp_path, name)
    assert all(printed[:-1])
    assert with_output(markdown, printed).count('title="Output"') == len([text for text in printed if text.strip()])
    if name == "tutorial.md":
        everything = "".join(printed)
        same, of = re.findall(r"same class: (\d+) of (\d+)", everything)[0]
        assert same == of
        assert (tmp_path / "report.html").is_file()
        float_bytes, binary_bytes = re.findall(r"bytes: float ([\d,]+), xnor_net ([\d,]+)", everything)[0]
        assert 10 * int(binary_bytes.replace(",", "")) < int(float_bytes.replace(",", ""))
    del sys.modules["execute"]
