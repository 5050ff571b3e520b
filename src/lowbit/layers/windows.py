"""The windows of a convolution as a view of its padded images, with which it is one matrix product."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.nn.functional import pad


def windows(
    x: Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int] = (1, 1)
) -> Tensor:
    """The window under each output pixel of images ``x`` (N, C, H, W), with zeros around them.

    Returns:
        (N, OH, OW, KH, KW, C): windows overlap in memory, so a copy such as ``reshape`` makes comes before any change.
    """
    images = pad(x.permute(0, 2, 3, 1), (0, 0, padding[1], padding[1], padding[0], padding[0])).contiguous()
    n, *size, channels = images.shape
    out = [(e - d * (k - 1) - 1) // s + 1 for e, d, k, s in zip(size, dilation, kernel, stride, strict=True)]
    per_image, per_row, per_pixel, _ = images.stride()
    steps = (stride[0] * per_row, stride[1] * per_pixel, dilation[0] * per_row, dilation[1] * per_pixel, 1)
    return images.as_strided((n, *out, *kernel, channels), (per_image, *steps))
