"""A look at a network, on one fixed batch, that leaves it as it was."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lowbit.errors import UsageError
from lowbit.layers import QuantizedLayer, named_quantized_layers

BINS = 40

Inputs = dict[str, list[Tensor]]
LayerFigures = dict[str, Any]


@dataclass(frozen=True)
class Probe:
    """The batch on which a network is looked at, and how closely.

    Attributes:
        images, labels: (N, ...) and (N,), on the model's device.
        loss: the method's loss of logits (n, classes) and labels (n,): a mean over n.
        directions: random directions per image and layer, K below.
        width: standard deviation of a step along a direction, as a share of that of what the layer reads.
        seed: of the directions, which are the same in every epoch.
    """

    images: Tensor
    labels: Tensor
    loss: Callable[[Tensor, Tensor], Tensor]
    directions: int = 4
    width: float = 0.3
    seed: int = 0


def diagnose(model: nn.Module, probe: Probe) -> dict[str, LayerFigures]:
    """Look at each quantized layer, and leave the model as it was.

    The network is in ``eval()`` (batch norm with its running statistics, no dropout, quantizers without chance), but
    for the quantized layers themselves, which stay differentiable as in ``train()``; all in the model's own dtype.
    Weights, buffers, modes, gradients and torch's random state are afterwards the same, to the bit.

    Returns:
        For each layer: ``gradient_cosine`` (see `gradient_cosines`), ``saturated`` and ``dead`` (see `saturation`), and
        ``weights`` (see `histogram`). None where the layer has no such side, or nothing can be said.
    """
    layers = named_quantized_layers(model)
    with _undisturbed(model, layers, probe.seed):
        inputs, gradients = _read(model, layers, probe)
        cosines = gradient_cosines(model, probe, inputs, gradients)
        figures: dict[str, LayerFigures] = {}
        for name, layer in layers.items():
            saturated, dead = saturation(layer, inputs.get(name, ()))
            weights = None if layer.weight_quantizer is None else histogram(layer.weight)
            figures[name] = {
                "gradient_cosine": cosines[name],
                "saturated": saturated,
                "dead": dead,
                "weights": weights,
            }
    return figures


def gradient_cosines(model: nn.Module, probe: Probe, inputs: Inputs, gradients: Inputs) -> dict[str, float | None]:
    r"""Gradient mismatch: do the straight-through gradients foretell how the quantized loss moves?

    Let $x$ be what a layer reads for one image, ahead of its quantizer, $L(x)$ the true loss of that image, staircases
    and all, and $g$ its straight-through gradient. With Gaussian directions $u_k \sim N(0, I)$, $k = 1 \ldots K$, and
    $\sigma$ = ``width`` times the standard deviation of what the layer reads:

    $$p_k = g \cdot u_k \qquad d_k = \frac{L(x + \sigma u_k) - L(x - \sigma u_k)}{2\sigma} \qquad
    c = \frac{\sum_k p_k\,d_k}{\sqrt{\sum_k p_k^2 \sum_k d_k^2}}$$

    The layer's figure is the mean of $c$ over the images: so those with a large loss count no more than others. An
    image whose $p$ or $d$ are all 0 has $c = 0$; one where both are is left out.

    What it estimates: let $h$ be the gradient of the smoothed loss $E[L(x + \sigma u)]$. By Stein's identity
    $E[p\,d] = g \cdot h$; $E[p^2] = |g|^2$; and $E[d^2] = |h|^2 + r$, where $r \ge 0$ is what no linear function can
    foretell. So $c$ tends to $\cos(g, h)\,|h| / \sqrt{|h|^2 + r}$: it has the sign of the true cosine and at most its
    size, and is 1 for a right gradient of a loss that is linear over the width. A finite $K$ takes about
    $c\,(1 - c^2) / (2K)$ from its mean; its standard error over $N$ images is about $1/\sqrt{N K}$ near 0.

    The gradient at $x$ carries the mismatch of this layer's activation quantizer and of all above it. Quantizers of
    weights have no part in it: along $x$ the weights are constants.

    Args:
        inputs, gradients: what each layer reads, one tensor per call, images along the first axis, and the gradients of
            the mean loss there. One direction spans all calls of a layer.

    Returns:
        None for a layer that does not run, or when no image is left.

    Source: presumed and effective gradients: Lin and Talathi 2016, arXiv 1607.02241. The gradient of a smoothed loss as
        the measure of the mismatch: Kim et al. 2020, "BinaryDuo", arXiv 2002.06517. Here projections are compared, and
        not whole gradients: an estimate from a few directions in a million dimensions is nearly orthogonal to anything.
        Central differences along Gaussian directions: Nesterov and Spokoiny 2017, "Random Gradient-Free Minimization of
        Convex Functions".
    """
    layers = named_quantized_layers(model)
    cosines: dict[str, float | None] = dict.fromkeys(layers)
    for name, parts in inputs.items():
        generator = torch.Generator(parts[0].device).manual_seed(probe.seed)
        widths = [probe.width * float(part.detach().std(correction=0)) for part in parts]
        foretold, found = [], []
        for _ in range(probe.directions):
            steps = [
                width * torch.randn(part.shape, generator=generator, dtype=part.dtype, device=part.device)
                for width, part in zip(widths, parts, strict=True)
            ]
            up, down = (_losses_beside(model, layers[name], steps, sign, probe) for sign in (1, -1))
            products = [(g * step).flatten(1).sum(1) for g, step in zip(gradients[name], steps, strict=True)]
            foretold.append(torch.stack(products).double().sum(0))
            found.append((up - down) / 2)
        p, d = torch.stack(foretold), torch.stack(found)
        sizes = p.square().sum(0) * d.square().sum(0)
        cosine = torch.where(sizes > 0, (p * d).sum(0) / sizes.sqrt(), 0.0)
        speaking = (p != 0).any(0) | (d != 0).any(0)
        if speaking.any():
            cosines[name] = float(cosine[speaking].mean())
    return cosines


def saturation(layer: QuantizedLayer, inputs: Sequence[Tensor]) -> tuple[float | None, float | None]:
    """Activations whose straight-through gradient is zero, and channels that say the same to every image.

    Args:
        inputs: what the layer reads, one tensor per call.

    Returns:
        The share of inputs at which the activation quantizer's own backward, given ones, gives exactly 0; and the share
        of channels whose code is the same for all images and places. None, None without an activation quantizer that is
        enabled, or without inputs.

    Source: the saturation and degeneration of Ding et al. 2019, "Regularizing Activation Distribution for Training
        Binarized Deep Networks", arXiv 1904.02823, for any quantizer.
    """
    quantizer = layer.activation_quantizer
    if quantizer is None or not quantizer.enabled or not inputs:
        return None, None
    zeros = count = 0
    lowest, highest = [], []
    for part in inputs:
        x = part.detach().requires_grad_()
        [gradient] = torch.autograd.grad(quantizer(x).sum(), x, allow_unused=True, materialize_grads=True)
        zeros, count = zeros + int((gradient == 0).sum()), count + gradient.numel()
        with torch.no_grad():
            channels = quantizer.encode(x)[0].movedim(-1 if isinstance(layer, nn.Linear) else 1, 0).flatten(1)
        lowest.append(channels.amin(1))
        highest.append(channels.amax(1))
    same = torch.stack(lowest).amin(0) == torch.stack(highest).amax(0)
    return zeros / count, float(same.double().mean())


def histogram(weight: Tensor) -> dict[str, Any]:
    """``BINS`` counts between the least and the largest weight: ``low``, ``high`` and ``counts``."""
    values = weight.detach().float().cpu().numpy()
    counts, edges = np.histogram(values, BINS)
    return {"low": float(edges[0]), "high": float(edges[-1]), "counts": counts.tolist()}


@contextlib.contextmanager
def _undisturbed(model: nn.Module, layers: dict[str, QuantizedLayer], seed: int) -> Iterator[None]:
    """Set the model up for `diagnose`; on the way out, put back all that looking at it may have changed."""
    modes = {module: module.training for module in model.modules()}
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    device = next(model.parameters()).device
    devices = [] if device.type == "cpu" else [device]
    with (
        torch.random.fork_rng(devices, device_type=device.type),
        torch.autocast(device.type, enabled=False),
        torch.enable_grad(),
    ):
        torch.manual_seed(seed)
        model.eval()
        for layer in layers.values():
            layer.training = True
        try:
            yield
        finally:
            for module, training in modes.items():
                module.training = training
            with torch.no_grad():
                for buffer, before in buffers:
                    buffer.copy_(before)


def _read(model: nn.Module, layers: dict[str, QuantizedLayer], probe: Probe) -> tuple[Inputs, Inputs]:
    """What each layer reads, one tensor per call, and the straight-through gradient of the mean loss there."""
    inputs: Inputs = {}

    def keep(name: str, x: Tensor) -> Tensor:
        if x.shape[0] != len(probe.labels):
            raise UsageError(
                f"layer '{name}' reads a tensor of shape {tuple(x.shape)} for {len(probe.labels)} images; "
                "diagnostics need the images along the first axis of what a quantized layer reads"
            )
        # An alias, so that no other reader of x, such as a shortcut, adds to the gradient.
        x = x.view_as(x) if x.requires_grad else x.detach().requires_grad_()
        inputs.setdefault(name, []).append(x)
        return x

    with contextlib.ExitStack() as hooks:
        for name, layer in layers.items():
            hooks.enter_context(_reading(layer, lambda x, name=name: keep(name, x)))  # type: ignore[misc]
        loss = _losses(model, probe).mean()
        everything = [part for parts in inputs.values() for part in parts]
        found = iter(torch.autograd.grad(loss, everything, allow_unused=True, materialize_grads=True))
    return inputs, {name: [next(found) for _ in parts] for name, parts in inputs.items()}


@torch.no_grad()
def _losses_beside(model: nn.Module, layer: nn.Module, steps: Sequence[Tensor], sign: int, probe: Probe) -> Tensor:
    """The loss of each image when ``layer`` reads its inputs plus ``sign`` times ``steps``, one step per call."""
    remaining = iter(steps)
    with _reading(layer, lambda x: x + sign * next(remaining)):
        return _losses(model, probe)


def _losses(model: nn.Module, probe: Probe) -> Tensor:
    # In float64, where the small losses of images that are classified well keep their digits.
    logits = model(probe.images).double()
    return torch.stack([probe.loss(logits[i : i + 1], probe.labels[i : i + 1]) for i in range(len(logits))])


@contextlib.contextmanager
def _reading(layer: nn.Module, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """While active, ``layer`` reads ``change(x)`` in place of ``x``."""
    handle = layer.register_forward_pre_hook(lambda _, arguments: (change(arguments[0]), *arguments[1:]))
    try:
        yield
    finally:
        handle.remove()
