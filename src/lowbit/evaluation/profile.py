"""What a network costs: parameters, bytes and multiply-accumulates, per layer and by bit widths."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.evaluation.modes import evaluating
from lowbit.packed import PackedModel

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
FLOAT_BITS = 32


@torch.inference_mode()
def profile(model: nn.Module, example: Tensor) -> dict[str, Any]:
    """Count what ``model`` stores and computes for one input.

    MACs are those of convolutions and linear layers, taps on the zero padding included, as papers count them. Bytes
    are those of all parameters and float buffers (batch norm's statistics are needed too): 4 each, or for a quantized
    weight its bits, rounded up to whole bytes, plus 4 for each scale. The model is left as it was.

    Args:
        model: any module; a quantized layer has ``weight_quantizer`` and ``activation_quantizer``, each with ``bits``,
            or None.
        example: a batch that the model takes, of shape (N, C, ...).

    Returns:
        ``parameters``, ``weight_bytes`` (as stored), ``float32_bytes``, ``macs`` (by kind: bits of W x bits of A,
        such as ``"1x1"`` or ``"32x32"``) and ``layers``: a list of ``name``, ``kind``, ``bits_w``, ``bits_a``,
        ``macs``, ``parameters``, ``bytes`` and ``float32_bytes``, in the order of the modules.
    """
    macs = _count_macs(model, example)
    layers = []
    seen: set[int] = set()
    for name, module in model.named_modules():
        tensors = {key: t for key, t in _own_tensors(module).items() if id(t) not in seen}
        seen.update(map(id, tensors.values()))
        if not tensors and name not in macs:
            continue
        float32_bytes = sum(4 * t.numel() for t in tensors.values())
        layers.append(
            {
                "name": name,
                "kind": type(module).__name__,
                "bits_w": _bits(module, "weight_quantizer"),
                "bits_a": _bits(module, "activation_quantizer"),
                "macs": macs.get(name, 0),
                "parameters": sum(t.numel() for t in tensors.values() if isinstance(t, nn.Parameter)),
                "bytes": float32_bytes - (_saved_bytes(module) if "weight" in tensors else 0),
                "float32_bytes": float32_bytes,
            }
        )
    return {"parameters": sum(layer["parameters"] for layer in layers), **_totals(layers)}


def profile_packed(model: PackedModel) -> dict[str, Any]:
    """Like `profile`, of a packed file: bytes are those of its stored tensors, and parameters are not counted."""
    layers = []
    values = model.values()
    for index, (op, cost) in enumerate(zip(model.ops, model.costs(), strict=True)):
        source = values[op["inputs"][0]]
        layers.append(
            {
                "name": op["source"],
                "kind": op["op"],
                "bits_w": 1 if f"{index}.weight_bits" in model.tensors else op.get("weight_width", FLOAT_BITS),
                "bits_a": FLOAT_BITS if source.kind == "float" else source.bits,
                "macs": cost.macs,
                "bytes": cost.bytes,
                "float32_bytes": cost.float_bytes,
            }
        )
    return _totals(layers)


def _totals(layers: list[dict[str, Any]]) -> dict[str, Any]:
    kinds: Counter[str] = Counter()
    for layer in layers:
        if layer["macs"]:
            kinds[f"{layer['bits_w']}x{layer['bits_a']}"] += layer["macs"]
    return {
        "weight_bytes": sum(layer["bytes"] for layer in layers),
        "float32_bytes": sum(layer["float32_bytes"] for layer in layers),
        "macs": dict(sorted(kinds.items(), key=lambda item: -item[1])),
        "layers": layers,
    }


def _count_macs(model: nn.Module, example: Tensor) -> Counter[str]:
    """MACs of each convolution and linear layer for one input of the batch, by module name."""
    macs: Counter[str] = Counter()

    def counter(name: str) -> Callable[[nn.Module, tuple[Any, ...], Tensor], None]:
        def count(module: nn.Module, _inputs: tuple[Any, ...], output: Tensor) -> None:
            taps = math.prod(module.get_parameter("weight").shape[1:])
            macs[name] += output.numel() // len(example) * taps

        return count

    hooks = [
        module.register_forward_hook(counter(name))
        for name, module in model.named_modules()
        if isinstance(module, (*CONVOLUTIONS, nn.Linear))
    ]
    try:
        with evaluating(model):
            model(example)
    finally:
        for hook in hooks:
            hook.remove()
    return macs


def _own_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and float buffers of the module itself, not of its children."""
    buffers = {name: b for name, b in module.named_buffers(recurse=False) if b.is_floating_point()}
    return {**dict(module.named_parameters(recurse=False)), **buffers}


def _bits(module: nn.Module, quantizer: str) -> int:
    return int(getattr(getattr(module, quantizer, None), "bits", FLOAT_BITS))


def _saved_bytes(module: nn.Module) -> int:
    """Bytes that storing the weight as codes and scales saves over float32; none where a code names a level."""
    quantizer = getattr(module, "weight_quantizer", None)
    if quantizer is None:
        return 0
    weight = module.get_parameter("weight")
    _codes, grid = quantizer.encode(weight)
    if grid.levels is not None:
        # The packed file, too, holds the values of such a weight, as float32.
        return 0
    packed = math.ceil(weight.numel() * int(quantizer.bits) / 8)
    return 4 * weight.numel() - packed - 4 * int(grid.scale.numel())
