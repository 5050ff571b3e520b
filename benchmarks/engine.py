"""The engine beside torch, onnxruntime and OpenVINO, by network, batch, threads and class of instruction sets.

    python benchmarks/engine.py                                # all of it, some twenty minutes on an idle machine
    python benchmarks/engine.py --nets conv256 --batches 1     # some rows anew; the others of results.json stay
    python benchmarks/engine.py --missing                      # what results.json does not have yet

Every network is made with random weights and random batch norms of either sign, exported, verified against torch, and
timed in a process of its own, where engine and peers take turns. An image goes in as float32, logits come out. Single
layers are the exception: conv256, a binary convolution of 256 to 256 channels, 3x3, on a 14x14 map, and dense4096, 4096
to 4096 numbers, run from packed codes to packed codes, against a float32 or int8 layer. OpenVINO's own binary
convolution computes the same network, where it can; of a layer it reads floats, makes the bits itself and writes sums.
An int8 peer has no float layer left, so the engine is timed with an 8-bit rest, too: the layers that the method leaves
in float, calibrated as `lowbit export --rest int8` does it. Accuracy means nothing here: the networks are untrained.

Writes results.json (every row with its quartiles, date and command, the machine and versions), table.md and plot.svg.
"""

from __future__ import annotations

import json
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import drawing
import typer
from measured import apart, command, form_of, machine, publish, quartiles

# Name: channels in and out, side of the map, kernel.
LAYERS = {"conv256": (256, 14, 3), "dense4096": (4096, 1, 1)}
# Name: model, its options, method, its options, the side of an image.
NETS: dict[str, tuple[str, dict[str, Any], str, dict[str, Any], int]] = {
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
    "AVX-VNNI": ("avx_vnni", "AVX2_VNNI"),
    "AVX2": ("avx2", "AVX2"),
}
KEYS = ("net", "class", "threads", "batch")
FORMS = ("float32", "bf16", "int8", "binary")
REST = "8-bit rest"
SECONDS = 4.0


def main(
    out: Annotated[Path, typer.Option(help="Folder of what is written.")] = Path("results/engine"),
    nets: Annotated[str, typer.Option(help="Any of " + ", ".join([*LAYERS, *NETS]))] = ",".join([*LAYERS, *NETS]),
    batches: Annotated[str, typer.Option(help="Images at a time.")] = "1,16",
    classes: Annotated[str, typer.Option(help="Any of " + ", ".join(CLASSES))] = ",".join(CLASSES),
    threads: Annotated[str, typer.Option(help="Threads of each runtime.")] = "1",
    missing: Annotated[bool, typer.Option("--missing", help="Leave what results.json has.")] = False,
    job: Annotated[str, typer.Option(hidden=True)] = "",
) -> None:
    """Time all that is asked for, and write each row down when it is there."""
    if job:
        print(json.dumps(measure(**json.loads(job))))
        return
    from lowbit._engine import available_isas

    record = opened(out)
    there = {key_of(row) for row in record["rows"]} if missing else set()
    with tempfile.TemporaryDirectory() as folder:
        for net in nets.split(","):
            for kind in classes.split(","):
                isa, cap = CLASSES[kind]
                if isa not in available_isas():
                    print(f"{kind}: this CPU or build has no {isa}", file=sys.stderr)
                    continue
                for count in map(int, threads.split(",")):
                    for batch in map(int, batches.split(",")):
                        settings = dict(zip(KEYS, (net, kind, count, batch), strict=True))
                        if key_of(settings) in there:
                            continue
                        path = Path(folder) / f"{net}.lowbit"
                        if not path.exists():
                            export_rests(net, path)
                        environment = {
                            "LOWBIT_ISA": isa,
                            "ONEDNN_MAX_CPU_ISA": cap,
                            "OMP_NUM_THREADS": str(count),
                        }
                        peers = ["torch", "openvino"] + ["onnxruntime"] * (kind == next(iter(CLASSES)))
                        of = {"path": str(path), "net": net, "batch": batch, "threads": count, "peers": peers}
                        asked = {"command": command(__file__)}
                        rows = [{**settings, **row, **asked} for row in apart(__file__, of, environment)]
                        record["rows"] = merged(record["rows"], rows)
                        publish(record, out, table, plot)
                        print(settings, rows[-1]["date"], file=sys.stderr)
    print(table(record))


