"""Start the first convolution as a whitening of the images' patches, and keep the first layer as it starts."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from lowbit.data.base import Labels
from lowbit.errors import UsageError
from lowbit.preprocessing import Pixels

# Enough to know a covariance of some hundred numbers by.
PATCHES = 400_000
# Added to the variances, in squared deviations of the normalised pixels: without it the weakest directions, which are
# noise, would be as loud as the others.
FLOOR = 5e-4


def reach(conv: nn.Conv2d, axis: int) -> int:
    """Pixels from the first to the last that an output of ``conv`` reads along an axis."""
    return conv.dilation[axis] * (conv.kernel_size[axis] - 1) + 1


def whitening_filters(images: Tensor, conv: nn.Conv2d) -> Tensor:
    r"""Directions of the patches that ``conv`` reads, scaled to the same variance.

    $w_i = v_i / \sqrt{\lambda_i + \epsilon}$, where $\lambda_i$ and $v_i$ are the eigenvalues, the largest first, and
    eigenvectors of the patches' covariance, $\epsilon = 0.0005$.

    Args:
        images: normalised, (N, C, H, W) float32.
        conv: reads patches of C x h x w numbers.

    Returns:
        (C h w, C, h, w) float32.

    Source: of whitening as a fixed first layer, Page 2019, "How to Train Your ResNet", part 8; Jordan 2024, "94% on
    CIFAR-10 in 3.29 Seconds on a Single GPU", arXiv 2404.00498.
    """
    height, width = conv.kernel_size
    columns = functional.unfold(images, (height, width), dilation=conv.dilation, stride=conv.stride)
    patches = columns.transpose(1, 2).flatten(0, 1).double()
    variances, directions = torch.linalg.eigh(torch.cov(patches.T))
    filters: Tensor = (directions / (variances.clamp_min(0) + FLOOR).sqrt()).T.flip(0).float()
    return filters.reshape(-1, images.shape[1], height, width)


def whiten_first_layer_(
    model: nn.Module, images: Pixels, indices: Labels, normalise: Callable[[Tensor], Tensor]
) -> None:
    """Give the first convolution whitening filters, each followed by its negative, as many as there are outputs.

    Outputs beyond twice the numbers of a patch keep what they have. The filters are a start: training changes them,
    unless `freeze_first_layer_` keeps them.

    Args:
        model: whose first convolution reads the images in float.
        images: uint8 (N, H, W, C).
        indices: of those to learn from; evenly spaced ones of them are looked at.
        normalise: makes inputs of images, (N, C, H, W) float32.

    Raises:
        UsageError: the first layer is no float convolution over all channels, or the images are smaller than its
            kernel.
    """
    conv = first_layer(model)
    height, width, channels = images.shape[1:]
    if (
        not isinstance(conv, nn.Conv2d)
        or getattr(conv, "weight_quantizer", None) is not None
        or conv.weight.shape[1] != channels
        or not all(reach(conv, axis) <= side for axis, side in enumerate((height, width)))
    ):
        raise UsageError(
            "recipe field whiten starts a first convolution in float, no larger than the images, and the first layer "
            "of this network is none; leave it false, or choose a method that keeps the first layer in float"
        )
    patches = images[0, :: conv.stride[0], :: conv.stride[1], 0].size
    spaced = np.linspace(0, len(indices) - 1, min(len(indices), 1 + PATCHES // patches)).astype(int)
    filters = whitening_filters(normalise(torch.from_numpy(images[indices[spaced]])), conv)
    pairs = torch.stack([filters, -filters], 1).flatten(0, 1)[: conv.out_channels]
    with torch.no_grad():
        conv.weight[: len(pairs)] = pairs


def freeze_first_layer_(model: nn.Module) -> None:
    """Let training leave the parameters of the first convolution or linear layer as they are.

    Raises:
        UsageError: the model has no such layer, or it is quantized.
    """
    first = first_layer(model)
    if first is None or getattr(first, "weight_quantizer", None) is not None:
        raise UsageError(
            "recipe field freeze_first keeps a first layer in float as it starts, and this network has none; "
            "leave it false, or choose a method that keeps the first layer in float"
        )
    for parameter in first.parameters(recurse=False):
        parameter.requires_grad_(False)


def first_layer(model: nn.Module) -> nn.Conv2d | nn.Linear | None:
    """The convolution or linear layer that the model names first."""
    return next((module for module in model.modules() if isinstance(module, (nn.Conv2d, nn.Linear))), None)
