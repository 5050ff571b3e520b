"""The layers of a network that look at pixels."""

from __future__ import annotations

from collections import OrderedDict

from torch import nn


class Stem(nn.Sequential):
    """The first layers of a network where they are several: methods that leave the first layer in float leave them all.

    See `lowbit.methods.Method.skip_first`. A network without a stem has one first layer.
    """


def patch_stem(in_channels: int, kernel: int, padding: int = 0) -> tuple[Stem, int]:
    """A stem that sees every patch of an image, and how many channels it gives.

    A convolution with twice as many channels as a patch has numbers, so that it can be a whitening and its negative
    (`lowbit.training.whitening`); ReLU; and batch norm, so that what reads on, where it is quantized too, reads numbers
    of both signs. The norm has no weights: behind a frozen first layer nothing up to here needs a gradient.

    Args:
        in_channels: of the image.
        kernel: side of a patch, in pixels.
        padding: pixels of border around the image.
    """
    directions = 2 * in_channels * kernel * kernel
    parts: OrderedDict[str, nn.Module] = OrderedDict(
        patches=nn.Conv2d(in_channels, directions, kernel, padding=padding, bias=False),
        act=nn.ReLU(),
        norm=nn.BatchNorm2d(directions, affine=False),
    )
    return Stem(parts), directions
