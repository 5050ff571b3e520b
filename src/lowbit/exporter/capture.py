"""Record what a model does to its input, by torch.fx, as a graph of torch modules and additions.

Functional calls become the modules that do the same; views, and what does nothing in ``eval()``, disappear. So what
lowers the graph needs to know modules only.
"""

from __future__ import annotations

import inspect
import keyword
import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from lowbit.errors import UsageError
from lowbit.exporter.copying import copy_of, unwrapped
from lowbit.layers import PReLU, QuantConv2d, QuantizedLayer, QuantLinear, Repeat, Shift

Shape = tuple[int, int, int]

CONVOLUTIONS = (nn.Conv2d, QuantConv2d)
LINEARS = (nn.Linear, QuantLinear)
LAYERS = CONVOLUTIONS + LINEARS
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)
# Each element of the result depends on one element of the input, and on its channel.
POINTWISE = (*NORMS, nn.ReLU, nn.ReLU6, nn.Hardtanh, nn.LeakyReLU, nn.PReLU, PReLU, Shift)
AVERAGES = (nn.AvgPool2d, nn.AdaptiveAvgPool2d)
LOWERED = (*LAYERS, *POINTWISE, nn.MaxPool2d, *AVERAGES, Repeat)
OWN = (QuantizedLayer, PReLU, Shift, Repeat)

_NOTHING_IN_EVAL = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.AlphaDropout)
_VIEWS = (nn.Flatten, nn.Unflatten)
_VIEW_CALLS = {"contiguous", "flatten", "reshape", "squeeze", "unflatten", "unsqueeze", "view"}
_VIEW_CALLS |= {getattr(torch, name) for name in _VIEW_CALLS if hasattr(torch, name)}
_ADD_CALLS = {operator.add, torch.add, "add"}
_DROPOUT_CALLS = {F.dropout, F.dropout1d, F.dropout2d}
_MEAN_CALLS = {torch.mean, "mean"}
_SAME_AS_MODULE: dict[Any, Callable[..., nn.Module]] = {
    F.relu: nn.ReLU,
    torch.relu: nn.ReLU,
    "relu": nn.ReLU,
    F.relu6: nn.ReLU6,
    F.hardtanh: nn.Hardtanh,
    F.leaky_relu: nn.LeakyReLU,
    F.max_pool2d: nn.MaxPool2d,
    torch.max_pool2d: nn.MaxPool2d,
    F.avg_pool2d: nn.AvgPool2d,
    F.adaptive_avg_pool2d: nn.AdaptiveAvgPool2d,
}


@dataclass(eq=False)
class Step:
    """One thing that the model computes.

    Attributes:
        source: name of the torch module; where a function was called, of the call, or for an addition of the module
            that adds.
        shape: (C, H, W) of the result; a dense layer's is (features, 1, 1), and flattening does not change it.
        module: what computes it; None for the model's input and for an addition of two inputs.
        inputs: the steps that it reads.
        rank: of the tensor that it reads: 4 for (N, C, H, W), 2 for (N, features).
        falling: of a max-pool that was moved (`lowbit.exporter.pools`), the channels of which it takes the minimum.
    """

    source: str
    shape: Shape
    module: nn.Module | None = None
    inputs: list[Step] = field(default_factory=list)
    rank: int = 4
    falling: Tensor | None = None


@dataclass(frozen=True)
class Graph:
    """Steps in the order of computation, from the model's input to its output, only those that the output needs."""

    steps: list[Step]

    @property
    def input(self) -> Step:
        return self.steps[0]

    @property
    def output(self) -> Step:
        return self.steps[-1]


