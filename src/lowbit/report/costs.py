"""What a packed network costs: bytes and time of one image, and which networks no other beats in cost and accuracy."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from lowbit.errors import LowbitError
from lowbit.runs import Run, read_json

T = TypeVar("T")


@dataclass(frozen=True)
class Latency:
    """Median time of one image on one thread of one machine.

    Attributes:
        milliseconds: on the clock.
        disturbed: whether other programs took the processor meanwhile, so that the figure is too high.
        date: of the measurement, ISO 8601.
    """

    milliseconds: float
    disturbed: bool
    date: str

    @property
    def note(self) -> str:
        """The day, and whether to trust the figure."""
        return self.date[:10] + ", disturbed" * self.disturbed


@dataclass(frozen=True)
class Costs:
    """What was recorded of a run's packed file.

    Attributes:
        packed_bytes: of the file; None if there is none.
        refusal: why the exporter made no file; empty if it did, or was not asked.
        latencies: by machine: the CPU's name and the instruction set.
    """

    packed_bytes: int | None
    refusal: str
    latencies: dict[str, Latency]


def read_costs(run: Run) -> Costs:
    """Contents of ``export.json`` and ``latency.json``; empty where they are missing.

    Raises:
        LowbitError: one of the two is damaged.
    """
    size, refusal, latencies = None, "", {}
    if run.export_path.is_file():
        with _damaged(run.export_path):
            record = read_json(run.export_path)
            size = None if record["packed_bytes"] is None else _positive(record["packed_bytes"])
            refusal = _of_type(str, record["refusal"])
    if run.latency_path.is_file():
        with _damaged(run.latency_path):
            latencies = {
                machine: Latency(
                    _positive(found["milliseconds"]), _of_type(bool, found["disturbed"]), _of_type(str, found["date"])
                )
                for machine, found in read_json(run.latency_path).items()
            }
    return Costs(size, refusal, latencies)


@contextmanager
def _damaged(path: Path) -> Iterator[None]:
    """Turn what a wrong record raises into a sentence that names its file."""
    try:
        yield
    except (AttributeError, KeyError, TypeError):
        raise LowbitError(f"{path} is damaged; delete it and run the study again") from None


def _of_type(kind: type[T], value: Any) -> T:
    if not isinstance(value, kind):
        raise TypeError(value)
    return value


def _positive(value: Any) -> Any:
    if isinstance(value, bool) or not 0 < value < 1e15:
        raise TypeError(value)
    return value


def common_machine(costs: Sequence[Costs]) -> str:
    """The machine on which most runs were timed, of several the one that was used last; empty if there is none.

    Times of different machines cannot be compared, so only this one's are shown.
    """
    dates: dict[str, list[str]] = {}
    for found in costs:
        for machine, latency in found.latencies.items():
            dates.setdefault(machine, []).append(latency.date)
    return max(dates, key=lambda machine: (len(dates[machine]), max(dates[machine])), default="")


def pareto_front(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Which of the points (cost, accuracy) no other one dominates.

    A point dominates another if it costs no more and is no less accurate, and is better in one of the two. Equal points
    do not dominate each other.
    """
    return [
        not any(other != point and other[0] <= point[0] and other[1] >= point[1] for other in points)
        for point in points
    ]


COSTS = {"packed_bytes": "Accuracy by size", "milliseconds": "Accuracy by time"}
"""What accuracy is drawn against, with the title of the chart."""


@dataclass(frozen=True)
class Comparison:
    """The runs of a page by cost.

    Attributes:
        machine: that all times are of; empty without any.
        accuracies: of each run; None if it is not evaluated.
        values: for each of `COSTS` the cost of each run, or None.
        fronts: for each of `COSTS` which runs are on the front.
        charts: those of `COSTS` that two runs or more have.
    """

    machine: str
    accuracies: list[float | None]
    values: dict[str, list[float | None]]
    fronts: dict[str, list[bool]]
    charts: list[str]

    def chart_data(self, run: int) -> dict[str, Any] | None:
        """What ``costs.js`` draws of one run, or None."""
        found = {
            name: {"cost": self.values[name][run], "front": self.fronts[name][run]}
            for name in self.charts
            if self.values[name][run] is not None
        }
        return {"accuracy": self.accuracies[run], **found} if found else None


def compare_costs(runs: Sequence[tuple[float | None, Costs, Hashable]]) -> Comparison:
    """Find the Pareto fronts of runs.

    Args:
        runs: the accuracy of each, None before it is evaluated, its costs, and what it was evaluated on: only runs on
            the same images can beat each other.
    """
    machine = common_machine([costs for _, costs, _ in runs])
    values: dict[str, list[float | None]] = {name: [] for name in COSTS}
    for accuracy, costs, _ in runs:
        latency = costs.latencies.get(machine)
        values["packed_bytes"].append(None if accuracy is None else costs.packed_bytes)
        values["milliseconds"].append(None if accuracy is None or latency is None else latency.milliseconds)
    accuracies, data = [accuracy for accuracy, _, _ in runs], [of_data for _, _, of_data in runs]
    fronts = {}
    for name, of_runs in values.items():
        placed = list(zip(data, of_runs, accuracies, strict=True))
        best: set[tuple[Hashable, float | None, float | None]] = set()
        for where in set(data):
            points = [
                (cost, accuracy)
                for of_data, cost, accuracy in placed
                if of_data == where and cost is not None and accuracy is not None
            ]
            best |= {(where, *point) for point, front in zip(points, pareto_front(points), strict=True) if front}
        fronts[name] = [place in best for place in placed]
    charts = [name for name in COSTS if sum(value is not None for value in values[name]) > 1]
    return Comparison(machine, accuracies, values, fronts, charts)
