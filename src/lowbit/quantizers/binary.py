"""The binary quantizer that most 1-bit methods share."""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit.quantizers import ste
from lowbit.quantizers.base import Grid, Quantizer


class SignQuantizer(Quantizer):
    r"""$q = \mathrm{sign}(x)$, no scale.

    Gradient: $g \cdot 1\{|x| \le 1\}$ (see `lowbit.quantizers.ste.sign`).
    Codes: 1 where ``x >= 0``; grid ``2 code - 1``.

    Source: Courbariaux, Hubara et al. 2016, arXiv 1602.02830, equations 1 and 4.
    """

    bits = 1
    signed = True

    def forward(self, x: Tensor) -> Tensor:
        return ste.sign(x)

    def encode(self, x: Tensor) -> tuple[Tensor, Grid]:
        return binary_codes(x), Grid(1, 2, -1, torch.ones((), device=x.device))


def binary_codes(x: Tensor) -> Tensor:
    """1 where ``x >= 0``, else 0, as uint8."""
    return (x >= 0).to(torch.uint8)
