"""Discrete functions with their straight-through gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor


def sign(x: Tensor, threshold: Tensor | float = 0.0) -> Tensor:
    r"""Sign with the clipped straight-through estimator.

    Forward: $q = +1$ if $x \ge$ ``threshold`` else $-1$; so ``sign(0) = sign(-0.0) = +1``, and NaN gives -1.
    Backward: $\partial L/\partial x = g \cdot 1\{|x| \le 1\}$, both ends included: a latent weight that was clipped to
    exactly 1 can come back.

    ```
     +1      ┌────   forward        1  ┌─────┐   backward
        ─────┘                      0 ─┘     └─
     -1      0                        -1  0  1
    ```

    Args:
        x: any shape, any floating dtype.
        threshold: 0, or random numbers of the shape of ``x``, in [-1, 1]; the gradient does not know of it.

    Source: Courbariaux, Hubara et al. 2016, arXiv 1602.02830, equations 1 and 4.
    """
    result: Tensor = _Sign.apply(x, threshold)
    return result


def sign_polynomial(x: Tensor) -> Tensor:
    r"""Sign with the gradient of a piecewise polynomial that lies closer to it than a clip.

    Forward: as `sign`.
    Backward: $\partial L/\partial x = g\,\max(0, 2 - 2|x|)$, which is $2 + 2x$ on $[-1, 0)$ and $2 - 2x$ on $[0, 1)$.

    ```
     +1      ┌────   forward        2    /\     backward
        ─────┘                         /  \
     -1      0                      0 ─┘    └─
                                      -1  0  1
    ```

    Source: Liu et al. 2018, "Bi-Real Net", arXiv 1808.00278, section 3.
    """
    result: Tensor = _SignPolynomial.apply(x)
    return result


def window(gradient: Tensor, x: Tensor, low: float = -1.0, high: float = 1.0) -> Tensor:
    r"""$g \cdot 1\{low \le x \le high\}$ in one pass over memory; both ends are numbers of float32."""
    # hardtanh's gradient is open at the ends, so they lie one step outside.
    number = np.float64 if x.dtype == torch.float64 else np.float32
    outside = (float(np.nextafter(number(end), number(way * np.inf))) for end, way in ((low, -1), (high, 1)))
    return torch.ops.aten.hardtanh_backward(gradient, x, *outside)  # type: ignore[no-any-return]


class _Sign(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, threshold: Tensor | float) -> Tensor:
        ctx.save_for_backward(x)
        return signs(x, threshold)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        return window(gradient, x), None


class _SignPolynomial(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return signs(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        slope = x.abs().clamp_(max=1)
        return torch.add(x.new_tensor(2), slope, alpha=-2, out=slope).mul_(gradient)


def signs(x: Tensor, threshold: Tensor | float = 0.0, scale: Tensor | None = None) -> Tensor:
    """``+1`` where ``x >= threshold``, else ``-1``, in the dtype of ``x``; no gradient. Times ``scale``, if given."""
    # Comparing into numbers, and not into booleans that become numbers, is several times as fast on a CPU.
    positive = torch.ge(x, threshold, out=torch.empty_like(x))
    if scale is None:
        return torch.add(x.new_tensor(-1), positive, alpha=2, out=positive)
    return torch.addcmul(-scale, positive, 2 * scale, out=positive)


def clip(x: Tensor, low: float, high: float) -> Tensor:
    """``x`` within [low, high], numbers of float32; the gradient is 1 there, both ends included, and 0 outside.

    Torch's own clamp has 1 at the ends in some versions and 0 in others.
    """
    result: Tensor = _Clip.apply(x, low, high)
    return result


class _Clip(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, low: float, high: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.ends = low, high
        return x.clamp(low, high)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (x,) = ctx.saved_tensors
        return window(gradient, x, *ctx.ends), None, None


def at_least(x: Tensor, low: float) -> Tensor:
    r"""$\max(x, low)$, whose gradient is 1 on both sides: a learned number that fell below ``low`` can come back."""
    return substitute(x.clamp(min=low), x)


def tanh_sign(x: Tensor, sharpness: float) -> Tensor:
    r"""Sign whose gradient is that of $k \tanh(t x)$, $k = \max(1/t, 1)$.

    Forward: $q = +1$ if $x \ge 0$ else $-1$.
    Backward: $\partial L/\partial x = g\,k\,t\,(1 - \tanh^2(t x))$. A small $t$ gives about the identity's gradient, a
    large one about the sign's own.

    Args:
        x: any shape, any floating dtype.
        sharpness: t, above 0.

    Source: Qin et al. 2019, arXiv 1909.10788, section 3.3 (the error decay estimator).
    """
    return substitute(signs(x), max(1 / sharpness, 1.0) * torch.tanh(sharpness * x))


def substitute(values: Tensor, surrogate: Tensor) -> Tensor:
    r"""The straight-through estimator in general: the values of one function, the gradient of another.

    Forward: $q$ = ``values``, to the bit. Backward: $\partial L/\partial$ ``surrogate`` $= g$.
    (``surrogate + (values - surrogate).detach()`` has this gradient too, but rounds.)

    Args:
        values, surrogate: of one shape and dtype.

    Source: Bengio, Léonard and Courville 2013, arXiv 1308.3432.
    """
    result: Tensor = _Substitute.apply(values, surrogate)
    return result


class _Substitute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, surrogate: Tensor) -> Tensor:
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor]:
        return None, gradient


def map_gradient(x: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    r"""The identity, whose gradient is changed on its way back: $\partial L/\partial x =$ ``function``$(g)$.

    Args:
        x: any shape, any floating dtype.
        function: of the gradient; keeps its shape. What it gives is passed on in the gradient's own dtype.
    """
    result: Tensor = _MapGradient.apply(x, function)
    return result


class _MapGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.function = function
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.function(gradient).to(gradient.dtype), None
