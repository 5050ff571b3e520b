"""Residual networks: 3x3 convolutions with shortcuts around them, the mean over the map, one dense layer.

A row is what the stages have: (channels, pairs of convolutions). Each stage but the first halves the map.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Literal

from torch import nn

from lowbit.errors import check_choice
from lowbit.layers import Residual, Shortcut
from lowbit.layers.blocks import Block, mean_head
from lowbit.models.base import check_image_size, registry

Row = tuple[tuple[int, int], ...]
Around = Literal["block", "conv"]
Stem = Literal["auto", "imagenet", "cifar"]

# He, Zhang, Ren and Sun 2015, table 1 and section 4.2.
RESNET18: Row = ((64, 2), (128, 2), (256, 2), (512, 2))
RESNET34: Row = ((64, 3), (128, 4), (256, 6), (512, 3))
RESNET20: Row = ((16, 3), (32, 3), (64, 3))

# Larger images have the stem of ImageNet, unless told otherwise.
LARGEST_FOR_CIFAR_STEM = 64


def _resnet(
    row: Row,
    block: Block,
    num_classes: int,
    in_channels: int,
    image_size: int,
    width: float,
    shortcut: Around,
    stem: Stem = "cifar",
) -> nn.Sequential:
    check_choice("shortcut of a ResNet", shortcut, ("block", "conv"))
    check_choice("stem of a ResNet", stem, ("auto", "imagenet", "cifar"))
    if stem == "auto":
        stem = "imagenet" if image_size > LARGEST_FOR_CIFAR_STEM else "cifar"
    check_image_size("this ResNet", image_size, 2 ** (len(row) - 1) * (4 if stem == "imagenet" else 1))
    stages = [(max(1, round(channels * width)), pairs) for channels, pairs in row]
    channels, side = stages[0][0], image_size
    parts: OrderedDict[str, nn.Module] = OrderedDict()
    if stem == "imagenet":
        parts["stem"] = block(_conv(in_channels, channels, 7, 2), pool=nn.MaxPool2d(3, 2, 1), role="first")
        side = _halved(_halved(side))
    else:
        parts["stem"] = block(_conv(in_channels, channels, 3), role="first")
    for number, (out, pairs) in enumerate(stages, start=1):
        units = []
        for pair in range(pairs):
            stride = 2 if number > 1 and pair == 0 else 1
            convs = [_conv(channels, out, 3, stride), _conv(out, out, 3)]
            for branch in [convs] if shortcut == "block" else [convs[:1], convs[1:]]:
                way = _shortcut(block, branch[0], shortcut, side)
                units.append(Residual(nn.Sequential(*map(block, branch)), way))
                side = _halved(side) if branch[0].stride != (1, 1) else side
            channels = out
        parts[f"stage{number}"] = nn.Sequential(*units)
    parts["head"] = mean_head(block, channels, num_classes)
    parts["flatten"] = nn.Flatten()
    return nn.Sequential(parts)


def _conv(channels: int, out: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    conv = nn.Conv2d(channels, out, kernel, stride, padding=kernel // 2, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return conv


def _shortcut(block: Block, first: nn.Conv2d, around: Around, side: int) -> Shortcut:
    """The way past convolutions of which ``first`` reads maps of ``side`` x ``side``."""
    channels, out, stride = first.in_channels, first.out_channels, first.stride[0]
    if stride == 1:
        return Shortcut()
    if around == "block":
        return Shortcut(block(_conv(channels, out, 1, stride)))
    # A row and a column of padding, which no mean counts, give an odd side the convolution's half: rounded up.
    pool = nn.AvgPool2d(2, padding=side % 2, count_include_pad=False)
    return Shortcut(pool, block(_conv(channels, out, 1)))


def _halved(side: int) -> int:
    return (side + 1) // 2


@registry.register
def resnet18(
    block: Block,
    num_classes: int = 10,
    in_channels: int = 3,
    image_size: int = 32,
    width: float = 1.0,
    shortcut: Around = "block",
    stem: Stem = "auto",
) -> nn.Module:
    """ResNet-18: 17 convolutions of 64 to 512 channels and one dense layer.

    ``width`` multiplies all widths. ``shortcut`` is around each ``block`` of two convolutions, or around each ``conv``,
    which keeps more of the float sum alive in binary networks. Where the map is halved a 1x1 convolution, in a block of
    the method's order without its activation, takes the shortcut along: with stride 2 (option B) for ``block``, behind
    a 2x2 average pool for ``conv``. Most methods leave it in float. ``stem``: ``imagenet`` is 7x7 with stride 2 and a
    max-pool, ``cifar`` 3x3 without; ``auto`` takes the latter for images of up to 64x64.

    Source: He, Zhang, Ren and Sun 2015, "Deep Residual Learning for Image Recognition", arXiv 1512.03385, table 1; for
    ``conv`` Liu et al. 2018, "Bi-Real Net", arXiv 1808.00278.
    """
    return _resnet(RESNET18, block, num_classes, in_channels, image_size, width, shortcut, stem)


@registry.register
def resnet34(
    block: Block,
    num_classes: int = 10,
    in_channels: int = 3,
    image_size: int = 32,
    width: float = 1.0,
    shortcut: Around = "block",
    stem: Stem = "auto",
) -> nn.Module:
    """ResNet-34: 33 convolutions of 64 to 512 channels and one dense layer.

    ``width``, ``shortcut``, ``stem`` and source: as in `resnet18`.
    """
    return _resnet(RESNET34, block, num_classes, in_channels, image_size, width, shortcut, stem)


@registry.register
def resnet20(
    block: Block,
    num_classes: int = 10,
    in_channels: int = 3,
    image_size: int = 32,
    width: float = 1.0,
    shortcut: Around = "block",
) -> nn.Module:
    """ResNet-20 for CIFAR-10: 19 convolutions of 16 to 64 channels and one dense layer.

    ``width`` and ``shortcut``: as in `resnet18`. The paper's shortcuts pad with channels of zeros where the map is
    halved (option A); here they are 1x1 convolutions as in `resnet18`, which add 2,752 parameters to its 269,722.

    Source: He, Zhang, Ren and Sun 2015, arXiv 1512.03385, section 4.2.
    """
    return _resnet(RESNET20, block, num_classes, in_channels, image_size, width, shortcut)
