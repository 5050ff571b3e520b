"""Check a packed model against the torch model, layer by layer. Shares nothing with what wrote the packed file.

Every integer layer of the engine is given the codes that the torch model's own activation quantizer makes, so a
difference is found where it arises and does not spread:

- What an integer op gives (codes, or its sums as float32) must be equal, all of it.
- What a layer with a table of levels or a K map gives as float32 may differ by ``1e-5 * max(|y|, |y - bias|, rms of y
  in its channel)``.
- After a float op a code may differ where the pre-activation lies on the threshold: the number ``z`` that the quantizer
  reads, computed by a float64 copy of the model, passes it within ``1e-5 * max(|z|, rms of z in its channel)``.
- Logits may differ from the float64 copy's by 1e-5 of the largest logit of their image, times sqrt(n / 2^16) where a
  float sum of the network has n products, more than 2^16.
"""

from __future__ import annotations

import copy
import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn

from lowbit.errors import LowbitError, UsageError
from lowbit.exporter.copying import copy_of
from lowbit.layers import QuantizedLayer
from lowbit.packed import PackedModel, Value, read

TOLERANCE = 1e-5
LONG_SUM = 1 << 16

Array = npt.NDArray[Any]

_INTEGER = {"binary_conv2d", "quant_conv2d"}
_ON_CODES = _INTEGER | {"table_conv2d"}
# Ops whose source is a layer with quantized activations, the last of them where it has a K map.
_ON_LAYERS = _ON_CODES | {"multiply"}
# Ops whose float result is exact when their input is: they select, or round once as torch does.
_EXACT = {"threshold", "max_pool", "relu", "prelu", "hardtanh"}


class Runner(Protocol):
    """What `verify` needs of an engine; values are (N, H, W, C), float32 or codes as uint8."""

    def run_op(self, index: int, inputs: Sequence[Array]) -> Array: ...
    def __call__(self, x: Array) -> Array: ...


@dataclass(frozen=True)
class LayerCheck:
    """One comparison.

    Attributes:
        layer: torch module.
        what: ``codes in`` (what the layer reads), ``sums out`` (its integer sums as float32, scaled) or ``floats out``
            (a result that must only be close).
        exact: whether only integer and exact ops lie before it, so that no difference is allowed.
        compared, different: numbers compared, and how many of them differ, for floats by more than the tolerance.
        excused: those of the different ones that lie within the tolerance of their threshold.
    """

    layer: str
    what: str
    exact: bool
    compared: int
    different: int
    excused: int

    @property
    def passed(self) -> bool:
        return self.different == self.excused


