"""How cost grows: the engine's time against products, and load time against bytes, over all registered models.

    python benchmarks/cost_growth.py            # two minutes on an idle machine

Every model is made as XNOR-Net at its usual input, with random weights, and exported. Timed are one image on one thread
(float32 in, logits out), and reading the packed file until the engine is ready, in a process that has built it once
and so knows which kernels are the faster ones: the first time takes longer. A line of slope 1 is growth in proportion.
Untrained networks: accuracy means nothing here.

Writes results.json, table.md and plot.svg, and its part of docs/engine.md.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import drawing
import numpy as np
import typer
from measured import about, into_page, publish, quartiles

METHOD = "xnor_net"
# Channels, side and classes of the usual input, where they are not those of CIFAR-10.
CIFAR10 = (3, 32, 10)
USUAL = {"lenet": (1, 32, 10), "resnet18": (3, 224, 1000), "resnet34": (3, 224, 1000)}
SECONDS = 1.5


def main(
    out: Annotated[Path, typer.Option(help="Folder of what is written.")] = Path("results/cost_growth"),
    page: Annotated[Path, typer.Option(help="Page that shows it.")] = Path("docs/engine.md"),
    models: Annotated[str, typer.Option(help="Names between commas. [default: all]")] = "",
) -> None:
    """Measure every model, and write it down."""
    from lowbit.models import registry
    from lowbit.runtime import instruction_sets

    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name in models.split(",") if models else registry:
            rows.append(measure(name, Path(folder) / f"{name}.lowbit"))
            print(name, time.strftime("%T"), file=sys.stderr)
    record = {
        **about(__file__),
        "isa": next(row["isa"] for row in instruction_sets() if row["chosen"]),
        "method": METHOD,
        "rows": sorted(rows, key=lambda row: int(row["macs"])),
    }
    publish(record, out, table, plot)
    into_page(page, "cost_growth", text(record))
    print(table(record))


def measure(name: str, path: Path) -> dict[str, Any]:
    """What a model costs: products, bytes, and quartiles of milliseconds."""
    import torch

    import lowbit
    from lowbit.exporter.bench import take_turns

    channels, side, classes = USUAL.get(name, CIFAR10)
    torch.manual_seed(0)
    model = lowbit.models.create(name, classes, METHOD, in_channels=channels, image_size=side).eval()
    packed = lowbit.export(model, torch.zeros(1, channels, side, side)).packed
    packed.save(path)
    engine, costs = lowbit.Engine(path), packed.costs()
    image = np.random.default_rng(0).standard_normal((1, channels, side, side), dtype=np.float32)
    calls = {"run": lambda: engine(image), "load": lambda: lowbit.Engine(path)}
    seconds = {call: [wall for wall, _ in of] for call, of in take_turns(calls, SECONDS).items()}
    binary = [cost.macs for op, cost in zip(packed.ops, costs, strict=True) if op["op"] == "binary_conv2d"]
    return {
        "model": name,
        "input": [channels, side, side],
        "macs": sum(cost.macs for cost in costs),
        "binary_macs": sum(binary),
        "bytes": path.stat().st_size,
        "float_bytes": 4 * sum(parameter.numel() for parameter in model.parameters()),
        "run": quartiles(seconds["run"]),
        "load": quartiles(seconds["load"]),
    }


def table(record: dict[str, Any]) -> str:
    """A Markdown table, a row to a model."""
    lines = [
        f"`{record['command']}`, {record['cpu']}, one thread, {record['isa']}, {record['date'][:10]}; "
        f"`{record['method']}`, untrained. Medians of calls that took turns, quartiles in brackets.",
        "",
        "| model | input | products, G | of them binary | one image, ms | G products a second | file, bytes "
        "| float32 over file | load, ms |",
        "|" + "---|" * 9,
    ]
    for row in record["rows"]:
        run, load = (
            f"{of['milliseconds']:.3f} ({of['low']:.3f} to {of['high']:.3f})" for of in (row["run"], row["load"])
        )
        cells = [
            f"`{row['model']}`",
            "x".join(map(str, row["input"])),
            f"{row['macs'] / 1e9:.4f}",
            f"{100 * row['binary_macs'] / row['macs']:.1f} %",
            run,
            f"{row['macs'] / 1e6 / row['run']['milliseconds']:.0f}",
            f"{row['bytes']:,}",
            f"{row['float_bytes'] / row['bytes']:.1f}x",
            load,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def slope(xs: list[float], ys: list[float]) -> float:
    """Exponent p of the least-squares fit y = a x^p."""
    return float(np.polyfit(np.log(xs), np.log(ys), 1)[0])


def text(record: dict[str, Any]) -> str:
    """What docs/engine.md says of it."""
    (macs, times), (sizes, loads) = (zip(*points, strict=True) for points in curves(record))
    return "\n".join(
        [
            table(record),
            f"From the fewest products to the most, they grow {max(macs) / min(macs):,.0f} times and the time of an "
            f"image {max(times) / min(times):,.0f} times; a straight line through all of them, on logarithmic axes, "
            f"has the slope {slope(list(macs), list(times)):.2f} (1 is growth in proportion). The largest file is "
            f"{max(sizes) / min(sizes):,.0f} times the smallest, the longest load {max(loads) / min(loads):,.0f} times "
            f"the shortest, slope {slope(list(sizes), list(loads)):.2f}.",
            "",
            "![Time over products, and load time over bytes](../results/cost_growth/plot.svg)",
            "",
        ]
    )


def curves(record: dict[str, Any]) -> tuple[list[tuple[float, float]], list[tuple[float, float]]]:
    """(products, milliseconds of an image) and (bytes, milliseconds to load) of every model."""
    rows = record["rows"]
    return (
        [(row["macs"], row["run"]["milliseconds"]) for row in rows],
        [(row["bytes"], row["load"]["milliseconds"]) for row in rows],
    )


def plot(record: dict[str, Any], path: Path) -> None:
    """Draw both, logarithmic, with lines of slope 1 through the point in the middle of each."""
    pyplot = drawing.pyplot()
    figure, axes = pyplot.subplots(1, 2, figsize=(9, 4), layout="constrained")
    labels = (("products of one image", "milliseconds of one image"), ("bytes of the file", "milliseconds to load it"))
    names = [row["model"] for row in record["rows"]]
    colour, shape = drawing.MARKS["engine"]
    for axis, points, (label, height) in zip(axes, curves(record), labels, strict=True):
        xs, ys = np.array(points).T
        ends = np.array([xs.min() / 1.5, xs.max() * 1.5])
        axis.plot(ends, ends * np.median(ys / xs), "--", color=drawing.INK, label="slope 1")
        axis.plot(xs, ys, shape, color=colour, markersize=5)
        for name, x, y in zip(names, xs, ys, strict=True):
            axis.annotate(name, (x, y), xytext=(5, -8), textcoords="offset points", fontsize=7)
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.margins(x=0.12)
        axis.set_xlabel(label)
        axis.set_ylabel(height)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False, loc="upper left")
    drawing.save(figure, path)


if __name__ == "__main__":
    typer.run(main)
