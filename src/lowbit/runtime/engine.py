"""The engine as Python sees it: NumPy in, NumPy out."""

from __future__ import annotations

import os
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
from PIL import Image

from lowbit import _engine, packed
from lowbit.errors import LowbitError, UsageError
from lowbit.packed import PackedModel, Value
from lowbit.preprocessing import Preprocessing

Floats = npt.NDArray[np.float32]
Array = npt.NDArray[Any]


def instruction_sets() -> list[dict[str, Any]]:
    """The engine's instruction sets, the best first: ``isa``, whether this ``cpu`` runs it, and whether an engine made
    now would have it ``chosen``.

    Raises:
        UsageError: the environment variable ``LOWBIT_ISA`` names one that this CPU or build lacks.
    """
    runs, chosen = _engine.available_isas(), _chosen_isa()
    return [{"isa": isa, "cpu": isa in runs, "chosen": isa == chosen} for isa in _engine.built_isas()]


def peak(kind: str, isa: str) -> float:
    """Products a second that one core reaches at most, in registers: measured now, in a few milliseconds.

    Args:
        kind: ``float`` (32 bits), ``integer`` (8 bits) or ``binary``.
        isa: one of `instruction_sets` that this CPU runs.

    Raises:
        UsageError: there is no such kind, or this CPU or build lacks the instruction set.
    """
    try:
        return _engine.peak(kind, isa)
    except ValueError as error:
        raise UsageError(f"{error}; `lowbit bench --list-kernels` lists what there is") from None


