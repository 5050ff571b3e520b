"""What ReActNet learns around sign and PReLU: a shift and a slope per channel, trained in few passes over memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

INITIAL_SLOPE = 0.25


class Shift(nn.Module):
    r"""$y = x + b_c$, one learned number per channel, 0 at first.

    In front of a sign it is ReActNet's RSign, $\mathrm{sign}(x - \alpha_c)$ with $\alpha_c = -b_c$; the sign stays in
    the quantized layer behind, so export puts the shift into its thresholds. ``x`` is (N, C, ...), and ``y`` has its
    dtype.

    Source: Liu, Shen, Savvides and Cheng 2020, "ReActNet", arXiv 2003.03488, section 4.2.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        return x + _shaped(self.bias, x)

    def extra_repr(self) -> str:
        return str(len(self.bias))


class PReLU(nn.Module):
    r"""$y = x$ where $x \ge 0$, else $\beta_c x$: torch's PReLU with a slope per channel, 0.25 at first.

    Gradient: $\partial L/\partial x = g$ where $x \ge 0$, else $\beta_c g$; $\partial L/\partial \beta_c$ is the sum
    of $g x$ over the $x < 0$. It is torch's own but for $x = 0$, which torch counts to the lower side. Torch first
    writes the slope's gradient for each element and adds them up then, which takes several times as long on a CPU.

    Source: He, Zhang, Ren and Sun 2015, "Delving Deep into Rectifiers", arXiv 1502.01852, section 2.1.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((channels,), INITIAL_SLOPE))

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = _PReLU.apply(x, self.weight)
        return result

    def extra_repr(self) -> str:
        return str(len(self.weight))


class RPReLU(nn.Sequential):
    r"""$y = \mathrm{PReLU}(x - \gamma_c) + \zeta_c$: the bend of a PReLU is moved along both axes, by channel.

    Its parts are a `Shift` by $-\gamma_c$, a `PReLU` and a `Shift` by $\zeta_c$.

    Source: Liu, Shen, Savvides and Cheng 2020, "ReActNet", arXiv 2003.03488, section 4.2.
    """

    def __init__(self, channels: int) -> None:
        super().__init__(Shift(channels), PReLU(channels), Shift(channels))


class _PReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, slope: Tensor) -> Tensor:
        ctx.save_for_backward(x, slope)
        return torch.prelu(x, slope.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        x, slope = ctx.saved_tensors
        # hardtanh passes the gradient of its middle on, which here is all of x < 0.
        below = torch.ops.aten.hardtanh_backward(gradient, x, -torch.inf, 0)
        to_x = torch.addcmul(gradient, below, _shaped(slope - 1, x))
        to_slope = below.mul_(x).sum([d for d in range(x.dim()) if d != 1])
        return to_x, to_slope.to(slope.dtype)


def _shaped(per_channel: Tensor, x: Tensor) -> Tensor:
    """Numbers of the channels in the dtype of ``x``, so that they broadcast over it."""
    return per_channel.to(x.dtype).reshape((-1,) + (1,) * (x.dim() - 2))
