"""The packed file: a safetensors container whose metadata key ``lowbit`` holds the op graph as JSON.

A packed file is treated as hostile: nothing of it is used before `validate` has checked it.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import safetensors.numpy

from lowbit.errors import LowbitError, UsageError
from lowbit.files import write_whole
from lowbit.packed.graph import (
    Array,
    Op,
    OpCost,
    Value,
    check_graph,
    check_integer,
    check_keys,
    cost_of,
    is_plain,
    tensors_by_op,
)
from lowbit.preprocessing import Preprocessing

FORMAT = 1
MAX_FILE_BYTES = 1 << 32
MAX_HEADER_BYTES = 1 << 24
DTYPES = {"F32": np.float32, "I32": np.int32, "U8": np.uint8, "U64": np.uint64}
"""The types of tensors that ops hold, by their names in a safetensors header."""


@dataclass
class PackedModel:
    """A network ready to run.

    Attributes:
        input_shape: (channels, height, width) of one image.
        ops: the graph in execution order; see docs/contract.md.
        tensors: NumPy arrays named ``"{op}.{name}"``.
        preprocessing: how an image becomes the input; None when the caller prepares inputs.
        classes: one name per output channel; None when the outputs are no classes.
        provenance: where the network came from; JSON.
    """

    input_shape: tuple[int, int, int]
    ops: list[Op]
    tensors: dict[str, Array]
    preprocessing: Preprocessing | None = None
    classes: list[str] | None = None
    provenance: dict[str, Any] = field(default_factory=dict)

    def op_tensors(self, index: int) -> dict[str, Array]:
        """Tensors of op ``index`` by their short names."""
        return self.all_op_tensors()[index]

    def all_op_tensors(self) -> list[dict[str, Array]]:
        """The same for each op."""
        by_op = tensors_by_op(self.tensors)
        return [by_op.get(str(index), {}) for index in range(len(self.ops))]

    def values(self) -> list[Value]:
        """All values, the input first and the output last. Raises like `validate`."""
        return validate(self)

    def costs(self) -> list[OpCost]:
        """The cost of each op. Raises like `validate`."""
        values = validate(self)
        return [
            cost_of(op, tensors, values[op["inputs"][0]], value)
            for op, tensors, value in zip(self.ops, self.all_op_tensors(), values[1:], strict=True)
        ]

    def to_bytes(self) -> bytes:
        """The packed file's bytes: the same for equal models. Raises like `validate`."""
        validate(self)
        header = {
            "format": FORMAT,
            "input": {"shape": list(self.input_shape)},
            "preprocessing": None if self.preprocessing is None else self.preprocessing.to_dict(),
            "classes": self.classes,
            "provenance": self.provenance,
            "ops": self.ops,
        }
        try:
            text = json.dumps(header, allow_nan=False, separators=(",", ":"))
        except (TypeError, ValueError) as error:
            raise LowbitError(f"the packed model's provenance is no JSON: {error}") from None
        tensors = {name: np.ascontiguousarray(tensor) for name, tensor in self.tensors.items()}
        return bytes(safetensors.numpy.save(tensors, {"lowbit": text}))

    def save(self, path: str | Path) -> None:
        """Write the packed file, whole or not at all. Raises like `validate` and `lowbit.files.write_whole`."""
        write(path, self)


def write(path: str | Path, model: PackedModel) -> None:
    """Write ``model`` to ``path``, whole or not at all.

    Raises:
        LowbitError: the model is invalid, or the place cannot be written.
    """
    data = model.to_bytes()
    with write_whole(Path(path)) as file:
        file.write(data)


def read(path: str | Path) -> PackedModel:
    """Map and validate the packed file at ``path``. See `read_with_values`."""
    return read_with_values(path)[0]


def read_with_values(path: str | Path) -> tuple[PackedModel, list[Value]]:
    """Map and validate the packed file at ``path``: its model, and all values of the graph as `validate` returns them.

    The tensors are views of the file, not copies. `write` and ``lowbit export`` replace a file and leave the mapped one
    alone; to cut a file short in place while a model of it is in use is as fatal as with any mapped file.

    Raises:
        UsageError: there is no file.
        LowbitError: it is damaged, malformed or of an unknown format version.
    """
    path = Path(path)
    try:
        if not path.is_file():
            raise UsageError(f"{path} is no file; `lowbit export RUN -o {path}` writes one")
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size > MAX_FILE_BYTES:
                raise LowbitError(
                    f"{path} has more than {MAX_FILE_BYTES} bytes and is no packed file; give another file"
                )
            data = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ) if size else b""
    except OSError as error:
        raise LowbitError(f"cannot read {path}: {error.strerror or error}; check its permissions") from None
    return parse_with_values(data, str(path))


def parse(data: bytes | mmap.mmap, name: str = "the packed model") -> PackedModel:
    """Read and validate the bytes of a packed file. See `parse_with_values`."""
    return parse_with_values(data, name)[0]


def parse_with_values(data: bytes | mmap.mmap, name: str = "the packed model") -> tuple[PackedModel, list[Value]]:
    """Read and validate the bytes of a packed file; ``name`` is what error messages call it.

    The tensors are read-only views of ``data``.

    Raises:
        LowbitError: the bytes are damaged, malformed or of an unknown format version.
    """
    try:
        model = _parse(data)
        return model, validate(model)
    except LowbitError as error:
        raise LowbitError(f"{name}: {error}; write the file again with `lowbit export`") from None
    except RecursionError:
        raise LowbitError(f"{name}: its JSON is nested too deeply; write the file again with `lowbit export`") from None


