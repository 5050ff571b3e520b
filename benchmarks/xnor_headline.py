"""XNOR-Net's headline, measured: one binary convolution against float32 and int8, over channels and over filter sizes.

    python benchmarks/xnor_headline.py          # two minutes on an idle machine

The paper's point is a convolution of 256 to 256 channels, 3x3, on a 14x14 map; one curve varies the channels that it
reads, the other its filter. One thread. The engine goes from packed codes to packed codes; float32 and int8 from floats
to floats. The plain loop is plain_conv2d.cpp, without SIMD. torch and OpenVINO take turns with the engine; the plain
loop, which may take seconds, is timed beside them. Untrained weights: accuracy means nothing here.

Writes results.json, table.md and plot.svg, and its part of docs/engine.md.
Source: Rastegari et al. 2016, "XNOR-Net", arXiv 1603.05279, section 4.1 and figure 4.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import drawing
import numpy as np
import typer
from measured import about, form_of, into_page, publish, quartiles

OUTPUTS, SIDE, POINT = 256, 14, (256, 3)
CHANNELS = (1, 8, 16, 32, 64, 128, 256, 512, 1024)
FILTERS = (1, 3, 5, 7, 9, 11, 15, 19)
SECONDS = 2.0
PLAIN_RUNS = 3
FLAGS = ("-O2", "-fno-tree-vectorize")


def main(
    out: Annotated[Path, typer.Option(help="Folder of what is written.")] = Path("results/headline"),
    page: Annotated[Path, typer.Option(help="Page that shows it.")] = Path("docs/engine.md"),
    channels: Annotated[str, typer.Option(help="Channels of the one curve.")] = ",".join(map(str, CHANNELS)),
    filters: Annotated[str, typer.Option(help="Filter sizes of the other, odd.")] = ",".join(map(str, FILTERS)),
) -> None:
    """Measure the point and the curves, and write them down."""
    from lowbit.runtime import instruction_sets, peak

    isa = next(row["isa"] for row in instruction_sets() if row["chosen"])
    counts, sides = (sorted({int(number) for number in text.split(",")}) for text in (channels, filters))
    points = [POINT, *((count, POINT[1]) for count in counts), *((POINT[0], side) for side in sides)]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        plain = plain_convolution(Path(folder))
        for point in dict.fromkeys(points):
            rows.append(measure(*point, plain))
            print(*point, time.strftime("%T"), file=sys.stderr)
    record = {
        **about(__file__),
        "isa": isa,
        "plain": f"plain_conv2d.cpp, {os.environ.get('CXX', 'c++')} {' '.join(FLAGS)}",
        "peaks": {kind: peak(kind, isa) / 1e9 for kind in ("float", "integer", "binary")},
        "channels": counts,
        "filters": sides,
        "rows": rows,
    }
    publish(record, out, table, plot)
    into_page(page, "headline", text(record))
    print(table(record))


def plain_convolution(folder: Path) -> Callable[..., None]:
    """plain_conv2d.cpp, compiled into ``folder``."""
    library = folder / "plain_conv2d.so"
    source = Path(__file__).with_name("plain_conv2d.cpp")
    subprocess.run(
        [os.environ.get("CXX", "c++"), *FLAGS, "-shared", "-fPIC", str(source), "-o", str(library)], check=True
    )
    function = ctypes.CDLL(str(library)).plain_conv2d
    floats = np.ctypeslib.ndpointer(np.float32, flags="C_CONTIGUOUS")
    function.argtypes, function.restype = [floats] * 3 + [ctypes.c_int] * 4, None
    return function


def binary_convolution(channels: int, kernel: int) -> Any:
    """A packed model: the signs of its input, the convolution from codes to codes, and one channel of sums."""
    from lowbit.packed import PackedModel

    random = np.random.default_rng(0)

    def bits(outputs: int, size: int, depth: int) -> Any:
        weights = np.zeros((outputs, size, size, -(-depth // 64) * 64), np.uint8)
        weights[..., :depth] = random.integers(0, 2, (outputs, size, size, depth))
        return np.packbits(weights, axis=-1, bitorder="little").view(np.uint64)

    def window(size: int) -> dict[str, Any]:
        pairs = {"kernel": size, "stride": 1, "padding": size // 2, "dilation": 1}
        return {**{name: [number] * 2 for name, number in pairs.items()}, "groups": 1}

    spread = (channels * kernel**2) ** 0.5
    ops = [
        {"op": "threshold", "inputs": [0], "source": "signs", "bits": 1},
        {"op": "binary_conv2d", "inputs": [1], "source": "conv", "channels": OUTPUTS, "bits": 1, **window(kernel)},
        {"op": "binary_conv2d", "inputs": [2], "source": "sums", "channels": 1, **window(1)},
    ]
    tensors = {
        "0.thresholds": np.zeros((channels, 1), np.float32),
        "0.falling": np.zeros(channels, np.uint8),
        "1.weight_bits": bits(OUTPUTS, kernel, channels),
        "1.thresholds": random.normal(0, spread, (OUTPUTS, 1)).astype(np.int32),
        "1.falling": random.integers(0, 2, OUTPUTS, dtype=np.uint8),
        "2.weight_bits": bits(1, 1, OUTPUTS),
        "2.scale": np.ones(1, np.float32),
    }
    return PackedModel((channels, SIDE, SIDE), ops, tensors)


def measure(channels: int, kernel: int, plain: Callable[..., None]) -> dict[str, Any]:
    """One convolution in every form: quartiles of milliseconds, and bytes of its weights."""
    import torch
    from torch import nn

    from lowbit import Engine
    from lowbit.exporter import peers
    from lowbit.exporter.bench import take_turns

    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = binary_convolution(channels, kernel)
    cost = model.costs()[1]
    engine = Engine(model)
    images = np.random.default_rng(0).standard_normal((1, *model.input_shape), dtype=np.float32)
    inside: list[float] = []
    twin = nn.Conv2d(channels, OUTPUTS, kernel, padding=kernel // 2, bias=False).eval()
    forms = peers.runners(["torch", "openvino"], twin, images, 1)
    forms = {name: call for name, call in forms.items() if form_of(name) != "bf16" and " and bf16" not in name}
    times = take_turns({"": lambda: inside.append(engine.profile(images)[1]), **forms}, SECONDS)
    seconds = {f"lowbit {engine.isa} binary": inside[-len(times.pop("")) :]}
    seconds |= {name: [wall for wall, _ in of] for name, of in times.items()}

    padded = np.pad(images[0], ((0, 0), *[(kernel // 2,) * 2] * 2))
    weight, output = twin.weight.detach().numpy(), np.empty((OUTPUTS, SIDE, SIDE), np.float32)
    spent = []
    for _ in range(PLAIN_RUNS):
        start = time.perf_counter()
        plain(padded, weight, output, channels, OUTPUTS, SIDE, kernel)
        spent.append(time.perf_counter() - start)
    with torch.inference_mode():
        if not np.allclose(output, twin(torch.from_numpy(images))[0].numpy(), rtol=1e-3, atol=1e-3):
            raise SystemExit("the plain loop computes another convolution than torch")
    return {
        "channels": channels,
        "filter": kernel,
        "macs": cost.macs,
        "bytes": {
            "bits": model.tensors["1.weight_bits"].nbytes,
            "packed": cost.bytes,
            "float32": weight.nbytes,
        },
        "times": {name: quartiles(of) for name, of in {**seconds, "plain C++ float32": spent}.items()},
    }


def formula(channels: int, kernel: int) -> float:
    """The paper's speed-up S = 64 c Nw / (c Nw + 64), of c channels and Nw taps: a product a clock against 64 bits."""
    products = channels * kernel**2
    return 64 * products / (products + 64)


