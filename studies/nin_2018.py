"""Draw the 2018 training curve of the binary NIN on CIFAR-10 beside those of our NIN runs, into results/nin_2018.svg.

    python studies/nin_2018.py

The 2018 points are in results/nin_2018.csv; ours are the run folders in results/cifar10* with the model ``nin``.
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import drawing

from lowbit.runs import Run

RESULTS = Path(__file__).parents[1] / "results"
COLUMNS = {"train_loss": ("Train loss", 1), "test_accuracy": ("Test accuracy (%)", 100)}
Rows = list[dict[str, float]]


def nin_runs(results: Path) -> list[Run]:
    """Run folders in ``results`` on CIFAR-10 whose model is ``nin`` and which have a curve."""
    runs = [Run(path.parent) for path in sorted(results.glob("cifar10*/*/config.json"))]
    return [run for run in runs if run.config["model"]["name"] == "nin" and (run.path / "metrics.csv").is_file()]


def curves(results: Path = RESULTS) -> dict[str, Rows]:
    """Rows with ``epoch``, ``train_loss`` and ``test_accuracy``, by label; the 2018 curve first."""
    with (results / "nin_2018.csv").open(newline="", encoding="utf-8") as file:
        of_2018 = [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]
    ours = {f"lowbit, {run.name} ({run.config['epochs']} epochs)": run.metrics() for run in nin_runs(results)}
    return {"2018, 320 epochs": of_2018, **ours}


def draw(found: dict[str, Rows], path: Path) -> None:
    """One panel per column of `COLUMNS`, epochs on a logarithmic axis because the runs differ in length."""
    figure, panels = drawing.pyplot().subplots(1, len(COLUMNS), figsize=(10, 3.8), layout="constrained")
    for panel, (column, (title, factor)) in zip(panels, COLUMNS.items(), strict=True):
        for index, (label, rows) in enumerate(found.items()):
            shown = [row for row in rows if column in row]
            style = (
                {"marker": "o", "linestyle": "--", "color": drawing.INK} if index == 0 else {"color": f"C{index - 1}"}
            )
            panel.plot([row["epoch"] for row in shown], [factor * row[column] for row in shown], label=label, **style)
        panel.set(xscale="log", xlabel="epoch", title=title)
        panel.xaxis.set_major_formatter(drawing.ticker().ScalarFormatter())
        panel.grid(color=drawing.FAINT)
    panels[-1].legend(frameon=False)
    drawing.save(figure, path)


def main() -> None:
    found = curves()
    if len(found) == 1:
        print("results/cifar10* hold no run of the model nin: nothing to draw")
        return
    draw(found, RESULTS / "nin_2018.svg")
    print(f"wrote results/nin_2018.svg: {', '.join(found)}")


if __name__ == "__main__":
    main()
