"""Convolutions taken out of torch's hands."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

Pair = tuple[int, int]


class Conv2dMode(TorchFunctionMode):
    """While active, plain convolutions by `torch.conv2d` go to `convolve` first, everything else to torch.

    Plain is one of a batch of images on a CPU, in one group, with arguments as `nn.Conv2d` passes them.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is torch.conv2d and len(args) == 7 and _is_plain(*args):
            result = self.convolve(*args[:6])
            if result is not None:
                return result
        return func(*args, **(kwargs or {}))

    def convolve(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, stride: Pair, padding: Pair, dilation: Pair
    ) -> Tensor | None:
        """The convolution, or None to leave it to torch; arguments as `torch.conv2d` has them."""
        raise NotImplementedError


def _is_plain(x: Tensor, weight: Tensor, bias: Tensor | None, *window: Any) -> bool:
    *pairs, groups = window
    return (
        x.device.type == weight.device.type == "cpu"
        and x.dim() == 4
        and x.numel() > 0
        and x.shape[1] == weight.shape[1]
        and groups == 1
        and all(isinstance(pair, tuple) and len(pair) == 2 for pair in pairs)
    )
