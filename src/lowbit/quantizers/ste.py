"""Discrete functions with their straight-through gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def sign(x: Tensor) -> Tensor:
    r"""Sign with the clipped straight-through estimator.

    Forward: $q = +1$ if $x \ge 0$ else $-1$; so ``sign(0) = sign(-0.0) = +1``, and NaN gives -1.
    Backward: $\partial L/\partial x = g \cdot 1\{|x| \le 1\}$, both ends included: a latent weight that was clipped to
    exactly 1 can come back.

    ```
     +1      ┌────   forward        1  ┌─────┐   backward
        ─────┘                      0 ─┘     └─
     -1      0                        -1  0  1
    ```

    Args:
        x: any shape, any floating dtype.

    Source: Courbariaux, Hubara et al. 2016, arXiv 1602.02830, equations 1 and 4.
    """
    result: Tensor = _Sign.apply(x)
    return result


def window(gradient: Tensor, x: Tensor) -> Tensor:
    r"""$g \cdot 1\{|x| \le 1\}$ in one pass over memory."""
    # hardtanh's gradient is open at the ends, so the ends lie one step outside [-1, 1].
    end = 1 + torch.finfo(torch.promote_types(x.dtype, torch.float32)).eps
    return torch.ops.aten.hardtanh_backward(gradient, x, -end, end)  # type: ignore[no-any-return]


class _Sign(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return signs(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return window(gradient, x)


def signs(x: Tensor) -> Tensor:
    """``+1`` where ``x >= 0``, else ``-1``, in the dtype of ``x``; no gradient."""
    return (x >= 0).to(x.dtype).mul_(2).sub_(1)
