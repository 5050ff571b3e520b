"""What a second thread gains in the engine.

    python benchmarks/two_threads.py            # three minutes on an idle machine

The networks of benchmarks/engine.py with their float rest and with an 8-bit one, on the CPU's best instruction set:
calls of an engine with one thread and of one with two take turns. No other runtime is in the process: its threads would
go on waiting on the second processor for a while after each of its calls. Untrained networks. What the machine itself
gives meanwhile is measured, in turns with them, by a computation that touches hardly any memory, PBKDF2 of Python's
hashlib: twice, one after the other, and on two threads at once.

Writes results.json and table.md, and its part of docs/engine.md.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any

import typer
from measured import about, apart, into_page, publish, quartiles

from engine import NETS, export_rests

SECONDS = 8.0
ROUNDS = 4_000  # some milliseconds
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
        print(json.dumps(measure(**json.loads(job))))
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
    record = {**about(__file__), "rows": rows}
    publish(record, out, table)
    into_page(page, "two_threads", text(record))
    print(table(record))


def measure(path: str, batch: int) -> dict[str, Any]:
    """Quartiles and the least of milliseconds, by the number of threads: for a batch, and of the machine alone."""
    import numpy as np

    import lowbit
    from lowbit.exporter.bench import take_turns

    engines = {threads: lowbit.Engine(path, threads=threads) for threads in THREADS}
    images = np.random.default_rng(0).standard_normal((batch, *engines[1].input_shape), dtype=np.float32)
    calls: dict[str, Callable[[], object]] = {
        f"engine {threads}": lambda engine=engine: engine(images) for threads, engine in engines.items()
    }

    def compute(_: int) -> bytes:
        return hashlib.pbkdf2_hmac("sha256", b"", b"", ROUNDS)

    with ThreadPoolExecutor(max(THREADS)) as pool:
        calls |= {"machine 1": lambda: [*map(compute, THREADS)], "machine 2": lambda: [*pool.map(compute, THREADS)]}
        times = take_turns(calls, SECONDS)
    found: dict[str, Any] = {"engine": {}, "machine": {}}
    for name, of in times.items():
        kind, threads = name.split()
        walls = [wall for wall, _ in of]
        found[kind][threads] = {**quartiles(walls), "least": 1e3 * min(walls)}
    return {"isa": engines[1].isa, "by_threads": found["engine"], "machine": found["machine"]}


def gain(row: dict[str, Any], time: str = "milliseconds", of: str = "by_threads") -> float:
    """The time of one thread over that of two, in the median call or the fastest one (``least``)."""
    one, two = (row[of][str(threads)][time] for threads in THREADS)
    return float(one / two)


def table(record: dict[str, Any]) -> str:
    """A Markdown table, a row to a network, rest and batch."""
    lines = [
        f"`{record['command']}`, {record['cpu']}, {record['cores']} cores, {record['rows'][0]['isa']}, "
        f"{record['date'][:10]}; untrained. Milliseconds for a batch, medians of calls that took turns, quartiles in "
        "brackets. The machine's gain: of a computation that touches hardly any memory, in turns with them.",
        "",
        "| network | rest | images | one thread | two threads | gain, median call | gain, fastest call "
        "| the machine's, median | fastest |",
        "|" + "---|" * 9,
    ]
    for row in record["rows"]:
        cells = [f"`{row['net']}`", row["rest"], str(row["batch"])]
        for threads in THREADS:
            of = row["by_threads"][str(threads)]
            cells.append(f"{of['milliseconds']:.3f} ({of['low']:.3f} to {of['high']:.3f})")
        cells += [
            f"{gain(row, time, of):.2f}" for of in ("by_threads", "machine") for time in ("milliseconds", "least")
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


text = table  # what docs/engine.md shows of it


if __name__ == "__main__":
    typer.run(main)
