"""One training run, from settings to a run folder."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import logging
import math
import os
import platform
import signal
import sys
import typing
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from torch import nn

import lowbit
from lowbit import data, methods, models
from lowbit.data import ImageData
from lowbit.data.base import Labels
from lowbit.errors import LowbitError, UsageError
from lowbit.methods.base import Method, Recipe
from lowbit.runs import Run, write_json
from lowbit.training.batches import EvalBatches, TrainBatches, derived_seed
from lowbit.training.callbacks import FiniteCheck, ProgressBar, Recorder, Row, best, write_metrics
from lowbit.training.checkpoints import Checkpoint, remove_partial_files
from lowbit.training.initialise import init_from
from lowbit.training.module import TrainingModule

EVAL_BATCH = 500
PRECISIONS = {"bf16": "bf16-mixed", "float32": "32-true"}


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
        precision: ``auto`` (bf16 on a GPU or a CPU with AMX, else float32), ``bf16`` or ``float32``.
        val_fraction: part of the train images that selects the best epoch; 0 keeps the last epoch's weights.
        init_from: run folder or safetensors file to take fitting weights from.
        resume: go on with the run in ``out``.
        threads: of torch on the CPU; None leaves torch's own number.
        progress: print the bar and a line per epoch to standard error.
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
    resume: bool = False
    threads: int | None = None
    progress: bool = True

    @classmethod
    def resuming(cls, out: str | Path, progress: bool = True) -> TrainConfig:
        """The settings of the run in ``out``, to go on with it.

        Raises:
            LowbitError: there is no run, or its config.json is damaged.
        """
        run = Run.open(out)
        config = run.config
        try:
            recipe = {name: value for name, value in config["recipe"].items() if name != "name"}
            return cls(
                out=out,
                method=config["method"]["name"],
                model=config["model"]["name"],
                data=config["data"]["spec"],
                data_dir=config["data"]["data_dir"],
                image_size=config["data"]["image_size"],
                method_options=config["method"]["options"],
                model_options=config["model"]["options"],
                recipe=Recipe(**{**recipe, "milestones": tuple(recipe["milestones"])}),
                seed=config["seed"],
                precision=config["precision"],
                val_fraction=config["data"]["val_fraction"],
                init_from=config["init_from"],
                resume=True,
                threads=config["threads"],
                progress=progress,
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise LowbitError(f"{run.config_path} is damaged ({error!r}); train again with another --out") from None


def train(config: TrainConfig) -> Run:
    """Train a model and leave a run folder.

    The folder holds config.json, metrics.csv (a row per epoch), model.safetensors (the best epoch on the validation
    images, else the last one), checkpoints/ and tensorboard/. The test set is measured each epoch and chooses nothing.

    Returns:
        The finished run.

    Raises:
        UsageError: a wrong setting; ``out`` exists and ``resume`` is False; resuming with other settings.
        LowbitError: data cannot be read, the disk is full, or a number is not finite.
        KeyboardInterrupt: passed on, after a sentence on how to resume.
    """
    say = print_to_stderr if config.progress else _say_nothing
    run = Run(Path(config.out))
    started = run.config_path.is_file()
    if started and not config.resume:
        raise UsageError(f"{run.path} already holds a run; go on with --resume or choose another --out")
    if not started and run.path.exists() and (not run.path.is_dir() or _visible(run.path)):
        raise UsageError(f"{run.path} exists and is no run folder; choose another --out")
    try:
        return _train(config, run, started, say)
    except KeyboardInterrupt:
        if run.config_path.is_file():
            print_to_stderr(
                f"stopped; `lowbit train --resume --out {run.path}` with the same options goes on "
                "from the last finished epoch"
            )
        raise


def _train(config: TrainConfig, run: Run, started: bool, say: Callable[[str], None]) -> Run:
    recorded = run.config if started else {}
    methods.registry.check_options(config.method, config.method_options)
    method = methods.registry[config.method](**config.method_options)
    recipe_name, recipe = choose_recipe(method, config)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if config.threads is not None and config.threads < 1:
        raise UsageError(f"--threads is {config.threads}, but must be at least 1")
    torch.set_num_threads(config.threads or recorded.get("threads") or torch.get_num_threads())
    precision = config.precision
    if precision == "auto":
        precision = recorded.get("precision") or auto_precision(device)
    if precision not in PRECISIONS:
        raise UsageError(f"--precision is '{precision}', but must be auto, {' or '.join(PRECISIONS)}")
    settings: dict[str, Any] = {
        "model": {"name": config.model, "options": dict(config.model_options)},
        "method": {"name": config.method, "options": dict(config.method_options)},
        "recipe": {"name": recipe_name, **asdict(recipe)},
        "epochs": recipe.epochs,
        "seed": config.seed,
        "precision": precision,
        "threads": torch.get_num_threads(),
        "init_from": None if config.init_from is None else str(config.init_from),
    }
    if started:
        refuse_changes(run, recorded, settings)
        if "finished" in recorded:
            say(f"{run.path} finished its {recipe.epochs} epochs already; nothing to do")
            return run
        remove_partial_files(run.path)
    images = data.load(config.data, config.data_dir, config.image_size)
    settings |= describe_data(config, images)
    if started:
        refuse_changes(run, recorded, settings)
    split = images.split(config.val_fraction, config.seed)
    torch.manual_seed(derived_seed(config.seed, 0, 0))
    model = models.create(
        config.model,
        num_classes=len(images.classes),
        method=method,
        in_channels=settings["in_channels"],
        image_size=settings["image_size"],
        **config.model_options,
    )
    report = init_from(model, config.init_from) if config.init_from is not None else None
    if report is not None and not (started and _checkpoint(run).is_file()):
        say(str(report))
    if not started:
        recorded = {
            "lowbit": lowbit.__version__,
            **settings,
            "versions": versions(),
            "hardware": {"cpu": cpu_name(), "cores": os.cpu_count(), "device": device_name(device)},
            "started": _now(),
        }
        if report is not None:
            recorded["init_report"] = asdict(report)
        write_json(run.config_path, recorded)
    rows = fit(model, method, recipe, images, split, run, config, precision, device, say)
    summary: dict[str, Any] = {}
    if config.val_fraction:
        top = best(rows, "val_accuracy")
        summary["best"] = {"epoch": int(top["epoch"]), "val_accuracy": top["val_accuracy"]}
    top = best(rows, "test_accuracy")
    summary["best_test"] = {"epoch": int(top["epoch"]), "accuracy": top["test_accuracy"]}
    seconds = round(sum(row["seconds"] for row in rows), 3)
    write_json(run.config_path, {**recorded, **summary, "finished": _now(), "seconds": seconds})
    return run


def fit(
    model: nn.Module,
    method: Method,
    recipe: Recipe,
    images: ImageData,
    split: tuple[Labels, Labels],
    run: Run,
    config: TrainConfig,
    precision: str,
    device: torch.device,
    say: Callable[[str], None],
) -> list[Row]:
    """Train from the run's checkpoint, or from the model as it is, to the recipe's last epoch.

    Returns:
        The metrics of all epochs, those before the checkpoint included.
    """
    checkpoint = Checkpoint.load(_checkpoint(run)) if _checkpoint(run).is_file() else None
    rows = checkpoint.rows if checkpoint else []
    if checkpoint:
        say(f"resuming after epoch {len(rows)} of {recipe.epochs}")
        if len(rows) == recipe.epochs:
            write_metrics(run, rows)
            return rows
    model.to(memory_format=torch.channels_last)
    train_indices, val_indices = split
    batches = TrainBatches(
        images.train_images[train_indices],
        images.train_labels[train_indices],
        images.preprocessing,
        recipe.batch_size,
        config.seed,
        recipe.augment,
        images.flip,
        device,
    )
    evaluated = {"test": (images.test_images, images.test_labels)}
    if len(val_indices):
        evaluated = {"val": (images.train_images[val_indices], images.train_labels[val_indices]), **evaluated}
    loaders = [EvalBatches(*pair, images.preprocessing, EVAL_BATCH, device) for pair in evaluated.values()]
    module = TrainingModule(
        model,
        method.loss,
        recipe,
        batches,
        tuple(evaluated),
        config.seed,
        checkpoint,
    )
    callbacks: list[Callback] = [FiniteCheck(), Recorder(run, rows, bool(len(val_indices)), say)]
    show_bar = config.progress and sys.stderr.isatty()
    if show_bar:
        callbacks.append(ProgressBar())
    with quiet_lightning():
        trainer = pl.Trainer(
            accelerator="gpu" if device.type == "cuda" else "cpu",
            devices=1,
            precision=PRECISIONS[precision],  # type: ignore[arg-type]
            max_epochs=recipe.epochs,
            logger=False,
            callbacks=callbacks,
            enable_checkpointing=False,
            enable_progress_bar=show_bar,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            use_distributed_sampler=False,
            inference_mode=False,
        )
        trainer.fit_loop.epoch_progress.current.processed = len(rows)  # type: ignore[attr-defined]
        with interrupts_pass():
            trainer.fit(module, batches, loaders)
    return rows


def choose_recipe(method: Method, config: TrainConfig) -> tuple[str, Recipe]:
    """The recipe's name and the recipe with all overrides, checked.

    Raises:
        UsageError: an unknown recipe or field, or a value out of range.
    """
    if isinstance(config.recipe, Recipe):
        name, recipe = "custom", config.recipe
    elif config.recipe is None or config.recipe == "default":
        name, recipe = "default", method.recipe
    elif config.recipe in method.recipes:
        name, recipe = config.recipe, method.recipes[config.recipe]
    else:
        choices = ", ".join(["default", *method.recipes])
        raise UsageError(f"method '{method.name}' has no recipe '{config.recipe}'; choose from {choices}")
    known = [entry.name for entry in fields(Recipe)]
    for key in config.overrides:
        if key not in known:
            raise UsageError(f"a recipe has no field '{key}'; its fields: {', '.join(known)}")
    recipe = replace(recipe, **config.overrides)
    if config.epochs is not None:
        recipe = replace(recipe, epochs=config.epochs)
    check_recipe(recipe)
    return name, recipe


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
        "momentum": (0 <= recipe.momentum < 1, "at least 0 and below 1"),
        "weight_decay": (0 <= recipe.weight_decay < math.inf, "at least 0"),
        "gamma": (0 < recipe.gamma < math.inf, "above 0"),
        "warmup": (0 <= recipe.warmup < math.inf, "at least 0"),
        "epochs": (recipe.epochs >= 1, "at least 1"),
        "batch_size": (recipe.batch_size >= 2, "at least 2"),
        "label_smoothing": (0 <= recipe.label_smoothing < 1, "at least 0 and below 1"),
        "milestones": (all(0 < milestone < 1 for milestone in recipe.milestones), "fractions between 0 and 1"),
    }
    for name, (good, wanted) in ranges.items():
        if not good:
            raise UsageError(f"recipe field {name} is {getattr(recipe, name)}, but must be {wanted}")


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
                "resume with the same settings or choose another --out"
            )


def _flatten(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in settings.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def auto_precision(device: torch.device) -> str:
    """``bf16`` where its matrix products are fast: a GPU that has it, or a CPU with AMX; else ``float32``."""
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    return "bf16" if "amx_bf16" in _cpuinfo("flags").split() else "float32"


def cpu_name() -> str:
    """Model name of the CPU."""
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def device_name(device: torch.device) -> str:
    """Name of the GPU, or ``cpu``."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def _cpuinfo(key: str) -> str:
    """The first processor's entry in /proc/cpuinfo; empty where there is none."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.partition(":")[0].strip() == key), "")


def versions() -> dict[str, str]:
    """Versions that a run's figures depend on."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "lightning": importlib.metadata.version("lightning"),
        "lowbit": lowbit.__version__,
    }


@contextlib.contextmanager
def quiet_lightning() -> Iterator[None]:
    """Keep Lightning's notes on devices, its tips and its advice on data loaders off the terminal."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"lightning\..*")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextlib.contextmanager
def interrupts_pass() -> Iterator[None]:
    """Raise KeyboardInterrupt where Lightning turns it into an exit, and undo its deafness to Ctrl-C."""
    handler = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit as exit_:
        if not isinstance(exit_.__context__, KeyboardInterrupt):
            raise
        signal.signal(signal.SIGINT, handler)
        raise KeyboardInterrupt from None


def print_to_stderr(text: str) -> None:
    """A line on standard error; above the progress bar, where one is shown."""
    print(text, file=sys.stderr, flush=True)


def _say_nothing(text: str) -> None:
    pass


def _checkpoint(run: Run) -> Path:
    return run.checkpoints_path / "last.ckpt"


def _visible(folder: Path) -> bool:
    return any(not entry.name.startswith(".") for entry in folder.iterdir())


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
