"""Convolutions over small maps as one matrix product, for training on a CPU in bfloat16.

oneDNN tiles a convolution by rows of the output map. Where rows are 2 or 4 pixels wide, most of an AMX tile is empty:
the weight gradient of a 512-channel layer on a 2x2 map runs at a tenth of the speed of the same product as a matrix
multiplication. With a stride of 2 the weight gradient is several times as slow, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lowbit.layers.windows import windows

# Largest output maps, in pixels, for which the product is the faster one (measured on a CPU with AMX).
PIXELS_FORWARD = 16
PIXELS_WEIGHT_GRADIENT = 64


class SmallMapConv2d(torch.autograd.Function):
    """A convolution of small maps under CPU autocast to bfloat16, as a product of matrices.

    Results differ from torch's by bfloat16's rounding only.
    """

    @staticmethod
    def takes(x: Tensor, weight: Tensor, stride: tuple[int, int], padding: tuple[int, int]) -> bool:
        """Whether a plain convolution over ``x`` (N, C, H, W) was faster this way."""
        # Autocast leaves float64 alone: exact integer sums rely on it.
        if not {x.dtype, weight.dtype} <= {torch.float32, torch.bfloat16}:
            return False
        if not torch.is_autocast_enabled("cpu") or torch.get_autocast_dtype("cpu") != torch.bfloat16:
            return False
        height, width = _output_size(x, weight, stride, padding)
        return min(height, width) > 0 and height * width <= PIXELS_WEIGHT_GRADIENT

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, stride: tuple[int, int], padding: tuple[int, int]) -> Tensor:
        x, weight = x.bfloat16(), weight.bfloat16()
        ctx.stride, ctx.padding = stride, padding
        height, width = _output_size(x, weight, stride, padding)
        if height * width > PIXELS_FORWARD:
            ctx.save_for_backward(x, weight, None)
            return torch.conv2d(x, weight, None, stride, padding)
        rows = _rows(x, weight.shape[2:], stride, padding)
        ctx.save_for_backward(x, weight, rows if ctx.needs_input_grad[1] else None)
        return _product(rows, weight, (len(x), height, width))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x, weight, of_x = ctx.saved_tensors
        stride, padding = ctx.stride, ctx.padding
        kernel = weight.shape[2:]
        gradient = gradient.bfloat16()
        to_x = to_weight = None
        if ctx.needs_input_grad[0]:
            if gradient.shape[2] * gradient.shape[3] > PIXELS_FORWARD or stride != (1, 1):
                to_x = torch.ops.aten.convolution_backward(
                    gradient, x, weight, None, stride, padding, (1, 1), False, (0, 0), 1, (True, False, False)
                )[0]
            else:
                mirrored = weight.flip(2, 3).transpose(0, 1)
                around = (kernel[0] - 1 - padding[0], kernel[1] - 1 - padding[1])
                to_x = _product(_rows(gradient, kernel, (1, 1), around), mirrored, (len(x), *x.shape[2:]))
        if ctx.needs_input_grad[1]:
            of_gradient = gradient.permute(0, 2, 3, 1).reshape(-1, gradient.shape[1])
            # The product is faster when its left factor is transposed in memory, too.
            product = of_gradient.t().contiguous() @ (_rows(x, kernel, stride, padding) if of_x is None else of_x)
            to_weight = product.reshape(-1, *kernel, x.shape[1]).permute(0, 3, 1, 2)
        return to_x, to_weight, None, None


def _output_size(x: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int]) -> tuple[int, int]:
    height, width = ((x.shape[d + 2] + 2 * padding[d] - weight.shape[d + 2]) // stride[d] + 1 for d in range(2))
    return height, width


def _rows(x: Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int]) -> Tensor:
    """Each output pixel's window as a row: (N*OH*OW, KH*KW*C)."""
    return windows(x, kernel, stride, padding).reshape(-1, kernel[0] * kernel[1] * x.shape[1])


def _product(rows: Tensor, weight: Tensor, pixels: tuple[int, int, int]) -> Tensor:
    """Convolution as one matrix product over ``pixels`` (N, OH, OW); channels last in memory."""
    sums = rows @ weight.permute(0, 2, 3, 1).reshape(weight.shape[0], -1).t()
    return sums.view(*pixels, -1).permute(0, 3, 1, 2)
