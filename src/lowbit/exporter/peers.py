"""Other runtimes, with the float network of a packed graph's architecture and its 8-bit form.

A twin is built from the packed graph itself: the same convolutions with random weights. Where the packed graph makes
codes, the twin has a batch norm and a ReLU, less what the value has been through already. Where the same sums also go
through a pool, a norm and an activation in float, because a shortcut reads them, the twin's next layer reads the result
of these. K maps are left out: only codes need them. A twin takes the time of the float network of that architecture;
its outputs mean nothing. The 8-bit form is quantized statically by onnxruntime: activations as uint8, weights as int8
per channel, ranges from random images.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import logging
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from graphlib import TopologicalSorter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lowbit.errors import UsageError
from lowbit.packed import PackedModel

if TYPE_CHECKING:
    import torch
    from torch import nn

Timed = dict[str, Callable[[], object]]

CALIBRATION_IMAGES = 4

# What may stand between a convolution and the codes that are made of it, in the float network.
_BEFORE_CODES = ("max_pool", "affine", "relu", "prelu", "hardtanh")

_NEEDS = {
    "torch": ("torch",),
    "onnxruntime": ("torch", "onnx", "onnxruntime"),
    "openvino": ("torch", "onnx", "onnxruntime", "openvino"),
}


def require(peer: str) -> None:
    """Raise a `UsageError` where a peer is unknown, or what it needs is not installed."""
    if peer not in _NEEDS:
        raise UsageError(f"no peer is called '{peer}'; choose from {', '.join(_NEEDS)}")
    for package in _NEEDS[peer]:
        try:
            importlib.import_module(package)
        except ImportError:
            raise UsageError(f"to bench against {peer}, install {package}: pip install {package}") from None


def float_twin(packed: PackedModel) -> nn.Module:
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

    def repeats(tensors: dict[str, Any]) -> bool:
        """Whether a convolution gives channels that it reads, as `lowbit.layers.Repeat` does."""
        if "weight" not in tensors:
            return False
        filters = tensors["weight"].reshape(len(tensors["weight"]), -1)
        return bool(((filters == 1).sum(1) == 1).all() and ((filters == 0).sum(1) == filters.shape[1] - 1).all())

    def passed(steps: list[tuple[int, list[int]]]) -> dict[int, frozenset[str]]:
        """Which of "affine" and "relu" each value has been through since its sums; the input needs neither."""
        result = {0: frozenset({"affine", "relu"})}
        for index, inputs in steps:
            before = result[inputs[0]]
            match packed.ops[index]["op"]:
                case "affine":
                    after = frozenset({"affine"})
                case "relu":
                    after = before | {"relu"}
                case "prelu":
                    # What has learned slopes is normalised before them, in every paper's order.
                    after = frozenset({"affine", "relu"})
                case "add":
                    after = before & result[inputs[1]] - {"relu"}
                case "max_pool" | "avg_pool" | "hardtanh" | "multiply":
                    after = before
                case "conv2d" if repeats(packed.op_tensors(index)):
                    after = before
                case _:
                    after = frozenset()
            result[index + 1] = after
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
            case "prelu":
                return nn.PReLU(channels)
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
            reads, last = _reads(packed)
            self.steps = [(value - 1, reads[value]) for value in _in_order(reads, last)]
            done = passed(self.steps)
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


def _reads(packed: PackedModel) -> tuple[dict[int, list[int]], int]:
    """For each value but the input, the values that its twin reads; and the value that is the twin's output.

    A product with a K map passes its first factor on. Codes of a layer's sums, where the layer's own block also pools,
    normalises or activates these in float, are made of what that leads to, and a pool that floats have been through is
    not there for the codes again. A pool that the exporter has moved stands behind norm and activation, which other
    runtimes make a part of the convolution.
    """
    blocks = {number: op["source"].rpartition(".")[0] for number, op in enumerate(packed.ops, start=1)}
    floats = {number: op for number, op in enumerate(packed.ops, start=1) if op["op"] in _BEFORE_CODES}

    moved = [
        number
        for number, value in enumerate(packed.values())
        if number in floats and value.kind == "float" and "falling" in packed.op_tensors(number - 1)
    ]

    def onward(value: int, block: str | None) -> list[int]:
        """Behind a pool that was moved, what it passed, which has its own block."""
        after = [number for number, op in floats.items() if op["inputs"] == [value]]
        return after if value in moved else [number for number in after if blocks[number] == block]

    last = len(packed.ops)
    reads: dict[int, list[int]] = {}
    pools: dict[int, set[str]] = {}
    instead: dict[int, int] = {}
    for number, op in enumerate(packed.ops, start=1):
        inputs = [instead.get(value, value) for value in op["inputs"]]
        match op["op"]:
            case "multiply":
                inputs = inputs[:1]
            case "threshold":
                pools[number], block = set(), blocks.get(inputs[0])
                while len(after := onward(inputs[0], block)) == 1:
                    inputs, block = after, blocks[after[0]]
                    if floats[after[0]]["op"] == "max_pool":
                        pools[number].add(floats[after[0]]["source"])
            case "max_pool" if op["source"] in pools.get(inputs[0], ()):
                instead[number] = inputs[0]
        reads[number] = inputs
    for pool in moved:
        passed = _passed(pool, reads, floats)
        if passed:
            reads = {n: [pool if value == passed[-1] else value for value in read] for n, read in reads.items()}
            reads[passed[0]], reads[pool] = reads[pool], passed[-1:]
            last = pool if last == passed[-1] else last
    return reads, last


def _passed(pool: int, reads: dict[int, list[int]], floats: dict[int, dict[str, Any]]) -> list[int]:
    """What a moved pool goes back behind: norms, each read by the next alone, up to an activation."""
    passed = [pool]
    while len(passed) == 1 or floats[passed[-1]]["op"] == "affine":
        after = [number for number, read in reads.items() if passed[-1] in read]
        if len(after) != 1 or after[0] not in floats or floats[after[0]]["op"] == "max_pool":
            break
        passed += after
    return passed[1:]


def _in_order(reads: dict[int, list[int]], last: int) -> list[int]:
    """``last`` and the values that it needs, each behind those that it reads, without the input."""
    needed: dict[int, list[int]] = {}
    todo = [last]
    while todo:
        value = todo.pop()
        if value in reads and value not in needed:
            needed[value] = reads[value]
            todo += reads[value]
    return [value for value in TopologicalSorter(needed).static_order() if value in needed]


@dataclass
class _Task:
    """What the peers are given to compute."""

    twin: nn.Module
    images: Any
    threads: int

    @cached_property
    def onnx(self) -> dict[str, bytes]:
        """The twin as ONNX, in float32 and quantized to int8."""
        return _onnx(self.twin, self.images)


def runners(chosen: Sequence[str], twin: nn.Module, images: Any, threads: int) -> Timed:
    """Calls that run ``images`` through ``twin``, by name: all the forms in which a peer may be fastest.

    Args:
        chosen: names that `require` takes.
        twin: from `float_twin`.
        images: float32 (N, C, H, W), of NumPy. The calls read this very buffer.
        threads: of onnxruntime and openvino; torch's are set by the caller.
    """
    task = _Task(twin, images, threads)
    return {name: call for peer in dict.fromkeys(chosen) for name, call in _PEERS[peer](task).items()}


def _torch(task: _Task) -> Timed:
    import torch

    contiguous = torch.from_numpy(task.images)
    channels_last = contiguous.to(memory_format=torch.channels_last)
    moved = copy.deepcopy(task.twin).to(memory_format=torch.channels_last)

    def call(model: nn.Module, x: torch.Tensor, bf16: bool = False) -> Callable[[], object]:
        def run() -> object:
            with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                return model(x)

        return run

    name = f"torch {torch.__version__}"
    return {
        f"{name} float32": call(task.twin, contiguous),
        f"{name} float32, channels last": call(moved, channels_last),
        f"{name} bf16, channels last": call(moved, channels_last, bf16=True),
    }


def _onnxruntime(task: _Task) -> Timed:
    runtime: Any = importlib.import_module("onnxruntime")
    options = runtime.SessionOptions()
    # Its threads would wait for the next call by computing, beside whoever has the turn.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    options.intra_op_num_threads, options.inter_op_num_threads = task.threads, 1

    def call(model: bytes) -> Callable[[], object]:
        session = runtime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        return lambda: session.run(None, {"x": task.images})

    name = f"onnxruntime {runtime.__version__}"
    return {f"{name} {form}": call(model) for form, model in task.onnx.items()}


def _openvino(task: _Task) -> Timed:
    openvino: Any = importlib.import_module("openvino")
    core = openvino.Core()

    def call(model: bytes, precision: str) -> Callable[[], object]:
        settings = {"INFERENCE_NUM_THREADS": task.threads, "INFERENCE_PRECISION_HINT": precision, "NUM_STREAMS": 1}
        request = core.compile_model(core.read_model(model, b""), "CPU", settings).create_infer_request()
        request.set_input_tensor(openvino.Tensor(task.images, shared_memory=True))
        # The outputs as they lie: without it every call copies them.
        return lambda: request.infer(share_outputs=True)

    name = f"openvino {openvino.__version__.split('-')[0]}"
    calls = {}
    # What is not int8 is float32 or bf16, which a CPU without it, or held to less than it has, refuses.
    for form, model in task.onnx.items():
        calls[f"{name} {form}"] = call(model, "f32")
        with contextlib.suppress(RuntimeError):
            calls[f"{name} {'bf16' if form == 'float32' else f'{form} and bf16'}"] = call(model, "bf16")
    return calls


def _onnx(twin: nn.Module, images: Any) -> dict[str, bytes]:
    import torch

    quantization: Any = importlib.import_module("onnxruntime.quantization")
    preprocess: Any = importlib.import_module("onnxruntime.quantization.shape_inference")
    with tempfile.TemporaryDirectory() as folder:
        plain, prepared, quantized = (str(Path(folder) / f"{name}.onnx") for name in ("plain", "prepared", "int8"))
        torch.onnx.export(twin, (torch.from_numpy(images),), plain, input_names=["x"], dynamo=False)
        with _quiet():  # of advice that is not the user's to take
            preprocess.quant_pre_process(plain, prepared, skip_symbolic_shape=True)
            quantization.quantize_static(
                prepared,
                quantized,
                _RandomImages(images.shape),
                quant_format=quantization.QuantFormat.QDQ,
                per_channel=True,
                activation_type=quantization.QuantType.QUInt8,
                weight_type=quantization.QuantType.QInt8,
            )
        return {"float32": Path(plain).read_bytes(), "int8": Path(quantized).read_bytes()}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


class _RandomImages:
    """What onnxruntime reads its calibration data from."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.batches = self._make(shape)

    @staticmethod
    def _make(shape: tuple[int, ...]) -> Iterator[dict[str, Any]]:
        random = np.random.default_rng(0)
        for _ in range(CALIBRATION_IMAGES):
            yield {"x": random.standard_normal(shape, dtype=np.float32)}

    def get_next(self) -> dict[str, Any] | None:
        return next(self.batches, None)


_PEERS: dict[str, Callable[[_Task], Timed]] = {
    "torch": _torch,
    "onnxruntime": _onnxruntime,
    "openvino": _openvino,
}