def best_of(row: dict[str, Any]) -> dict[str, tuple[str, dict[str, Any]]]:
    """Name and time of the fastest of each form: engine, plain, float32 and int8."""
    best: dict[str, tuple[str, dict[str, Any]]] = {}
    for name, of in row["times"].items():
        form = {"lowbit": "engine", "plain": "plain"}.get(name.split()[0]) or form_of(name)
        if form not in best or of["milliseconds"] < best[form][1]["milliseconds"]:
            best[form] = name, of
    return best


def speed_ups(row: dict[str, Any]) -> dict[str, float]:
    """Times of plain, float32 and int8 over the engine's."""
    best = best_of(row)
    ours = best.pop("engine")[1]["milliseconds"]
    return {form: of["milliseconds"] / ours for form, (_, of) in best.items()}


def point_of(record: dict[str, Any]) -> dict[str, Any]:
    """The row of the paper's point."""
    found: dict[str, Any] = next(row for row in record["rows"] if (row["channels"], row["filter"]) == POINT)
    return found


def table(record: dict[str, Any]) -> str:
    """A Markdown table of all points."""
    lines = [
        f"`{record['command']}`, {record['cpu']}, one thread, {record['isa']}, {record['date'][:10]}. Milliseconds of "
        f"one image, medians, quartiles in brackets; in the columns of others also their time over the engine's. "
        f"{OUTPUTS} channels out, a {SIDE}x{SIDE} map. Plain loop: {record['plain']}.",
        "",
        "| channels in | filter | engine | plain loop | float32 | int8 | formula | bytes, bits | bytes, float32 |",
        "|" + "---|" * 9,
    ]
    for row in sorted(record["rows"], key=lambda row: (row["filter"], row["channels"])):
        best, ratios = best_of(row), speed_ups(row)
        cells = [str(row["channels"]), f"{row['filter']}x{row['filter']}"]
        for form in ("engine", "plain", "float32", "int8"):
            name, of = best[form]
            cell = f"{of['milliseconds']:.4g} ({of['low']:.4g} to {of['high']:.4g})"
            named = "" if form == "plain" else f", {name.split()[0]}"
            cells.append(cell if form == "engine" else f"{cell}, {ratios[form]:.1f}x{named}")
        cells.append(f"{formula(row['channels'], row['filter']):.2f}")
        cells += [f"{row['bytes'][form]:,}" for form in ("bits", "float32")]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def text(record: dict[str, Any]) -> str:
    """What docs/engine.md says of it."""
    row = point_of(record)
    ratios, best, stored, peaks = speed_ups(row), best_of(row), row["bytes"], record["peaks"]
    plain_rate = row["macs"] / 1e6 / best["plain"][1]["milliseconds"]
    lines = [
        f"At the paper's point, one thread, `{record['isa']}` ({record['cpu']}, {record['date'][:10]}, "
        f"`{record['command']}`; every point with its quartiles is in `results/headline`):",
        "",
        "| one image | ms | over the engine |",
        "|---|---|---|",
    ]
    labels = {
        "engine": "binary, this engine",
        "plain": "float32, a plain loop",
        "float32": f"float32, SIMD: {best['float32'][0].split()[0]}",
        "int8": f"int8: {best['int8'][0].split()[0]}",
    }
    for form, label in labels.items():
        ratio = "1" if form == "engine" else f"{ratios[form]:.1f}"
        lines.append(f"| {label} | {best[form][1]['milliseconds']:.4g} | {ratio} |")
    lines += [
        "",
        f"**58x.** The formula gives {formula(*POINT):.2f} for this convolution. It takes one product a clock against "
        f"64 bit operations a clock. Against a float32 loop of one product after the other ({plain_rate:.1f} G a "
        f"second) the engine is {ratios['plain']:.0f} times as fast, for it works on more than 64 bits a clock. But no "
        f"library runs such a loop: against float32 as torch and OpenVINO compute it, it is {ratios['float32']:.1f} "
        f"times as fast, and {ratios['int8']:.1f} times against int8. In registers, without memory, this core reaches "
        f"{peaks['float']:,.0f} G products a second in float32, {peaks['integer']:,.0f} in int8 and "
        f"{peaks['binary']:,.0f} of bits: {peaks['binary'] / peaks['float']:.0f} times float32 and "
        f"{peaks['binary'] / peaks['integer']:.1f} times int8. The paper's figure "
        "leaves memory out; these leave out the making of the first codes and, on our side, the call from "
        "Python, some microseconds that the peers' times contain.",
        "",
        f"**32x.** The weights of this convolution take {stored['bits']:,} bytes as bits and {stored['float32']:,} as "
        f"float32: {stored['float32'] / stored['bits']:.1f} times as many. With its thresholds the layer takes "
        f"{stored['packed']:,} bytes in the packed file, {stored['float32'] / stored['packed']:.1f} times less. "
        "Channels come in words of 64, so that fewer than 64 save less. A network's first and last layers stay float: "
        "what that leaves of 32 is in the table of networks below.",
        "",
        "![Speed-up over channels and over filter sizes](../results/headline/plot.svg)",
        "",
    ]
    return "\n".join(lines)


