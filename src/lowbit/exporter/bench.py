"""Time the engine beside twins of the same architecture in other runtimes (`lowbit.exporter.peers`), interleaved.

Taking turns does not make a busy machine fair: a call of 1 ms fits between two interruptions, one of 90 ms does not. So
the processor time of each call is kept beside its wall time, and the result says when they differ.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from lowbit.errors import UsageError
from lowbit.exporter import peers
from lowbit.hardware import cpu_name
from lowbit.packed import WEIGHTS, PackedModel, Value, read
from lowbit.runtime import Engine, kernels_of, peak

if TYPE_CHECKING:
    from torch import nn

Call = Callable[[], object]

WARM_UP, FEWEST, MOST = 3, 7, 2000
# A turn ends after so many calls or seconds. Quick calls come in a row, as in a loop of their own: one alone would find
# the caches full of what the others left.
CALLS_A_TURN, TURN_SECONDS = 20, 0.02
KINDS = {"conv2d": "float", "table_conv2d": "float", "binary_conv2d": "binary", "quant_conv2d": "integer"}
"""The kind of product of each op that has products."""
JOINED = "with the layer above"
INTERRUPTED = 1.1
"""Wall time over processor time from which a call counts as interrupted; idle, several threads make it less than 1."""


@dataclass(frozen=True)
class Row:
    """One runtime: median milliseconds of a batch over ``runs``, on the clock and on processors, and the former
    over the engine's."""

    name: str
    milliseconds: float
    cpu_milliseconds: float
    ratio: float
    runs: int = 1

    @property
    def interrupted(self) -> bool:
        """Whether the call waited for a processor that something else had."""
        return self.milliseconds > INTERRUPTED * self.cpu_milliseconds


@dataclass(frozen=True)
class Layer:
    """One op of the engine: median milliseconds of a batch, its products, billions of them a second and their share of
    what the cores in use reach at most, and bytes of its weights. What an op above does too takes no time of its own:
    ``kernel`` then says so."""

    name: str
    op: str
    kernel: str
    milliseconds: float
    macs: int
    weight_bytes: int
    gmacs: float | None = None
    share: float | None = None


@dataclass(frozen=True)
class BenchResult:
    """What `bench` measured. The first row is the engine; ``layers`` are its ops, ``peaks`` billions of products a
    second that one core reaches at most, by kind."""

    file: str
    isa: str
    threads: int
    batch: int
    rows: tuple[Row, ...]
    layers: tuple[Layer, ...] = ()
    peaks: Mapping[str, float] = field(default_factory=dict)
    cpu: str = field(default_factory=cpu_name)
    date: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))

    @property
    def disturbed(self) -> bool:
        """Whether the machine was too busy for the ratios to mean anything."""
        return any(row.interrupted for row in self.rows)

    def to_dict(self) -> dict[str, Any]:
        """The result as JSON."""
        return {**asdict(self), "disturbed": self.disturbed}

    def render(self) -> RenderableType:
        """The result for the terminal."""
        table = Table(
            title=f"{escape(self.file)}, batch {self.batch}, {_threads(self.threads)} each", title_justify="left"
        )
        for column in ("runtime", "ms per batch", "processor ms", "time / engine's"):
            table.add_column(column, justify="left" if column == "runtime" else "right")
        for row in self.rows:
            table.add_row(Text(row.name), f"{row.milliseconds:.3f}", f"{row.cpu_milliseconds:.3f}", f"{row.ratio:.2f}")
        notes = ["medians of interleaved runs; a peer runs the same architecture with random weights"]
        if self.disturbed:
            notes.append(
                "DISTURBED: other programs took the processor; do not quote these ratios, run again on an idle machine"
            )
        return Group(table, *notes, *self._render_layers())

    def _render_layers(self) -> list[RenderableType]:
        if not self.layers:
            return []
        table = Table(title="Layers of the engine", title_justify="left")
        for column in ("layer", "op", "kernel"):
            table.add_column(column, overflow="fold")
        for column in ("ms", "G MAC/s", "of peak", "weights, bytes"):
            table.add_column(column, justify="right", no_wrap=column == "ms")
        for layer in self.layers:
            table.add_row(
                *map(Text, (layer.name, layer.op, layer.kernel)),
                "" if layer.kernel == JOINED else f"{layer.milliseconds:.4f}",
                "" if layer.gmacs is None else f"{layer.gmacs:.1f}",
                "" if layer.share is None else f"{100 * layer.share:.0f} %",
                f"{layer.weight_bytes:,}" if layer.weight_bytes else "",
            )
        peaks = ", ".join(f"{kind} {peak:,.0f}" for kind, peak in self.peaks.items())
        return [table, f"most that one core reaches with {self.isa}, in registers, measured now, G MAC/s: {peaks}"]


