"""How fast training is: lowbit's step against a plain loop, and a binary layer's step against a float one's.

    python benchmarks/training.py               # four minutes on an idle machine

The plain loop is what one writes first: tensors as torch makes them (channels first), torch's own convolutions, PReLU
and unfused optimizer, autocast where the precision is bf16, and the straight-through sign in its usual form,
clip(x) + (sign(x) - clip(x)).detach(). Both loops train the same network by the same optimizer from the same batches,
in one process, in turns. The layers are 3x3 convolutions with batch norm behind, all as lowbit trains them.

Writes results.json and table.md, and the part of docs/results.md that belongs to the precision.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from measured import about, into_page, publish, quartiles
from torch import Tensor, nn
from torch.nn import functional

from lowbit import methods, models
from lowbit.errors import check_choice
from lowbit.exporter.bench import take_turns
from lowbit.layers import PReLU, quantized_layers, quantized_twin
from lowbit.memory import keep_freed_memory
from lowbit.methods import Method, Recipe
from lowbit.preprocessing import Preprocessing
from lowbit.training.batches import Batch, TrainBatches
from lowbit.training.convolutions import FastConvolutions
from lowbit.training.environment import PRECISIONS, auto_precision
from lowbit.training.module import TrainingModule

# Of the folder in results/ and the part of the page, by precision.
PARTS = {"float32": "training", "bf16": "training_bf16"}
SECONDS = 24.0
NETWORKS = (("vgg16", "float"), ("vgg16", "xnor_net"), ("patchnet", "float"), ("patchnet", "reactnet"))
# Channels and side of the map, as in patchnet and VGG.
LAYERS = ((128, 16), (256, 8), (512, 4))
LAYER_METHODS = ("float", "xnor_net", "reactnet")
CPU = torch.device("cpu")

Step = Callable[[], Any]


def main(
    out: Annotated[Path | None, typer.Option(help="Folder of what is written, else in results/.")] = None,
    page: Annotated[Path, typer.Option(help="Page that shows it.")] = Path("docs/results.md"),
    batch: Annotated[int, typer.Option(help="Images at a time.")] = 128,
    threads: Annotated[int, typer.Option(help="Threads of torch.")] = 1,
    precision: Annotated[str, typer.Option(help="bf16, float32, or auto: as lowbit chooses.")] = "auto",
) -> None:
    """Time every network and layer, and write it down."""
    torch.set_num_threads(threads)
    keep_freed_memory()
    check_choice("precision", precision, ("auto", *PRECISIONS))
    chosen = auto_precision(CPU) if precision == "auto" else precision
    dtype = torch.bfloat16 if chosen == "bf16" else torch.float32
    record = {
        **about(__file__),
        "precision": chosen,
        "threads": threads,
        "batch": batch,
        "networks": [network(*pair, batch, dtype) for pair in NETWORKS],
        "layers": [layer(*shape, batch, dtype) for shape in LAYERS],
    }
    publish(record, out or Path("results") / PARTS[chosen], table)
    into_page(page, PARTS[chosen], text(record))
    print(table(record))


def network(name: str, method_name: str, batch: int, dtype: torch.dtype) -> dict[str, Any]:
    """Quartiles of a step of both loops on one network."""
    method = methods.registry[method_name]()
    batches = random_images(batch)
    steps = {
        "plain": plain_step(plain_(models.create(name, method=method)), method.recipe, endless(batches), dtype),
        "lowbit": lowbit_step(models.create(name, method=method), method, batches, dtype),
    }
    return {"model": name, "method": method_name, "steps": timed(steps, SECONDS)}


def layer(channels: int, side: int, batch: int, dtype: torch.dtype) -> dict[str, Any]:
    """Quartiles of forward and backward of a convolution with its batch norm, float and binary."""
    steps = {name: layer_step(name, (batch, channels, side, side), dtype) for name in LAYER_METHODS}
    return {"channels": channels, "side": side, "steps": timed(steps, SECONDS / 4)}


def timed(steps: dict[str, Step], seconds: float) -> dict[str, Any]:
    return {name: quartiles([wall for wall, _ in times]) for name, times in take_turns(steps, seconds).items()}


def precision_of(dtype: torch.dtype) -> torch.autocast:
    """Where forward passes run: under autocast if ``dtype`` is bfloat16."""
    return torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16)


def random_images(batch: int) -> TrainBatches:
    """Augmented batches of images of noise."""
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (8 * batch, 32, 32, 3), dtype=np.uint8)
    preprocessing = Preprocessing("RGB", (32, 32), 0, (0.5,) * 3, (0.25,) * 3)
    labels = random.integers(0, 10, len(images))
    return TrainBatches(images, labels, preprocessing, batch, 0, True, True, CPU)


def endless(batches: TrainBatches) -> Iterator[Batch]:
    while True:
        yield from batches


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
    for quantized in quantized_layers(model):
        quantized.weight_quantizer, quantized.activation_quantizer = PlainSign(True), PlainSign(False)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, PReLU):
                setattr(parent, name, nn.PReLU(len(child.weight)))
    return model


def plain_step(model: nn.Module, recipe: Recipe, batches: Iterator[Batch], dtype: torch.dtype) -> Step:
    """A step of the loop that one writes first."""
    kinds: dict[str, Callable[..., torch.optim.Optimizer]] = {
        "sgd": partial(torch.optim.SGD, momentum=recipe.momentum),
        "adam": torch.optim.Adam,
        "adamw": torch.optim.AdamW,
    }
    optimizer = kinds[recipe.optimizer](model.parameters(), lr=recipe.learning_rate)

    def step() -> None:
        images, labels = next(batches)
        optimizer.zero_grad()
        with precision_of(dtype):
            loss = functional.cross_entropy(model(images.contiguous()), labels)
        loss.backward()
        optimizer.step()

    return step


def lowbit_step(model: nn.Module, method: Method, batches: TrainBatches, dtype: torch.dtype) -> Step:
    """A step of `lowbit train`, without the logging around it."""
    module = TrainingModule(model.to(memory_format=torch.channels_last), method, method.recipe, batches, (), 0)
    optimizer = module.configure_optimizers()
    module.on_train_epoch_start()
    turns = endless(batches)

    def step() -> None:
        batch = next(turns)
        module.on_train_batch_start(batch, 0)
        optimizer.zero_grad()
        with precision_of(dtype):
            loss = module.training_step(batch, 0)
        loss.backward()
        norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        assert norm.isfinite()
        optimizer.step()

    return step


def layer_step(method: str, shape: tuple[int, int, int, int], dtype: torch.dtype) -> Step:
    """Forward and backward of one convolution and its batch norm, and ReLU where it is float."""
    channels = shape[1]
    made = nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels))
    chosen = methods.registry[method]()
    if chosen.weight is None or chosen.activation is None:
        made.append(nn.ReLU())
    else:
        made[0] = quantized_twin(made[0], chosen.weight(), chosen.activation())
    made.to(memory_format=torch.channels_last)
    x = torch.randn(shape, dtype=dtype).contiguous(memory_format=torch.channels_last).requires_grad_()
    gradient = torch.randn_like(x)

    def step() -> None:
        with precision_of(dtype), FastConvolutions():
            y = made(x)
        y.backward(gradient)

    return step


def gain(row: dict[str, Any]) -> float:
    """How many times as fast lowbit's step is as the plain one."""
    return float(row["steps"]["plain"]["milliseconds"] / row["steps"]["lowbit"]["milliseconds"])


