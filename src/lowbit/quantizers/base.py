"""What every quantizer promises: fake-quantized values for training, codes and their grid for everything after."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lowbit.quantizers import ste


@dataclass(frozen=True)
class Grid:
    """What the integer codes of a tensor mean: ``value = scale * (multiplier * code + offset)``, or ``levels[code]``.

    Binary is multiplier 2, offset -1; ternary is multiplier 1, offset -1; affine is multiplier 1, offset -zero_point;
    half-wave is multiplier 1, offset 0.

    Attributes:
        bits: codes lie in ``0 .. 2**bits - 1``.
        multiplier, offset: integers.
        scale: float32, a scalar or broadcastable over the tensor (``(out_channels, 1, ...)`` for weights).
        levels: for unequal steps, which have no integer form: float32 (2**bits,), rising, or for weights also
            (out_channels, 2**bits), a table for each. Multiplier 1, offset 0 and scale 1 then mean nothing.
    """

    bits: int
    multiplier: int
    offset: int
    scale: Tensor
    levels: Tensor | None = None

    def integers(self, codes: Tensor) -> Tensor:
        """``multiplier * code + offset`` as float32, exact."""
        return codes.to(torch.float32) * self.multiplier + self.offset

    def decode(self, codes: Tensor) -> Tensor:
        """The values that the codes stand for, float32."""
        if self.levels is None:
            return self.integers(codes) * self.scale
        if self.levels.dim() == 1:
            return self.levels[codes.int()]
        return self.levels.gather(1, codes.flatten(1).long()).reshape(codes.shape)

    @property
    def magnitude(self) -> int:
        """Largest absolute value of ``multiplier * code + offset``."""
        return max(abs(self.offset), abs(self.multiplier * ((1 << self.bits) - 1) + self.offset))


class Quantizer(nn.Module):
    """Maps float values onto a small grid.

    Subclasses implement `encode`, and `surrogate` for the gradient: ``decode(*encode(x)) == forward(x)`` to the bit in
    float32. One whose gradient is that of no function, or that draws at random, writes its own `forward`.

    Attributes:
        bits: width of a code.
        signed: whether the grid has values below zero.
        enabled: False makes the layer `bypass` it in ``train()``, for methods that quantize in phases; ``eval()``, and
            so export, computes with the codes all the same.
    """

    bits: int
    signed: bool
    enabled: bool = True

    def forward(self, x: Tensor) -> Tensor:
        """Fake-quantized values, differentiable; same shape and dtype as ``x``."""
        with torch.no_grad():
            values = self.decode(*self.encode(x)).to(x.dtype)
        return ste.substitute(values, self.surrogate(x))

    def bypass(self, x: Tensor) -> Tensor:
        """``x``, as it is; one that learns its grid from data looks at ``x`` here too."""
        return x

    def surrogate(self, x: Tensor) -> Tensor:
        """The function whose gradient stands in for that of the staircase; the identity unless a method says more."""
        return x

    def encode(self, x: Tensor) -> tuple[Tensor, Grid]:
        """Integer codes (uint8, shape of ``x``) and the grid that gives them meaning."""
        raise NotImplementedError

    @staticmethod
    def decode(codes: Tensor, grid: Grid) -> Tensor:
        """The values that ``codes`` stand for, float32."""
        return grid.decode(codes)


def wide(x: Tensor) -> Tensor:
    """``x`` in float32, or in float64 when it is that: arithmetic in 16 bits would move it to other codes."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
