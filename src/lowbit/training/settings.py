"""What a run is asked to do, checked before anything is computed, and held against what a stopped run was asked."""

from __future__ import annotations

import json
import math
import typing
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from lowbit import methods, models
from lowbit.data import ImageData
from lowbit.errors import LowbitError, UsageError
from lowbit.methods.base import Method, Recipe
from lowbit.registry import check_value, field_types
from lowbit.runs import Run
from lowbit.training.distillation import weights_hash

# What may be changed in a recipe, by name, with its type.
RECIPE_FIELDS = {name: kind for name, kind in field_types(Recipe).items() if name != "source"}


@dataclass(frozen=True)
class TrainConfig:
    """Settings of a run.

    Attributes:
        out: the run folder to make.
        method, model, data: registered names; data may be ``folder:PATH``.
        data_dir, image_size: see `lowbit.data.load`.
        method_options, model_options: keyword arguments of the method and of the model.
        recipe: name of one of the method's recipes, a `Recipe`, or None for the method's default.
        overrides: fields of the recipe to change, by name.
        epochs: short for ``overrides={"epochs": ...}``.
        seed: of initial weights, split, order, augmentation and dropout.
        precision: ``bf16``, ``float32`` or ``auto``: bf16 on a GPU, a CPU with AMX and AMD's with AVX-512 BF16, else
            float32.
        val_fraction: part of the train images that selects the best epoch; 0 keeps the last epoch's weights.
        init_from: run folder or safetensors file to take fitting weights from. What its method has left in float, and
            calibration made low-bit, stays low-bit.
        distill_from: run folder of a teacher on the same data, whose logits are the target in place of the labels, or,
            with a ``distill_weight`` below 1, beside them.
        resume: go on with the run in ``out``.
        threads: of torch on the CPU; None leaves torch's own number.
        progress: print the bar and a line per epoch to standard error.
        diagnose: look at each quantized layer after each epoch, and write diagnostics.json; changes no weight.
    """

    out: str | Path
    method: str = "xnor_net"
    model: str = "vgg16"
    data: str = "digits"
    data_dir: str | Path | None = None
    image_size: int | None = None
    method_options: Mapping[str, Any] = field(default_factory=dict)
    model_options: Mapping[str, Any] = field(default_factory=dict)
    recipe: str | Recipe | None = None
    overrides: Mapping[str, Any] = field(default_factory=dict)
    epochs: int | None = None
    seed: int = 0
    precision: str = "auto"
    val_fraction: float = 0.0
    init_from: str | Path | None = None
    distill_from: str | Path | None = None
    resume: bool = False
    threads: int | None = None
    progress: bool = True
    diagnose: bool = False

    @classmethod
    def resuming(cls, out: str | Path, progress: bool = True) -> TrainConfig:
        """The settings of the run in ``out``, to go on with it.

        Raises:
            LowbitError: there is no run, or its config.json is damaged.
        """
        run = Run.open(out)
        config = run.config
        if "calibration" in config:
            raise UsageError(f"{run.path} was calibrated, not trained; `lowbit train --init-from {run.path}` tunes it")
        method, model, recipe, images = (config[key] for key in ("method", "model", "recipe", "data"))
        types = field_types(Recipe)
        try:
            return cls(
                out=out,
                method=check_value(method["name"], str, "method"),
                model=check_value(model["name"], str, "model"),
                data=check_value(images["spec"], str, "data"),
                data_dir=_check_optional(images["data_dir"], str, "data_dir"),
                image_size=_check_optional(images["image_size"], int, "image_size"),
                method_options=methods.registry.check_values(method["name"], method["options"]),
                model_options=models.registry.check_values(model["name"], model["options"]),
                recipe=Recipe(
                    **{
                        name: check_value(value, types[name], f"recipe field '{name}'")
                        for name, value in recipe.items()
                        if name != "name"
                    }
                ),
                seed=check_value(config["seed"], int, "seed"),
                precision=check_value(config["precision"], str, "precision"),
                val_fraction=check_value(images["val_fraction"], float, "val_fraction"),
                init_from=_check_optional(config["init_from"], str, "init_from"),
                distill_from=_check_optional((config.get("distill_from") or {}).get("run"), str, "distill_from"),
                resume=True,
                threads=check_value(config["threads"], int, "threads"),
                progress=progress,
                diagnose=check_value(config.get("diagnose", False), bool, "diagnose"),
            )
        except (TypeError, AttributeError, KeyError, UsageError) as error:
            raise LowbitError(f"{run.config_path} is damaged ({error}); train again with another --out") from None


