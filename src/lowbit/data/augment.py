"""Augmentation of a whole batch at a time: random crop and flip in one gather, and cutout."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def random_crop_flip(images: Tensor, generator: torch.Generator, pad: int = 4, flip: bool = True) -> Tensor:
    """Move each image by up to ``pad`` pixels each way and mirror every other one, at random.

    Each image is padded by ``pad`` zero pixels on all sides and cropped back to its size at a uniformly drawn offset;
    with ``flip`` it is then mirrored left-right with probability 1/2.

    Args:
        images: (N, H, W, C), any dtype; the channels-last layout makes a pixel one contiguous piece.
        generator: the only source of randomness, on the CPU. It is advanced by the same number of draws with and
            without ``flip``.
        pad: zero pixels on each side.
        flip: whether to mirror.

    Returns:
        (N, H, W, C), same dtype and device, contiguous.
    """
    count, height, width, _ = images.shape
    device = images.device
    offsets = torch.randint(2 * pad + 1, (2, count, 1), generator=generator).to(device)
    mirrored = torch.randint(2, (count, 1), generator=generator).bool().to(device)
    padded = functional.pad(images, (0, 0, pad, pad, pad, pad))
    rows = torch.arange(height, device=device) + offsets[0]
    columns = torch.arange(width, device=device).expand(count, width)
    if flip:
        columns = torch.where(mirrored, width - 1 - columns, columns)
    columns = columns + offsets[1]
    which = torch.arange(count, device=device)[:, None, None]
    return padded[which, rows[:, :, None], columns[:, None, :]]


def cutout(inputs: Tensor, generator: torch.Generator, side: int) -> Tensor:
    """Clear a square of each image, at random.

    The square's centre is drawn uniformly from the pixels; what lies outside of the image is left out, so that it
    covers ``side`` x ``side`` pixels at most.

    Args:
        inputs: (N, C, H, W), normalised, so that what is cleared becomes the mean colour.
        generator: the only source of randomness, on the CPU.
        side: of the square, in pixels.

    Returns:
        ``inputs``, changed in place.

    Source: DeVries and Taylor 2017, "Improved Regularization of Convolutional Neural Networks with Cutout", arXiv
    1708.04552, section 3.2.
    """

    def inside(length: int) -> Tensor:
        """Which of ``length`` rows or columns the square covers, (N, length)."""
        start = torch.randint(length, (len(inputs), 1), generator=generator) - side // 2
        places = torch.arange(length)
        return ((places >= start) & (places < start + side)).to(inputs.device)

    rows, columns = (inside(length) for length in inputs.shape[2:])
    return inputs.masked_fill_((rows[:, :, None] & columns[:, None, :])[:, None], 0)