def opened(out: Path) -> dict[str, Any]:
    """What results.json holds, or an empty record of this machine; figures of another machine are never mixed in."""
    here, path = machine(), out / "results.json"
    if not path.exists():
        return {**here, "rows": []}
    record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    for key, value in here.items():
        if record[key] != value:
            raise SystemExit(f"{path} has other {key}: {record[key]}, not {value}; write to another --out")
    return record


def key_of(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row[key] for key in KEYS)


def merged(old: list[dict[str, Any]], new: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of both, in the order of nets and classes; what was measured anew replaces what was."""
    again = {key_of(row) for row in new}
    works, kinds = [*LAYERS, *NETS], [*CLASSES]
    rows = [row for row in old if key_of(row) not in again] + new
    return sorted(rows, key=lambda r: (works.index(r["net"]), kinds.index(r["class"]), r["threads"], r["batch"]))


def with_rest(path: Path) -> Path:
    """Where the same network lies with an 8-bit rest."""
    return path.with_suffix(".rest.lowbit")


def export_rests(net: str, path: Path) -> dict[str, Path]:
    """Export a network with its float rest to ``path`` and, unless it is a single layer, with an 8-bit one beside it.

    Returns:
        Where each lies, by its rest.
    """
    export(net, path)
    if net not in NETS:
        return {"float": path}
    export(net, with_rest(path), rest=True)
    return {"float": path, REST: with_rest(path)}


def export(net: str, path: Path, rest: bool = False) -> None:
    """Write a packed file of random weights, and verify it; with ``rest``, what is float in it becomes 8-bit."""
    import torch
    from torch import nn

    import lowbit
    from lowbit.exporter.verify import verify
    from lowbit.layers import calibrate
    from lowbit.rest import METHOD, OPTIONS

    torch.manual_seed(0)
    if net in LAYERS:
        # Between a first and a last layer that stay float, two binary ones: the first of them gives codes.
        channels, side, kernel = LAYERS[net]
        model: nn.Module = nn.Sequential(
            nn.Conv2d(3, channels, 1),
            nn.BatchNorm2d(channels),
            nn.Conv2d(channels, channels, kernel, padding=kernel // 2, bias=False),
            nn.BatchNorm2d(channels),
            nn.Conv2d(channels, 16, 1, bias=False),
            nn.ReLU(),
            nn.Conv2d(16, 10, side),
            nn.Flatten(),
        )
        lowbit.quantize_(model, "xnor_net")
    else:
        name, options, method, method_options, side = NETS[net]
        model = lowbit.models.create(name, method=method, method_options=method_options, image_size=side, **options)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor, spread in ((module.weight, 1.0), (module.bias, 0.3), (module.running_mean, 0.3)):
                nn.init.normal_(tensor, 0, spread)
            nn.init.uniform_(module.running_var, 0.5, 2)
    images = torch.randn(2, 3, side, side)
    if rest:
        lowbit.quantize_(model, lowbit.methods.registry[METHOD](**OPTIONS))
        calibrate(model, [images])
    packed = lowbit.export(model.eval(), images).packed
    report = verify(model, packed, images)
    if not report.passed:
        raise SystemExit(f"{net}: verify failed")
    packed.save(path)


def layer_twin(channels: int, kernel: int) -> Any:
    """The float layer of the same size, which reads (N, channels, H, W)."""
    from torch import nn

    if kernel == 1:
        return nn.Sequential(nn.Flatten(), nn.Linear(channels, channels, bias=False)).eval()
    return nn.Conv2d(channels, channels, kernel, padding=kernel // 2, bias=False).eval()


def binary_layer(op: dict[str, Any], tensors: dict[str, Any], channels: int) -> tuple[list[Any], list[Any]]:
    """Ops and tensors of a binary layer that reads floats, whose signs are the bits, and writes its sums."""
    import numpy as np

    signs = {"thresholds": np.zeros((channels, 1), np.float32), "falling": np.zeros(channels, np.uint8)}
    sums = {"weight_bits": tensors["weight_bits"], "scale": np.ones(channels, np.float32)}
    return [{"op": "threshold", "inputs": [0], "bits": 1}, {**op, "inputs": [1]}], [signs, sums]


def measure(path: str, net: str, batch: int, threads: int, peers: list[str]) -> list[dict[str, Any]]:
    """Rows of the engine and the peers: quartiles of milliseconds for a batch, of calls that took turns."""
    import numpy as np
    import openvino_binary
    import torch

    from lowbit import Engine
    from lowbit.errors import UsageError
    from lowbit.exporter import peers as others
    from lowbit.exporter.bench import TURN_SECONDS, take_turns

    torch.set_num_threads(threads)
    engine = Engine(path, threads=threads)
    images = np.random.default_rng(0).standard_normal((batch, *engine.input_shape), dtype=np.float32)
    tensors = engine.model.all_op_tensors()
    inside: list[float] = []
    if net in LAYERS:
        channels, side, kernel = LAYERS[net]
        twin = layer_twin(channels, kernel)
        middle = [op["op"] for op in engine.model.ops].index("binary_conv2d")
        inputs = np.random.default_rng(0).standard_normal((batch, channels, side, side), dtype=np.float32)
        same = (channels, side, side), *binary_layer(engine.model.ops[middle], tensors[middle], channels)

        def ours() -> None:
            inside.append(engine.profile(images)[middle])
    else:
        twin, inputs, same = others.float_twin(engine.model), images, (engine.input_shape, engine.model.ops, tensors)

        def ours() -> object:
            return engine(images)

    name = f"lowbit {engine.isa}"
    calls = {name: ours}
    if with_rest(Path(path)).exists():
        rest = Engine(with_rest(Path(path)), threads=threads)
        calls[f"{name} {REST}"] = lambda: rest(images)
    calls |= others.runners(peers, twin, inputs, threads)
    if "openvino" in peers:
        try:
            calls |= openvino_binary.runners(*same, inputs, threads)
        except UsageError as error:
            print(f"{net}: {error}", file=sys.stderr)
    times = take_turns(calls, SECONDS)
    seconds = {runtime: [wall for wall, _ in of] for runtime, of in times.items()}
    if inside:
        seconds[name] = inside[-len(seconds[name]) :]
    busy = sum(cpu for of in times.values() for _, cpu in of) / sum(wall for of in times.values() for wall, _ in of)
    date = datetime.now(UTC).isoformat(timespec="seconds")
    return [
        {"runtime": runtime, **quartiles(values), "turn_seconds": TURN_SECONDS, "processor_share": busy, "date": date}
        for runtime, values in seconds.items()
    ]


def fastest_of(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The row of the least time of each form."""
    slowest_first = sorted(rows, key=lambda row: float(row["milliseconds"]), reverse=True)
    return {form_of(row["runtime"]): row for row in slowest_first}


def table(record: dict[str, Any]) -> str:
    """Markdown tables: the engine beside the fastest form of each kind of peer, and then beside each peer."""
    rows = record["rows"]
    dates = sorted({row["date"][:10] for row in rows})
    commands = ", ".join(f"`{command}`" for command in dict.fromkeys(row["command"] for row in rows))
    turns = "turns of calls in a row" if all("turn_seconds" in row for row in rows) else "turns"
    lines = [
        f"{commands}; {record['cpu']}, {record['cores']} cores, {' to '.join(dict.fromkeys((dates[0], dates[-1])))}. "
        f"Milliseconds for a batch, medians of calls that took {turns}, quartiles in brackets; with peers also their "
        "time over the engine's, and with int8 ones over that of the engine with an 8-bit rest too, where there is a "
        "rest. Untrained networks. The binary peer is OpenVINO's own binary convolution.",
        "",
        f"| net | class | threads | batch | engine | engine, {REST} | " + " | ".join(FORMS) + " |",
        "|" + "---|" * (6 + len(FORMS)),
    ]
    every = [
        "",
        "Every peer:",
        "",
        "| net | class | threads | batch | runtime | time | over engine |",
        "|" + "---|" * 7,
    ]
    for key in dict.fromkeys(map(key_of, rows)):
        engine, *others = [row for row in rows if key_of(row) == key]
        fastest = fastest_of(others)
        rest = fastest.get(REST)
        cells = [*map(str, key), _cell(engine), "-" if rest is None else _cell(rest)]
        for form in FORMS:
            best = fastest.get(form)
            if best is None:
                cells.append("-")
                continue
            over = [engine] if rest is None or form != "int8" else [engine, rest]
            ratios = " and ".join(f"{best['milliseconds'] / ours['milliseconds']:.2f}x" for ours in over)
            cells.append(f"{_cell(best)}, {ratios}, {_name(best)}")
        lines.append(f"| {' | '.join(cells)} |")
        for row in (engine, *others):
            ratio = f"{row['milliseconds'] / engine['milliseconds']:.2f}"
            every.append(f"| {' | '.join([*map(str, key), row['runtime'], _cell(row), ratio])} |")
    return "\n".join(lines + every) + "\n"


def _cell(row: dict[str, Any]) -> str:
    return f"{row['milliseconds']:.3f} ({row['low']:.3f} to {row['high']:.3f})"


def _name(row: dict[str, Any]) -> str:
    return str(row["runtime"].split()[0])


def plot(record: dict[str, Any], path: Path) -> None:
    """Draw a panel per net and batch, on one thread or the fewest: the engine and the fastest peer of each form."""
    pyplot, ticker = drawing.pyplot(), drawing.ticker()
    fewest = min(row["threads"] for row in record["rows"])
    rows = [row for row in record["rows"] if row["threads"] == fewest]
    panels = list(dict.fromkeys((row["net"], row["batch"]) for row in rows))
    kinds = list(dict.fromkeys(row["class"] for row in rows))
    marks = drawing.MARKS
    lines = -(-len(panels) // 2)
    figure, axes = pyplot.subplots(
        lines, 2, figsize=(10, lines * (0.9 + 0.35 * len(kinds))), squeeze=False, layout="constrained"
    )
    labels: list[tuple[Any, int, list[float]]] = []
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis, (net, batch) in zip(axes.flat, panels, strict=False):
        for height, kind in enumerate(kinds):
            there = [row for row in rows if (row["net"], row["batch"], row["class"]) == (net, batch, kind)]
            if not there:
                continue
            engine, *others = there
            fastest = {"engine": engine, **fastest_of(others)}
            best = {form: row["milliseconds"] for form, row in fastest.items()}
            axis.plot([min(best.values()), max(best.values())], [height, height], color=drawing.FAINT, zorder=0)
            for form, milliseconds in best.items():
                colour, shape = marks[form]
                axis.plot(milliseconds, height, shape, color=colour, markersize=6)
            labels.append((axis, height, sorted(best.values())))
        axis.set_yticks(range(len(kinds)), kinds, fontsize=8)
        axis.set_ylim(len(kinds) - 0.5, -0.7)
        axis.set_xscale("log")
        axis.xaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
        axis.xaxis.set_minor_formatter(ticker.NullFormatter())
        axis.tick_params(axis="both", labelsize=8)
        axis.margins(x=0.1)
        axis.set_title(f"{net}, batch {batch}", fontsize=9, loc="left")
        axis.spines[["top", "right"]].set_visible(False)
    shown = {form_of(row["runtime"]) for row in rows}
    names = {"engine": "lowbit"} | ({REST: f"lowbit, {REST}"} if REST in shown else {})
    names |= {form: f"{form}, best peer" for form in reversed(FORMS) if form in shown}
    handles = [pyplot.Line2D([], [], color=marks[form][0], marker=marks[form][1], linestyle="") for form in names]
    figure.legend(handles, list(names.values()), loc="outside upper center", ncols=6, fontsize=8, frameon=False)
    figure.supxlabel("milliseconds for a batch, logarithmic: further left is faster", fontsize=8)
    figure.draw_without_rendering()  # now it is known where everything lies
    for axis, height, times in labels:
        _label(axis, height, times[::2], 6)
        _label(axis, height, times[1::2], -12)
    drawing.save(figure, path)


def _label(axis: Any, height: int, times: list[float], above: int) -> None:
    """Write rising ``times`` at their marks, ``above`` points over them, each at least beside the one before."""
    end = 0.0  # of the label before, in points
    for milliseconds in times:
        text = f"{milliseconds:.{3 if milliseconds < 1000 else 4}g}"
        mark, half = axis.transData.transform((milliseconds, height))[0] * 72 / axis.figure.dpi, 2.2 * len(text)
        middle = max(mark, end + half)
        end = middle + half + 2
        place = {"xytext": (middle - mark, above), "textcoords": "offset points", "ha": "center", "fontsize": 7}
        axis.annotate(text, (milliseconds, height), **place)


if __name__ == "__main__":
    typer.run(main)
