"""Small residual networks for binary layers: patches, 3x3 convolutions each with a shortcut, the mean over the map.

A row is what the stages have: (channels, convolutions). Each stage but the first halves the map.
"""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

from lowbit.errors import UsageError
from lowbit.layers import Repeat, Residual, Shortcut
from lowbit.layers.blocks import Block, mean_head
from lowbit.models.base import registry

Row = tuple[tuple[int, int], ...]

PATCHNET: Row = ((128, 2), (256, 4), (512, 4))
PATCHNET_SMALL: Row = ((64, 1), (128, 3), (256, 3))

SMALLEST = 8


def _patchnet(
    row: Row, block: Block, num_classes: int, in_channels: int, image_size: int, width: float
) -> nn.Sequential:
    if image_size < SMALLEST:
        raise UsageError(
            f"a patchnet needs images of at least {SMALLEST}x{SMALLEST}, not {image_size}x{image_size}; "
            f"give --image-size {SMALLEST} or more"
        )
    # Each stage has a whole multiple of the channels before it, which its shortcut repeats.
    channels, side = max(1, round(row[0][0] * width)), image_size // 2
    stem = nn.Conv2d(in_channels, channels, 4, 2, padding=1, bias=False)
    parts: OrderedDict[str, nn.Module] = OrderedDict(stem=block(stem, role="first"))
    for number, (wide, convolutions) in enumerate(row, start=1):
        out = channels * (wide // row[max(0, number - 2)][0])
        units = []
        for index in range(convolutions):
            halves = number > 1 and index == 0
            conv = nn.Conv2d(channels, out, 3, 2 if halves else 1, padding=1, bias=False)
            nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
            # A row and a column of padding, which no mean counts, give an odd side the convolution's half: rounded up.
            pool = nn.AvgPool2d(2, padding=side % 2, count_include_pad=False)
            way = Shortcut(pool, Repeat(out // channels)) if halves else Shortcut()
            units.append(Residual(nn.Sequential(block(conv)), way))
            channels, side = out, (side + 1) // 2 if halves else side
        parts[f"stage{number}"] = nn.Sequential(*units)
    parts["head"] = mean_head(block, channels, num_classes)
    parts["flatten"] = nn.Flatten()
    return nn.Sequential(parts)


@registry.register
def patchnet(
    block: Block, num_classes: int = 10, in_channels: int = 3, image_size: int = 32, width: float = 1.0
) -> nn.Module:
    """Patches, ten 3x3 convolutions of 128 to 512 channels, each with a shortcut of its own, one dense layer.

    Made for binary layers on a CPU: patches of 4x4 pixels, every second, bring the map to half of its size at once, so
    that most of the work is products over many channels. Shortcuts have no parameters: where the map is halved they
    average 2x2 pixels and repeat each channel. ``width`` multiplies all widths.

    Source: this project; a shortcut around each convolution is that of Liu et al. 2018, "Bi-Real Net", arXiv
    1808.00278, shortcuts without parameters those of He et al. 2015, arXiv 1512.03385, option A, with copies for zeros.
    """
    return _patchnet(PATCHNET, block, num_classes, in_channels, image_size, width)


@registry.register
def patchnet_small(
    block: Block, num_classes: int = 10, in_channels: int = 3, image_size: int = 32, width: float = 1.0
) -> nn.Module:
    """`patchnet` with seven 3x3 convolutions of 64 to 256 channels.

    ``width`` and source: as in `patchnet`.
    """
    return _patchnet(PATCHNET_SMALL, block, num_classes, in_channels, image_size, width)
