"""Time the engine beside float32 twins of the same architecture in other runtimes, interleaved in one run.

A twin is built from the packed graph itself: the same convolutions with random weights, and wherever codes are made a
batch norm and a ReLU, unless what becomes codes has been through one, without K maps, which only codes need. It takes
the time of the float network of that architecture; its outputs mean nothing.

Taking turns does not make a busy machine fair: a call of 1 ms fits between two interruptions, one of 90 ms does not. So
the processor time of each call is kept beside its wall time, and the result says when they differ.
"""

from __future__ import annotations

import importlib
import io
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Group, RenderableType
from rich.table import Table

from lowbit.errors import UsageError
from lowbit.hardware import cpu_name
from lowbit.packed import PackedModel, read
from lowbit.runtime import Engine

if TYPE_CHECKING:
    import torch
    from torch import nn

Call = Callable[[], object]
Timed = dict[str, Call]

WARM_UP, FEWEST, MOST = 3, 7, 2000
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
class BenchResult:
    """What `bench` measured. The first row is the engine."""

    file: str
    isa: str
    threads: int
    batch: int
    rows: tuple[Row, ...]
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
        table = Table(title=f"{self.file}, batch {self.batch}, {_threads(self.threads)} each", title_justify="left")
        for column in ("runtime", "ms per batch", "processor ms", "time / engine's"):
            table.add_column(column, justify="left" if column == "runtime" else "right")
        for row in self.rows:
            table.add_row(row.name, f"{row.milliseconds:.3f}", f"{row.cpu_milliseconds:.3f}", f"{row.ratio:.2f}")
        notes = ["medians of interleaved runs; a peer runs the same architecture in float32"]
        if self.disturbed:
            notes.append(
                "DISTURBED: other programs took the processor; do not quote these ratios, run again on an idle machine"
            )
        return Group(table, *notes)


def bench(
    packed: PackedModel | str | Path, *, threads: int = 1, batch: int = 1, against: Sequence[str] = ()
) -> BenchResult:
    """Median time of a batch of random images: float32 in, logits out.

    Args:
        packed: a packed model, or the path of its file.
        threads: of the engine and of each peer.
        batch: images at a time.
        against: any of ``torch`` (timed in both memory formats), ``onnxruntime``, ``openvino``.

    Raises:
        UsageError: a peer is unknown or not installed, or a number is below 1.
        LowbitError: the file cannot be read.
    """
    if batch < 1:
        raise UsageError(f"the batch size is {batch}, but must be at least 1")
    file = "packed model" if isinstance(packed, PackedModel) else str(packed)
    model = packed if isinstance(packed, PackedModel) else read(packed)
    for peer in against:
        _require(peer)
    engine = Engine(model, threads=threads)
    images = np.random.default_rng(0).standard_normal((batch, *model.input_shape), dtype=np.float32)
    name = f"lowbit ({engine.isa})"
    runners: Timed = {name: lambda: engine(images)}
    with ExitStack() as stack:
        if against:
            stack.enter_context(_torch_threads(threads))
            twin = _twin(model)
            for peer in dict.fromkeys(against):
                runners |= _PEERS[peer](twin, images, threads)
        medians = _medians(runners)
    of_engine = medians[name][0]
    rows = tuple(
        Row(peer, 1e3 * wall, 1e3 * cpu, wall / of_engine, runs) for peer, (wall, cpu, runs) in medians.items()
    )
    return BenchResult(file, engine.isa, threads, batch, rows)


def interleaved_medians(runners: Mapping[str, Call], seconds: float = 3.0) -> dict[str, float]:
    """Median seconds of each call. The calls take turns, so that what slows the machine slows them all.

    Args:
        runners: name to what is timed.
        seconds: how long to go on; each is called 7 to 2000 times, after 3 calls to warm up.
    """
    return {name: wall for name, (wall, _, _) in _medians(runners, seconds).items()}


def _medians(runners: Mapping[str, Call], seconds: float = 3.0) -> dict[str, tuple[float, float, int]]:
    """Median wall and processor seconds of each call, and how many calls they are of; see `interleaved_medians`."""
    walls: dict[str, list[float]] = {name: [] for name in runners}
    cpus: dict[str, list[float]] = {name: [] for name in runners}
    for call in runners.values():
        for _ in range(WARM_UP):
            call()
    end = time.perf_counter() + seconds
    for turn in range(MOST):
        if turn >= FEWEST and time.perf_counter() > end:
            break
        for name, call in runners.items():
            wall, cpu = time.perf_counter(), time.process_time()
            call()
            walls[name].append(time.perf_counter() - wall)
            cpus[name].append(time.process_time() - cpu)
    return {name: (statistics.median(walls[name]), statistics.median(cpus[name]), len(walls[name])) for name in runners}


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


_NEEDS = {
    "torch": ("torch",),
    "onnxruntime": ("torch", "onnx", "onnxruntime"),
    "openvino": ("torch", "onnx", "openvino"),
}


def _require(peer: str) -> None:
    if peer not in _NEEDS:
        raise UsageError(f"no peer is called '{peer}'; choose from {', '.join(_NEEDS)}")
    for package in _NEEDS[peer]:
        try:
            importlib.import_module(package)
        except ImportError:
            raise UsageError(f"to bench against {peer}, install {package}: pip install {package}") from None