class Engine:
    """A packed network, ready to run on the CPU without torch.

    The outputs are the same bits for every batch size and number of threads. An engine may be called from several
    threads: the calls wait for each other, and release Python's lock while they compute. In a process that forked after
    the engine was made, it runs on one thread.

    Args:
        model: path of a packed file, its bytes, or a model in memory.
        threads: how many threads compute, 1 to 256.

    Raises:
        LowbitError: the file is missing, damaged or malformed.
        UsageError: ``threads`` is out of range, or the environment variable ``LOWBIT_ISA`` names an instruction set
            that this CPU or build lacks.
    """

    def __init__(self, model: str | Path | bytes | PackedModel, threads: int = 1) -> None:
        if isinstance(threads, bool) or not isinstance(threads, int) or not 1 <= threads <= 256:
            raise UsageError(f"threads is {threads!r}, but must be an integer from 1 to 256")
        _chosen_isa()
        if isinstance(model, PackedModel):
            self.model, self._values = model, model.values()
        elif isinstance(model, bytes):
            self.model, self._values = packed.parse_with_values(model)
        elif isinstance(model, str | Path):
            self.model, self._values = packed.read_with_values(model)
        else:
            what = f"a {type(model).__name__} is no packed model, file's path or its bytes"
            raise UsageError(f"{what}; of what lowbit.export returns, give .packed")
        tensors = [
            {name: np.ascontiguousarray(tensor) for name, tensor in of_op.items()}
            for of_op in self.model.all_op_tensors()
        ]
        try:
            self._native = _engine.Engine(list(self.model.input_shape), self.model.ops, tensors, threads)
        except (ValueError, MemoryError) as error:
            raise LowbitError(f"the engine cannot load the network: {error}; export it again") from None
        _engines.add(self)

    @property
    def classes(self) -> list[str] | None:
        """Class names, one per output, or None."""
        return self.model.classes

    @property
    def preprocessing(self) -> Preprocessing | None:
        """What is done to an image before the network sees it, or None."""
        return self.model.preprocessing

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of one image."""
        return self.model.input_shape

    @property
    def isa(self) -> str:
        """The instruction set whose kernels run; `instruction_sets` lists those that there are."""
        return self._native.isa

    @property
    def kernels(self) -> list[str]:
        """The kernel that each op calls (``binary_bits``, ``float_tile``, ...), empty for an op that has none."""
        return self._native.kernels

    @property
    def threads(self) -> int:
        return self._native.threads

    def __call__(self, x: Floats) -> Floats:
        """Run the network.

        Args:
            x: images (N, C, H, W), float32, finite; N may be 0.

        Returns:
            Logits (N, classes), or (N, C, H, W) when the network's output is a map. float32.

        Raises:
            UsageError: ``x`` has another type or shape, or holds a number that is not finite.
        """
        return self._flat(self._run(x))

    def profile(self, x: Floats) -> list[float]:
        """Seconds that each op takes in one run on ``x``, all threads at work on it. Raises like calling the engine.

        Otherwise threads take images of their own where a batch has enough of them, and the ops' sum is an upper bound.
        """
        seconds: list[float] = []
        self._run(x, seconds)
        return seconds

    def predict(self, images: Sequence[Image.Image]) -> npt.NDArray[np.float64]:
        """Probabilities (N, classes) of PIL images, by softmax in float64.

        Raises:
            LowbitError: the packed file has no preprocessing, or its output is a map.
        """
        if self.preprocessing is None:
            raise LowbitError("the packed file does not say how images are prepared; export it with a preprocessing")
        if self._values[-1].shape[:2] != (1, 1):
            raise LowbitError(
                f"the network's output is {self._values[-1]}, not one number per class; call the engine itself"
            )
        if not images:
            return np.zeros((0, self._values[-1].channels))
        logits = self(self.preprocessing(images)).astype(np.float64)
        exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
        return cast(npt.NDArray[np.float64], exponentials / exponentials.sum(axis=1, keepdims=True))

    def run_op(self, index: int, inputs: Sequence[Array]) -> Array:
        """Run op ``index`` alone.

        Args:
            index: number of the op in the packed file.
            inputs: its inputs, channels last: (N, H, W, C) float32, or uint8 codes below 2^bits.

        Returns:
            Its value, (N, H, W, C): float32 or uint8 codes.

        Raises:
            UsageError: there is no such op, or an input has the wrong type, shape or range.
        """
        if not 0 <= index < len(self.model.ops):
            raise UsageError(f"there is no op {index}: the network has {len(self.model.ops)}")
        numbers = self.model.ops[index]["inputs"]
        if len(inputs) != len(numbers):
            raise UsageError(f"op {index} has {len(numbers)} inputs, not {len(inputs)}")
        for array, number in zip(inputs, numbers, strict=True):
            _check_value(f"op {index}", array, self._values[number], inputs[0].shape[:1])
        return self._native.run_op(index, [np.ascontiguousarray(array) for array in inputs])

    def _run(self, x: Floats, seconds: list[float] | None = None) -> Floats:
        if not isinstance(x, np.ndarray) or x.dtype != np.float32:
            found = f"{x.dtype} array" if isinstance(x, np.ndarray) else type(x).__name__
            raise UsageError(
                f"the engine needs a float32 NumPy array, not {found}; convert it with np.asarray(x, np.float32)"
            )
        if x.ndim != 4 or x.shape[1:] != tuple(self.input_shape):
            wanted = ", ".join(map(str, self.input_shape))
            raise UsageError(f"the engine needs images of shape (N, {wanted}), not {x.shape}")
        outputs = self._native.run(np.ascontiguousarray(x), seconds)
        if outputs is None:
            raise UsageError("the engine's input holds a NaN or an infinity; check the preprocessing")
        return outputs

    def _flat(self, outputs: Floats) -> Floats:
        return outputs.reshape(outputs.shape[:2]) if outputs.shape[2:] == (1, 1) else outputs


_engines: weakref.WeakSet[Engine] = weakref.WeakSet()


def _after_fork() -> None:
    for engine in _engines:
        engine._native.after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def kernels_of(engine: Engine) -> list[dict[str, Any]]:
    """What each op of an engine runs: its number ``op``, ``kind``, ``source``, and the ``kernel`` of which ``isa``."""
    return [
        {"op": index, "kind": op["op"], "source": op["source"], "kernel": kernel, "isa": engine.isa if kernel else ""}
        for index, (op, kernel) in enumerate(zip(engine.model.ops, engine.kernels, strict=True))
    ]


def _chosen_isa() -> str:
    isa, isas = os.environ.get("LOWBIT_ISA", ""), _engine.available_isas()
    if isa and isa not in isas:
        raise UsageError(f"LOWBIT_ISA is '{isa}', but this CPU and build have {', '.join(isas)}; unset it or take one")
    return isa or isas[0]


def _check_value(what: str, array: Array, value: Value, batch: tuple[int, ...]) -> None:
    dtype = np.float32 if value.kind == "float" else np.uint8
    if not isinstance(array, np.ndarray) or array.dtype != dtype or array.shape != (*batch, *value.shape):
        raise UsageError(f"{what} needs {np.dtype(dtype).name} of shape (N, {', '.join(map(str, value.shape))})")
    if value.kind == "codes" and array.size and array.max() >> value.bits:
        raise UsageError(f"{what} needs codes of {value.bits} bits, but one is {array.max()}")