@dataclass(frozen=True)
class VerifyReport:
    """The result of `verify`.

    Attributes:
        layers: the comparisons, in the order of computation.
        images: how many were run.
        logit_error: largest difference of a logit from the float64 reference, over the largest logit of its image,
            when every integer layer is given torch's own codes.
        end_to_end_error: the same when the engine runs alone, from image to logits, over the images in which no code
            differs; elsewhere one code, though excused, may change much.
        end_to_end_images: how many those are.
        agreement: images to which torch and the engine alone give the same class.
        tolerance: for both errors.
    """

    layers: tuple[LayerCheck, ...]
    images: int
    logit_error: float
    end_to_end_error: float
    end_to_end_images: int
    agreement: int
    tolerance: float = TOLERANCE

    @property
    def passed(self) -> bool:
        errors_pass = self.logit_error <= self.tolerance and self.end_to_end_error <= self.tolerance
        return errors_pass and all(check.passed for check in self.layers)

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON."""
        layers = [{**asdict(check), "passed": check.passed} for check in self.layers]
        return {**asdict(self), "layers": layers, "passed": self.passed}

    def render(self) -> RenderableType:
        """The report for the terminal."""
        table = Table(title="Packed against trained, layer by layer", title_justify="left")
        for column in ("layer", "compared", "after", "numbers", "differ", "at a threshold", ""):
            table.add_column(column, justify="right" if column in ("numbers", "differ", "at a threshold") else "left")
        for check in self.layers:
            after = "integer ops" if check.exact else "float ops"
            counts = [f"{n:,}" for n in (check.compared, check.different, check.excused)]
            same = "close" if check.what == "floats out" else "equal"
            table.add_row(
                Text(check.layer), check.what, after, *counts, _verdict(check.passed) if check.different else same
            )
        summary = (
            f"logits: largest error {self.logit_error:.1e} layer by layer, {self.end_to_end_error:.1e} end to end, "
            f"in {self.end_to_end_images} images (of the largest logit; allowed {self.tolerance:.1e})\n"
            f"same class: {self.agreement} of {self.images} images\n"
            f"verify {_verdict(self.passed)}"
        )
        return Group(table, summary)


def _verdict(passed: bool) -> str:
    return "passed" if passed else "FAILED"


def verify(
    model: nn.Module,
    packed: PackedModel | str | Path,
    images: Tensor,
    *,
    batch_size: int = 16,
    engine: Runner | None = None,
) -> VerifyReport:
    """Compare the packed model with ``model`` in ``eval()``, on ``images``. The model is left as it was.

    Args:
        packed: a packed model, or the path of its file.
        images: float32, of the shape (N, ...) that the model takes.
        batch_size: images at a time.
        engine: what runs ``packed``; by default `lowbit.Engine`.

    Raises:
        UsageError: there are no images, or they do not have the packed input's size.
        LowbitError: the file cannot be read, or its layers are not those of the model.
    """
    if not isinstance(packed, PackedModel | str | Path):
        raise UsageError(f"verify needs a packed model or a file's path, not {type(packed).__name__}; give its .packed")
    packed = packed if isinstance(packed, PackedModel) else read(packed)
    shape = packed.input_shape
    fits = isinstance(images, Tensor) and images.dtype == torch.float32 and len(images.shape) > 1 and len(images) > 0
    if not (fits and images.shape[1:] in (shape, shape[:1] if shape[1:] == (1, 1) else shape)):
        given = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
        raise UsageError(f"verify needs a float32 tensor of shape (N, {', '.join(map(str, shape))}), not {given}")
    if engine is None:
        from lowbit.runtime import Engine

        engine = Engine(packed)
    trained = copy_of(model)
    comparison = _Comparison(packed, engine, trained)
    with torch.inference_mode():
        for start in range(0, len(images), batch_size):
            comparison.add(images[start : start + batch_size].cpu())
    return comparison.report()


@dataclass
class _Count:
    what: str
    exact: bool
    compared: int = 0
    different: int = 0
    excused: int = 0


class _Comparison:
    def __init__(self, packed: PackedModel, engine: Runner, trained: nn.Module) -> None:
        self.packed = packed
        self.values = packed.values()
        self.engine = engine
        self.torch = _Recorded(trained)
        self.float64 = _Recorded(copy.deepcopy(trained).double())
        self.calls = Counter(op["source"] for op in packed.ops if op["op"] in _ON_CODES)
        self.counts: dict[tuple[str, str], _Count] = {}
        self.images = 0
        self.end_to_end_images = 0
        self.agreement = 0
        self.errors = [0.0]
        self.end_to_end_errors = [0.0]

    def add(self, images: Tensor) -> None:
        """Run one batch both ways."""
        logits = self.torch.run(images)
        exact_logits = self.float64.run(images.double(), self.torch.outputs).flatten(1).numpy()
        for layer, made in self.torch.inputs.items():
            if len(made) > self.calls[layer]:
                used = self.torch.used_calls(layer, images, logits)
                self.torch.keep(layer, used)
                self.float64.keep(layer, used)
        inputs = images.reshape(-1, *self.packed.input_shape)
        last, differs = self._run_ops(inputs)
        alone = self.engine(inputs.numpy()).reshape(len(images), -1)
        self.images += len(images)
        self.end_to_end_images += int((~differs).sum())
        self.agreement += int((alone.argmax(1) == logits.flatten(1).numpy().argmax(1)).sum())
        self.errors.append(_largest_error(last.transpose(0, 3, 1, 2).reshape(len(images), -1), exact_logits))
        self.end_to_end_errors.append(_largest_error(alone[~differs], exact_logits[~differs]))

    def report(self) -> VerifyReport:
        """The checks of all batches."""
        checks = tuple(
            LayerCheck(layer, count.what, count.exact, count.compared, count.different, count.excused)
            for (layer, _), count in self.counts.items()
        )
        return VerifyReport(
            checks,
            self.images,
            max(self.errors),
            max(self.end_to_end_errors),
            self.end_to_end_images,
            self.agreement,
            self._tolerance(),
        )

    def _tolerance(self) -> float:
        """Of logits: roundings grow with the square root of how many products a float sum has."""
        products = [
            math.prod(op["kernel"]) * self.values[op["inputs"][0]].channels // op["groups"]
            for op in self.packed.ops
            if op["op"] == "conv2d"
        ]
        return TOLERANCE * math.sqrt(max([1, *(n / LONG_SUM for n in products)]))

    def _run_ops(self, images: Tensor) -> tuple[Array, npt.NDArray[np.bool_]]:
        """The last value, and for each image whether any code or sum differs from torch's."""
        differs = np.zeros(len(images), bool)
        values: list[Array] = [np.ascontiguousarray(images.permute(0, 2, 3, 1).numpy())]
        exact = [True]
        calls: Counter[str] = Counter()
        for index, op in enumerate(self.packed.ops):
            kind, layer, source = op["op"], op["source"], op["inputs"][0]
            given = [values[number] for number in op["inputs"]]
            if kind in _ON_CODES:
                calls[layer] += 1
            call = calls[layer] - 1
            if kind in _ON_LAYERS and not 0 <= call < len(self.torch.inputs[layer]):
                raise LowbitError(
                    f"op {index} is layer '{layer}', which the model does not have so; export the model again"
                )
            if kind in _ON_CODES:
                own = _channels_last(self.torch.codes(layer, call), self.values[source], layer)
                differs |= self._compare_codes(layer, call, self.values[source], given[0], own, exact[source])
                given = [own]
            result = self.engine.run_op(index, given)
            if kind in _ON_LAYERS and result.dtype == np.float32:
                results = self.torch.outputs if kind == "multiply" else self.torch.unscaled
                expected = _channels_last(results[layer][call], self.values[index + 1], layer)
                biased = results is self.torch.outputs or not self.torch.layers[layer].k_map
                bias = self.torch.layers[layer].bias if biased else None
                differs |= self._compare_floats(layer, result, expected, kind in _INTEGER, bias)
            values.append(result)
            exact.append(kind in _INTEGER or (kind in _EXACT and exact[source]))
        for layer, made in self.torch.inputs.items():
            if calls[layer] != len(made):
                raise LowbitError(f"layer '{layer}' of the model is not in the packed file; export the model again")
        return values[-1], differs

    def _compare_codes(self, layer: str, call: int, value: Value, found: Array, own: Array, exact: bool) -> Array:
        wrong = found != own
        excused = np.zeros_like(wrong)
        if not exact:
            low, high = (_channels_last(end, value, layer) for end in self._range(layer, call))
            excused = wrong & (np.minimum(found, own) >= low) & (np.maximum(found, own) <= high)
        return self._count(layer, "codes in", exact, wrong, excused)

    def _compare_floats(self, layer: str, found: Array, expected: Array, exactly: bool, bias: Tensor | None) -> Array:
        wrong = found != expected
        if not exactly:
            size = np.sqrt(np.square(expected, dtype=np.float64).mean(axis=(0, 1, 2)))
            for y in (expected, expected if bias is None else expected - bias.detach().numpy()):
                size = np.maximum(size, np.abs(y))
            # A NaN is wrong, too.
            wrong = ~(np.abs(found - expected) <= TOLERANCE * size)
        return self._count(layer, "sums out" if exactly else "floats out", exactly, wrong, np.zeros_like(wrong))

    def _range(self, layer: str, call: int) -> tuple[Tensor, Tensor]:
        """The smallest and the largest code that the tolerance allows."""
        z = self.float64.inputs[layer][call]
        others = [d for d in range(z.dim()) if d != 1]
        reach = TOLERANCE * z.abs().maximum(z.square().mean(dim=others, keepdim=True).sqrt())
        ends = [self.float64.encode(layer, end) for end in (z - reach, z + reach)]
        return ends[0].minimum(ends[1]), ends[0].maximum(ends[1])

    def _count(self, layer: str, what: str, exact: bool, wrong: Array, excused: Array) -> Array:
        count = self.counts.setdefault((layer, what), _Count(what, exact))
        count.exact &= exact
        count.compared += wrong.size
        count.different += int(wrong.sum())
        count.excused += int(excused.sum())
        return np.asarray(wrong.reshape(len(wrong), -1).any(axis=1))


