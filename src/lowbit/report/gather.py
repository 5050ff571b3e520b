"""What the page shows of each run, read from its folder and checked."""

from __future__ import annotations

import json
import math
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lowbit.report.costs import Costs, read_costs
from lowbit.report.diagnostics import Diagnostics, read_diagnostics
from lowbit.report.statistics import McNemar, mcnemar
from lowbit.runs import Run, follows_training, is_of_data

Config = dict[str, Any]
Evaluation = dict[str, Any]
SCORES = ("precision", "recall", "f1")
CURVES = ("learning_rate", "train_loss", "test_loss", "test_accuracy", "val_accuracy")
RESULTS_IN_CONFIG = ("best", "best_test", "started")


@dataclass(frozen=True)
class Entry:
    """One run on the page.

    Attributes:
        label: the run's name, made unique among the runs of the page.
        rows: of ``metrics.csv``, those with an epoch; empty before the first.
        evaluation: contents of ``evaluation.json``, or None.
        diagnostics: contents of ``diagnostics.json``, or None.
        costs: contents of ``export.json`` and ``latency.json``, as far as there are any.
        notes: sentences about what is missing.
    """

    label: str
    config: Config
    rows: list[dict[str, float]]
    evaluation: Evaluation | None
    diagnostics: Diagnostics | None
    costs: Costs
    notes: list[str]

    @property
    def data_hash(self) -> Any:
        """Of the images that the run was evaluated on: its own ones, unless the evaluation says otherwise."""
        own = self.config.get("data", {}).get("hash")
        return (self.evaluation or {}).get("data_hash") or own

    def curves(self) -> dict[str, list[float | None]]:
        """``epoch`` and each of `CURVES` by epoch; None where there is no finite number."""
        return {name: [finite(row.get(name)) for row in self.rows] for name in ("epoch", *CURVES)}

    def best(self, column: str) -> dict[str, float] | None:
        """The first epoch with the highest ``column``: its ``epoch``, that ``value`` and its ``test_accuracy``."""
        rows = [row for row in self.rows if finite(row.get(column)) is not None]
        if not rows:
            return None
        row = max(rows, key=lambda row: row[column])
        return {"epoch": row["epoch"], "value": row[column], "test_accuracy": row.get("test_accuracy", math.nan)}


def gather(runs: Sequence[Run]) -> list[Entry]:
    """Read all runs.

    Raises:
        LowbitError: a file is damaged. A missing one only leads to a note.
    """
    return [_entry(run, label) for run, label in zip(runs, _labels(runs), strict=True)]


def finite(value: Any) -> float | None:
    """``value`` if it is a finite number, else None."""
    # By comparison: `math.isfinite` fails for an integer that is no float.
    return value if isinstance(value, int | float) and abs(value) <= sys.float_info.max else None


def _entry(run: Run, label: str) -> Entry:
    config, notes = run.config, []
    rows: list[dict[str, float]] = []
    if run.metrics_path.is_file():
        rows = [row for row in run.metrics() if finite(row.get("epoch")) is not None]
    epochs = config.get("epochs")
    if not rows and "calibration" in config:
        notes.append("has no curves: it was calibrated, not trained")
    elif not rows:
        notes.append("has no curves: its first epoch is not finished")
    elif isinstance(epochs, int) and len(rows) < epochs:
        notes.append(f"is in progress or was stopped: {len(rows)} of {epochs} epochs are finished")
    evaluation = run.evaluation
    if evaluation is None:
        notes.append(f"has no evaluation.json: run `lowbit evaluate {run.path}` for its accuracy, matrix and scores")
    else:
        _check(evaluation, run)
        if "finished" in config and not follows_training(evaluation, config):
            notes.append(f"was evaluated before its training ended: run `lowbit evaluate {run.path}` again")
        if not is_of_data(evaluation.get("data_hash"), config):
            notes.append(f"was evaluated on other images than its own: run `lowbit evaluate {run.path}` again")
    return Entry(label, config, rows, evaluation, read_diagnostics(run), read_costs(run), notes)


def _labels(runs: Sequence[Run]) -> list[str]:
    """Names of the runs; those that occur twice with their parent folder, and a number if that is not enough."""
    names = Counter(run.name for run in runs)
    labels = [run.name if names[run.name] == 1 else f"{run.path.resolve().parent.name}/{run.name}" for run in runs]
    totals, seen = Counter(labels), Counter[str]()
    for i, label in enumerate(labels):
        seen[label] += 1
        if totals[label] > 1:
            labels[i] = f"{label} ({seen[label]})"
    return labels


def _check(evaluation: Any, run: Run) -> None:
    """Refuse an evaluation that the page could not show."""
    try:
        classes, matrix = evaluation["classes"], evaluation["confusion_matrix"]
        sound = (
            all(isinstance(name, str) for name in classes)
            and len(matrix) == len(classes) == len(evaluation["per_class"])
            and all(len(row) == len(classes) and all(type(n) is int and n >= 0 for n in row) for row in matrix)
            and len(evaluation["predictions"]) == len(evaluation["labels"]) == evaluation["total"]
            and all(finite(e[key]) is not None for e in evaluation["per_class"] for key in SCORES)
            and finite(evaluation["accuracy"]) is not None
            and isinstance(evaluation["correct"], int)
        )
    except (KeyError, TypeError):
        sound = False
    if not sound:
        raise run.damaged_evaluation()


def test_between(first: Entry, second: Entry) -> McNemar | str:
    """McNemar's test between two runs, or the reason why there is none."""
    a, b = first.evaluation, second.evaluation
    if a is None or b is None:
        return f"{(second if a else first).label} is not evaluated"
    if a["classes"] != b["classes"]:
        return "the runs have different classes"
    if a["labels"] != b["labels"] or first.data_hash != second.data_hash:
        return "the runs were evaluated on different data"
    return mcnemar(a["labels"], a["predictions"], b["predictions"])


def settings(entries: Sequence[Entry]) -> dict[str, list[str | None]]:
    """Every setting of the configs by its dotted name, with one value per run; None where a run does not have it."""
    flat = [
        _flatten({key: value for key, value in entry.config.items() if key not in RESULTS_IN_CONFIG})
        for entry in entries
    ]
    names = dict.fromkeys(name for values in flat for name in values)
    return {name: [values.get(name) for values in flat] for name in names}


def _flatten(config: Config, prefix: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for key, value in config.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value if isinstance(value, str) else json.dumps(value)
    return flat
