"""An evaluation record as tables on the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

MOST_CLASSES = 50


def render(record: dict[str, Any], console: Console) -> None:
    """Print loss, accuracy, confusion matrix, row-normalised matrix and scores per class of ``evaluation.json``.

    Of more than `MOST_CLASSES` the matrices, which no terminal would hold, are left to the file.
    """
    classes = record["classes"]
    console.print(_headline(record))
    matrices = {
        "confusion_matrix": ("Confusion matrix (rows: true class)", "d"),
        "normalised": ("Normalised by row", ".3f"),
    }
    if len(classes) > MOST_CLASSES:
        console.print(f"The confusion matrix of {len(classes)} classes is in the record.")
        matrices = {}
    for table in (
        *(_matrix(title, classes, record[key], form) for key, (title, form) in matrices.items()),
        _scores(record),
    ):
        needed = Measurement.get(console, console.options.update(max_width=1 << 16), table).minimum
        console.print()
        console.print(table, width=max(console.width, needed), crop=False)


def _headline(record: dict[str, Any]) -> Text:
    return Text.assemble(
        (str(record["run"]), "bold"),
        f": average loss {record['loss']:.4f}, accuracy {record['correct']}/{record['total']} (",
        (f"{100 * record['accuracy']:.2f} %", "bold"),
        ")",
    )


def _matrix(title: str, classes: Sequence[str], rows: Sequence[Sequence[float]], form: str) -> Table:
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, padding=(0, 0, 0, 1))
    table.add_column("", min_width=max(map(len, classes)))
    width = max(len(f"{value:{form}}") for row in rows for value in row)
    for name in classes:
        table.add_column(Text(name), justify="right", overflow="fold", min_width=width)
    for i, (name, row) in enumerate(zip(classes, rows, strict=True)):
        styles = ["bold" if i == j else "dim" if value == 0 else "" for j, value in enumerate(row)]
        table.add_row(Text(name), *(Text(f"{v:{form}}", style) for v, style in zip(row, styles, strict=True)))
    return table


def _scores(record: dict[str, Any]) -> Table:
    table = Table(title="Scores per class", title_justify="left", box=None, pad_edge=False)
    rows = [(entry["class"], entry) for entry in record["per_class"]]
    averages = [(f"{name} average", entry) for name, entry in record["averages"].items()]
    table.add_column("", min_width=max(len(label) for label, _ in rows + averages))
    for name in ("precision", "recall", "f1", "support"):
        table.add_column(name, justify="right", min_width=max(5, len(name)))
    for i, (name, entry) in enumerate(rows + averages):
        cells = (f"{entry[key]:.3f}" for key in ("precision", "recall", "f1"))
        table.add_row(Text(name), *cells, f"{entry['support']}", end_section=i == len(rows) - 1)
    return table
