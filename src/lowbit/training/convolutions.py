"""The convolutions of a training step on a CPU, each by the way that was the faster one for its shape."""

from __future__ import annotations

from torch import Tensor

from lowbit.layers.conv2d_mode import Conv2dMode, Pair
from lowbit.training.small_maps import SmallMapConv2d
from lowbit.training.winograd import WinogradConv2d

WAYS = (SmallMapConv2d, WinogradConv2d)


class FastConvolutions(Conv2dMode):
    """While active, `torch.conv2d` on a CPU goes by the first of the ``WAYS`` that takes it.

    Only plain ones of dilation 1 are asked about; everything else goes to torch as before. Results differ from torch's
    by rounding only, so that sums of integers need not be integers any more: it is for steps of a training, those of a
    teacher among them, and not for measuring a network, whose sums are exact (`lowbit.layers.integer`).
    """

    def convolve(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, stride: Pair, padding: Pair, dilation: Pair
    ) -> Tensor | None:
        """The convolution by the first way that takes it."""
        if dilation != (1, 1):
            return None
        for way in WAYS:
            if way.takes(x, weight, stride, padding):
                result: Tensor = way.apply(x, weight, stride, padding)
                return result if bias is None else result + bias.to(result.dtype).reshape(-1, 1, 1)
        return None
