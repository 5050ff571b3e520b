"""The convolutions of a training step on a CPU, each by the way that was the faster one for its shape."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lowbit.training.small_maps import SmallMapConv2d
from lowbit.training.winograd import WinogradConv2d

WAYS = (SmallMapConv2d, WinogradConv2d)


class FastConvolutions(TorchFunctionMode):
    """While active, `torch.conv2d` on a CPU goes by the first of the ``WAYS`` that takes it.

    Only plain convolutions are asked about (a batch of images, dilation 1, one group, gradients enabled, arguments as
    `nn.Conv2d` passes them); everything else goes to torch as before. Results differ from torch's by rounding only, so
    that sums of integers need not be integers any more; in ``eval()`` they are (`lowbit.layers.integer`).
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is torch.conv2d and len(args) == 7 and _is_plain(*args):
            x, weight, bias, stride, padding = args[:5]
            for way in WAYS:
                if way.takes(x, weight, stride, padding):
                    result = way.apply(x, weight, stride, padding)
                    return result if bias is None else result + bias.to(result.dtype).reshape(-1, 1, 1)
        return func(*args, **(kwargs or {}))


def _is_plain(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: Any, padding: Any, dilation: Any, groups: int
) -> bool:
    return (
        x.device.type == "cpu"
        and x.dim() == 4
        and x.numel() > 0
        and x.shape[1] == weight.shape[1]
        and torch.is_grad_enabled()
        and dilation == (1, 1)
        and groups == 1
        and all(isinstance(pair, tuple) and len(pair) == 2 for pair in (stride, padding))
    )
