"""3x3 convolutions of many channels by Winograd's products, for training on a CPU in float32.

Of four by four output pixels the direct sum takes 144 products for each pair of an input and an output channel, and
Winograd's form 36, between transforms whose cost grows with the channels, not with pairs of them. The products are
matrices of torch's, and so are the transforms.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad

SIDE = 4
WINDOW = SIDE + 2
POINTS = WINDOW**2

# Harmonic mean of input and output channels below which the transforms cost more than the products that they save
# (measured on a CPU with AVX-512 and without bf16).
SMALLEST_HARMONIC_MEAN = 96
# Numbers of the windows that are worked on at once, so that they are still in the cache for the next step.
CHUNK = 2**21


def _both_axes(rows: list[list[float]]) -> Tensor:
    """The transform M d M^T of matrices d, as one matrix over their entries in row-major order, in float64."""
    matrix = torch.tensor(rows, dtype=torch.float64)
    return torch.kron(matrix, matrix)


# B^T, G and A^T of F(4x4, 3x3), for both axes at once.
OF_INPUT = _both_axes(
    [
        [4, 0, -5, 0, 1, 0],
        [0, -4, -4, 1, 1, 0],
        [0, 4, -4, -1, 1, 0],
        [0, -2, -1, 2, 1, 0],
        [0, 2, -1, -2, 1, 0],
        [0, 4, 0, -5, 0, 1],
    ]
)
OF_WEIGHT = _both_axes(
    [
        [1 / 4, 0, 0],
        [-1 / 6, -1 / 6, -1 / 6],
        [-1 / 6, 1 / 6, -1 / 6],
        [1 / 24, 1 / 12, 1 / 6],
        [1 / 24, -1 / 12, 1 / 6],
        [0, 0, 1],
    ]
)
OF_PRODUCTS = _both_axes([[1, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 1]])


class WinogradConv2d(torch.autograd.Function):
    r"""A 3x3 convolution with a padding of one pixel, by tiles of 4x4 pixels of its output.

    Forward: $Y = A^\top\left[(G W G^\top) \odot (B^\top d B)\right]A$ for the window $d$ of 6x6 pixels under a tile,
    summed over input channels, which makes 36 matrix products over all tiles.
    Backward: to the input, the same with the mirrored weights;
    $\partial L/\partial W = G^\top\left[\sum (B^\top d B) \odot (A\,g A^\top)\right]G$, summed over tiles.
    Results differ from the direct sum's by float32's rounding, some 1e-5 of the largest.

    Source: Lavin and Gray 2015, "Fast Algorithms for Convolutional Neural Networks", arXiv 1509.09308, section 4.
    """

    @staticmethod
    def takes(x: Tensor, weight: Tensor, stride: tuple[int, int], padding: tuple[int, int]) -> bool:
        """Whether a plain convolution over ``x`` (N, C, H, W) was faster this way; tiles are to be half full, too."""
        if x.dtype != torch.float32 or weight.dtype != torch.float32 or torch.is_autocast_enabled("cpu"):
            return False
        if tuple(weight.shape[2:]) != (3, 3) or stride != (1, 1) or padding != (1, 1):
            return False
        outputs, inputs = weight.shape[:2]
        height, width = x.shape[2:]
        down, across = _tiles(height, width)
        return (
            2 * outputs * inputs >= SMALLEST_HARMONIC_MEAN * (outputs + inputs)
            and 2 * height * width >= down * across * SIDE**2
        )

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, stride: tuple[int, int], padding: tuple[int, int]) -> Tensor:
        windows: list[Tensor] | None = [] if ctx.needs_input_grad[1] else None
        y = _convolve(x, weight, windows)
        ctx.save_for_backward(weight, *(windows or ()))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        weight, *windows = ctx.saved_tensors
        to_x = _convolve(gradient, weight.flip(2, 3).transpose(0, 1)) if ctx.needs_input_grad[0] else None
        return to_x, _to_weight(windows, gradient, weight) if ctx.needs_input_grad[1] else None, None, None


def _convolve(x: Tensor, weight: Tensor, keep: list[Tensor] | None = None) -> Tensor:
    """The output, channels last in memory; ``keep`` is given the transformed windows of each chunk of images."""
    height, width = x.shape[2:]
    down, across = _tiles(height, width)
    outputs, inputs = weight.shape[:2]
    of_weight = (OF_WEIGHT.to(x.dtype) @ weight.permute(2, 3, 1, 0).reshape(9, -1)).view(POINTS, inputs, outputs)
    y = x.new_empty(len(x), down, SIDE, across, SIDE, outputs)
    for images in _chunks(x, max(outputs, inputs)):
        windows = _windows(x[images])
        if keep is not None:
            keep.append(windows)
        products = torch.bmm(windows, of_weight).view(POINTS, -1)
        tiles = (OF_PRODUCTS.to(x.dtype) @ products).view(SIDE, SIDE, -1, down, across, outputs)
        y[images] = tiles.permute(2, 3, 0, 4, 1, 5)
    whole = y.view(len(x), down * SIDE, across * SIDE, outputs)
    return whole[:, :height, :width].contiguous().permute(0, 3, 1, 2)


def _to_weight(windows: list[Tensor], gradient: Tensor, weight: Tensor) -> Tensor:
    """The gradient of ``weight``: first that of its transform, 36 products over all tiles, then transformed back."""
    outputs, inputs = weight.shape[:2]
    sums = weight.new_zeros(POINTS, inputs, outputs)
    for images, of_x in zip(_chunks(gradient, max(outputs, inputs)), windows, strict=True):
        sums.baddbmm_(of_x.transpose(1, 2), _spread(gradient[images]))
    return (OF_WEIGHT.t().to(weight.dtype) @ sums.view(POINTS, -1)).view(3, 3, inputs, outputs).permute(3, 2, 0, 1)


def _chunks(x: Tensor, channels: int) -> Iterator[slice]:
    """Slices of images, as even as they come."""
    down, across = _tiles(*x.shape[2:])
    parts = -(-len(x) * down * across * POINTS * channels // CHUNK)
    size = -(-len(x) // parts)
    return (slice(start, start + size) for start in range(0, len(x), size))


def _tiles(height: int, width: int) -> tuple[int, int]:
    return -(-height // SIDE), -(-width // SIDE)


def _windows(x: Tensor) -> Tensor:
    """Each tile's window of images (N, C, H, W), transformed: (36, tiles, C)."""
    n, channels, height, width = x.shape
    down, across = _tiles(height, width)
    around = (0, 0, 1, across * SIDE + 1 - width, 1, down * SIDE + 1 - height)
    images = pad(x.permute(0, 2, 3, 1), around).contiguous()
    per_image, per_row, per_pixel, _ = images.stride()
    steps = (per_row, per_pixel, per_image, SIDE * per_row, SIDE * per_pixel, 1)
    windows = images.as_strided((WINDOW, WINDOW, n, down, across, channels), steps)
    return (OF_INPUT.to(x.dtype) @ windows.reshape(POINTS, -1)).view(POINTS, -1, channels)


def _spread(gradient: Tensor) -> Tensor:
    """From the gradient of the output (N, C, H, W), that of the 36 products of each tile: (36, tiles, C)."""
    n, channels, height, width = gradient.shape
    down, across = _tiles(height, width)
    images = pad(gradient.permute(0, 2, 3, 1), (0, 0, 0, across * SIDE - width, 0, down * SIDE - height))
    tiles = images.reshape(n, down, SIDE, across, SIDE, channels).permute(2, 4, 0, 1, 3, 5)
    return (OF_PRODUCTS.t().to(gradient.dtype) @ tiles.reshape(SIDE**2, -1)).view(POINTS, -1, channels)
