"""One training run, from settings to a run folder."""

from __future__ import annotations

import contextlib
import logging
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import nn

from lowbit import data, methods, models
from lowbit.data import ImageData
from lowbit.data.base import Labels
from lowbit.errors import UsageError
from lowbit.files import remove_partial_files
from lowbit.hardware import machine, versions
from lowbit.layers import quantized_layers
from lowbit.memory import keep_freed_memory
from lowbit.methods.base import Method, Recipe
from lowbit.runs import Run, write_json
from lowbit.training.batches import EvalBatches, Normalise, TrainBatches, derived_seed
from lowbit.training.callbacks import FiniteCheck, ProgressBar, Recorder, Row, best, write_metrics
from lowbit.training.checkpoints import Checkpoint
from lowbit.training.diagnostics import Diagnostics, Probe
from lowbit.training.distillation import load_teacher
from lowbit.training.environment import PRECISIONS, auto_precision, device_name
from lowbit.training.initialise import InitReport, check_ranges, init_from, rest_of
from lowbit.training.lock import sole_process, visible
from lowbit.training.module import TrainingModule, loss_of
from lowbit.training.settings import (
    TrainConfig,
    check_augmentation,
    choose_recipe,
    describe_data,
    describe_request,
    refuse_changes,
    with_later_settings,
)
from lowbit.training.whitening import freeze_first_layer_, whiten_first_layer_

EVAL_BATCH = 250
PROBE_IMAGES = 64
MAX_THREADS = 1024


def train(config: TrainConfig) -> Run:
    """Train a model and leave a run folder.

    The folder holds config.json, metrics.csv (a row per epoch), model.safetensors (the best epoch on the validation
    images, else the last one), checkpoints/ and tensorboard/, and diagnostics.json when the run is diagnosed. The test
    set is measured each epoch and chooses nothing.

    Returns:
        The finished run.

    Raises:
        UsageError: a wrong setting; ``out`` exists and ``resume`` is False; resuming with other settings.
        LowbitError: data cannot be read, the disk is full, a number is not finite, or another process trains there.
        KeyboardInterrupt: passed on, after a sentence on how to resume; ``args`` hold SIGTERM if it was that.
    """
    say = print_to_stderr if config.progress else _say_nothing
    run = Run(Path(config.out))
    try:
        str(run.path).encode()
    except UnicodeEncodeError:
        raise UsageError(f"--out {str(run.path)!a} is no text in UTF-8, as pages and tables need; rename it") from None
    if run.path.exists() and not run.path.is_dir():
        raise UsageError(f"{run.path} exists and is no run folder; choose another --out")
    try:
        with sole_process(run.path):
            started = run.config_path.is_file()
            if started and not config.resume:
                raise UsageError(f"{run.path} already holds a run; go on with --resume or choose another --out")
            if not started and visible(run.path):
                raise UsageError(f"{run.path} exists and is no run folder; choose another --out")
            return _train(config, run, started, say)
    except KeyboardInterrupt:
        if run.config_path.is_file():
            print_to_stderr(f"stopped; `lowbit train --resume --out {run.path}` goes on from the last finished epoch")
        raise


