"""The float network of short trainings: a whitened stem and six 3x3 convolutions, after each second one a max-pool.

A row is a pair of convolutions: how many channels they give. The first of them has a max-pool behind it.
"""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

from lowbit.layers import patch_stem
from lowbit.layers.blocks import Block, pooled_head
from lowbit.models.base import check_image_size, registry

ROWS: tuple[int, ...] = (64, 256, 256)
# How large the numbers are that the last layer reads at first, in standard deviations. With those of 1 the rates that
# the rest of the network wants make it diverge.
SCALE = 0.2

SMALLEST = 9


@registry.register
def airbench(
    block: Block,
    num_classes: int = 10,
    in_channels: int = 3,
    image_size: int = 32,
    width: float = 1.0,
) -> nn.Module:
    """A 2x2 convolution, six 3x3 convolutions of 64 to 256 channels in pairs, a dense layer.

    Made for float training in minutes, such as that of a teacher. The stem's convolution has no border and twice as
    many channels as a patch has numbers, 24 for a coloured image, so that it can be a whitening and its negative
    (`lowbit.training.whitening`); ReLU and batch norm follow in every order of blocks. The 3x3 convolutions start as
    the identity on as many channels as they read, unless their weights are binary (an identity has no signs). Behind
    the first one of a pair stands a 2x2 max-pool. The dense layer reads the largest value of each channel, where blocks
    have batch norms through another one, whose weights start at 0.2. ``width`` multiplies all widths but that of the
    first convolution.

    Source: Jordan 2024, "94% on CIFAR-10 in 3.29 Seconds on a Single GPU", arXiv 2404.00498. Differs in ReLU for GELU,
    in the batch norms, which there have no weights, and in the last one, where logits are divided by 9.
    """
    check_image_size("airbench", image_size, SMALLEST)
    stem, channels = patch_stem(in_channels, 2)
    parts: OrderedDict[str, nn.Module] = OrderedDict(stem=stem)
    side = image_size - 1
    for number, row in enumerate(ROWS, start=1):
        wide, side = max(1, round(row * width)), side // 2
        pair = nn.Sequential(block(_conv(channels, wide), pool=nn.MaxPool2d(2)), block(_conv(wide, wide)))
        parts[f"pair{number}"], channels = pair, wide
    pool = nn.Sequential(nn.MaxPool2d(side))
    if any(isinstance(part, nn.BatchNorm2d) for part in pair.modules()):
        norm = nn.BatchNorm2d(channels)
        nn.init.constant_(norm.weight, SCALE)
        pool.append(norm)
    parts["head"] = pooled_head(block, channels, num_classes, pool)
    parts["flatten"] = nn.Flatten()
    return nn.Sequential(parts)


def _conv(read: int, wide: int) -> nn.Conv2d:
    """A 3x3 convolution that gives what it reads first, then numbers of its own."""
    conv = nn.Conv2d(read, wide, 3, padding=1, bias=False)
    nn.init.dirac_(conv.weight[:read])
    return conv
