"""The engine beside torch, onnxruntime and OpenVINO, by network, batch, threads and class of instruction sets.

    python benchmarks/engine.py --out results/engine          # all of it, about ten minutes on an idle machine
    python benchmarks/engine.py --nets conv256,vgg16 --batches 1

Every network is made with random weights and random batch norms of either sign, exported, verified against torch, and
timed in a process of its own, where engine and peers take turns. An image goes in as float32, logits come out. conv256
is the one exception: a single binary convolution of 256 to 256 channels, 3x3, on a 14x14 map, from packed codes to
packed codes, against a float32 or int8 convolution. Accuracy means nothing here: the networks are untrained.

Writes results.json (every row with its quartiles, the machine, versions and date), table.md and plot.svg.
"""

from __future__ import annotations

import copy
import json
import os
import statistics
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer

# Name: model (None: the single convolution), its options, method, its options, the side of an image.
NETS: dict[str, tuple[str | None, dict[str, Any], str, dict[str, Any], int]] = {
    "conv256": (None, {}, "xnor_net", {}, 14),
    "vgg16": ("vgg16", {}, "xnor_net", {}, 32),
    "vgg_small": ("vgg_small", {}, "xnor_net", {}, 32),
    "resnet18": ("resnet18", {"shortcut": "conv", "num_classes": 1000}, "xnor_net", {}, 224),
    "vgg_small_2bit": ("vgg_small", {}, "hwgq", {"bits_a": 2}, 32),
}
# Class: what the engine is held to, and what oneDNN, which torch and OpenVINO stand on, is held to. onnxruntime cannot
# be held to anything, so it runs in the first class alone.
CLASSES = {
    "AMX": ("amx", "DEFAULT"),
    "AVX-512": ("avx512_vpopcntdq", "AVX512_CORE_VNNI"),
    "AVX2": ("avx2", "AVX2"),
}
SECONDS = 4.0


