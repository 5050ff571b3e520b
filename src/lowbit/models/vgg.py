"""VGG for small images: 3x3 convolutions, max-pools, one dense layer.

A row is a table of widths; "M" is a 2x2 max-pool.
"""

from __future__ import annotations

from torch import nn

from lowbit.errors import UsageError
from lowbit.layers.blocks import Block
from lowbit.models.base import registry

Row = tuple[int | str, ...]

VGG11: Row = (64, "M", 128, "M", 256, 256, "M", 512, 512, "M", 512, 512, "M")
VGG13: Row = (64, 64, "M", 128, 128, "M", 256, 256, "M", 512, 512, "M", 512, 512, "M")
VGG16: Row = (64, 64, "M", 128, 128, "M", *[256] * 3, "M", *[512] * 3, "M", *[512] * 3, "M")
VGG19: Row = (64, 64, "M", 128, 128, "M", *[256] * 4, "M", *[512] * 4, "M", *[512] * 4, "M")
VGG_SMALL: Row = (128, 128, "M", 256, 256, "M", 512, 512, "M")


def _vgg(row: Row, block: Block, num_classes: int, in_channels: int, image_size: int, width: float) -> nn.Sequential:
    pools = row.count("M")
    if image_size % 2**pools or image_size < 2**pools:
        raise UsageError(
            f"this VGG halves its map {pools} times: image size {image_size} must be a multiple of {2**pools}"
        )
    features: list[nn.Module] = []
    channels = in_channels
    for position, entry in enumerate(row):
        if isinstance(entry, str):
            continue
        out = max(1, round(entry * width))
        pooled = row[position + 1 : position + 2] == ("M",)
        conv = nn.Conv2d(channels, out, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
        features.append(block(conv, pool=nn.MaxPool2d(2) if pooled else None, role="middle" if features else "first"))
        channels = out
    head = block(nn.Conv2d(channels, num_classes, image_size // 2**pools), role="last")
    return nn.Sequential(*features, head, nn.Flatten())


@registry.register
def vgg11(
    block: Block, num_classes: int = 10, in_channels: int = 3, image_size: int = 32, width: float = 1.0
) -> nn.Module:
    """VGG-11 (column A): 8 convolutions and one dense layer. ``width`` multiplies all widths.

    Raises:
        UsageError: ``image_size`` is no multiple of 32.

    Source: Simonyan & Zisserman 2014, arXiv 1409.1556, table 1, with one dense layer in place of its three.
    """
    return _vgg(VGG11, block, num_classes, in_channels, image_size, width)


@registry.register
def vgg13(
    block: Block, num_classes: int = 10, in_channels: int = 3, image_size: int = 32, width: float = 1.0
) -> nn.Module:
    """VGG-13 (column B): 10 convolutions and one dense layer. ``width`` multiplies all widths.

    Raises:
        UsageError: ``image_size`` is no multiple of 32.

    Source: Simonyan & Zisserman 2014, arXiv 1409.1556, table 1, with one dense layer in place of its three.
    """
    return _vgg(VGG13, block, num_classes, in_channels, image_size, width)


@registry.register
def vgg16(
    block: Block, num_classes: int = 10, in_channels: int = 3, image_size: int = 32, width: float = 1.0
) -> nn.Module:
    """VGG-16 (column D): 13 convolutions and one dense layer. ``width`` multiplies all widths.

    Raises:
        UsageError: ``image_size`` is no multiple of 32.

    Source: Simonyan & Zisserman 2014, arXiv 1409.1556, table 1, with one dense layer in place of its three.
    """
    return _vgg(VGG16, block, num_classes, in_channels, image_size, width)


@registry.register
def vgg19(
    block: Block, num_classes: int = 10, in_channels: int = 3, image_size: int = 32, width: float = 1.0
) -> nn.Module:
    """VGG-19 (column E): 16 convolutions and one dense layer. ``width`` multiplies all widths.

    Raises:
        UsageError: ``image_size`` is no multiple of 32.

    Source: Simonyan & Zisserman 2014, arXiv 1409.1556, table 1, with one dense layer in place of its three.
    """
    return _vgg(VGG19, block, num_classes, in_channels, image_size, width)


@registry.register
def vgg_small(
    block: Block, num_classes: int = 10, in_channels: int = 3, image_size: int = 32, width: float = 1.0
) -> nn.Module:
    """VGG-small: 6 convolutions of 128 to 512 channels and one dense layer. ``width`` multiplies all widths.

    Raises:
        UsageError: ``image_size`` is no multiple of 8.

    Source: the network of Courbariaux et al. 2016, arXiv 1602.02830, for CIFAR-10, without its hidden dense layers.
    """
    return _vgg(VGG_SMALL, block, num_classes, in_channels, image_size, width)
