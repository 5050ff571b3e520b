"""Images a second that training takes on this CPU: lowbit's step against a plain loop in bfloat16, in turns.

    python benchmarks/training.py [--batch 128] [--seconds 20] [-o training.json]

Both loops train the same network from the same batches, in one process, a step each in turn; a figure is the median of
its steps. The plain loop is what one writes first: tensors as torch makes them (channels first), autocast, torch's own
AdamW, PReLU and convolutions, and the straight-through sign in its usual form, clip(x) + (sign(x) - clip(x)).detach().
"layers" compares one binary convolution with its batch norm to the same in float, both as lowbit trains them.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from lowbit import methods, models
from lowbit.exporter.bench import interleaved_medians
from lowbit.hardware import cpu_name, versions
from lowbit.layers import PReLU, quantized_layers, quantized_twin
from lowbit.preprocessing import Preprocessing
from lowbit.training.batches import TrainBatches
from lowbit.training.environment import keep_freed_memory
from lowbit.training.module import TrainingModule
from lowbit.training.small_maps import SmallMapConvolutions

NETWORKS = (("vgg16", "float"), ("vgg16", "xnor_net"), ("patchnet", "float"), ("patchnet", "reactnet"))
# Channels and side of the map, as in patchnet and VGG.
LAYERS = ((128, 16), (256, 8), (512, 4))

Step = Callable[[], Any]


class PlainSign(nn.Module):
    """The straight-through sign, as it is usually written, times a scale per filter for weights."""

    bits, enabled = 1, True

    def __init__(self, scaled: bool) -> None:
        super().__init__()
        self.scaled = scaled

    def forward(self, x: Tensor) -> Tensor:
        scale = x.detach().abs().mean(dim=(1, 2, 3), keepdim=True) if self.scaled else 1
        signs = torch.where(x >= 0, 1.0, -1.0)
        clipped = x.clamp(-1, 1)
        return scale * (clipped + (signs - clipped).detach())


def plain_(model: nn.Module) -> nn.Module:
    """Put torch's own and textbook parts in the place of lowbit's, in a network without weights of worth."""
    for layer in quantized_layers(model):
        layer.weight_quantizer, layer.activation_quantizer = PlainSign(True), PlainSign(False)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, PReLU):
                setattr(parent, name, nn.PReLU(len(child.weight)))
    return model


def plain_step(model: nn.Module, batches: Callable[[], tuple[Tensor, Tensor]]) -> Step:
    """A step of the loop that one writes first."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    def step() -> None:
        images, labels = batches()
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = functional.cross_entropy(model(images.contiguous()), labels)
        loss.backward()
        optimizer.step()

    return step


def lowbit_step(model: nn.Module, method: methods.Method, batches: TrainBatches, batch: Step) -> Step:
    """A step of `lowbit train`, without the logging around it."""
    module = TrainingModule(model.to(memory_format=torch.channels_last), method, method.recipe, batches, (), 0)
    optimizer = module.configure_optimizers()
    module.on_train_epoch_start()

    def step() -> None:
        images = batch()
        module.on_train_batch_start(images, 0)
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = module.training_step(images, 0)
        loss.backward()
        norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        assert norm.isfinite()
        optimizer.step()

    return step


def network(name: str, method_name: str, batch: int, seconds: float) -> dict[str, Any]:
    """Images a second of both loops on one network."""
    method = methods.registry[method_name]()
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (8 * batch, 32, 32, 3), dtype=np.uint8)
    preprocessing = Preprocessing("RGB", (32, 32), 0, (0.5,) * 3, (0.25,) * 3)
    batches = TrainBatches(
        images, random.integers(0, 10, len(images)), preprocessing, batch, 0, True, True, torch.device("cpu")
    )
    turns = iter(())

    def next_batch() -> tuple[Tensor, Tensor]:
        nonlocal turns
        found = next(turns, None)
        if found is None:
            turns = iter(batches)
            found = next(turns)
        return found

    steps = {
        "plain": plain_step(plain_(models.create(name, method=method)), next_batch),
        "lowbit": lowbit_step(models.create(name, method=method), method, batches, next_batch),
    }
    medians = interleaved_medians(steps, seconds)
    rates = {f"{key}_images_per_second": round(batch / value, 1) for key, value in medians.items()}
    return {"model": name, "method": method_name, **rates, "speedup": round(medians["plain"] / medians["lowbit"], 3)}


def layer(channels: int, side: int, batch: int, seconds: float) -> dict[str, Any]:
    """Seconds of forward and backward of a binary and of a float convolution, each with its batch norm."""

    def step_of(method: str) -> Step:
        made = nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels))
        chosen = methods.registry[method]()
        if chosen.weight is None or chosen.activation is None:
            made.append(nn.ReLU())
        else:
            made[0] = quantized_twin(made[0], chosen.weight(), chosen.activation())
        made.to(memory_format=torch.channels_last)
        x = torch.randn(batch, channels, side, side).bfloat16().contiguous(memory_format=torch.channels_last)
        x.requires_grad_()
        gradient = torch.randn_like(x)

        def step() -> None:
            with torch.autocast("cpu", torch.bfloat16), SmallMapConvolutions():
                y = made(x)
            y.backward(gradient)

        return step

    names = ("float", "xnor_net", "reactnet")
    medians = interleaved_medians({name: step_of(name) for name in names}, seconds)
    return {
        "channels": channels,
        "side": side,
        **{f"{name}_ms": round(1e3 * medians[name], 3) for name in names},
        **{f"{name}_over_float": round(medians[name] / medians["float"], 3) for name in names[1:]},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--seconds", type=float, default=20.0, help="of each comparison; seven rounds at least")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("-o", "--output", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    keep_freed_memory()
    result = {
        "hardware": {"cpu": cpu_name(), "cores": os.cpu_count()},
        "versions": versions("torch", "lightning"),
        "batch": arguments.batch,
        "seconds": arguments.seconds,
        "threads": arguments.threads,
        "networks": [network(*pair, arguments.batch, arguments.seconds) for pair in NETWORKS],
        "layers": [layer(*shape, arguments.batch, arguments.seconds / 4) for shape in LAYERS],
    }
    text = json.dumps(result, indent=1)
    print(text)
    if arguments.output:
        arguments.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
