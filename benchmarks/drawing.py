"""What the figures share: readable on a light and on a dark page, and the same file for the same figures."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

INK, FAINT = "#808080", "#80808066"
# Colours of Okabe and Ito; the shapes tell them apart without.
MARKS = {
    "engine": ("#0072b2", "o"),
    "8-bit rest": ("#56b4e9", "o"),
    "int8": ("#d55e00", "s"),
    "bf16": ("#cc79a7", "^"),
    "float32": (INK, "D"),
    "binary": ("#009e73", "v"),
    "plain": ("#e69f00", "P"),
}


def pyplot() -> Any:
    """matplotlib's pyplot, its ink grey and its paper transparent."""
    matplotlib: Any = importlib.import_module("matplotlib")
    matplotlib.use("svg")
    inks = ("text.color", "axes.labelcolor", "axes.edgecolor", "axes.titlecolor", "xtick.color", "ytick.color")
    matplotlib.rcParams |= {"svg.hashsalt": "lowbit", "font.size": 8, **dict.fromkeys(inks, INK)}
    return importlib.import_module("matplotlib.pyplot")


def ticker() -> Any:
    """matplotlib's ticker."""
    return importlib.import_module("matplotlib.ticker")


def save(figure: Any, path: Path) -> None:
    """Write ``figure`` as SVG, and let go of it."""
    figure.savefig(path, metadata={"Date": None}, transparent=True)
    pyplot().close(figure)
