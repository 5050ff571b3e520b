"""Where an image's time goes in the engine: products by kind, and what lies between them.

    python benchmarks/where_time_goes.py            # two minutes on an idle machine

The networks of benchmarks/engine.py, with their float rest and with an 8-bit one, one image on one thread, on each of
its instruction sets that this CPU has. Every op is timed in place (`lowbit.Engine.profile`); what an op does for the
one behind it counts as its own. Beside them stands what the core reaches in registers with the same instructions, the
best of a measurement for each row: the time that the 1-bit products would take at that speed is a bound that no order
of loops can beat. Untrained networks: accuracy means nothing here.

Writes results.json, table.md and plot.svg, and its part of docs/engine.md.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import drawing
import typer
from measured import about, apart, into_page, publish, quartiles

from engine import CLASSES, NETS, export_rests

# Kinds of products as the table has them; every other op lies between the products.
TITLES = {"binary": "1-bit products", "integer": "products of codes", "float": "float products"}
BINARY, BETWEEN = TITLES["binary"], "between them"
COLUMNS = (*TITLES.values(), BETWEEN)
COLOURS = dict(zip(COLUMNS, ("#0072b2", "#d55e00", "#e69f00", drawing.INK), strict=True))
SECONDS = 2.0


def main(
    out: Annotated[Path, typer.Option(help="Folder of what is written.")] = Path("results/where_time_goes"),
    page: Annotated[Path, typer.Option(help="Page that shows it.")] = Path("docs/engine.md"),
    nets: Annotated[str, typer.Option(help="Any of " + ", ".join(NETS))] = ",".join(NETS),
    job: Annotated[str, typer.Option(hidden=True)] = "",
) -> None:
    """Time the ops of every network, and write it down."""
    if job:
        print(json.dumps(measure(**json.loads(job))))
        return
    from lowbit._engine import available_isas

    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for net in nets.split(","):
            files = export_rests(net, Path(folder) / f"{net}.lowbit")
            for kind, (isa, _) in CLASSES.items():
                if isa not in available_isas():
                    continue
                for rest, file in files.items():
                    measured = apart(__file__, {"path": str(file)}, {"LOWBIT_ISA": isa})
                    rows.append({"net": net, "class": kind, "rest": rest, **measured})
                    print(net, kind, rest, file=sys.stderr)
    if not rows:
        raise SystemExit(f"this CPU, or this build, has none of the instruction sets of {', '.join(CLASSES)}")
    for row in rows:  # what disturbs a loop only makes it slower
        row["binary_peak_gmacs"] = max(other["binary_peak_gmacs"] for other in rows if other["class"] == row["class"])
    record = {**about(__file__), "rows": rows}
    publish(record, out, table, plot)
    into_page(page, "where_time_goes", text(record))
    print(table(record))


def measure(path: str) -> dict[str, Any]:
    """Milliseconds and products by kind of op, medians and the least over calls, and the peak of binary products."""
    import numpy as np

    import lowbit
    from lowbit.exporter.bench import KINDS, WARM_UP, take_turns
    from lowbit.runtime import peak

    engine = lowbit.Engine(path)
    image = np.random.default_rng(0).standard_normal((1, *engine.input_shape), dtype=np.float32)
    profiles: list[list[float]] = []
    calls = {"whole": lambda: engine(image), "ops": lambda: profiles.append(engine.profile(image))}
    whole = [wall for wall, _ in take_turns(calls, SECONDS)["whole"]]
    kinds = [TITLES[KINDS[op["op"]]] if op["op"] in KINDS else BETWEEN for op in engine.model.ops]
    macs = dict.fromkeys(COLUMNS, 0)
    for kind, cost in zip(kinds, engine.model.costs(), strict=True):
        macs[kind] += cost.macs
    by_kind = {}
    for column in COLUMNS:
        spent = [
            1e3 * sum(seconds for kind, seconds in zip(kinds, profile, strict=True) if kind == column)
            for profile in profiles[WARM_UP:]
        ]
        by_kind[column] = {"milliseconds": statistics.median(spent), "least": min(spent), "macs": macs[column]}
    return {
        "isa": engine.isa,
        **quartiles(whole),
        "by_kind": by_kind,
        "binary_peak_gmacs": peak("binary", engine.isa) / 1e9,
    }


def rate(row: dict[str, Any], time: str) -> float:
    """Billions of 1-bit products a second in the median call (``milliseconds``) or the fastest one (``least``)."""
    return float(row["by_kind"][BINARY]["macs"] / row["by_kind"][BINARY][time] / 1e6)


def bound(row: dict[str, Any]) -> float:
    """Milliseconds of the 1-bit products at the peak."""
    return float(row["by_kind"][BINARY]["macs"] / row["binary_peak_gmacs"] / 1e6)


def table(record: dict[str, Any]) -> str:
    """A Markdown table, a row to a network, class and rest."""
    lines = [
        f"`{record['command']}`, {record['cpu']}, one image, one thread, {record['date'][:10]}; untrained. "
        "Milliseconds, medians; `whole` is measured apart from the ops, of which each is timed alone. The last three "
        "columns: how many 1-bit products a second, G, in the median call, in the fastest one, and in registers.",
        "",
        f"| network | class | rest | whole | {' | '.join(COLUMNS)} | median | fastest | in registers |",
        "|" + "---|" * (7 + len(COLUMNS)),
    ]
    for row in record["rows"]:
        times = [row["by_kind"][column]["milliseconds"] for column in COLUMNS]
        cells = [f"`{row['net']}`", row["class"], row["rest"], f"{row['milliseconds']:.3f}"]
        cells += [f"{time:.3f}" if time else "-" for time in times]
        if row["by_kind"][BINARY]["macs"]:
            speeds = rate(row, "milliseconds"), rate(row, "least"), row["binary_peak_gmacs"]
            cells += [f"{speed:.0f}" for speed in speeds]
        else:
            cells += ["-"] * 3
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def text(record: dict[str, Any]) -> str:
    """What docs/engine.md shows of it."""
    with_bits = [row for row in record["rows"] if row["by_kind"][BINARY]["macs"]]
    shares = [rate(row, "least") / row["binary_peak_gmacs"] for row in with_bits]
    lines = [table(record)]
    if shares:
        lines += [
            f"In the fastest call, the 1-bit convolutions of a network reach {100 * min(shares):.0f} to "
            f"{100 * max(shares):.0f} % of what the core does in registers. The median call runs the same loops on the "
            "same numbers: what it is slower by comes from outside of them. Lines in the picture: the time of the "
            "1-bit products at the speed of registers.",
            "",
        ]
    return "\n".join([*lines, "![Time of an image by kind of work](../results/where_time_goes/plot.svg)", ""])


def plot(record: dict[str, Any], path: Path) -> None:
    """Draw a bar per row, its kinds one after the other, each network on a scale of its own."""
    pyplot = drawing.pyplot()
    nets = list(dict.fromkeys(row["net"] for row in record["rows"]))
    figure, axes = pyplot.subplots(-(-len(nets) // 2), 2, figsize=(10, 3.6), squeeze=False, layout="constrained")
    for axis in axes.flat[len(nets) :]:
        axis.set_visible(False)
    for axis, net in zip(axes.flat, nets, strict=False):
        rows = [row for row in record["rows"] if row["net"] == net]
        starts = [0.0] * len(rows)
        for column in COLUMNS:
            widths = [row["by_kind"][column]["milliseconds"] for row in rows]
            axis.barh(range(len(rows)), widths, left=starts, color=COLOURS[column], height=0.6, label=column)
            starts = [start + width for start, width in zip(starts, widths, strict=True)]
        for height, row in enumerate(rows):
            if least := bound(row):
                axis.plot([least, least], [height - 0.4, height + 0.4], color=drawing.INK, linewidth=1.5)
        axis.set_yticks(range(len(rows)), [f"{row['class']}, {row['rest']}" for row in rows], fontsize=7)
        axis.invert_yaxis()
        axis.set_title(net, fontsize=9)
        axis.spines[["top", "right"]].set_visible(False)
    handles, names = axes.flat[0].get_legend_handles_labels()
    handles.append(pyplot.Line2D([], [], color=drawing.INK, linewidth=1.5))
    names.append("the 1-bit products at the core's peak")
    figure.legend(handles, names, loc="outside upper center", ncols=5, fontsize=8, frameon=False)
    figure.supxlabel("milliseconds of one image on one thread", fontsize=8)
    drawing.save(figure, path)


if __name__ == "__main__":
    typer.run(main)
