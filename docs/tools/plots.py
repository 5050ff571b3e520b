"""Draw a quantizer by running it: values and gradients over x as an SVG that follows the page's colours."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from lowbit.quantizers.base import Quantizer

COUNT = 400
WEIGHTS = torch.arange(-COUNT, COUNT + 1) / COUNT * 1.5
ACTIVATIONS = torch.arange(-COUNT, COUNT + 1) / COUNT * 3
GRADIENTS = torch.arange(-COUNT, COUNT + 1) / COUNT
DRAWS = 500
MOST_JUMPS = 40
"""A curve with more jumps is noise and is drawn as dots."""
WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 340, 210, 36, 26, 24

Curves = tuple[Tensor, Tensor, Tensor]


def run_weight_quantizer(quantizer: Quantizer) -> Curves:
    """x, q and dq_i/dx_i for one filter that holds all numbers of `WEIGHTS`: its scale is taken over them.

    The gradient of number i is what a gradient of 1 at that number alone gives back to it.
    """
    weight = WEIGHTS.reshape(1, -1, 1, 1).clone().requires_grad_()
    q = quantizer.train()(weight)
    slopes = []
    for i in range(len(WEIGHTS)):
        (gradient,) = torch.autograd.grad(q[0, i, 0, 0], weight, retain_graph=True)
        slopes.append(gradient[0, i, 0, 0])
    return WEIGHTS, q.detach().flatten(), torch.stack(slopes)


def run_activation_quantizer(quantizer: Quantizer) -> Curves:
    """x, q and dq/dx for the numbers of `ACTIVATIONS` as a batch of single numbers, for an incoming gradient of 1."""
    x = ACTIVATIONS.reshape(-1, 1, 1, 1).clone().requires_grad_()
    q = quantizer.train()(x)
    (gradient,) = torch.autograd.grad(q.sum(), x)
    return ACTIVATIONS, q.detach().flatten(), gradient.flatten()


def run_gradient_quantizer(quantize: Callable[[Tensor], Tensor]) -> Curves:
    """Incoming gradients, one draw of what goes on, and the mean of `DRAWS` draws, for one sample of a batch."""
    incoming = GRADIENTS.reshape(1, -1, 1, 1)
    draws = []
    for _ in range(DRAWS):
        x = torch.zeros_like(incoming, requires_grad=True)
        draws.append(torch.autograd.grad(quantize(x), x, incoming)[0].flatten())
    return GRADIENTS, draws[0], torch.stack(draws).mean(dim=0)


def figure(curves: Curves, titles: tuple[str, str], label: str, caption: str) -> str:
    """Two panels side by side, as one line of HTML.

    Args:
        curves: x, the curve of the left panel and that of the right one.
        titles: of the panels.
        label: for those who do not see it.
        caption: below; HTML.
    """
    x, left, right = curves
    panels = _panel(x, left, titles[0], 0, identity=True) + _panel(x, right, titles[1], WIDTH + 20, identity=False)
    return (
        f'<figure class="quantizer"><svg viewBox="0 0 {2 * WIDTH + 20} {HEIGHT}" role="img" aria-label="{label}">'
        f"{panels}</svg><figcaption>{caption}</figcaption></figure>"
    )


def _panel(x: Tensor, y: Tensor, title: str, shift: int, *, identity: bool) -> str:
    xs, points, finite = x.tolist(), y.tolist(), y[y.isfinite()]
    low, high = min(0.0, float(finite.min())), max(0.0, float(finite.max()))
    low, high = (low - 0.1 * (high - low or 1), high + 0.1 * (high - low or 1))
    x_low, x_high = xs[0], xs[-1]

    def at_x(value: float) -> float:
        return LEFT + (value - x_low) / (x_high - x_low) * (WIDTH - LEFT - 6)

    def at_y(value: float) -> float:
        return TOP + (high - value) / (high - low) * (HEIGHT - TOP - BOTTOM)

    parts = [f'<text class="title" x="{LEFT}" y="14">{title}</text>']
    for tick in _ticks(x_low, x_high):
        parts.append(_line("grid", at_x(tick), TOP, at_x(tick), HEIGHT - BOTTOM))
        parts.append(f'<text x="{at_x(tick):.1f}" y="{HEIGHT - 9}" text-anchor="middle">{_number(tick)}</text>')
    for tick in _ticks(low, high):
        parts.append(_line("zero" if tick == 0 else "grid", LEFT, at_y(tick), WIDTH - 6, at_y(tick)))
        parts.append(f'<text x="{LEFT - 5}" y="{at_y(tick) + 4:.1f}" text-anchor="end">{_number(tick)}</text>')
    parts.append(_line("zero", at_x(0), TOP, at_x(0), HEIGHT - BOTTOM))
    if identity:
        ends = max(low, x_low), min(high, x_high)
        parts.append(_line("identity", at_x(ends[0]), at_y(ends[0]), at_x(ends[1]), at_y(ends[1])))
    jump = 0.03 * (high - low)
    breaks = [i for i in range(1, len(points)) if abs(points[i] - points[i - 1]) > jump]
    dots = [f"{at_x(at):.1f},{at_y(value):.1f}" for at, value in zip(xs, points, strict=True)]
    if len(breaks) > MOST_JUMPS:
        parts += [_dot(dot) for dot in dots]
        return f'<g transform="translate({shift} 0)">{"".join(parts)}</g>'
    for i in breaks:
        middle = at_x((xs[i - 1] + xs[i]) / 2)
        parts.append(_line("jump", middle, at_y(points[i - 1]), middle, at_y(points[i])))
    for start, end in pairwise([0, *breaks, len(points)]):
        piece = dots[start:end]
        if len(piece) == 1:
            parts.append(_dot(piece[0]))
        else:
            parts.append(f'<polyline class="curve" points="{" ".join(_straight(piece))}"/>')
    return f'<g transform="translate({shift} 0)">{"".join(parts)}</g>'


def _straight(piece: Sequence[str]) -> Sequence[str]:
    """Only the ends of a level piece: it keeps the page small."""
    heights = {point.split(",")[1] for point in piece}
    return (piece[0], piece[-1]) if len(heights) == 1 else piece


def _dot(point: str) -> str:
    x, y = point.split(",")
    return f'<circle class="dot" cx="{x}" cy="{y}" r="1.2"/>'


def _line(kind: str, x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _ticks(low: float, high: float) -> list[float]:
    for step in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500):
        first, last = int(low / step), int(high / step)
        if last - first <= 6:
            return [step * k for k in range(first, last + 1)]
    return [0.0]


def _number(value: float) -> str:
    return f"{value:g}".replace("-", "\N{MINUS SIGN}")
