"""Write the ledger of docs/results.md: what papers, codes and the runs of 2018 report, beside what we measured.

    python studies/ledger.py

The published figures are those of results/published.toml; ours are read from the run folders in results/cifar10 and
the studies in results/*/results.csv.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowbit import methods
from lowbit.runs import Run, read_json
from lowbit.study.results import read_results

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "results"
PAGE = ROOT / "docs" / "results.md"
BEGIN, END = "<!-- ledger: python studies/ledger.py -->", "<!-- end of the ledger -->"
SAYS = ("paper", "code", "user")
HEAD = (
    "method",
    "test accuracy on",
    "the paper's figure, %",
    "the code's claim, %",
    "2018 runs, %",
    "ours, %",
    "what differs in ours",
)
NAMES = {"cifar10": "CIFAR-10", "fashion_mnist": "Fashion-MNIST"}


@dataclass(frozen=True)
class Ours:
    """One of our results: where it is from, its settings, test accuracy in %, and the copy of the data."""

    place: str
    method: str
    model: str
    options: str
    data: str
    bits_w: int
    bits_a: int
    epochs: int
    start: str
    accuracy: float
    copy: str


def ours(results: Path = RESULTS, copies: dict[str, str] | None = None) -> list[Ours]:
    """All results that are published: run folders and rows of studies."""
    copies = copies or {}
    found = []
    for path in sorted(results.glob("*/*/config.json")):
        run = Run(path.parent)
        config, evaluation = run.config, run.evaluation
        if evaluation is None:
            continue
        method = methods.registry[config["method"]["name"]](**config["method"]["options"])
        options = ", ".join(f"{key} {value}" for key, value in config["model"]["options"].items())
        start = config["calibration"]["source"] if "calibration" in config else config["init_from"]
        found.append(
            Ours(
                f"{path.parent.parent.name}/{run.name}",
                config["method"]["name"],
                config["model"]["name"],
                options,
                config["data"]["name"],
                method.bits_w,
                method.bits_a,
                config["epochs"],
                Path(start).name if start else "",
                100 * evaluation["accuracy"],
                copies.get(config["data"]["hash"], ""),
            )
        )
    for path in sorted(results.glob("*/results.csv")):
        runs = read_json(path.with_name("study.json"))["runs"]
        for row in read_results(path):
            if row.test_accuracy is None:
                continue
            model, _, options = row.model.partition("-")
            recorded = runs.get(f"{row.data}/{row.model}/seed-{row.seed}/{row.row}", {})
            found.append(
                Ours(
                    f"{path.parent.name}/{row.row}",
                    row.method,
                    model,
                    options.replace("-", " "),
                    row.data,
                    row.bits_w,
                    row.bits_a,
                    row.epochs,
                    row.start,
                    100 * row.test_accuracy,
                    copies.get(recorded.get("data", {}).get("hash", ""), ""),
                )
            )
    return found


def nearest(figure: dict[str, Any], results: Iterable[Ours]) -> list[Ours]:
    """Our results with the figure's method, bits and data, the best one first: those with its model, else all."""
    same = [r for r in results if all(getattr(r, key) == figure[key] for key in ("method", "bits_w", "bits_a", "data"))]
    return sorted([r for r in same if r.model == figure["model"]] or same, key=lambda r: r.accuracy, reverse=True)


def ledger(published: dict[str, Any], results: list[Ours]) -> str:
    """The ledger as Markdown: a line for each of our results beside the figures that it is to be held against.

    All figures of a line are of one data set: what we have on another one only is no comparison.
    """
    keys = ("method", "model", "data", "bits_w", "bits_a")
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for figure in published["figure"]:
        groups.setdefault(tuple(figure[key] for key in keys), []).append(figure)
    lines = [HEAD, ("---", "---", "--:", "--:", "--:", "--:", "---")]
    sources: list[str] = []
    for group in groups.values():
        first = group[0]
        cells = []
        for says in SAYS:
            texts = []
            for figure in group:
                if figure["says"] == says:
                    if figure["source"] not in sources:
                        sources.append(figure["source"])
                    texts.append(f"{_accuracy(figure['accuracy'])} ({sources.index(figure['source']) + 1})")
            cells.append(", ".join(texts))
        name = f"`{first['method']}`, {first['model']}, W{first['bits_w']} A{first['bits_a']}"
        data = NAMES.get(first["data"], first["data"])
        epochs = next((figure["epochs"] for figure in group if "epochs" in figure), None)
        near = nearest(first, results)
        if not near:
            lines.append((name, data, *cells, "", f"not run on {data}"))
        for position, result in enumerate(near):
            shown = (name, data, *cells) if position == 0 else ("", data, "", "", "")
            lines.append((*shown, f"{result.accuracy:.2f}", f"`{result.place}`: {differs(first, epochs, result)}"))
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return table + "\n\n" + "\n".join(f"{number}. {source}" for number, source in enumerate(sources, 1))


def differs(figure: dict[str, Any], epochs: int | None, result: Ours) -> str:
    """How our setting is not that of the figure."""
    parts = []
    if result.copy:
        parts.append(result.copy)
    model = result.model + f" with {result.options}" * bool(result.options)
    if model != figure["model"]:
        parts.append(f"{model}, not {figure['model']}")
    if result.epochs != epochs:
        parts.append(f"{result.epochs} epochs" + (f", not {epochs}" if epochs else ""))
    if result.start:
        parts.append(f"starts from {result.start}")
    return "; ".join(parts) or "nothing"


def _accuracy(value: float | list[float]) -> str:
    return " to ".join(f"{each:g}" for each in value) if isinstance(value, list) else f"{value:.2f}"


def written() -> str:
    """docs/results.md with the ledger of today's files."""
    text = PAGE.read_text(encoding="utf-8")
    published = tomllib.loads((RESULTS / "published.toml").read_text(encoding="utf-8"))
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{ledger(published, ours(RESULTS, published['copies']))}\n\n{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(written(), encoding="utf-8")
