"""Convolutions of small integers as products of bytes: the same sums, several times as fast on a CPU.

In ``eval()`` a quantized layer convolves integers that float32 holds exactly. Where they fit a byte, CPUs with VNNI or
AMX multiply them as bytes and add in 32 bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit.hardware import cpu_flags
from lowbit.layers.conv2d_mode import Conv2dMode, Pair
from lowbit.layers.windows import windows

# Windows of an image lie side by side in memory; as many images at a time as fit.
WINDOW_BYTES = 1 << 26


class IntegerConvolutions(Conv2dMode):
    """While active, `torch.conv2d` of float32 numbers that are all integers of a byte multiplies bytes.

    Results are the same to the bit: both ways the sums are exact. Taken over are plain convolutions without gradient
    and bias, on a CPU with VNNI; everything else goes to torch as before.
    """

    def __init__(self) -> None:
        super().__init__()
        self.fast = bool({"avx512_vnni", "avx_vnni"} & cpu_flags())

    def convolve(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, stride: Pair, padding: Pair, dilation: Pair
    ) -> Tensor | None:
        """The convolution, where both operands are bytes."""
        in_float = x.dtype == weight.dtype == torch.float32
        if self.fast and bias is None and in_float and not torch.is_grad_enabled():
            small = _as_bytes(x), _as_bytes(weight)
            if small[0] is not None and small[1] is not None:
                return _convolve(small[0], small[1], stride, padding, dilation)
        return None


def _as_bytes(x: Tensor) -> Tensor | None:
    """``x`` as int8, if that changes no number."""
    small = x.to(torch.int8)
    return small if torch.equal(small.to(x.dtype), x) else None


def _convolve(x: Tensor, weight: Tensor, stride: Pair, padding: Pair, dilation: Pair) -> Tensor:
    columns = weight.permute(2, 3, 1, 0).reshape(-1, len(weight)).contiguous()
    views = windows(x, weight.shape[2:], stride, padding, dilation)
    pixels = views.shape[:3]
    at_once = max(1, WINDOW_BYTES // max(1, pixels[1] * pixels[2] * len(columns)))
    sums = [torch._int_mm(part.reshape(-1, len(columns)), columns).float() for part in torch.split(views, at_once)]
    return torch.cat(sums).view(*pixels, -1).permute(0, 3, 1, 2)