def capture(model: nn.Module, example_input: Tensor) -> Graph:
    """Record what ``model`` does in ``eval()``. The model is left as it was; the graph holds a copy on the CPU.

    Args:
        model: takes one tensor and returns one.
        example_input: float32, (N, C, H, W) or (N, features), N at least 1; its shape alone matters.

    Raises:
        UsageError: the model's control flow depends on values, a hook changes what a layer does, a tensor is changed in
            place while something else reads it, or the model does what cannot be lowered; the message names the module
            or call.
    """
    if not isinstance(example_input, Tensor):
        raise UsageError(f"the example input is a {type(example_input).__name__}, but must be a torch tensor")
    if example_input.dtype != torch.float32 or example_input.dim() not in (2, 4) or not example_input.numel():
        found = f"{str(example_input.dtype).removeprefix('torch.')} {tuple(example_input.shape)}"
        raise UsageError(f"the example input is {found}, but must be float32 (N, C, H, W) or (N, features), N >= 1")
    wide = next((n for n, p in model.named_parameters() if p.is_floating_point() and p.dtype != torch.float32), None)
    if wide is not None:
        raise UsageError(f"parameter '{wide}' is not float32; export the model after model.float()")
    model = unwrapped(model)
    is_leaf = _Tracer().is_leaf_module  # recorded as a whole, and without what its hooks do, as is the model itself
    hooked = next((n for n, m in model.named_modules() if (is_leaf(m, n) or m is model) and _has_hooks(m)), None)
    if hooked is not None:
        what = f"'{hooked}'" if hooked else "the model"
        raise UsageError(
            f"{what} has a hook, which the packed network would not have; take it off (torch's remove_weight_norm, "
            "remove_spectral_norm and prune.remove do), or write what it does as a module"
        )
    model = copy_of(model)
    module = _trace(model)
    # Numbers of both signs: of zeros, say, a ReLU in place changes none.
    numbers = torch.randn(example_input.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = _Shapes(module).run(numbers.clone())
        expected, again = (model(numbers.clone()) for _ in range(2))
    if not _same(again, expected):
        raise UsageError(
            "the model gives another result each time, also in eval(): something is random, such as a dropout that is "
            "called without training=self.training"
        )
    if not _same(found, expected):
        raise UsageError(
            "the model computes something else than its graph: a tensor is changed in place, as by `+=`, while "
            "something else reads it; write `x = x + y`"
        )
    return _Reader(module).read()


def _has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))


def _same(a: Any, b: Any) -> bool:
    """Whether ``b`` is the tensor that ``a`` is; a result that is none is refused elsewhere."""
    if not isinstance(a, Tensor):
        return True
    return isinstance(b, Tensor) and a.shape == b.shape and torch.allclose(a, b, rtol=1e-5, atol=0, equal_nan=True)


class _Tracer(fx.Tracer):
    """Lowbit's and torch's own modules are leaves; an error names the innermost module that it came from."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, OWN) or super().is_leaf_module(m, module_qualified_name)

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        try:
            return super().call_module(m, forward, args, kwargs)
        except UsageError:
            raise
        except Exception as error:
            raise _cannot_capture(f"'{self.path_of_module(m)}' ({type(m).__name__})", error) from error


def _trace(model: nn.Module) -> fx.GraphModule:
    tracer = _Tracer()
    # A bare layer is a leaf, and a leaf is recorded only when another module calls it.
    root = nn.Sequential(model) if tracer.is_leaf_module(model, "") else model
    try:
        # What may be left out is left out.
        given = inspect.signature(root.forward).parameters.values()
        with _sizes_in_pools():
            graph = tracer.trace(root, {p.name: p.default for p in given if p.default is not p.empty})
    except UsageError:
        raise
    except Exception as error:
        raise _cannot_capture(f"the model ({type(model).__name__})", error) from error
    inputs = [node.target for node in graph.nodes if node.op == "placeholder" and not node.args]
    if len(inputs) > 1:
        raise UsageError(f"the model takes a second input '{inputs[1]}'; it must take one tensor")
    try:
        return fx.GraphModule(root, graph)
    except SyntaxError:  # of the code that it writes
        name = next(name for name, _ in root.named_modules() if not _is_writable(name))
        raise UsageError(f"the layer '{name}' has a name that Python code cannot hold; rename it") from None


@contextmanager
def _sizes_in_pools() -> Iterator[None]:
    """Let a proxy be the kernel of ``avg_pool2d``: torch 2.6 refuses one before it asks whether to record the call."""
    plain = F.avg_pool2d

    def recorded(input: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(input, fx.Proxy):
            return input.tracer.create_proxy("call_function", plain, (input, *args), kwargs)
        return plain(input, *args, **kwargs)

    F.avg_pool2d = recorded
    try:
        yield
    finally:
        F.avg_pool2d = plain


def _is_writable(name: str) -> bool:
    return name.isprintable() and not {'"', "\\"} & set(name) and not any(map(keyword.iskeyword, name.split(".")))


def _cannot_capture(where: str, error: Exception) -> UsageError:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    mend = ""
    if isinstance(error, fx.proxy.TraceError):
        mend = "; its forward must not branch on values or shapes"
    elif isinstance(error, NameError):
        mend = "; modules must be attributes of others: call the layers of a slice one by one"
    return UsageError(f"{where} cannot be captured: {reason}{mend}")


class _Shapes(fx.Interpreter):
    """Runs a graph and leaves at each node the shape of the tensor that it makes, or what else it makes."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.extra_traceback = False

    def run_node(self, n: fx.Node) -> Any:
        try:
            result = super().run_node(n)
        except Exception as error:
            raise UsageError(f"'{n.target}' does not run on what the example input becomes: {error}") from error
        if isinstance(result, Tensor):
            n.meta["shape"] = tuple(result.shape)
        else:
            n.meta["value"] = result
        return result


