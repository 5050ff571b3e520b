"""What the benchmarks do alike: measure apart, write down the machine, quartiles, names of forms, parts of a page."""

from __future__ import annotations

import json
import os
import re
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lowbit.hardware import cpu_name, versions


def machine() -> dict[str, Any]:
    """What figures can be compared on."""
    return {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "versions": versions("torch", "onnxruntime", "openvino", "numpy"),
    }


def command(script: str) -> str:
    """How ``script`` was called."""
    return " ".join([f"python benchmarks/{Path(script).name}", *sys.argv[1:]])


def about(script: str) -> dict[str, Any]:
    """How ``script`` was called, on what machine and when: what every record of figures begins with."""
    return {"command": command(script), **machine(), "date": datetime.now(UTC).isoformat(timespec="seconds")}


def apart(script: str, job: Mapping[str, Any], environment: Mapping[str, str]) -> Any:
    """What ``script --job`` prints, as JSON, in a process of its own: kernels and peers read the environment once."""
    call = [sys.executable, script, "--job", json.dumps(job)]
    done = subprocess.run(call, env={**os.environ, **environment}, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout)


def quartiles(seconds: Sequence[float]) -> dict[str, Any]:
    """Median and quartiles in milliseconds, and of how many runs."""
    low, median, high = (1e3 * quartile for quartile in statistics.quantiles(seconds, n=4))
    return {"milliseconds": median, "low": low, "high": high, "runs": len(seconds)}


def publish(
    record: dict[str, Any],
    out: Path,
    table: Callable[[dict[str, Any]], str],
    plot: Callable[[dict[str, Any], Path], None] | None = None,
) -> None:
    """Write results.json, table.md and, if it is drawn, plot.svg of a record into ``out``."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "results.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    (out / "table.md").write_text(table(record), encoding="utf-8")
    if plot is not None:
        plot(record, out / "plot.svg")


def form_of(runtime: str) -> str:
    """What most of the products are made of; a peer is named 'runtime version form', the engine 'lowbit isa [form]'."""
    _, _, form = runtime.partition(" ")[2].partition(" ")
    return form.partition(",")[0].partition(" and ")[0]


def into_page(page: Path, name: str, text: str) -> None:
    """Put ``text`` between the comments ``begin NAME`` and ``end NAME`` of a Markdown page.

    Raises:
        ValueError: the page has no such part.
    """
    before = page.read_text(encoding="utf-8")
    pattern = re.compile(rf"(<!-- begin {name} -->\n).*?(<!-- end {name} -->)", re.DOTALL)
    if not pattern.search(before):
        raise ValueError(f"{page} has no part called '{name}'")
    page.write_text(pattern.sub(lambda match: f"{match[1]}\n{text}\n{match[2]}", before), encoding="utf-8")