class _Recorded:
    """A model whose layers with quantized activations leave what they read and give, call by call.

    ``unscaled`` is what they give before a K map and the bias behind it; without a K map, what they give.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.layers = {
            name: module
            for name, module in model.named_modules()
            if isinstance(module, QuantizedLayer) and module.activation_quantizer is not None
        }
        self.inputs: dict[str, list[Tensor]] = defaultdict(list)
        self.outputs: dict[str, list[Tensor]] = defaultdict(list)
        self.unscaled: dict[str, list[Tensor]] = defaultdict(list)

    def run(self, images: Tensor, outputs: dict[str, list[Tensor]] | None = None) -> Tensor:
        """The model's logits. With ``outputs``, the layers give these instead of their own results."""
        self.inputs.clear()
        self.outputs.clear()
        self.unscaled.clear()
        with self._hooked(outputs):
            logits: Tensor = self.model(images)
        return logits

    def used_calls(self, layer: str, images: Tensor, logits: Tensor) -> list[int]:
        """The calls of a layer that ``logits`` depend on: other results than its own change them."""

        def changes(call: int, number: float) -> bool:
            calls = count()

            def hook(_: nn.Module, given: tuple[Tensor, ...], result: Tensor) -> Tensor:
                return torch.full_like(result, number) if next(calls) == call else result

            handle = self.layers[layer].register_forward_hook(hook)
            try:
                return not torch.equal(self.model(images), logits)
            finally:
                handle.remove()

        made = range(len(self.inputs[layer]))
        return [call for call in made if any(changes(call, number) for number in (-1e30, 1e30))]

    def keep(self, layer: str, calls: Sequence[int]) -> None:
        """Forget all but some calls of a layer."""
        for of_layers in (self.inputs, self.outputs, self.unscaled):
            of_layers[layer] = [of_layers[layer][call] for call in calls]

    def encode(self, layer: str, x: Tensor) -> Tensor:
        """The codes that a layer's own quantizer makes of ``x``."""
        quantizer = self.layers[layer].activation_quantizer
        assert quantizer is not None
        return quantizer.encode(x)[0]

    def codes(self, layer: str, call: int) -> Tensor:
        """The codes that a layer made of what it read."""
        return self.encode(layer, self.inputs[layer][call])

    @contextmanager
    def _hooked(self, outputs: dict[str, list[Tensor]] | None) -> Iterator[None]:
        def hook_of(name: str) -> Any:
            def hook(_: nn.Module, given: tuple[Tensor, ...], result: Tensor) -> Tensor:
                if outputs is not None:
                    result = outputs[name][len(self.outputs[name])].to(given[0].dtype, copy=True)
                # A module in place after the layer would change what is kept.
                self.inputs[name].append(given[0].clone())
                self.outputs[name].append(result.clone())
                layer = self.layers[name]
                bare = _without_k_map(layer).forward(given[0]) if layer.k_map else self.outputs[name][-1]
                self.unscaled[name].append(bare)
                return result

            return hook

        handles = [module.register_forward_hook(hook_of(name)) for name, module in self.layers.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _without_k_map(layer: QuantizedLayer) -> QuantizedLayer:
    bare = copy.copy(layer)
    bare.k_map = False
    bare._parameters = {**layer._parameters, "bias": None}
    return bare


def _channels_last(x: Tensor, value: Value, layer: str) -> Array:
    """What torch has as (N, C, H, W), or flattened, as the packed file's (N, H, W, C)."""
    if x[0].numel() != value.elements:
        raise LowbitError(
            f"layer '{layer}' has {tuple(x.shape[1:])} numbers, but {value} in the packed file; export the model again"
        )
    channels_first = x.reshape(-1, value.channels, value.height, value.width)
    return np.ascontiguousarray(channels_first.permute(0, 2, 3, 1).numpy())


def _largest_error(found: Array, expected: Array) -> float:
    if not found.size:
        return 0.0
    if not (np.isfinite(found).all() and np.isfinite(expected).all()):
        return math.inf
    scale = np.abs(expected).max(axis=1, keepdims=True)
    return float((np.abs(found - expected) / np.where(scale == 0, 1, scale)).max())
