"""What every quantizer promises: fake-quantized values for training, codes and their grid for everything after."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Grid:
    """What the integer codes of a tensor mean: ``value = scale * (multiplier * code + offset)``.

    Binary is multiplier 2, offset -1; affine is multiplier 1, offset -zero_point; half-wave is multiplier 1, offset 0.

    Attributes:
        bits: codes lie in ``0 .. 2**bits - 1``.
        multiplier, offset: integers.
        scale: float32, a scalar or broadcastable over the tensor (``(out_channels, 1, ...)`` for weights).
    """

    bits: int
    multiplier: int
    offset: int
    scale: Tensor

    def integers(self, codes: Tensor) -> Tensor:
        """``multiplier * code + offset`` as float32, exact."""
        return codes.to(torch.float32) * self.multiplier + self.offset

    def decode(self, codes: Tensor) -> Tensor:
        """The values that the codes stand for, float32."""
        return self.integers(codes) * self.scale

    @property
    def magnitude(self) -> int:
        """Largest absolute value of ``multiplier * code + offset``."""
        return max(abs(self.offset), abs(self.multiplier * ((1 << self.bits) - 1) + self.offset))


class Quantizer(nn.Module):
    """Maps float values onto a small grid.

    Subclasses implement `forward` and `encode` so that ``decode(*encode(x)) == forward(x)`` to the bit in float32, and
    state the gradient.

    Attributes:
        bits: width of a code.
        signed: whether the grid has values below zero.
    """

    bits: int
    signed: bool

    def forward(self, x: Tensor) -> Tensor:
        """Fake-quantized values, differentiable; same shape and dtype as ``x``."""
        raise NotImplementedError

    def encode(self, x: Tensor) -> tuple[Tensor, Grid]:
        """Integer codes (uint8, shape of ``x``) and the grid that gives them meaning."""
        raise NotImplementedError

    @staticmethod
    def decode(codes: Tensor, grid: Grid) -> Tensor:
        """The values that ``codes`` stand for, float32."""
        return grid.decode(codes)