def _train(config: TrainConfig, run: Run, started: bool, say: Callable[[str], None]) -> Run:
    recorded = with_later_settings(run.config) if started else {}
    methods.registry.check_options(config.method, config.method_options)
    method = methods.registry[config.method](**config.method_options)
    recipe_name, recipe = choose_recipe(method, config)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if config.threads is not None and not 1 <= config.threads <= MAX_THREADS:
        raise UsageError(f"--threads is {config.threads}, but must be from 1 to {MAX_THREADS}")
    if config.seed < 0:
        raise UsageError(f"--seed is {config.seed}, but must be at least 0")
    if device.type == "cpu":
        keep_freed_memory()
    torch.set_num_threads(config.threads or recorded.get("threads") or torch.get_num_threads())
    precision = config.precision
    if precision == "auto":
        precision = recorded.get("precision") or auto_precision(device)
    if precision not in PRECISIONS:
        raise UsageError(f"--precision is '{precision}', but must be auto, {' or '.join(PRECISIONS)}")
    settings: dict[str, Any] = {
        **describe_request(config, recipe_name, recipe),
        "precision": precision,
        "threads": torch.get_num_threads(),
    }
    if started:
        refuse_changes(run, recorded, settings)
        if "finished" in recorded:
            say(f"{run.path} finished its {recipe.epochs} epochs already; nothing to do")
            return run
        remove_partial_files(run.path, run.checkpoints_path)
    rest = recorded.get("rest") if started else rest_of(config.init_from)
    if rest is not None:
        settings["rest"] = rest
    images = data.load(config.data, config.data_dir, config.image_size)
    settings |= describe_data(config, images)
    check_augmentation(recipe, images)
    if started:
        refuse_changes(run, recorded, settings)
    split = images.split(config.val_fraction, config.seed)
    if config.val_fraction and not started:
        for option, source in (("--init-from", config.init_from), ("--distill-from", config.distill_from)):
            if source is not None:
                refuse_other_split(option, Path(source), config, images)
    teacher = None
    if config.distill_from is not None:
        teacher = load_teacher(config.distill_from, settings).to(device).to(memory_format=torch.channels_last)
    model, report = make_model(config, method, recipe, settings, images, split[0], run.checkpoint_path.is_file())
    if report is not None:
        say(str(report))
        if started and recorded.get("init_report", {}).get("sha256") not in (None, report.sha256):
            raise UsageError(
                f"--init-from {config.init_from}: its weights are no longer those that {run.path} started from; "
                "train into another folder"
            )
    environment = {"versions": versions("torch", "numpy", "lightning"), "hardware": machine(device_name(device))}
    if started and environment != {key: recorded.get(key) for key in environment}:
        say("resuming with other versions or on another machine, which config.json records; last bits may differ")
        recorded["resumed"] = [*recorded.get("resumed", []), {"date": _now(), **environment}]
        write_json(run.config_path, recorded)
    if not started:
        recorded = {"lowbit": versions()["lowbit"], **settings, **environment, "started": _now()}
        if report is not None:
            recorded["init_report"] = asdict(report)
        write_json(run.config_path, recorded)
    rows = fit(model, method, recipe, images, split, run, config, precision, device, say, teacher)
    summary: dict[str, Any] = {}
    if config.val_fraction:
        top = best(rows, "val_accuracy")
        summary["best"] = {"epoch": int(top["epoch"]), "val_accuracy": top["val_accuracy"]}
    top = best(rows, "test_accuracy")
    summary["best_test"] = {"epoch": int(top["epoch"]), "accuracy": top["test_accuracy"]}
    seconds = round(sum(row["seconds"] for row in rows), 3)
    write_json(run.config_path, {**recorded, **summary, "finished": _now(), "seconds": seconds})
    return run


def make_model(
    config: TrainConfig,
    method: Method,
    recipe: Recipe,
    settings: Mapping[str, Any],
    images: ImageData,
    chosen: Labels,
    resuming: bool,
) -> tuple[nn.Module, InitReport | None]:
    """The network that a run begins with; where it resumes, one that its checkpoint's weights fit.

    First its own weights, drawn by the run's seed, then those that the images of ``chosen`` whiten, then those of
    ``--init-from``: what comes later replaces what came before, also in the rest, which has been made low-bit by then.

    Returns:
        The network, and what became of the weights of ``--init-from``, if they were read.

    Raises:
        UsageError: there is nothing to diagnose, or weights do not fit.
    """
    torch.manual_seed(derived_seed(config.seed, 0, 0))
    model = models.create(
        config.model,
        num_classes=len(images.classes),
        method=method,
        in_channels=settings["in_channels"],
        image_size=settings["image_size"],
        **config.model_options,
    )
    if config.diagnose and not quantized_layers(model):
        raise UsageError(
            f"method '{config.method}' quantizes no layer of {config.model}: there is nothing to diagnose; "
            "leave --diagnose out"
        )
    if recipe.whiten and not resuming:
        normalise = Normalise(images.preprocessing, torch.device("cpu"))
        whiten_first_layer_(model, images.train_images, chosen, normalise)
    if recipe.freeze_first:
        freeze_first_layer_(model)
    if "rest" in settings:
        models.quantize_rest_(model, settings["rest"])
    if config.init_from is None or resuming:
        return model, None
    report = init_from(model, config.init_from)
    if "rest" in settings:
        check_ranges(model, report.source)
    return model, report


