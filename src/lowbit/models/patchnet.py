"""A small residual network for binary layers: patches, 3x3 convolutions each with a shortcut, the mean over the map.

A row is a stage: (convolutions, how many times the channels before it). Each stage but the first halves the map.
"""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

from lowbit.errors import UsageError
from lowbit.layers import Repeat, Residual, Shortcut
from lowbit.layers.blocks import Block, mean_head
from lowbit.models.base import registry

CHANNELS = 128
STAGES: tuple[tuple[int, int], ...] = ((1, 1), (3, 2), (3, 2))

SMALLEST = 8


@registry.register
def patchnet(
    block: Block, num_classes: int = 10, in_channels: int = 3, image_size: int = 32, width: float = 1.0
) -> nn.Module:
    """Patches, seven 3x3 convolutions of 128 to 512 channels, each with a shortcut of its own, one dense layer.

    Made for binary layers trained on a CPU: patches of 4x4 pixels, every second, bring the map to half of its size at
    once, so that most of the work is products over many channels. Shortcuts have no parameters: where the map is
    halved they average 2x2 pixels and repeat each channel. ``width`` multiplies all widths.

    Source: this project. A shortcut around each convolution is that of Liu et al. 2018, "Bi-Real Net", arXiv
    1808.00278; shortcuts without parameters are those of He et al. 2015, arXiv 1512.03385, option A, with copies of
    channels in place of zeros.
    """
    if image_size < SMALLEST:
        raise UsageError(f"patchnet needs images of at least {SMALLEST}x{SMALLEST}, not {image_size}x{image_size}")
    channels, side = max(1, round(CHANNELS * width)), image_size // 2
    stem = nn.Conv2d(in_channels, channels, 4, 2, padding=1, bias=False)
    parts: OrderedDict[str, nn.Module] = OrderedDict(stem=block(stem, role="first"))
    for number, (convolutions, times) in enumerate(STAGES, start=1):
        units = []
        for index in range(convolutions):
            first = number > 1 and index == 0
            units.append(_unit(block, channels, times if first else 1, side if first else None))
            channels, side = (channels * times, (side + 1) // 2) if first else (channels, side)
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
