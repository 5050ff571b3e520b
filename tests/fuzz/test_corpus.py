"""Everything that fuzzing found, and the files that reach the most code, are loaded and run again."""

from __future__ import annotations

from pathlib import Path

import pytest
from target import exercise

CORPUS = Path(__file__).with_name("corpus")


@pytest.mark.parametrize("kind", ["refused", "loaded unchecked", "large", "run"])
def test_corpus_is_refused_or_runs(kind, monkeypatch):
    """Each kind of outcome is there: a corpus that is all refused would test nothing."""
    monkeypatch.setenv("LOWBIT_ISA", "")  # exercise sets it
    outcomes = [exercise(path.read_bytes()) for path in sorted(CORPUS.iterdir())]
    assert kind in outcomes
