"""LeNet-5."""

from __future__ import annotations

from torch import nn

from lowbit.layers.blocks import Block
from lowbit.models.base import check_image_size, registry


@registry.register
def lenet(
    block: Block, num_classes: int = 10, in_channels: int = 1, image_size: int = 32, width: float = 1.0
) -> nn.Module:
    """LeNet-5 in its common form: 5x5 convolutions of 20 and 50 channels, dense layers of 500 and ``num_classes``.

    Source: LeCun, Bottou, Bengio and Haffner 1998; the widths are those of Caffe's example, which the XNOR-Net codes
    share. ``width`` multiplies all of them.
    """
    check_image_size("lenet", image_size, 16)
    side = ((image_size - 4) // 2 - 4) // 2
    small, large, hidden = (max(1, round(n * width)) for n in (20, 50, 500))
    return nn.Sequential(
        block(nn.Conv2d(in_channels, small, 5), pool=nn.MaxPool2d(2), role="first"),
        block(nn.Conv2d(small, large, 5), pool=nn.MaxPool2d(2)),
        block(nn.Conv2d(large, hidden, side)),
        block(nn.Conv2d(hidden, num_classes, 1), role="last"),
        nn.Flatten(),
    )