def _twin(packed: PackedModel) -> nn.Module:
    """The float network of a packed graph's architecture."""
    import torch
    from torch import nn

    def as_pair(pair: list[int]) -> tuple[int, int]:
        return pair[0], pair[1]

    def norm_and_relu(channels: int, done: frozenset[str] = frozenset()) -> nn.Module:
        parts = {"affine": nn.BatchNorm2d(channels), "relu": nn.ReLU()}
        return nn.Sequential(*(part for op, part in parts.items() if op not in done))

    def convolution(op: dict[str, Any], tensors: dict[str, Any], channels: int) -> nn.Module:
        stride, padding, dilation = (as_pair(op[key]) for key in ("stride", "padding", "dilation"))
        bias = "bias" in tensors
        conv = nn.Conv2d(
            channels, op["channels"], as_pair(op["kernel"]), stride, padding, dilation, op["groups"], bias=bias
        )
        nn.init.kaiming_normal_(conv.weight)
        return conv

    def passed() -> list[frozenset[str]]:
        """Which of "affine" and "relu" each value has been through since a convolution; the input needs neither."""
        result = [frozenset({"affine", "relu"})]
        for op in packed.ops:
            before = result[op["inputs"][0]]
            match op["op"]:
                case "affine":
                    result.append(frozenset({"affine"}))
                case "relu":
                    result.append(before | {"relu"})
                case "add":
                    result.append(before & result[op["inputs"][1]] - {"relu"})
                case "max_pool" | "avg_pool" | "hardtanh" | "multiply":
                    result.append(before)
                case _:
                    result.append(frozenset())
        return result

    def made(op: dict[str, Any], tensors: dict[str, Any], channels: int, done: frozenset[str]) -> nn.Module:
        match op["op"]:
            case "conv2d" | "table_conv2d":
                return convolution(op, tensors, channels)
            case "binary_conv2d" | "quant_conv2d":
                conv = convolution(op, tensors, channels)
                return nn.Sequential(conv, norm_and_relu(op["channels"])) if "thresholds" in tensors else conv
            case "threshold":
                return norm_and_relu(channels, done)
            case "affine":
                return nn.BatchNorm2d(channels)
            case "max_pool":
                return nn.MaxPool2d(as_pair(op["kernel"]), as_pair(op["stride"]), as_pair(op["padding"]))
            case "avg_pool":
                return nn.AvgPool2d(
                    as_pair(op["kernel"]),
                    as_pair(op["stride"]),
                    as_pair(op["padding"]),
                    count_include_pad=op["count_include_pad"],
                )
            case "relu":
                return nn.ReLU()
            case "hardtanh":
                return nn.Hardtanh(op["min"], op["max"])
            case "add":
                return _Sum()
            case "multiply":
                return nn.Identity()
        raise UsageError(f"op '{op['op']}' has no float twin")

    class _Sum(nn.Module):
        def forward(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
            return left + right

    class _Twin(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            values = packed.values()
            # A product with a K map passes its first factor on; what only the map reads is then left out.
            reads = {i: op["inputs"][:1] if op["op"] == "multiply" else op["inputs"] for i, op in enumerate(packed.ops)}
            needed = {len(packed.ops)}
            for index in reversed(reads):
                if index + 1 in needed:
                    needed.update(reads[index])
            self.steps = [(index, reads[index]) for index in reads if index + 1 in needed]
            done = passed()
            self.ops = nn.ModuleList(
                made(packed.ops[index], packed.op_tensors(index), values[inputs[0]].channels, done[inputs[0]])
                for index, inputs in self.steps
            )

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            values = {0: x}
            for op, (index, inputs) in zip(self.ops, self.steps, strict=True):
                values[index + 1] = op(*(values[number] for number in inputs))
            return values[index + 1].flatten(1)

    torch.manual_seed(0)
    return _Twin().eval()


def _torch_peer(twin: nn.Module, images: Any, threads: int) -> Timed:
    import copy

    import torch

    contiguous, channels_last = torch.from_numpy(images), torch.from_numpy(images).to(memory_format=torch.channels_last)
    moved = copy.deepcopy(twin).to(memory_format=torch.channels_last)

    def call(model: nn.Module, x: torch.Tensor) -> Call:
        def run() -> object:
            with torch.inference_mode():
                return model(x)

        return run

    name = f"torch {torch.__version__}"
    return {name: call(twin, contiguous), f"{name}, channels last": call(moved, channels_last)}


def _onnx(twin: nn.Module, images: Any) -> bytes:
    import torch

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "twin.onnx"
        torch.onnx.export(twin, (torch.from_numpy(images),), path, input_names=["x"], dynamo=False)
        return path.read_bytes()


def _onnxruntime_peer(twin: nn.Module, images: Any, threads: int) -> Timed:
    runtime: Any = importlib.import_module("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    session = runtime.InferenceSession(_onnx(twin, images), options, providers=["CPUExecutionProvider"])
    return {f"onnxruntime {runtime.__version__}": lambda: session.run(None, {"x": images})}


def _openvino_peer(twin: nn.Module, images: Any, threads: int) -> Timed:
    openvino: Any = importlib.import_module("openvino")
    core = openvino.Core()
    # On a CPU with bf16 OpenVINO computes in bf16 unless it is told not to.
    settings = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32", "NUM_STREAMS": 1}
    compiled = core.compile_model(core.read_model(io.BytesIO(_onnx(twin, images))), "CPU", settings)
    request = compiled.create_infer_request()
    return {f"openvino {openvino.__version__}": lambda: request.infer({0: images})}


_PEERS: dict[str, Callable[[Any, Any, int], Timed]] = {
    "torch": _torch_peer,
    "onnxruntime": _onnxruntime_peer,
    "openvino": _openvino_peer,
}