def main(
    out: Annotated[Path, typer.Option(help="Folder of what is written.")] = Path("results/engine"),
    nets: Annotated[str, typer.Option(help="Any of " + ", ".join(NETS))] = ",".join(NETS),
    batches: Annotated[str, typer.Option(help="Images at a time.")] = "1,16",
    classes: Annotated[str, typer.Option(help="Any of " + ", ".join(CLASSES))] = ",".join(CLASSES),
    threads: Annotated[str, typer.Option(help="Threads of each runtime.")] = "1",
    job: Annotated[str, typer.Option(hidden=True)] = "",
) -> None:
    """Time all that is asked for, and write it down."""
    if job:
        print(json.dumps(measure(**json.loads(job))))
        return
    from lowbit._engine import available_isas
    from lowbit.hardware import cpu_name, versions

    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for net in nets.split(","):
            path = Path(folder) / f"{net}.lowbit"
            export(net, path)
            for kind in classes.split(","):
                isa, cap = CLASSES[kind]
                if isa not in available_isas():
                    print(f"{kind}: this CPU or build has no {isa}", file=sys.stderr)
                    continue
                for count in map(int, threads.split(",")):
                    for batch in map(int, batches.split(",")):
                        environment = {
                            **os.environ,
                            "LOWBIT_ISA": isa,
                            "ONEDNN_MAX_CPU_ISA": cap,
                            "OMP_NUM_THREADS": str(count),
                        }
                        peers = ["torch", "openvino"] + ["onnxruntime"] * (kind == next(iter(CLASSES)))
                        of = {"path": str(path), "net": net, "batch": batch, "threads": count, "peers": peers}
                        command = [sys.executable, __file__, "--job", json.dumps(of)]
                        done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
                        settings = {"net": net, "class": kind, "threads": count, "batch": batch}
                        rows += [{**settings, **row} for row in json.loads(done.stdout)]
                        print(settings, rows[-1]["date"], file=sys.stderr)
    record = {
        "command": "python benchmarks/engine.py " + " ".join(sys.argv[1:]),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "versions": versions("torch", "onnxruntime", "openvino", "numpy"),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "rows": rows,
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / "results.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    (out / "table.md").write_text(table(record), encoding="utf-8")
    plot(record, out / "plot.svg")
    print(table(record))


def export(net: str, path: Path) -> None:
    """Write a packed file of random weights, and verify it."""
    import torch
    from torch import nn

    import lowbit
    from lowbit.exporter.verify import verify

    model_name, options, method, method_options, side = NETS[net]
    torch.manual_seed(0)
    if model_name is None:
        # Between a first and a last layer that stay float, two binary ones: the first of them gives codes.
        middle = (nn.BatchNorm2d(256), nn.Conv2d(256, 256, 3, padding=1, bias=False))
        model: nn.Module = nn.Sequential(
            nn.Conv2d(3, 256, 1), *middle, *copy.deepcopy(middle), nn.ReLU(), nn.Conv2d(256, 10, side), nn.Flatten()
        )
        lowbit.quantize_(model, method)
    else:
        model = lowbit.models.create(
            model_name, method=method, method_options=method_options, image_size=side, **options
        )
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor, spread in ((module.weight, 1.0), (module.bias, 0.3), (module.running_mean, 0.3)):
                nn.init.normal_(tensor, 0, spread)
            nn.init.uniform_(module.running_var, 0.5, 2)
    images = torch.randn(2, 3, side, side)
    packed = lowbit.export(model.eval(), images).packed
    report = verify(model, packed, images)
    if not report.passed:
        raise SystemExit(f"{net}: verify failed")
    packed.save(path)


def measure(path: str, net: str, batch: int, threads: int, peers: list[str]) -> list[dict[str, Any]]:
    """Rows of the engine and the peers: quartiles of milliseconds for a batch, of calls that took turns."""
    import numpy as np
    import torch
    from torch import nn

    from lowbit import Engine
    from lowbit.exporter import peers as others
    from lowbit.exporter.bench import take_turns

    torch.set_num_threads(threads)
    engine = Engine(path, threads=threads)
    images = np.random.default_rng(0).standard_normal((batch, *engine.input_shape), dtype=np.float32)
    inside: list[float] = []
    if NETS[net][0] is None:
        twin: nn.Module = nn.Conv2d(256, 256, 3, padding=1, bias=False).eval()
        middle = [op["op"] for op in engine.model.ops].index("binary_conv2d")
        inputs = np.random.default_rng(0).standard_normal((batch, 256, 14, 14), dtype=np.float32)

        def ours() -> None:
            inside.append(engine.profile(images)[middle])
    else:
        twin, inputs = others.float_twin(engine.model), images

        def ours() -> object:
            return engine(images)

    name = f"lowbit {engine.isa}"
    times = take_turns({name: ours, **others.runners(peers, twin, inputs, threads)}, SECONDS)
    seconds = {runtime: [wall for wall, _ in of] for runtime, of in times.items()}
    if inside:
        seconds[name] = inside[-len(seconds[name]) :]
    busy = sum(cpu for of in times.values() for _, cpu in of) / sum(wall for of in times.values() for wall, _ in of)
    rows = []
    for runtime, values in seconds.items():
        low, median, high = (1e3 * quartile for quartile in statistics.quantiles(values, n=4))
        rows.append(
            {
                "runtime": runtime,
                "milliseconds": median,
                "low": low,
                "high": high,
                "runs": len(values),
                "processor_share": busy,
                "date": datetime.now(UTC).isoformat(timespec="seconds"),
            }
        )
    return rows


def table(record: dict[str, Any]) -> str:
    """A Markdown table: the engine, the fastest form of each kind of peer, and how many times longer it takes."""
    lines = [
        f"`{record['command']}`, {record['cpu']}, {record['cores']} cores, {record['date'][:10]}. Milliseconds for a "
        "batch, medians of calls that took turns, quartiles in brackets; in the columns of peers also their time over "
        "the engine's. Untrained networks.",
        "",
        "| net | class | threads | batch | engine | float32 | bf16 | int8 |",
        "|---|---|---|---|---|---|---|---|",
    ]
    keys = ("net", "class", "threads", "batch")
    for key in dict.fromkeys(tuple(row[k] for k in keys) for row in record["rows"]):
        rows = [row for row in record["rows"] if tuple(row[k] for k in keys) == key]
        engine, *others = rows
        cells = [*map(str, key), _cell(engine)]
        for form in ("float32", "bf16", "int8"):
            fitting = [row for row in others if _form(row) == form]
            best = min(fitting, key=lambda row: float(row["milliseconds"]), default=None)
            ratio = "" if best is None else f", {best['milliseconds'] / engine['milliseconds']:.2f}x, {_name(best)}"
            cells.append("-" if best is None else _cell(best) + ratio)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _cell(row: dict[str, Any]) -> str:
    return f"{row['milliseconds']:.3f} ({row['low']:.3f} to {row['high']:.3f})"


def _form(row: dict[str, Any]) -> str:
    """What most of the peer's products are made of: a row is named 'runtime version form'."""
    return str(row["runtime"].split(" ", 2)[2].partition(",")[0].partition(" and ")[0])


def _name(row: dict[str, Any]) -> str:
    return str(row["runtime"].split()[0])


def plot(record: dict[str, Any], path: Path) -> None:
    """Draw a panel per net and batch, on one thread or the fewest: the engine and the fastest peer of each form."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "lowbit"  # the same figures, the same file
    from matplotlib import pyplot, ticker

    fewest = min(row["threads"] for row in record["rows"])
    rows = [row for row in record["rows"] if row["threads"] == fewest]
    panels = list(dict.fromkeys((row["net"], row["batch"]) for row in rows))
    kinds = list(dict.fromkeys(row["class"] for row in rows))
    # Colours of Okabe and Ito; the shapes tell them apart without.
    marks = {
        "engine": ("#0072b2", "o"),
        "int8": ("#d55e00", "s"),
        "bf16": ("#cc79a7", "^"),
        "float32": ("#777777", "D"),
    }
    lines = -(-len(panels) // 2)
    figure, axes = pyplot.subplots(
        lines, 2, figsize=(10, lines * (0.9 + 0.35 * len(kinds))), squeeze=False, layout="constrained"
    )
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis, (net, batch) in zip(axes.flat, panels, strict=False):
        for height, kind in enumerate(kinds):
            engine, *others = [row for row in rows if (row["net"], row["batch"], row["class"]) == (net, batch, kind)]
            best = {"engine": engine["milliseconds"]}
            for row in others:
                best[_form(row)] = min(best.get(_form(row), row["milliseconds"]), row["milliseconds"])
            axis.plot([min(best.values()), max(best.values())], [height, height], color="#dddddd", zorder=0)
            for form, milliseconds in best.items():
                colour, shape = marks[form]
                axis.plot(milliseconds, height, shape, color=colour, markersize=6)
                above = 6 if form != "bf16" else -12  # bf16 and int8 are often close
                place = {"xytext": (0, above), "textcoords": "offset points", "ha": "center", "fontsize": 7}
                axis.annotate(f"{milliseconds:.3g}", (milliseconds, height), **place)
        axis.set_yticks(range(len(kinds)), kinds, fontsize=8)
        axis.set_ylim(len(kinds) - 0.5, -0.7)
        axis.set_xscale("log")
        axis.xaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
        axis.xaxis.set_minor_formatter(ticker.NullFormatter())
        axis.tick_params(axis="both", labelsize=8)
        axis.margins(x=0.1)
        axis.set_title(f"{net}, batch {batch}", fontsize=9, loc="left")
        axis.spines[["top", "right"]].set_visible(False)
    names = {"engine": "lowbit", "int8": "int8, best peer", "bf16": "bf16, best peer", "float32": "float32, best peer"}
    handles = [pyplot.Line2D([], [], color=marks[form][0], marker=marks[form][1], linestyle="") for form in names]
    figure.legend(handles, list(names.values()), loc="outside upper center", ncols=4, fontsize=8, frameon=False)
    figure.supxlabel("milliseconds for a batch, logarithmic: further left is faster", fontsize=8)
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    typer.run(main)
