"""The files that fuzz_packed.py found to reach the most code of loader and engine are loaded and run again."""

from __future__ import annotations

from pathlib import Path

from target import exercise

CORPUS = Path(__file__).with_name("corpus")


def test_corpus_is_refused_or_runs(monkeypatch):
    """A corpus that was all refused would test nothing."""
    monkeypatch.setenv("LOWBIT_ISA", "")  # which exercise sets
    outcomes = [exercise(path.read_bytes()) for path in sorted(CORPUS.iterdir())]
    assert {"refused", "loaded unchecked", "run"} <= set(outcomes)
    assert outcomes.count("run") > len(outcomes) / 4