def bench(
    packed: PackedModel | str | Path,
    *,
    threads: int = 1,
    batch: int = 1,
    against: Sequence[str] = (),
    seconds: float = 3.0,
    layers: bool = True,
) -> BenchResult:
    """Median time of a batch of random images: float32 in, logits out.

    Args:
        packed: a packed model, or the path of its file.
        threads: of the engine and of each peer.
        batch: images at a time.
        against: any of ``torch`` (in float32 and bf16), ``onnxruntime`` (float32 and int8), ``openvino`` (all three).
        seconds: how long to go on; see `interleaved_medians` for the turns.
        layers: whether to time the engine's ops too, which takes a second more.

    Raises:
        UsageError: a peer is unknown or not installed, or a number is below 1.
        LowbitError: the file cannot be read.
    """
    if batch < 1:
        raise UsageError(f"the batch size is {batch}, but must be at least 1")
    file = "packed model" if isinstance(packed, PackedModel) else str(packed)
    model = packed if isinstance(packed, PackedModel) else read(packed)
    for peer in against:
        peers.require(peer)
    engine = Engine(model, threads=threads)
    too_many = UsageError(f"a batch of {batch} images needs more memory than there is; take fewer")
    try:
        images = np.random.default_rng(0).standard_normal((batch, *model.input_shape), dtype=np.float32)
    except (MemoryError, ValueError):  # the latter beyond what an address can be
        raise too_many from None
    try:
        engine(images)
    except MemoryError:
        raise too_many from None
    name = f"lowbit ({engine.isa})"
    runners: dict[str, Call] = {name: lambda: engine(images)}
    with ExitStack() as stack:
        if against:
            stack.enter_context(_torch_threads(threads))
            twin = peers.float_twin(model)
            runners |= peers.runners(against, twin, images, threads)
        medians = _medians(runners, seconds)
    of_engine = medians[name][0]
    rows = tuple(
        Row(peer, 1e3 * wall, 1e3 * cpu, wall / of_engine, runs) for peer, (wall, cpu, runs) in medians.items()
    )
    return BenchResult(file, engine.isa, threads, batch, rows, *(_layers(engine, images) if layers else ()))


def _layers(engine: Engine, images: Any, seconds: float = 1.0) -> tuple[tuple[Layer, ...], dict[str, float]]:
    """The engine's ops, and what one core reaches at most in the kinds of products that they have."""
    profiles: list[list[float]] = []
    take_turns({"": lambda: profiles.append(engine.profile(images))}, seconds)
    model, rows = engine.model, kernels_of(engine)
    values = model.values()
    work = [_work(op, row["kernel"], values[op["inputs"][0]]) for op, row in zip(model.ops, rows, strict=True)]
    peaks = {kind: peak(kind, engine.isa) / 1e9 for kind in sorted({kind for kind, _ in work if kind})}
    layers = []
    for index, (row, cost, (kind, times)) in enumerate(zip(rows, model.costs(), work, strict=True)):
        spent = statistics.median(profile[index] for profile in profiles[WARM_UP:])
        joined, tensors = not any(profile[index] for profile in profiles), model.op_tensors(index)
        rate = 1e-9 * cost.macs * len(images) / spent if cost.macs and spent else None
        layers.append(
            Layer(
                row["source"],
                row["kind"],
                JOINED if joined else row["kernel"],
                1e3 * spent,
                cost.macs * len(images),
                sum(tensors[name].nbytes for name in WEIGHTS if name in tensors),
                rate,
                None if rate is None else rate * times / (peaks[kind] * engine.threads),
            )
        )
    return tuple(layers), peaks


def _work(op: Mapping[str, Any], kernel: str, given: Value) -> tuple[str, int]:
    """The kind of product that an op's kernel makes, and how many of them for one product of the network."""
    if kernel.startswith("planes."):
        return "binary", given.bits * op["weight_width"]
    return KINDS.get(op["op"], ""), 1


def interleaved_medians(runners: Mapping[str, Call], seconds: float = 3.0) -> dict[str, float]:
    """Median seconds of each call. The calls take turns, so that what slows the machine slows them all.

    Args:
        runners: name to what is timed.
        seconds: how long to go on; each has 7 to 2000 turns, after 3 calls to warm up. A turn is
            20 calls in a row, or as many as begin within 20 ms.
    """
    return {name: wall for name, (wall, _, _) in _medians(runners, seconds).items()}


def _medians(runners: Mapping[str, Call], seconds: float) -> dict[str, tuple[float, float, int]]:
    """Median wall and processor seconds of each call, and how many calls they are of; see `interleaved_medians`."""
    medians = {}
    for name, times in take_turns(runners, seconds).items():
        walls, cpus = zip(*times, strict=True)
        medians[name] = statistics.median(walls), statistics.median(cpus), len(times)
    return medians


def take_turns(runners: Mapping[str, Call], seconds: float) -> dict[str, list[tuple[float, float]]]:
    """Wall and processor seconds of every call, by name; arguments as in `interleaved_medians`."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in runners}
    for call in runners.values():
        for _ in range(WARM_UP):
            call()
    end = time.perf_counter() + seconds
    for turn in range(MOST):
        if turn >= FEWEST and time.perf_counter() > end:
            break
        for name, call in runners.items():
            last = time.perf_counter() + TURN_SECONDS
            for _ in range(CALLS_A_TURN):
                wall, cpu = time.perf_counter(), time.process_time()
                call()
                times[name].append((time.perf_counter() - wall, time.process_time() - cpu))
                if time.perf_counter() > last:
                    break
    return times


def torch_runner(model: nn.Module, input_shape: tuple[int, int, int], *, threads: int = 1, batch: int = 1) -> Call:
    """A call that runs ``model`` in ``eval()`` on one random batch, with ``threads`` threads."""
    import torch

    model.eval()
    images = torch.randn(batch, *input_shape)

    def call() -> object:
        with _torch_threads(threads), torch.inference_mode():
            return model(images)

    return call


class _torch_threads:
    """Torch's number of threads, inside a ``with``."""

    def __init__(self, threads: int) -> None:
        self.threads = threads

    def __enter__(self) -> None:
        import torch

        self.before = torch.get_num_threads()
        torch.set_num_threads(self.threads)

    def __exit__(self, *_: object) -> None:
        import torch

        torch.set_num_threads(self.before)


def _threads(count: int) -> str:
    return "one thread" if count == 1 else f"{count} threads"
