"""What a method is: a small record that names its parts. Only parts that differ between papers are functions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor

from lowbit.quantizers.base import Quantizer
from lowbit.registry import Registry

if TYPE_CHECKING:
    from lowbit.layers.quantized import QuantizedLayer


@dataclass(frozen=True)
class Recipe:
    """How to train: every field can be overridden on the command line.

    Attributes:
        optimizer: ``sgd`` (with ``momentum``), ``adam`` or ``adamw``.
        nesterov: take the gradient at the point where momentum leads (with ``sgd``).
        learning_rate: the peak, after warm-up.
        bias_rate: what it is multiplied by for biases, those of norms among them.
        weight_decay: reaches convolution and linear weights; norms, biases and latent binary weights only with
            ``decay_all`` (a latent weight's size has no meaning for its sign).
        schedule: ``step`` (times ``gamma`` at each of ``milestones``), ``cosine``, ``linear``, ``poly`` (power
            ``gamma``) or ``exponential`` (down to ``gamma`` times the peak).
        milestones: fractions of the epochs, for ``step``.
        warmup: epochs of linear warm-up from 0.
        epochs, batch_size: as they say.
        label_smoothing: of the cross entropy.
        distill_weight, temperature: with a teacher (``distill_from``), the loss is ``1 - distill_weight`` times the
            method's own plus ``distill_weight`` times that of `lowbit.training.distillation` at this temperature.
        average: share of the epochs, at the end, over whose steps the weights are averaged, each step counting the same
            (`lowbit.training.module.TrainingModule`); 0 is never.
        augment: random crop, and flip where the data set allows it.
        crop: pixels of padding that an image is cropped out of; short trainings, which fit too little, want fewer.
        cutout: side of a square, in pixels, cleared in each train image (`lowbit.data.augment.cutout`); 0 is none.
        whiten: start the first convolution, if it is in float, as a whitening of the images' patches
            (`lowbit.training.whitening`); weights to start from replace it.
        freeze_first: keep the first convolution or linear layer (of a `lowbit.layers.Stem` its first one only), which
            has to be in float, as it starts; its gradients are then never computed. What ``whiten`` has not filled of
            it stays as random as it is.
        source: where the recipe comes from, what was changed and why.
    """

    optimizer: Literal["sgd", "adam", "adamw"] = "adamw"
    learning_rate: float = 1e-3
    bias_rate: float = 1.0
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 0.0
    decay_all: bool = False
    schedule: Literal["step", "cosine", "linear", "poly", "exponential"] = "cosine"
    milestones: tuple[float, ...] = ()
    gamma: float = 0.1
    warmup: float = 0.0
    epochs: int = 10
    batch_size: int = 128
    label_smoothing: float = 0.0
    distill_weight: float = 1.0
    temperature: float = 1.0
    average: float = 0.0
    augment: bool = True
    crop: int = 4
    cutout: int = 0
    whiten: bool = False
    freeze_first: bool = False
    source: str = ""

    def settings(self) -> dict[str, Any]:
        """The fields that have an effect beside the others; without ``source``."""
        shown = {
            "bias_rate": self.bias_rate != 1,
            "momentum": self.optimizer == "sgd",
            "nesterov": self.optimizer == "sgd" and self.nesterov,
            "decay_all": self.weight_decay > 0,
            "milestones": self.schedule == "step",
            "gamma": self.schedule in ("step", "poly", "exponential"),
            "warmup": self.warmup > 0,
            "label_smoothing": self.label_smoothing > 0,
            "distill_weight": self.distill_weight < 1,
            "temperature": self.temperature != 1,
            "average": self.average > 0,
            "crop": self.augment,
            "cutout": self.cutout > 0,
            "whiten": self.whiten,
            "freeze_first": self.freeze_first,
            "source": False,
        }
        return {entry.name: getattr(self, entry.name) for entry in fields(self) if shown.get(entry.name, True)}


@dataclass(frozen=True)
class Method:
    """A published way of making a network low-bit.

    Attributes:
        name: registered name.
        title, paper, url: what is shown beside it.
        weight, activation: make a fresh quantizer for one layer; None leaves that side in float.
        input: makes a quantizer for what the network's first layer reads, when that layer is quantized; None leaves its
            input as it is.
        bits_w, bits_a, bits_g: bits of weights, activations and gradients, for tables (32 = float).
        gradient: the identity, applied to what a layer gives in training, which quantizes the gradient that comes back;
            None leaves gradients in float.
        block: name of the block in ``layers.blocks`` whose order the paper uses.
        skip_first, skip_last: leave the first layer (`lowbit.layers.Stem`: all of its layers) and the last in float.
        skip_shortcuts: leave the layers of shortcuts (`lowbit.layers.Shortcut`) in float.
        projection: changes a latent weight in place after each optimizer step, outside autograd.
        update: moves a latent weight in place of the optimizer, given weight, gradient and learning rate.
        initialise: sets a latent weight that `lowbit.models.create` has made, in place of the model's own values.
        phases: called before each epoch with the model's quantized layers, in order, and the share of the epochs that
            is done, 0 to below 1: switches quantizers (`Quantizer.enabled`) and freezes weights. It sets everything
            anew at each call, so that a resumed run finds the same phase.
        freeze_norms: share of the epochs after which batch norms normalise by their running statistics, which then
            stay as they are; 1 is never.
        k_map: whether each result is scaled by the mean magnitude of the inputs that it sums
            (`QuantizedLayer.magnitudes`).
        loss: ``cross_entropy``, ``squared_hinge`` or ``sum_of_squares``.
        recipe: the default recipe.
        recipes: further recipes by name; ``paper`` is the published one, or as much of it as a `Recipe` can say.
    """

    name: str
    title: str
    paper: str
    url: str
    bits_w: int
    bits_a: int
    block: str
    weight: Callable[[], Quantizer] | None = None
    activation: Callable[[], Quantizer] | None = None
    input: Callable[[], Quantizer] | None = None
    gradient: Callable[[Tensor], Tensor] | None = None
    bits_g: int = 32
    skip_first: bool = True
    skip_last: bool = True
    skip_shortcuts: bool = True
    projection: Callable[[Tensor], None] | None = None
    update: Callable[[Tensor, Tensor, float], None] | None = None
    initialise: Callable[[Tensor], None] | None = None
    phases: Callable[[Sequence[QuantizedLayer], float], None] | None = None
    freeze_norms: float = 1.0
    k_map: bool = False
    loss: Literal["cross_entropy", "squared_hinge", "sum_of_squares"] = "cross_entropy"
    recipe: Recipe = field(default_factory=Recipe)
    recipes: dict[str, Recipe] = field(default_factory=dict)

    @property
    def named_recipes(self) -> dict[str, Recipe]:
        """All recipes by the names that ``--recipe`` takes, ``default`` first."""
        return {"default": self.recipe, **self.recipes}


registry: Registry[Callable[..., Method]] = Registry("lowbit.methods", "method")
