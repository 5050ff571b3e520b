"""Networks to export: small, random, with batch norms of every sign."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lowbit
from lowbit.layers import PReLU, Shift, quantized_layers


def awkward_(model: nn.Module, seed: int = 0) -> nn.Module:
    """Statistics and weights that need care: gamma below, above and at 0, shifted means, biases."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
                channels = module.num_features
                if module.track_running_stats:
                    module.running_mean.copy_(torch.randn(channels, generator=generator) * 2)
                    module.running_var.copy_(torch.rand(channels, generator=generator) * 3 + 0.1)
                if module.affine:
                    module.weight.copy_(torch.randn(channels, generator=generator))
                    module.bias.copy_(torch.randn(channels, generator=generator))
                    module.weight[::4] = 0
                    module.bias[::8] = 0
            elif isinstance(module, PReLU | Shift):
                for parameter in module.parameters():
                    parameter.copy_(torch.randn(parameter.shape, generator=generator))
            elif isinstance(module, nn.Conv2d | nn.Linear):
                for parameter in (module.weight, module.bias):
                    if parameter is not None:
                        parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model.eval()


def quantized(model: nn.Module, method: str = "xnor_net") -> nn.Module:
    """``model`` made binary and awkward."""
    lowbit.quantize_(model, method)
    return awkward_(model)


def chain(*between: nn.Module, channels: int = 7, bias: bool = True) -> nn.Module:
    """A float stem, a binary convolution, ``between``, another binary convolution, and a float head."""
    return quantized(
        nn.Sequential(
            nn.Conv2d(3, channels, 3, bias=bias),
            nn.BatchNorm2d(channels),
            nn.Conv2d(channels, channels, 3, padding=1, bias=bias),
            *between,
            nn.Conv2d(channels, 5, 3, padding=1, bias=bias),
            nn.BatchNorm2d(5),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(5, 4),
        )
    )


# What may stand between two layers of codes.
CHAINS = {
    "nothing": [],
    "batch norm": [nn.BatchNorm2d(7)],
    "pool in the middle": [nn.BatchNorm2d(7), nn.MaxPool2d(2), nn.BatchNorm2d(7)],
    "two pools": [nn.BatchNorm2d(7), nn.MaxPool2d(3, 2, 1), nn.ReLU(), nn.BatchNorm2d(7), nn.MaxPool2d((2, 1))],
    "hardtanh": [nn.BatchNorm2d(7), nn.Hardtanh(-0.3, 0.7), nn.BatchNorm2d(7)],
    "average": [nn.AvgPool2d(2), nn.BatchNorm2d(7)],
}


def coded_chain(
    activation: Callable[[], nn.Module], weight: Callable[[], nn.Module | None], *between: nn.Module, bias: bool = True
) -> nn.Module:
    """`chain` with fresh quantizers of one's own in both of its layers."""
    model = chain(*between, bias=bias)
    for layer in quantized_layers(model):
        layer.activation_quantizer, layer.weight_quantizer = activation(), weight()
    return model


class Residual(nn.Module):
    """Bi-Real's shortcut around each convolution; a float value is read by a quantizer and by an addition."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels)
        self.conv = nn.Conv2d(channels, out, 3, stride, 1, bias=False)
        self.post = nn.BatchNorm2d(out)
        self.down = nn.Conv2d(channels, out, 1, bias=False) if stride != 1 or channels != out else None
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        y = self.post(self.conv(self.norm(x)))
        if self.down is not None:
            x = self.down(F.avg_pool2d(x, self.stride) if self.stride > 1 else x)
        return F.hardtanh(y + x, -2.0, 2.0)


class Plain(nn.Module):
    """A user's own module: functional calls, a shortcut, a dense binary layer on a flattened map."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 9, 3, padding=1)
        self.first = Residual(9, 9, 1)
        self.second = Residual(9, 11, 2)
        self.norm = nn.BatchNorm2d(11)
        self.hidden = nn.Linear(11 * 4 * 4, 13)
        self.hidden_norm = nn.BatchNorm1d(13)
        self.last = nn.Linear(13, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.stem(x)), 2)
        x = self.second(self.first(x))
        x = F.dropout(self.norm(x), 0.3, self.training)
        x = x.view(x.size(0), -1)
        return self.last(torch.relu(self.hidden_norm(self.hidden(x))))


class Shared(nn.Module):
    """One binary layer's result is read by two binary layers, each behind its own batch norm, and one by two alike."""

    def __init__(self, alike: bool) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3)
        self.base = nn.Conv2d(6, 6, 3)
        self.left_norm = nn.BatchNorm2d(6)
        self.right_norm = self.left_norm if alike else nn.BatchNorm2d(6)
        self.left = nn.Conv2d(6, 5, 3, padding=1)
        self.right = nn.Conv2d(6, 5, 1)
        self.alike = alike
        self.last = nn.Conv2d(5, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.base(self.stem(x))
        left = self.left_norm(x)
        right = left if self.alike else self.right_norm(x)
        return self.last(self.left(left) + self.right(right)).mean((2, 3))