def plot(record: dict[str, Any], path: Path) -> None:
    """Draw the speed-up over channels and over filter sizes, and the formula."""
    pyplot, ticker = drawing.pyplot(), drawing.ticker()
    rows = {(row["channels"], row["filter"]): row for row in record["rows"]}
    labels = {
        "plain": "against a plain float32 loop",
        "float32": "against SIMD float32, the faster of torch and OpenVINO",
        "int8": "against int8, OpenVINO",
    }
    figure, axes = pyplot.subplots(1, 2, figsize=(9, 4), sharey=True, layout="constrained")
    curves = (
        (axes[0], f"channels in, {POINT[1]}x{POINT[1]} filter", [(count, POINT[1]) for count in record["channels"]], 0),
        (axes[1], f"side of the filter, {POINT[0]} channels", [(POINT[0], side) for side in record["filters"]], 1),
    )
    for axis, label, points, varied in curves:
        at = [point[varied] for point in points]
        for form, what in labels.items():
            colour, shape = drawing.MARKS[form]
            values = [speed_ups(rows[point])[form] for point in points]
            axis.plot(at, values, color=colour, marker=shape, markersize=5, label=what)
        values = [formula(*point) for point in points]
        axis.plot(at, values, "--", color=drawing.INK, label="S = 64 c Nw / (c Nw + 64)")
        axis.axhline(1, color=drawing.FAINT, linewidth=1)
        axis.set_xlabel(label)
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
        axis.spines[["top", "right"]].set_visible(False)
    axes[1].set_xticks(record["filters"])
    axes[0].set_xscale("log", base=2)
    axes[0].xaxis.set_major_formatter(ticker.FormatStrFormatter("%d"))
    axes[0].set_ylabel("time over the engine's, logarithmic")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=2, frameon=False)
    drawing.save(figure, path)


if __name__ == "__main__":
    typer.run(main)