def refuse_other_split(option: str, source: Path, config: TrainConfig, images: ImageData) -> None:
    """Refuse to choose an epoch by images that the run of ``source``, on the same data, was trained on.

    Raises:
        UsageError: it was trained with another validation split.
    """
    run = Run.of(source)
    if not run.config_path.is_file():
        return
    theirs = run.config
    # The hash is of images in the size of the run; of another size, the same data may still be meant.
    if theirs["data"]["hash"] != images.hash and theirs["data"]["spec"] != config.data:
        return
    # What was calibrated has the weights and the split of its source; its own seed chose other images.
    seed = theirs["calibration"]["source_seed"] if "calibration" in theirs else theirs["seed"]
    if (theirs["data"]["val_fraction"], seed) != (config.val_fraction, config.seed):
        raise UsageError(
            f"{option} {source}: it was trained on some of the images that are to validate this run; train it with the "
            "same --val-fraction and --seed, or leave --val-fraction out"
        )


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
    teacher: nn.Module | None = None,
) -> list[Row]:
    """Train from the run's checkpoint, or from the model as it is, to the recipe's last epoch.

    Returns:
        The metrics of all epochs, those before the checkpoint included.
    """
    checkpoint = Checkpoint.load(run.checkpoint_path) if run.checkpoint_path.is_file() else None
    rows, diagnosed = (checkpoint.rows, checkpoint.diagnostics) if checkpoint else ([], [])
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
        recipe.crop,
        recipe.cutout,
    )
    evaluated = {"test": (images.test_images, images.test_labels)}
    if len(val_indices):
        evaluated = {"val": (images.train_images[val_indices], images.train_labels[val_indices]), **evaluated}
    loaders = [EvalBatches(*pair, images.preprocessing, EVAL_BATCH, device) for pair in evaluated.values()]
    module = TrainingModule(
        model,
        method,
        recipe,
        batches,
        tuple(evaluated),
        config.seed,
        checkpoint,
        teacher,
    )
    callbacks: list[Callback] = [FiniteCheck(), Recorder(run, rows, bool(len(val_indices)), say, diagnosed)]
    if config.diagnose:
        # Ahead of the recorder, whose checkpoint holds the rows.
        callbacks.insert(1, Diagnostics(model, choose_probe(batches, module), run.diagnostics_path, diagnosed))
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


def choose_probe(batches: TrainBatches, module: TrainingModule) -> Probe:
    """Some train images, as they are without augmentation, drawn by the run's seed, with the method's loss.

    That is a loss of the labels, also where a teacher's logits are the target.
    """
    generator = torch.Generator().manual_seed(derived_seed(batches.seed, 0, 3))
    chosen = torch.randperm(len(batches.images), generator=generator)[:PROBE_IMAGES].to(batches.images.device)
    loss = partial(loss_of, module.method.loss, label_smoothing=module.recipe.label_smoothing)
    return Probe(batches.normalise(batches.images[chosen]), batches.labels[chosen], loss)


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
    """Raise KeyboardInterrupt where Lightning turns it into an exit, and undo its deafness to Ctrl-C.

    SIGTERM, which Lightning turns into an exit of status 0, is passed on alike, with its number as the argument.
    """
    handler = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SIGTERMException:
        raise KeyboardInterrupt(signal.SIGTERM) from None
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


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