class _Reader:
    """Turns the nodes of an fx graph into steps."""

    def __init__(self, module: fx.GraphModule) -> None:
        self.module = module
        self.steps: list[Step] = []
        self.values: dict[fx.Node, Step] = {}

    def read(self) -> Graph:
        output = None
        for node in self.module.graph.nodes:
            if node.op == "output":
                if not isinstance(node.args[0], fx.Node) or node.args[0] not in self.values:
                    raise UsageError("the model returns more than one tensor; return the logits alone")
                output = self.values[node.args[0]]
                if output.shape[1:] != (1, 1) and len(_tensor_shape(node.args[0]) or ()) == 2:
                    raise UsageError(
                        "the model returns a flattened map; return the map, or what a dense layer makes of it"
                    )
            elif _tensor_shape(node) is not None:
                self.values[node] = self._step(node)
        if output is None or output is self.steps[0]:
            raise UsageError("the model returns its input; there is nothing to export")
        return Graph(list(_needed(self.steps, output)))

    def _step(self, node: fx.Node) -> Step:
        if node.op == "placeholder":
            return self._append(Step("input", _map_shape(node, node.name)))
        if node.op == "call_module":
            name = str(node.target)
            return self._module_step(node, name, self.module.get_submodule(name))
        if node.op == "get_attr":
            raise UsageError(f"'{node.target}' is a tensor that forward reads itself; only modules may hold tensors")
        return self._call_step(node)

    def _call_step(self, node: fx.Node) -> Step:
        call, name = node.target, node.name
        tensors = [a for a in (*node.args, *node.kwargs.values()) if isinstance(a, fx.Node) and a in self.values]
        if call in _ADD_CALLS:
            return self._add_step(node, tensors)
        if call in _DROPOUT_CALLS and not node.kwargs.get("training", True):
            return self.values[tensors[0]]
        if call in _VIEW_CALLS:
            return self._view(node, tensors[0], name)
        if call in _MEAN_CALLS and _is_over_the_map(node):
            return self._append(
                self._make(node, name, nn.AdaptiveAvgPool2d(1), (*_map_shape(tensors[0], name)[:1], 1, 1))
            )
        make = _SAME_AS_MODULE.get(call)
        if make is None or tensors != list(node.args[:1]):
            called = call if isinstance(call, str) else getattr(call, "__name__", str(call))
            mend = _MEND if make is None else "give it one tensor, in the first place and not by name"
            raise UsageError(f"the call of '{called}' (node '{name}'{_owner(node)}) cannot be lowered; {mend}")
        options = fx.node.map_arg((node.args[1:], node.kwargs), lambda each: each.meta["value"])
        return self._module_step(node, name, make(*options[0], **options[1]).eval())

    def _module_step(self, node: fx.Node, name: str, module: nn.Module) -> Step:
        argument = node.args[0] if node.args else None
        if not isinstance(argument, fx.Node) or argument not in self.values:
            raise UsageError(f"'{name}' ({type(module).__name__}) is not called with one tensor; {_MEND}")
        if type(module) in _NOTHING_IN_EVAL:
            return self.values[argument]
        if getattr(module, "inplace", False) and len(self._readers(self.values[argument])) > 1:
            raise UsageError(f"'{name}' works in place on a tensor that is read elsewhere too; make it inplace=False")
        if type(module) in _VIEWS:
            return self._view(node, argument, name)
        if type(module) not in LOWERED:
            raise UsageError(f"'{name}' ({type(module).__name__}) cannot be lowered; {_MEND}")
        return self._append(self._make(node, name, module, _map_shape(node, name)))

    def _readers(self, step: Step) -> set[fx.Node]:
        """Nodes that read what ``step`` gives, under whatever name: views and what does nothing hand it on."""
        names = [node for node, value in self.values.items() if value is step]
        return {user for name in names for user in name.users if self.values.get(user) is not step}

    def _make(self, node: fx.Node, name: str, module: nn.Module, shape: Shape) -> Step:
        argument = node.args[0]
        assert isinstance(argument, fx.Node)
        source = self.values[argument]
        rank = len(_tensor_shape(argument) or ())
        _check_supported(name, module, source.shape, rank)
        if type(module) in POINTWISE:
            shape = source.shape
        return Step(name, shape, module, [source], rank)

    def _add_step(self, node: fx.Node, tensors: list[fx.Node]) -> Step:
        shapes = {_tensor_shape(tensor) for tensor in tensors}
        if len(tensors) != 2 or len(shapes) != 1 or len(node.args) != 2 or node.kwargs.get("alpha", 1) != 1:
            raise UsageError(
                f"the addition '{node.name}'{_owner(node)} must be of two tensors of one shape, without alpha"
            )
        inputs = [self.values[tensor] for tensor in tensors]
        return self._append(Step(_path(node) or node.name, inputs[0].shape, None, inputs))

    def _view(self, node: fx.Node, argument: fx.Node, name: str) -> Step:
        source, shape = self.values[argument], _tensor_shape(node) or ()
        batch = (_tensor_shape(argument) or ())[:1]
        c, h, w = source.shape
        if shape not in ((*batch, c * h * w), (*batch, c, h, w)):
            raise UsageError(
                f"'{name}'{_owner(node)} makes {shape} of a map {(c, h, w)}; only flattening can be lowered"
            )
        return source

    def _append(self, step: Step) -> Step:
        self.steps.append(step)
        return step


