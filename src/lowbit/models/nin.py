"""Network in Network."""

from __future__ import annotations

from torch import nn

from lowbit.layers.blocks import Block
from lowbit.models.base import check_image_size, registry

# (channels, kernel, pool after it): the CIFAR-10 network of Lin, Chen and Yan 2013, with the widths of the XNOR-Net
# code of 2018.
ROWS = (
    (192, 5, None),
    (160, 1, None),
    (96, 1, "max"),
    (192, 5, None),
    (192, 1, None),
    (192, 1, "average"),
    (192, 3, None),
    (192, 1, None),
)


@registry.register
def nin(
    block: Block,
    num_classes: int = 10,
    in_channels: int = 3,
    image_size: int = 32,
    dropout: float = 0.5,
    width: float = 1.0,
) -> nn.Module:
    """NIN: three groups of a spatial and two 1x1 convolutions, global average pooling. ``dropout`` follows the pools.

    ``width`` multiplies all widths.

    Source: Lin, Chen and Yan 2013, "Network In Network", arXiv 1312.4400.
    """
    check_image_size("nin", image_size, 8)
    layers: list[nn.Module] = []
    channels, dropped = in_channels, 0.0
    for full, kernel, pool in ROWS:
        out = max(1, round(full * width))
        conv = _conv(channels, out, kernel)
        pooling = {None: None, "max": nn.MaxPool2d(3, 2, 1), "average": nn.AvgPool2d(3, 2, 1)}[pool]
        layers.append(block(conv, pool=pooling, dropout=dropped, role="middle" if layers else "first"))
        channels, dropped = out, dropout if pool else 0.0
    layers.append(block(_conv(channels, num_classes, 1), role="last"))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())


def _conv(channels: int, out: int, kernel: int) -> nn.Conv2d:
    conv = nn.Conv2d(channels, out, kernel, padding=kernel // 2)
    nn.init.normal_(conv.weight, std=0.05)
    return conv
