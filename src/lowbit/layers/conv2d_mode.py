"""Convolutions taken out of torch's hands."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


class Conv2dMode(TorchFunctionMode):
    """While active, `torch.conv2d`, called as `nn.Conv2d` calls it, goes to `convolve` first, the rest to torch."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is torch.conv2d and len(args) == 7:
            result = self.convolve(*args)
            if result is not None:
                return result
        return func(*args, **(kwargs or {}))

    def convolve(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, stride: Any, padding: Any, dilation: Any, groups: int
    ) -> Tensor | None:
        """The convolution, or None to leave it to torch; arguments as `torch.conv2d` has them."""
        raise NotImplementedError
