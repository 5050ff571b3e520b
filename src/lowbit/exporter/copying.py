"""The model itself, and a copy of it to work on."""

from __future__ import annotations

import copy

from torch import Tensor, nn

from lowbit.errors import UsageError, briefly


def unwrapped(model: nn.Module) -> nn.Module:
    """``model`` out of what ``torch.compile`` or a data-parallel module has wrapped around it."""
    while isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
        model = inner
    return model.module if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel) else model


def copy_of(model: nn.Module) -> nn.Module:
    """``model``, `unwrapped`, on the CPU and in ``eval()``.

    Raises:
        UsageError: it keeps a result of its forward, which torch does not copy, or something else that cannot be.
    """
    model = unwrapped(model)
    try:
        return copy.deepcopy(model).cpu().eval()
    except Exception as error:
        for name, module in model.named_modules():
            for key, value in vars(module).items():
                if isinstance(value, Tensor) and not value.is_leaf:
                    place = ".".join(filter(None, (name, key)))
                    raise UsageError(
                        f"'{place}' keeps a result of forward with its gradient, which cannot be copied; "
                        f"keep {key}.detach(), or run the model under torch.no_grad()"
                    ) from error
        raise UsageError(f"the model cannot be copied: {briefly(error)}") from error