def _check_optional(value: Any, kind: type, what: str) -> Any:
    return None if value is None else check_value(value, kind, what)


def choose_recipe(method: Method, config: TrainConfig) -> tuple[str, Recipe]:
    """The recipe's name and the recipe with all overrides, checked.

    Raises:
        UsageError: an unknown recipe or field, a value out of range, or one that the method cannot heed.
    """
    if isinstance(config.recipe, Recipe):
        name, recipe = "custom", config.recipe
    else:
        name = config.recipe or "default"
        if name not in method.named_recipes:
            choices = ", ".join(method.named_recipes)
            raise UsageError(f"method '{method.name}' has no recipe '{name}'; choose from {choices}")
        recipe = method.named_recipes[name]
    for key in config.overrides:
        if key not in RECIPE_FIELDS:
            raise UsageError(f"a recipe has no field '{key}'; its fields: {', '.join(RECIPE_FIELDS)}")
    recipe = replace(recipe, **config.overrides)
    if config.epochs is not None:
        recipe = replace(recipe, epochs=config.epochs)
    check_recipe(recipe)
    if recipe.label_smoothing and method.loss != "cross_entropy":
        raise UsageError(
            f"recipe field label_smoothing is for cross entropy, and the loss of '{method.name}' is {method.loss}; "
            "leave it out"
        )
    return name, recipe


# What a field of the recipe needs, where it is neither the optimizer nor the schedule.
NEEDS = {"crop": "augment", "decay_all": "weight_decay"}
# What is the optimizer's alone, which a method's own rule of updates stands in for.
OPTIMIZERS_OWN = frozenset({"optimizer", "momentum", "nesterov", "weight_decay", "decay_all", "bias_rate"})


def check_effect(method: Method, recipe: Recipe, asked: Iterable[str], taught: bool) -> None:
    """Refuse fields that were asked for, for this run alone, and change nothing beside the others or with the method.

    Raises:
        UsageError: there is one; the message names it.
    """
    effective = recipe.settings()
    for name in asked:
        if method.update is not None and name in OPTIMIZERS_OWN:
            if getattr(recipe, name) != getattr(method.recipe, name):
                raise UsageError(
                    f"recipe field {name} is for an optimizer, and '{method.name}' moves its weights by a rule of its "
                    "own; leave it out"
                )
        elif name in ("distill_weight", "temperature"):
            if not taught:
                raise UsageError(
                    f"recipe field '{name}' is for a teacher; name one with --distill-from (distill_from in a study), "
                    "or leave it out"
                )
        elif name not in effective and getattr(recipe, name) != getattr(Recipe(), name):
            needs = [NEEDS[name]] if name in NEEDS else ["optimizer", "schedule"]
            beside = " and ".join(f"{need} {getattr(recipe, need)}" for need in needs)
            raise UsageError(f"recipe field {name} has no effect beside {beside}; leave it out")
        elif name == "schedule" and recipe.schedule == "step" and not recipe.milestones:
            raise UsageError("recipe field schedule is step, which needs milestones: set recipe.milestones")
        elif name == "warmup" and recipe.warmup >= recipe.epochs:
            raise UsageError(
                f"recipe field warmup is {recipe.warmup} of {recipe.epochs} epochs, so that the learning rate never "
                "comes to its peak; make it shorter"
            )
        elif name == "label_smoothing" and taught and recipe.distill_weight == 1:
            raise UsageError(
                "recipe field label_smoothing is of the labels, and a teacher's logits are the only target; "
                "set distill_weight below 1, or leave it out"
            )


