"""The whole road on the digits that scikit-learn ships: every step is a command that the reader could type."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from lowbit.errors import UsageError
from lowbit.runs import Run, read_json

Invoke = Callable[[list[str]], None]
METHODS = ("float", "xnor_net")
EPOCHS = 15


def run_demo(out: Path, threads: int | None, invoke: Invoke) -> None:
    """Train a float LeNet and its XNOR-Net twin, evaluate, compare, export, verify and run them.

    Args:
        out: folder for everything; the runs are resumed if they are there.
        threads: of training; None leaves torch's own number.
        invoke: runs a command line of lowbit.

    Raises:
        UsageError: ``out`` is a file.
    """
    if out.is_file():
        raise UsageError(f"{out} is a file; choose a folder with --out")
    console = Console(stderr=True, highlight=False, soft_wrap=True)

    def step(*arguments: str | Path) -> None:
        console.print("\n$ lowbit " + " ".join(map(str, arguments)), style="bold", markup=False)
        invoke(list(map(str, arguments)))

    runs = {method: out / method for method in METHODS}
    packed = {method: out / f"{method}.lowbit" for method in METHODS}
    given: list[str] = [] if threads is None else ["--threads", str(threads)]
    for method, run in runs.items():
        base = ["--method", method, "--model", "lenet", "--data", "digits", "--epochs", str(EPOCHS), *given]
        step("train", *base, "--out", run, *(["--resume"] if run.exists() else []))
        step("evaluate", run)
    step("compare", *runs.values(), "-o", out / "report.html")
    for method, run in runs.items():
        step("export", run, "-o", packed[method])
        step("verify", run, packed[method])
        step("evaluate", packed[method])
    _table(out, runs, packed)
    console.print(f"report: {(out / 'report.html').resolve()}", markup=False)


def _table(out: Path, runs: dict[str, Path], packed: dict[str, Path]) -> None:
    from lowbit.exporter.bench import interleaved_medians, torch_runner
    from lowbit.models import load_run
    from lowbit.runtime import Engine

    runners: dict[str, Callable[[], object]] = {}
    rows: dict[str, tuple[float, int]] = {}
    for method, run in runs.items():
        engine = Engine(packed[method], threads=1)
        record = Run(run).evaluation
        on_engine = read_json(packed[method].with_name(packed[method].name + ".evaluation.json"))
        assert record is not None
        rows[f"{method}, torch"] = (record["accuracy"], record["profile"]["float32_bytes"])
        rows[f"{method}, packed"] = (on_engine["accuracy"], packed[method].stat().st_size)
        runners[f"{method}, torch"] = torch_runner(load_run(run), engine.input_shape)
        runners[f"{method}, packed"] = partial(engine, np.zeros((1, *engine.input_shape), np.float32))
    seconds = interleaved_medians(runners)
    table = Table(title="Digits: accuracy, size and time of one image, one thread", title_justify="left")
    for column in ("network", "test accuracy", "bytes", "ms per image"):
        table.add_column(column, justify="left" if column == "network" else "right")
    for name, (accuracy, size) in rows.items():
        table.add_row(name, f"{100 * accuracy:.2f} %", f"{size:,}", f"{1e3 * seconds[name]:.3f}")
    Console().print(table)
