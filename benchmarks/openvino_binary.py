"""A packed network on OpenVINO's own binary convolution, which no converter makes: its graph is built op by op.

The CPU plugin counts bits where a `FakeQuantize` of two levels, 0 and 1, meets a `BinaryConvolution` whose weights are
a constant of single bits. It computes what the engine computes, from the same thresholds, so it can be checked.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from lowbit.errors import UsageError

LARGEST = float(np.finfo(np.float32).max)


def runners(
    shape: Sequence[int],
    ops: Sequence[Mapping[str, Any]],
    tensors: Sequence[Mapping[str, Any]],
    images: Any,
    threads: int,
) -> dict[str, Callable[[], Any]]:
    """Calls that run ``images`` through the ops of a packed model, by name: float ops in float32, and in bf16.

    Args:
        shape: (channels, height, width) of the ops' input.
        ops, tensors: of the packed model. The last of them must write floats.
        images: float32 (N, C, H, W), of NumPy. The calls read this very buffer.
        threads: of OpenVINO.

    Raises:
        UsageError: an op has no counterpart here.
    """
    openvino: Any = importlib.import_module("openvino")
    model, kept = network((len(images), *shape), ops, tensors)
    core = openvino.Core()

    def call(precision: str) -> Callable[[], Any]:
        settings = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": precision, "NUM_STREAMS": 1}
        request = core.compile_model(model, "CPU", settings).create_infer_request()
        request.set_input_tensor(openvino.Tensor(images, shared_memory=True))
        return lambda _=kept: request.infer(share_outputs=True)

    name = f"openvino {openvino.__version__.split('-')[0]} binary"
    calls = {name: call("f32")}
    with contextlib.suppress(RuntimeError):  # of a CPU without bf16
        calls[f"{name} and bf16"] = call("bf16")
    return calls


def network(
    shape: Sequence[int], ops: Sequence[Mapping[str, Any]], tensors: Sequence[Mapping[str, Any]]
) -> tuple[Any, list[Any]]:
    """An OpenVINO model of the ops, which read an input of ``shape``, and the buffers that it borrows."""
    openvino: Any = importlib.import_module("openvino")
    make: Any = importlib.import_module("openvino.opset1")
    kept: list[Any] = []

    def per_channel(numbers: Any) -> Any:
        return np.asarray(numbers, np.float32).reshape(1, -1, 1, 1)

    def codes(value: Any, found: Mapping[str, Any], bits: int) -> Any:
        if bits != 1:
            raise UsageError("OpenVINO's binary convolution has codes of one bit only")
        falling = found["falling"].astype(bool)
        limits = found["thresholds"][:, 0].astype(np.float32).clip(-LARGEST, LARGEST)
        # What equals its limit is a 0 there, but a 1 here where codes rise.
        limits = per_channel(np.where(falling, limits, np.nextafter(limits, np.float32(-LARGEST))))
        return make.fake_quantize(value, limits, limits, per_channel(falling), per_channel(~falling), 2)

    def window(op: Mapping[str, Any]) -> tuple[Any, Any, Any]:
        return op["stride"], op["padding"], op["padding"]

    def binary_weights(found: Mapping[str, Any], depth: int) -> Any:
        if depth % 8:
            raise UsageError(f"OpenVINO's binary convolution is wrong for {depth} channels, no multiple of 8")
        bits = _bits(found["weight_bits"], depth).transpose(0, 3, 1, 2)
        kept.append(np.packbits(bits.ravel(), bitorder="little"))
        return openvino.op.Constant(openvino.Tensor(kept[-1], list(bits.shape), openvino.Type.u1))

    def float_weights(found: Mapping[str, Any], depth: int) -> Any:
        if "weight" in found:
            return found["weight"].transpose(0, 3, 1, 2).copy()
        if "weight_bits" not in found:
            raise UsageError("weights of several bits have no counterpart here")
        signs = 2.0 * _bits(found["weight_bits"], depth) - 1
        return (signs * found["weight_scale"].reshape(-1, 1, 1, 1)).transpose(0, 3, 1, 2).astype(np.float32)

    def made(op: Mapping[str, Any], found: Mapping[str, Any], inputs: Sequence[Any], coded: bool) -> Any:
        value, *others = inputs
        depth = value.get_output_shape(0)[1]
        if op.get("groups", 1) != 1:
            raise UsageError("groups have no counterpart here")
        match op["op"]:
            case "conv2d":
                result = make.convolution(value, float_weights(found, depth), *window(op), op["dilation"])
            case "binary_conv2d":
                mode = ("xnor-popcount", 0.0)
                result = make.binary_convolution(
                    value, binary_weights(found, depth), *window(op), op["dilation"], *mode
                )
                if "thresholds" in found:
                    return codes(result, found, op["bits"])
                result = make.multiply(result, per_channel(found["scale"]))
            case "threshold":
                return codes(value, found, op["bits"])
            case "max_pool":
                if coded:
                    raise UsageError("a pool of codes has no counterpart here")
                if "falling" not in found:
                    return make.max_pool(value, *window(op), op["kernel"])
                # Products by signs become parts of the convolution in front and of the norm behind.
                signs = per_channel(1.0 - 2.0 * found["falling"])
                return make.multiply(make.max_pool(make.multiply(value, signs), *window(op), op["kernel"]), signs)
            case "avg_pool":
                return make.avg_pool(value, *window(op), op["kernel"], not op["count_include_pad"])
            case "affine":
                return make.add(make.multiply(value, per_channel(found["scale"])), per_channel(found["shift"]))
            case "relu":
                return make.relu(value)
            case "hardtanh":
                return make.clamp(value, op["min"], op["max"])
            case "add":
                return make.add(value, *others)
            case kind:
                raise UsageError(f"op '{kind}' has no counterpart here")
        return make.add(result, per_channel(found["bias"])) if "bias" in found else result

    values, coded = [make.parameter(list(shape), np.float32)], [False]
    for op, found in zip(ops, tensors, strict=True):
        first, *_ = numbers = op["inputs"]
        values.append(made(op, found, [values[number] for number in numbers], coded[first]))
        coded.append("bits" in op)
    return openvino.Model([values[-1]], [values[0]]), kept


def _bits(words: Any, depth: int) -> Any:
    """0 and 1 of packed weights, (O, kh, kw, depth)."""
    return np.unpackbits(words.view(np.uint8), axis=-1, bitorder="little", count=depth)