_MEND = "use Conv2d, Linear, BatchNorm, ReLU, Hardtanh, MaxPool2d, AvgPool2d, addition and flattening"


def _check_supported(name: str, module: nn.Module, source: Shape, rank: int) -> None:
    """Refuse the settings that no op has."""

    def refuse(what: str) -> None:
        raise UsageError(f"'{name}' ({type(module).__name__}) {what}")

    channels, *size = source
    if type(module) in LINEARS and rank != 2:
        refuse("reads a map; flatten it first")
    if isinstance(module, nn.Conv2d) and module.padding_mode != "zeros":
        refuse(f"has padding_mode '{module.padding_mode}'; only 'zeros' can be lowered")
    if isinstance(module, NORMS):
        if module.running_mean is None or module.running_var is None:
            refuse("has no running statistics, so it depends on the batch; make it with track_running_stats=True")
        if module.num_features != channels:
            refuse(
                f"normalises a flattened map of {channels} x {size[0]} x {size[1]}; "
                "put a BatchNorm2d before the flattening"
            )
    if isinstance(module, nn.PReLU) and module.num_parameters not in (1, channels):
        refuse("has slopes for each place of a map; use one per channel")
    if isinstance(module, nn.MaxPool2d) and (as_pair(module.dilation) != (1, 1) or module.return_indices):
        refuse("has dilation or returns indices, which cannot be lowered")
    if isinstance(module, nn.MaxPool2d | nn.AvgPool2d) and module.ceil_mode:
        refuse("has ceil_mode=True, which cannot be lowered")
    if isinstance(module, nn.AvgPool2d) and module.divisor_override is not None:
        refuse("has a divisor_override, which cannot be lowered")


def as_pair(value: Any) -> tuple[int, int]:
    """``(v, v)`` of a number, or the pair that was given."""
    first, second = value if isinstance(value, tuple | list) else (value, value)
    return int(first), int(second)


def _is_over_the_map(node: fx.Node) -> bool:
    """Whether a call of mean is over height and width."""
    argument = node.args[0] if node.args else None
    dims = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    if (
        not isinstance(argument, fx.Node)
        or len(_tensor_shape(argument) or ()) != 4
        or not isinstance(dims, tuple | list)
    ):
        return False
    return sorted(int(d) % 4 for d in dims) == [2, 3]


def _tensor_shape(node: fx.Node) -> tuple[int, ...] | None:
    shape: tuple[int, ...] | None = node.meta.get("shape")
    return shape


def _map_shape(node: fx.Node, name: str) -> Shape:
    shape = _tensor_shape(node) or ()
    if len(shape) == 4:
        return shape[1], shape[2], shape[3]
    if len(shape) == 2:
        return shape[1], 1, 1
    raise UsageError(f"'{name}' makes a tensor of shape {shape}; only (N, C, H, W) and (N, features) can be lowered")


def _owner(node: fx.Node) -> str:
    """Where in the model a function is called: ``, in 'name'``, or nothing at the top."""
    return f", in '{_path(node)}'" if _path(node) else ""


def _path(node: fx.Node) -> str:
    """The name of the module that calls a function; nothing at the top."""
    stack = list(node.meta.get("nn_module_stack", {}).values())
    return str(stack[-1][0]) if stack else ""


def _needed(steps: list[Step], output: Step) -> Iterator[Step]:
    needed: set[int] = set()
    pending = [output]
    while pending:
        step = pending.pop()
        if id(step) not in needed:
            needed.add(id(step))
            pending += step.inputs
    if id(steps[0]) not in needed:
        raise UsageError("the model's output does not depend on its input")
    yield from (step for step in steps if id(step) in needed)