def over_float(row: dict[str, Any], method: str) -> float:
    """The time of a method's layer over that of the float one."""
    return float(row["steps"][method]["milliseconds"] / row["steps"]["float"]["milliseconds"])


def table(record: dict[str, Any]) -> str:
    """Two Markdown tables: of networks, and of layers."""
    batch = record["batch"]

    def cell(times: dict[str, float]) -> str:
        low, median, high = (1e3 * batch / times[key] for key in ("high", "milliseconds", "low"))
        return f"{median:.0f} ({low:.0f} to {high:.0f})"

    lines = [
        f"`{record['command']}`, {record['cpu']}, threads: {record['threads']}, {record['precision']}, batches of "
        f"{batch}, torch {record['versions']['torch']}, {record['date'][:10]}. Images a second, medians of steps that "
        "took turns, quartiles in brackets.",
        "",
        "| network | method | plain loop | lowbit | gain |",
        "|" + "---|" * 5,
    ]
    for row in record["networks"]:
        steps = row["steps"]
        lines.append(
            f"| `{row['model']}` | `{row['method']}` | {cell(steps['plain'])} | {cell(steps['lowbit'])} "
            f"| {gain(row):.2f} |"
        )
    lines += [
        "",
        "Milliseconds of forward and backward of one convolution with its batch norm, and over those of the float one:",
        "",
    ]
    lines += [
        f"| layer | {' | '.join(f'`{name}`' for name in LAYER_METHODS)} |",
        "|" + "---|" * (1 + len(LAYER_METHODS)),
    ]
    for row in record["layers"]:
        cells = [f"{row['channels']} channels, {row['side']}x{row['side']}"]
        for name in LAYER_METHODS:
            ratio = "" if name == "float" else f", {over_float(row, name):.2f}x"
            cells.append(f"{row['steps'][name]['milliseconds']:.1f}{ratio}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


text = table  # what docs/results.md shows of it


if __name__ == "__main__":
    typer.run(main)
