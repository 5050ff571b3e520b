"""How long each packed row takes for one image on one thread, written down per machine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict

from lowbit.exporter.bench import bench
from lowbit.hardware import cpu_name, versions
from lowbit.report.costs import read_costs
from lowbit.runs import read_json, write_json
from lowbit.runtime import instruction_sets
from lowbit.study.folder import DONE, packed_path
from lowbit.study.plan import Row

SECONDS = 0.5


def cpu_and_kernels() -> str:
    """What a time is of: the CPU's name, and the instruction set whose kernels run."""
    return f"{cpu_name()}, {next(each['isa'] for each in instruction_sets() if each['chosen'])}"


def time_rows(rows: Sequence[Row], say: Callable[[str], None]) -> None:
    """Time the packed rows that were not timed on this machine, one after another, half a second each.

    A time that other programs have disturbed is written down, too, but measured again by the next call.

    Args:
        rows: of a study; those that are not done, or have no packed file, are left out.
        say: takes a line on progress.

    Raises:
        LowbitError: a packed file cannot be read, or the disk is full.
    """
    here = cpu_and_kernels()
    todo = []
    for row in rows:
        if row.state == DONE:
            costs = read_costs(row.run)
            before = costs.latencies.get(here)
            if (
                packed_path(row.run).is_file()
                and costs.packed_bytes is not None
                and (before is None or before.disturbed)
            ):
                todo.append(row)
    if todo:
        say(f"timing {len(todo)} packed rows on {here}")
    for row in todo:
        result = bench(packed_path(row.run), seconds=SECONDS, layers=False)
        engine = asdict(result.rows[0])
        record = {key: engine[key] for key in ("milliseconds", "cpu_milliseconds", "runs")}
        record |= {"disturbed": result.disturbed, "date": result.date, "lowbit": versions()["lowbit"]}
        known = read_json(row.run.latency_path) if row.run.latency_path.is_file() else {}
        write_json(row.run.latency_path, {**known, here: record})
