"""Projections: changes of latent weights after each optimizer step, outside autograd."""

from __future__ import annotations

import torch
from torch import nn
from torch.optim import Optimizer

from lowbit.layers.quantized import QuantizedLayer


@torch.no_grad()
def project_(model: nn.Module) -> None:
    """Apply each quantized layer's projection to its latent weight, in place, once."""
    for module in model.modules():
        if isinstance(module, QuantizedLayer) and module.projection is not None:
            module.projection(module.weight)


def attach_projections(optimizer: Optimizer, model: nn.Module) -> None:
    """Project the latent weights of ``model`` now and after every ``optimizer.step()``.

    A plain training loop needs this one line beside `quantize_`. Evaluation and export never project: what they see is
    what the last step left.
    """
    project_(model)
    optimizer.register_step_post_hook(lambda *_: project_(model))
