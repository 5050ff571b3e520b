"""What a second thread gains in the engine.

    python benchmarks/two_threads.py            # two minutes on an idle machine

The networks of benchmarks/engine.py with their float rest and with an 8-bit one, on the CPU's best instruction set:
calls of an engine with one thread and of one with two take turns. No other runtime is in the process: its threads would
go on waiting on the second processor for a while after each of its calls. Untrained networks. What the machine itself
gives is measured by the loop in registers that `lowbit bench` holds layers against: twice, one after the other, and on
two threads at once.

Writes results.json and table.md, and its part of docs/engine.md.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any

import typer
from measured import about, apart, into_page, publish, quartiles

from engine import NETS, export_rests

SECONDS = 6.0
THREADS = (1, 2)


def main(
    out: Annotated[Path, typer.Option(help="Folder of what is written.")] = Path("results/two_threads"),
    page: Annotated[Path, typer.Option(help="Page that shows it.")] = Path("docs/engine.md"),
    nets: Annotated[str, typer.Option(help="Any of " + ", ".join(NETS))] = ",".join(NETS),
    batches: Annotated[str, typer.Option(help="Images at a time.")] = "1,16",
    job: Annotated[str, typer.Option(hidden=True)] = "",
) -> None:
    """Time every network with one thread and with two, and write it down."""
    if job:
        settings = json.loads(job)
        print(json.dumps(measure(**settings) if settings else measure_registers()))
        return
    if (cores := os.cpu_count() or 1) < max(THREADS):
        raise SystemExit(f"this machine has {cores} processor; two threads need two")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for net in nets.split(","):
            for rest, file in export_rests(net, Path(folder) / f"{net}.lowbit").items():
                for batch in map(int, batches.split(",")):
                    measured = apart(__file__, {"path": str(file), "batch": batch}, {})
                    rows.append({"net": net, "rest": rest, "batch": batch, **measured})
                    print(net, rest, batch, file=sys.stderr)
    record = {**about(__file__), "registers": apart(__file__, {}, {}), "rows": rows}
    publish(record, out, table)
    into_page(page, "two_threads", text(record))
    print(table(record))


def measure(path: str, batch: int) -> dict[str, Any]:
    """Quartiles and the least of milliseconds for a batch, by the number of threads."""
    import numpy as np

    import lowbit

    engines = {str(threads): lowbit.Engine(path, threads=threads) for threads in THREADS}
    images = np.random.default_rng(0).standard_normal((batch, *engines["1"].input_shape), dtype=np.float32)
    return {
        "isa": engines["1"].isa,
        "by_threads": by_threads({name: lambda engine=engine: engine(images) for name, engine in engines.items()}),
    }


def measure_registers() -> dict[str, Any]:
    """The same of a loop that touches no memory, run as often as there are threads."""
    from lowbit._engine import available_isas
    from lowbit.runtime import peak

    def loop(_: int) -> float:
        return peak("binary", available_isas()[0])

    with ThreadPoolExecutor(max(THREADS)) as pool:
        calls = {"1": lambda: [*map(loop, THREADS)], "2": lambda: [*pool.map(loop, THREADS)]}
        return {"by_threads": by_threads(calls)}


def by_threads(calls: Mapping[str, Callable[[], object]]) -> dict[str, dict[str, Any]]:
    """Quartiles and the least of milliseconds of calls that take turns."""
    from lowbit.exporter.bench import take_turns

    found = {}
    for name, times in take_turns(calls, SECONDS).items():
        walls = [wall for wall, _ in times]
        found[name] = {**quartiles(walls), "least": 1e3 * min(walls)}
    return found


def gain(row: dict[str, Any], time: str = "milliseconds") -> float:
    """The time of one thread over that of two, in the median call or the fastest one (``least``)."""
    one, two = (row["by_threads"][str(threads)][time] for threads in THREADS)
    return float(one / two)


def table(record: dict[str, Any]) -> str:
    """A Markdown table, a row to a network, rest and batch."""
    lines = [
        f"`{record['command']}`, {record['cpu']}, {record['cores']} cores, {record['rows'][0]['isa']}, "
        f"{record['date'][:10]}; untrained. Milliseconds for a batch, medians of calls that took turns, quartiles in "
        "brackets.",
        "",
        "| network | rest | images | one thread | two threads | gain, median call | gain, fastest call |",
        "|" + "---|" * 7,
    ]
    for row in record["rows"]:
        cells = [f"`{row['net']}`", row["rest"], str(row["batch"])]
        for threads in THREADS:
            of = row["by_threads"][str(threads)]
            cells.append(f"{of['milliseconds']:.3f} ({of['low']:.3f} to {of['high']:.3f})")
        cells += [f"{gain(row):.2f}", f"{gain(row, 'least'):.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    of_loop = record["registers"]
    duration = of_loop["by_threads"]["2"]["milliseconds"]
    lines += [
        "",
        f"A loop in registers, of {duration:.1f} ms on two threads: {gain(of_loop):.2f} in the median call and "
        f"{gain(of_loop, 'least'):.2f} in the fastest one. So much this machine gives at the most.",
    ]
    return "\n".join(lines) + "\n"


text = table  # what docs/engine.md shows of it


if __name__ == "__main__":
    typer.run(main)
