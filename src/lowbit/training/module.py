"""What Lightning trains: the model, its loss, its optimizer and the learning rate of each step."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.conv import _ConvNd
from torch.optim.swa_utils import AveragedModel, update_bn

from lowbit.errors import LowbitError, briefly
from lowbit.layers import attach_rules, start_epoch
from lowbit.layers.integer import IntegerConvolutions
from lowbit.methods.base import Method, Recipe
from lowbit.training.batches import Batch, TrainBatches, derived_seed
from lowbit.training.checkpoints import Checkpoint
from lowbit.training.convolutions import FastConvolutions
from lowbit.training.distillation import distillation_loss, teach
from lowbit.training.schedules import multiplier

# Enough to know a channel's mean and variance by; an epoch of CIFAR-10 has four times as many.
NORM_BATCHES = 100


def squared_hinge(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean over batch and classes of max(0, 1 - t y)^2, t = +1 for the label's class and -1 for the others."""
    targets = 2 * functional.one_hot(labels, logits.shape[1]) - 1
    return functional.relu(1 - targets * logits).square().mean()


def sum_of_squares(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean over the batch of half the sum over classes of (y - t)^2, t = 1 for the label's class and 0 else."""
    targets = functional.one_hot(labels, logits.shape[1])
    return (logits - targets).square().sum(1).mean() / 2


def loss_of(name: str, logits: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """The loss that a method names, of logits (N, classes) in float32, as a scalar."""
    if name == "squared_hinge":
        return squared_hinge(logits, labels)
    if name == "sum_of_squares":
        return sum_of_squares(logits, labels)
    return functional.cross_entropy(logits, labels, label_smoothing=label_smoothing)


def parameter_groups(model: nn.Module, recipe: Recipe) -> list[dict[str, Any]]:
    """Parameters by weight decay and learning rate, for an optimizer.

    Decay reaches the weights of convolutions and linear layers. It spares norms, biases and latent weights (those of
    layers whose ``weight_quantizer`` is not None), unless the recipe says ``decay_all``. A group's ``rate`` is what
    its learning rate is multiplied by: the recipe's ``bias_rate`` for biases, those of norms among them, else 1.
    """
    decayed: set[Tensor] = set()
    biases: set[Tensor] = set()
    for module in model.modules():
        latent = getattr(module, "weight_quantizer", None) is not None
        if isinstance(module, (_ConvNd, nn.Linear)) and not latent:
            decayed.add(module.weight)
        if isinstance(bias := getattr(module, "bias", None), nn.Parameter):
            biases.add(bias)
    groups: dict[tuple[bool, float], list[Tensor]] = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            spared = not (recipe.decay_all or parameter in decayed)
            groups.setdefault((spared, recipe.bias_rate if parameter in biases else 1.0), []).append(parameter)
    return [
        {"params": params, "weight_decay": 0.0 if spared else recipe.weight_decay, "rate": rate}
        for (spared, rate), params in sorted(groups.items())
    ]


def make_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """The recipe's optimizer, one fused kernel for all parameters, with the method's projections attached."""
    groups = parameter_groups(model, recipe)
    rate = recipe.learning_rate
    optimizer: torch.optim.Optimizer
    if recipe.optimizer == "sgd":
        optimizer = torch.optim.SGD(groups, lr=rate, momentum=recipe.momentum, nesterov=recipe.nesterov, fused=True)
    elif recipe.optimizer == "adam":
        optimizer = torch.optim.Adam(groups, lr=rate, fused=True)
    else:
        optimizer = torch.optim.AdamW(groups, lr=rate, fused=True)
    attach_rules(optimizer, model)
    return optimizer


@dataclass
class Tally:
    """Sums over an evaluation, kept on the device and read once at its end."""

    loss: Tensor
    correct: Tensor
    count: int = 0

    @classmethod
    def empty(cls, device: torch.device) -> Tally:
        return cls(
            torch.zeros((), dtype=torch.float64, device=device), torch.zeros((), dtype=torch.int64, device=device)
        )

    def add(self, loss: Tensor, correct: Tensor, count: int) -> None:
        """Add one batch's mean loss and number of correct predictions."""
        self.loss += loss.detach() * count
        self.correct += correct
        self.count += count

    @property
    def mean_loss(self) -> float:
        return float(self.loss) / self.count

    @property
    def accuracy(self) -> float:
        return int(self.correct) / self.count


class TrainingModule(pl.LightningModule):
    """Model, loss, optimizer and learning rate for Lightning's loop.

    With the recipe's ``average``, a copy of the model holds the mean of the weights over the steps so far of that share
    of the epochs: latent weights, norms' and learned levels alike. From then on the copy is what is measured, chosen
    and saved, while training goes on with the weights themselves. A sign of averaged latent weights is a vote of the
    steps, weighted by their size; where projections keep weights in a range, their mean lies in it too. Statistics of
    batch norms are no averages: before each measurement the copy takes them anew from train images, as long as norms
    are not frozen. Its other buffers, such as observed ranges, go on from those of the last step.

    Args:
        model: takes (N, C, H, W) float32, gives logits.
        method: whose loss and phases are used.
        recipe: how to train.
        batches: the train batches, to be told which epoch is next.
        sets: names of the evaluation sets, in the order of the validation loaders.
        seed: of the run; dropout of epoch e is drawn from (seed, e).
        checkpoint: to resume from, or None.
        teacher: gives logits that are the target in place of the labels, or beside them, or None.

    Attributes:
        average: the averaged copy, if the recipe asks for one.

    Source: of averaging, Polyak and Juditsky 1992, "Acceleration of Stochastic Approximation by Averaging"; with new
    statistics of batch norms, Izmailov, Podoprikhin, Garipov, Vetrov and Wilson 2018, "Averaging Weights Leads to Wider
    Optima and Better Generalization", arXiv 1803.05407.
    """

    def __init__(
        self,
        model: nn.Module,
        method: Method,
        recipe: Recipe,
        batches: TrainBatches,
        sets: tuple[str, ...],
        seed: int,
        checkpoint: Checkpoint | None = None,
        teacher: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.method = method
        self.recipe = recipe
        self.batches = batches
        self.sets = sets
        self.seed = seed
        self.checkpoint = checkpoint
        # In a list, so that it is no part of this module: train() and the state dictionary pass it by.
        self.teachers = [] if teacher is None else [teacher]
        self.tallies: dict[str, Tally] = {}
        self.average = AveragedModel(model) if recipe.average else None
        self.step_loss = torch.zeros(())
        self.step_batch: Batch | None = None
        self.learning_rate = 0.0

    def configure_optimizers(self) -> torch.optim.Optimizer:
        self.optimizer = make_optimizer(self.model, self.recipe)
        if self.checkpoint is not None:
            # Attaching projects once more, which is no identity in the last bit: so the weights are restored after it.
            try:
                self.model.load_state_dict(self.checkpoint.model)
                self.optimizer.load_state_dict(self.checkpoint.optimizer)
                if self.average is not None and self.checkpoint.average:
                    self.average.load_state_dict(self.checkpoint.average)
            except (RuntimeError, KeyError, ValueError, TypeError, AttributeError) as error:
                raise LowbitError(
                    f"the checkpoint does not fit the network ({briefly(error)}); train again with another --out"
                ) from None
            self.checkpoint = None
        return self.optimizer

    @property
    def share(self) -> float:
        """Share of the epochs that was done when this epoch began."""
        return self.current_epoch / self.recipe.epochs

    @property
    def averaged(self) -> AveragedModel | None:
        """The averaged copy, once averaging has begun."""
        return self.average if self.average is not None and self.average.n_averaged > 0 else None

    @property
    def measured(self) -> nn.Module:
        """The model that is evaluated and saved."""
        return self.model if self.averaged is None else self.averaged.module

    def on_train_epoch_start(self) -> None:
        self.batches.epoch = self.current_epoch
        torch.manual_seed(derived_seed(self.seed, self.current_epoch, 2))
        for model in [self.model] if self.average is None else [self.model, self.average.module]:
            start_epoch(model, self.method, self.share)
        self.tallies = {name: Tally.empty(self.device) for name in ("train", *self.sets)}

    def moment(self, batch_idx: int) -> float:
        """The middle of a step, in epochs."""
        return self.current_epoch + (batch_idx + 0.5) / len(self.batches)

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        self.learning_rate = self.recipe.learning_rate * multiplier(self.recipe, self.moment(batch_idx))
        for group in self.optimizer.param_groups:
            # Checkpoints of earlier versions have no rates.
            group["lr"] = self.learning_rate * group.get("rate", 1.0)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        images, labels = batch
        with FastConvolutions():
            logits = self.model(images).float()
            lessons = [teach(teacher, images) for teacher in self.teachers]
        loss = loss_of(self.method.loss, logits, labels, self.recipe.label_smoothing)
        for lesson in lessons:
            distilled = distillation_loss(logits, lesson, self.recipe.temperature)
            loss = torch.lerp(loss, distilled, self.recipe.distill_weight)
        self.step_loss, self.step_batch = loss.detach(), batch
        self.tallies["train"].add(loss, (logits.detach().argmax(1) == labels).sum(), len(labels))
        return loss

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        start = (1 - self.recipe.average) * self.recipe.epochs
        if self.average is not None and self.moment(batch_idx) > start:
            self.average.update_parameters(self.model)

    def on_validation_start(self) -> None:
        if self.averaged is not None and self.share < self.method.freeze_norms:
            with self.trainer.precision_plugin.forward_context():
                update_bn(islice(self.batches, NORM_BATCHES), self.measured)

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        images, labels = batch
        with torch.autocast(self.device.type, enabled=False), IntegerConvolutions():
            logits = self.measured(images)
        loss = loss_of(self.method.loss, logits, labels)
        self.tallies[self.sets[dataloader_idx]].add(loss, (logits.argmax(1) == labels).sum(), len(labels))


def modules_in_call_order(model: nn.Module, images: Tensor) -> list[tuple[str, nn.Module, bool]]:
    """Run the model once; give each module's name, the module and whether its output is finite, in order of return."""
    seen: list[tuple[str, nn.Module, bool]] = []

    def record(name: str) -> Any:
        def hook(module: nn.Module, arguments: Any, output: Any) -> None:
            seen.append((name, module, not isinstance(output, Tensor) or bool(output.isfinite().all())))

        return hook

    handles = [module.register_forward_hook(record(name)) for name, module in model.named_modules() if name]
    try:
        with torch.no_grad():
            model(images)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def find_not_finite(model: nn.Module, images: Tensor) -> str:
    """Name where a number stopped being finite: an output on the way forward, else a gradient on the way back.

    Args:
        model: with the gradients of the failed step still in ``.grad``.
        images: the failed step's inputs.
    """
    order = modules_in_call_order(model, images)
    for name, _, finite in order:
        if not finite:
            return f"the output of layer '{name}'"
    for name, module, _ in reversed(order):
        gradients = (parameter.grad for parameter in module.parameters(recurse=False))
        if not all(bool(gradient.isfinite().all()) for gradient in gradients if gradient is not None):
            return f"the gradient of layer '{name}'"
    return "the loss"
