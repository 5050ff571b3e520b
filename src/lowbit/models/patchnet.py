"""A small residual network for binary layers: a stem that halves the map, 3x3 convolutions with shortcuts, a mean.

A row is a stage: (convolutions, how many times the channels before it). Each stage but the first halves the map.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Literal

from torch import nn

from lowbit.layers import Repeat, Residual, Shortcut
from lowbit.layers.blocks import Block, mean_head
from lowbit.models.base import check_image_size, registry

CHANNELS = 128
STAGES: tuple[tuple[int, int], ...] = ((1, 1), (3, 2), (3, 2))

SMALLEST = 8


@registry.register
def patchnet(
    block: Block,
    num_classes: int = 10,
    in_channels: int = 3,
    image_size: int = 32,
    width: float = 1.0,
    stem: Literal["patches", "pooled"] = "patches",
) -> nn.Module:
    """A stem, seven 3x3 convolutions of 128 to 512 channels, each with a shortcut of its own, one dense layer.

    Made for binary layers trained on a CPU: the stem brings the map to half of its size at once, so that most of the
    work is products over many channels. Shortcuts have no parameters: where the map is halved they average 2x2 pixels
    and repeat each channel. ``width`` multiplies all widths. ``stem``: ``patches`` of 4x4 pixels, every second; or
    ``pooled``, a 3x3 convolution at every pixel and the largest of 2x2, which costs 2.25 times as many products.

    Source: this project. A shortcut around each convolution is that of Liu et al. 2018, "Bi-Real Net", arXiv
    1808.00278; shortcuts without parameters are those of He et al. 2015, arXiv 1512.03385, option A, with copies of
    channels in place of zeros.
    """
    check_image_size("patchnet", image_size, SMALLEST)
    channels, side = max(1, round(CHANNELS * width)), image_size // 2
    if stem == "patches":
        first = block(nn.Conv2d(in_channels, channels, 4, 2, padding=1, bias=False), role="first")
    else:
        conv = nn.Conv2d(in_channels, channels, 3, padding=1, bias=False)
        first = block(conv, role="first", pool=nn.MaxPool2d(2))
    parts: OrderedDict[str, nn.Module] = OrderedDict(stem=first)
    for number, (convolutions, times) in enumerate(STAGES, start=1):
        units = []
        for index in range(convolutions):
            halving = number > 1 and index == 0
            units.append(_unit(block, channels, times if halving else 1, side if halving else None))
            channels, side = (channels * times, (side + 1) // 2) if halving else (channels, side)
        parts[f"stage{number}"] = nn.Sequential(*units)
    parts["head"] = mean_head(block, channels, num_classes)
    parts["flatten"] = nn.Flatten()
    return nn.Sequential(parts)


def _unit(block: Block, channels: int, times: int, halved: int | None) -> Residual:
    """A 3x3 convolution to ``times`` as many channels and the way past it; ``halved`` is the side of a map to halve."""
    conv = nn.Conv2d(channels, channels * times, 3, 1 if halved is None else 2, padding=1, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    if halved is None:
        return Residual(nn.Sequential(block(conv)), Shortcut())
    # A row and a column of padding, which no mean counts, give an odd side the convolution's half: rounded up.
    pool = nn.AvgPool2d(2, padding=halved % 2, count_include_pad=False)
    return Residual(nn.Sequential(block(conv)), Shortcut(pool, Repeat(times)))
