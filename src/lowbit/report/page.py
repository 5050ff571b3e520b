"""Write the page: tables made here, charts drawn by ``page.js`` from data embedded as JSON."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from html import escape
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

from lowbit.errors import LowbitError, UsageError
from lowbit.files import write_whole
from lowbit.report import tables
from lowbit.report.costs import COSTS, Comparison, compare_costs
from lowbit.report.gather import SCORES, Entry, gather
from lowbit.runs import Run


def compare(
    runs: Sequence[Run],
    output: str | Path,
    title: str = "Comparison of runs",
    over_seeds: Sequence[Mapping[str, Any]] = (),
) -> Path:
    """Write one self-contained HTML page about ``runs`` that opens without a network.

    Runs in progress and runs without ``evaluation.json`` are shown as far as they go; the page says what is missing.

    Args:
        runs: one or more; the first is what the others are compared with.
        output: the page's file; an older one is replaced.
        title: the page's heading.
        over_seeds: rows of a table that puts several seeds together, as `lowbit.study.results.summary_rows` makes them.

    Returns:
        ``output``.

    Raises:
        UsageError: there is no run.
        LowbitError: a run's file is damaged, or the page cannot be written.
    """
    if not runs:
        raise UsageError("there is nothing to compare; name at least one run folder")
    with write_whole(Path(output)) as file:
        file.write(render(gather(runs), title, over_seeds).encode())
    return Path(output)


def render(entries: Sequence[Entry], title: str, over_seeds: Sequence[Mapping[str, Any]] = ()) -> str:
    """The page as HTML."""
    diagnosed = any(entry.diagnostics for entry in entries)
    costs = compare_costs(
        [
            (entry.evaluation["accuracy"] if entry.evaluation else None, entry.costs, entry.data_hash)
            for entry in entries
        ]
    )
    plotly, script = _plotly(), _asset("page.js")
    script += _asset("costs.js") * bool(costs.charts) + _asset("diagnostics.js") * diagnosed
    policy = (
        "default-src 'none'; base-uri 'none'; form-action 'none'; style-src 'unsafe-inline'; img-src data: blob:; "
        f"script-src {_allow(plotly, script)}"
    )
    return Template(_asset("page.html")).substitute(
        title=escape(title),
        policy=policy,
        style=_asset("page.css"),
        lead=tables.lead(entries),
        notes=tables.notes(entries),
        over_seeds=tables.over_seeds(over_seeds) if over_seeds else "",
        summary=tables.summary(entries),
        costs=_costs(entries, costs) if costs.charts else "",
        legend="".join(_legend_button(i, entry) for i, entry in enumerate(entries)),
        epochs=tables.epochs(entries),
        significance=tables.significance(entries),
        diagnostics=_diagnostics(entries) if diagnosed else "",
        differences=tables.differences(entries),
        date=datetime.now(UTC).strftime("%-d %B %Y, %H:%M UTC"),
        data=_embedded([{**_chart_data(entry), "costs": costs.chart_data(i)} for i, entry in enumerate(entries)]),
        plotly=plotly,
        script=script,
    )


def _chart_data(entry: Entry) -> dict[str, Any]:
    """What ``page.js`` draws of one run."""
    result = entry.evaluation
    return {
        "label": entry.label,
        "curves": entry.curves(),
        "best": {"validation": entry.best("val_accuracy"), "test": entry.best("test_accuracy")},
        "evaluation": result
        and {
            "classes": result["classes"],
            "matrix": result["confusion_matrix"],
            "support": [sum(row) for row in result["confusion_matrix"]],
            "scores": {key: [e[key] for e in result["per_class"]] for key in SCORES},
        },
        "diagnostics": entry.diagnostics and entry.diagnostics.chart_data(),
    }


def _costs(entries: Sequence[Entry], costs: Comparison) -> str:
    """The section about accuracy against bytes and time."""
    figures = "".join(
        f'<figure><figcaption>{COSTS[name]}</figcaption><div class="chart" id="{name}"></div></figure>'
        for name in costs.charts
    )
    timed = (
        f" Times are medians in lowbit&rsquo;s engine, one thread, one image at a time, on {escape(costs.machine)}."
        if "milliseconds" in costs.charts
        else ""
    )
    return Template(_asset("costs.html")).substitute(figures=figures, numbers=tables.costs(entries, costs), timed=timed)


def _diagnostics(entries: Sequence[Entry]) -> str:
    """The section about quantized layers."""
    return Template(_asset("diagnostics.html")).substitute(
        swatches="".join(map(tables.swatch, range(len(tables.MARKERS)))), numbers=tables.diagnostics(entries)
    )


def _embedded(data: Any) -> str:
    """JSON that is safe inside a ``<script>`` element: no character of it can end the element or open a comment."""
    text = json.dumps(_without_nan(data), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _without_nan(data: Any) -> Any:
    if isinstance(data, dict):
        return {key: _without_nan(value) for key, value in data.items()}
    if isinstance(data, list):
        return [_without_nan(value) for value in data]
    return None if isinstance(data, float) and data - data != 0 else data


def _legend_button(index: int, entry: Entry) -> str:
    label = f"{tables.swatch(index)}{tables.name(entry.label)}"
    return f'<button type="button" aria-pressed="true" data-run="{index}">{label}</button>'


def _allow(*scripts: str) -> str:
    """Sources of a content security policy that let exactly these scripts run."""
    hashes = (base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts)
    return " ".join(f"'sha256-{value}'" for value in hashes)


def _asset(name: str) -> str:
    return resources.files("lowbit.report").joinpath(name).read_text(encoding="utf-8")


def _plotly() -> str:
    try:
        from plotly.offline import get_plotlyjs
    except ImportError:
        raise LowbitError("the report needs plotly; `pip install '.[train]'` in lowbit's folder brings it") from None
    script: str = get_plotlyjs()
    return script
