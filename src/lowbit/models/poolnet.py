"""A small residual network for short trainings: every halving is a max-pool behind a convolution of the larger map.

A row is a convolution: (how many times the channels before it, whether a pool halves the map behind it).
"""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

from lowbit.layers import Repeat, Residual, Shortcut, patch_stem
from lowbit.layers.blocks import Block, pooled_head
from lowbit.models.base import check_image_size, registry

CHANNELS = 64
ROWS: tuple[tuple[int, bool], ...] = ((4, True), (1, False), (1, True), (1, False))

SMALLEST = 8


@registry.register
def poolnet(
    block: Block,
    num_classes: int = 10,
    in_channels: int = 3,
    image_size: int = 32,
    width: float = 1.0,
) -> nn.Module:
    """A stem of 64 channels at half of the image's size, four 3x3 convolutions to 256 channels, a dense layer.

    The stem has a 3x3 convolution to twice as many channels as a patch has numbers, 54 for a coloured image, so that it
    can be a whitening and its negative (`lowbit.training.whitening`); ReLU and batch norm, in every order of blocks; a
    1x1 convolution to 64 channels; and a 2x2 max-pool. Of the other convolutions, each with a shortcut of its own, the
    first and the third have a max-pool behind them, in place of a stride, so that all products are taken on the larger
    map; their shortcuts average 2x2 pixels, and that of the first, which makes four times as many channels, repeats
    each. The dense layer reads the largest value of each channel. ``width`` multiplies all widths but that of the first
    convolution.

    Source: this project. Few, wide convolutions with pools behind them are those of Page 2019, "How to Train Your
    ResNet", and of Jordan 2024, arXiv 2404.00498, as is the fixed number of the first one's channels; shortcuts around
    each are those of Liu et al. 2018, "Bi-Real Net", arXiv 1808.00278.
    """
    check_image_size("poolnet", image_size, SMALLEST)
    channels = max(1, round(CHANNELS * width))
    stem, directions = patch_stem(in_channels, 3, padding=1)
    mix = nn.Conv2d(directions, channels, 1, bias=False)
    stem.add_module("mix", block(mix, role="first", pool=nn.MaxPool2d(2)))
    parts: OrderedDict[str, nn.Module] = OrderedDict(stem=stem)
    for number, (times, halved) in enumerate(ROWS, start=1):
        parts[f"unit{number}"] = _unit(block, channels, times, halved)
        channels *= times
    parts["head"] = pooled_head(block, channels, num_classes, nn.MaxPool2d(image_size // 8))
    parts["flatten"] = nn.Flatten()
    return nn.Sequential(parts)


def _unit(block: Block, channels: int, times: int, halved: bool) -> Residual:
    """A 3x3 convolution to ``times`` as many channels, the pool behind it if ``halved``, and the way past both."""
    conv = nn.Conv2d(channels, channels * times, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    branch = nn.Sequential(block(conv, pool=nn.MaxPool2d(2) if halved else None))
    way = [module for module, needed in ((nn.AvgPool2d(2), halved), (Repeat(times), times > 1)) if needed]
    return Residual(branch, Shortcut(*way))
