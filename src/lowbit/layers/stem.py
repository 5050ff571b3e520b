"""The layers of a network that look at pixels."""

from __future__ import annotations

from torch import nn


class Stem(nn.Sequential):
    """The first layers of a network where they are several: methods that leave the first layer in float leave them all.

    See `lowbit.methods.Method.skip_first`. A network without a stem has one first layer.
    """