def check_recipe(recipe: Recipe) -> None:
    """Refuse a recipe that cannot be trained.

    Raises:
        UsageError: a field is out of range; the message names it.
    """
    hints = typing.get_type_hints(Recipe)
    for name in ("optimizer", "schedule"):
        choices = typing.get_args(hints[name])
        if getattr(recipe, name) not in choices:
            raise UsageError(f"recipe field {name} is '{getattr(recipe, name)}', but must be {' or '.join(choices)}")
    ranges = {
        "learning_rate": (0 < recipe.learning_rate < math.inf, "above 0"),
        "bias_rate": (0 < recipe.bias_rate < math.inf, "above 0"),
        "momentum": (0 <= recipe.momentum < 1, "at least 0 and below 1"),
        "nesterov": (not recipe.nesterov or recipe.momentum > 0, "false where there is no momentum"),
        "weight_decay": (0 <= recipe.weight_decay < math.inf, "at least 0"),
        "gamma": (0 < recipe.gamma < math.inf, "above 0"),
        "warmup": (0 <= recipe.warmup < math.inf, "at least 0"),
        "epochs": (recipe.epochs >= 1, "at least 1"),
        "batch_size": (recipe.batch_size >= 2, "at least 2"),
        "distill_weight": (0 < recipe.distill_weight <= 1, "above 0 and at most 1"),
        "temperature": (0 < recipe.temperature < math.inf, "above 0"),
        "average": (0 <= recipe.average <= 1, "at least 0 and at most 1"),
        "crop": (recipe.crop >= 0, "at least 0"),
        "cutout": (recipe.cutout >= 0, "at least 0"),
        "label_smoothing": (0 <= recipe.label_smoothing < 1, "at least 0 and below 1"),
        "milestones": (all(0 < milestone < 1 for milestone in recipe.milestones), "fractions between 0 and 1"),
    }
    for name, (good, wanted) in ranges.items():
        if not good:
            raise UsageError(f"recipe field {name} is {getattr(recipe, name)}, but must be {wanted}")


def check_augmentation(recipe: Recipe, images: ImageData) -> None:
    """Refuse to cut out, or to shift by, whole images.

    Raises:
        UsageError: a field is as large as the images; the message names it.
    """
    side = min(images.preprocessing.shape[1:])
    for name in ("crop", "cutout"):
        if getattr(recipe, name) >= side:
            raise UsageError(
                f"recipe field {name} is {getattr(recipe, name)}, but must be below the images' side, {side}"
            )


def describe_request(config: TrainConfig, recipe_name: str, recipe: Recipe) -> dict[str, Any]:
    """What config.json says of the settings that are known before the data and the machine are."""
    return {
        "model": {"name": config.model, "options": dict(config.model_options)},
        "method": {"name": config.method, "options": dict(config.method_options)},
        "recipe": {"name": recipe_name, **asdict(recipe)},
        "epochs": recipe.epochs,
        "seed": config.seed,
        "init_from": None if config.init_from is None else str(config.init_from),
        "distill_from": None
        if config.distill_from is None
        else {"run": str(config.distill_from), "weights": weights_hash(config.distill_from)},
        "diagnose": config.diagnose,
    }


def describe_data(config: TrainConfig, images: ImageData) -> dict[str, Any]:
    """What config.json says of the data and of the input that the model is made for."""
    channels, height, width = images.preprocessing.shape
    if height != width:
        raise UsageError(
            f"{config.data} has images of {width}x{height} pixels; give --image-size N to make them square"
        )
    return {
        "num_classes": len(images.classes),
        "in_channels": channels,
        "image_size": height,
        "classes": list(images.classes),
        "data": {
            "name": images.name,
            "spec": config.data,
            "data_dir": None if config.data_dir is None else str(config.data_dir),
            "image_size": config.image_size,
            "hash": images.hash,
            "train_images": len(images.train_labels),
            "test_images": len(images.test_labels),
            "val_fraction": config.val_fraction,
        },
        "preprocessing": images.preprocessing.to_dict(),
    }


# Where the data lies and what the recipe was called may change between start and resume.
FREE = frozenset({"recipe.name", "recipe.source", "data.spec", "data.data_dir", "data.name"})


def refuse_changes(run: Run, recorded: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Compare settings with those that the run was started with.

    Raises:
        UsageError: one differs; the message names it.
    """
    old = dict(_flatten({key: recorded.get(key) for key in settings}))
    new = dict(_flatten(json.loads(json.dumps(settings))))
    for key in sorted(old.keys() | new.keys()):
        if key not in FREE and old.get(key) != new.get(key):
            raise UsageError(
                f"{run.path} was started with {key} {old.get(key)}, not {new.get(key)}; "
                "go on with the same settings or train into another folder"
            )


def with_later_settings(recorded: Mapping[str, Any]) -> dict[str, Any]:
    """``recorded``, and for settings that came after the version that wrote it, what it did then."""
    later = {"diagnose": False, "distill_from": None}
    return {**later, **recorded, "recipe": {**asdict(Recipe()), **recorded.get("recipe", {})}}


def _flatten(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in settings.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
