"""Batch norms that follow a convolution, folded into its weight and bias."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor, fx, nn

from lowbit.errors import UsageError
from lowbit.layers.quantized import QuantizedLayer

_LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def fold_batch_norms_(model: nn.Module) -> list[str]:
    r"""Fold each batch norm that reads a convolution or linear layer into that layer, in place.

    $W' = f W$ and $b' = \beta + f\,(b - \mu)$ with $f = \gamma / \sqrt{\sigma^2 + \epsilon}$ for each output channel,
    from the running statistics, in float64 and rounded once; the norm's place is taken by `nn.Identity`. What the model
    computes in ``eval()`` stays the same up to rounding.

    A pair is folded when the norm alone reads the layer, the model calls either once, and the layer's weight and bias
    are its own. Other norms stay: those without running statistics, those behind something else, such as pooling or an
    addition, and those behind a layer whose weight a hook computes, another layer shares or ``forward`` reads itself.

    Args:
        model: before `quantize_`; torch.fx must be able to trace it. A linear layer that is followed by a norm gives
            (N, features).

    Returns:
        Names of the norms that were folded.

    Raises:
        UsageError: the model is quantized, or its control flow depends on values. It is then unchanged.

    Source: Jacob et al. 2017, arXiv 1712.05877, section 3.2; Krishnamoorthi 2018, arXiv 1806.08342, section 3.
    """
    if any(isinstance(module, QuantizedLayer) for module in model.modules()):
        raise UsageError("the model is quantized already; fold its batch norms before quantize_")
    try:
        graph = fx.Tracer().trace(model)
    except Exception as error:
        raise UsageError(f"batch norms cannot be folded, for torch.fx cannot trace the model: {error}") from error
    modules = dict(model.named_modules(remove_duplicate=False))
    calls = [node for node in graph.nodes if node.op == "call_module"]
    read_by_hand = [str(node.target).rpartition(".")[0] for node in graph.nodes if node.op == "get_attr"]
    times = Counter(id(modules[name]) for name in [*(str(node.target) for node in calls), *read_by_hand])
    holders = Counter(id(own) for module in model.modules() for own in module._parameters.values())
    folded = []
    for node in calls:
        source = node.args[0] if node.args else None
        if not isinstance(source, fx.Node) or source.op != "call_module" or len(source.users) > 1:
            continue
        layer, norm = modules[str(source.target)], modules[node.target]
        if type(layer) not in _LAYERS or not _can_fold(norm) or times[id(layer)] > 1 or times[id(norm)] > 1:
            continue
        if "weight" not in layer._parameters or max(holders[id(own)] for own in _parameters(layer)) > 1:
            continue
        _fold(layer, norm)
        for name in [name for name, module in modules.items() if module is norm]:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, nn.Identity())
        folded.append(node.target)
    return folded


def _parameters(layer: nn.Module) -> list[nn.Parameter]:
    return [own for own in layer._parameters.values() if own is not None]


def _can_fold(norm: nn.Module) -> bool:
    return type(norm) in _NORMS and norm.running_mean is not None and norm.running_var is not None


@torch.no_grad()
def _fold(layer: Any, norm: Any) -> None:
    def wide(tensor: Tensor | None, default: float) -> Tensor:
        return torch.full_like(norm.running_var, default).double() if tensor is None else tensor.double()

    factor = wide(norm.weight, 1) / (norm.running_var.double() + norm.eps).sqrt()
    bias = wide(norm.bias, 0) + factor * (wide(layer.bias, 0) - norm.running_mean.double())
    layer.weight.copy_(layer.weight.double() * factor.reshape(-1, *(1,) * (layer.weight.dim() - 1)))
    layer.bias = nn.Parameter(bias.to(layer.weight.dtype))