def _open(data: bytes | mmap.mmap) -> tuple[str, dict[str, Array]]:
    """The graph's text and the tensors of a safetensors container: its header's length (uint64, little-endian), the
    header (JSON), and the tensors, which fill the rest without gaps.
    """
    if len(data) < 8:
        raise LowbitError(f"not a packed file, or a damaged one: it has {len(data)} bytes")
    (length,) = struct.unpack_from("<Q", data)
    if length > min(MAX_HEADER_BYTES, len(data) - 8):
        raise LowbitError("not a packed file, or a damaged one: its header is too long")
    try:
        header = json.loads(data[8 : 8 + length].decode())
        text = header.pop("__metadata__")["lowbit"]
    except (ValueError, TypeError, AttributeError, LookupError) as error:
        raise LowbitError(f"not a packed file, or a damaged one ({type(error).__name__}: {error})") from None
    if not isinstance(text, str):
        raise LowbitError("not a packed file, or a damaged one: its graph is no text")
    return text, _tensors(header, np.frombuffer(data, np.uint8, offset=8 + length))


def _tensors(header: dict[str, Any], body: npt.NDArray[np.uint8]) -> dict[str, Array]:
    """The tensors that ``header`` describes, as views of ``body``."""
    tensors, places = {}, []
    for name, entry in header.items():
        what = f"tensor {name!r:.60}"
        if not isinstance(entry, dict):
            raise LowbitError(f"{what} is no JSON object")
        check_keys(what, entry, {"dtype", "shape", "data_offsets"})
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(dtype, str) or dtype not in DTYPES:
            raise LowbitError(f"{what} is of type {dtype!r:.40}, not {', '.join(DTYPES)}")
        if not isinstance(shape, list) or not 1 <= len(shape) <= 4:
            raise LowbitError(f"{what} must have 1 to 4 axes")
        if not isinstance(offsets, list) or len(offsets) != 2:
            raise LowbitError(f"{what} must have two offsets")
        size = (
            math.prod(check_integer(what, extent, 1, len(body)) for extent in shape) * np.dtype(DTYPES[dtype]).itemsize
        )
        first, end = (check_integer(what, offset, 0, len(body)) for offset in offsets)
        if end - first != size:
            raise LowbitError(f"{what} has {end - first} bytes, not {size}")
        places.append((first, end))
        # A writer puts wide types first: only the tensors of a strange file are copied to where the CPU may read them.
        tensors[name] = np.require(body[first:end].view(DTYPES[dtype]).reshape(shape), requirements="A")
    filled = 0
    for first, end in sorted(places):
        if first != filled:
            raise LowbitError("the tensors overlap, or leave gaps in the file")
        filled = end
    if filled != len(body):
        raise LowbitError(f"the tensors take {filled} bytes, but the file has {len(body)} for them")
    return tensors


def _parse(data: bytes | mmap.mmap) -> PackedModel:
    text, tensors = _open(data)
    try:
        header = json.loads(text, parse_constant=_refuse_constant)
        # What a message or a table may print: neither lone surrogates nor numbers too large for a float.
        json.dumps(header, ensure_ascii=False, allow_nan=False).encode()
    except ValueError as error:
        raise LowbitError(f"the graph is no JSON ({error})") from None
    if not isinstance(header, dict):
        raise LowbitError("the graph is no JSON object")
    if header.get("format") != FORMAT or isinstance(header.get("format"), bool):
        found = header.get("format")
        raise LowbitError(f"format version {found!r:.40} is unknown to this lowbit, which reads version {FORMAT}")
    check_keys("the graph", header, {"format", "input", "preprocessing", "classes", "provenance", "ops"})
    if not isinstance(header["input"], dict):
        raise LowbitError("the input is no JSON object")
    check_keys("the input", header["input"], {"shape"})
    shape = header["input"]["shape"]
    if not isinstance(shape, list) or len(shape) != 3:
        raise LowbitError("the input shape must be [channels, height, width]")
    preprocessing = header["preprocessing"]
    if preprocessing is not None:
        if not isinstance(preprocessing, dict):
            raise LowbitError("the preprocessing is no JSON object")
        try:
            preprocessing = Preprocessing.from_dict(preprocessing)
        except (LowbitError, OverflowError) as error:
            raise LowbitError(str(error).removesuffix("; write the file again")) from None
    return PackedModel(
        (shape[0], shape[1], shape[2]),
        header["ops"],
        tensors,
        preprocessing,
        header["classes"],
        header["provenance"],
    )


def _refuse_constant(text: str) -> None:
    raise ValueError(f"{text} is not allowed")


def validate(model: PackedModel) -> list[Value]:
    """Check everything that the engine and its callers rely on: `check_graph`, and what describes the graph.

    Returns:
        All values of the graph, the input first and the output last.

    Raises:
        LowbitError: one sentence that names what is wrong.
    """
    values = check_graph(model.input_shape, model.ops, model.tensors)
    _check_description(model, values[-1])
    return values


def _check_description(model: PackedModel, output: Value) -> None:
    if model.preprocessing is not None and model.preprocessing.shape != tuple(model.input_shape):
        raise LowbitError(
            f"preprocessing makes images of shape {model.preprocessing.shape}, the input is {model.input_shape}"
        )
    if model.classes is not None:
        if not isinstance(model.classes, list) or not all(map(is_plain, model.classes)):
            raise LowbitError("classes must be a list of names, without control characters")
        if output.shape != (1, 1, len(model.classes)):
            raise LowbitError(f"{len(model.classes)} class names do not fit an output of {output}")
    if not isinstance(model.provenance, dict):
        raise LowbitError("provenance must be a JSON object")
