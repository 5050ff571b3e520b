"""The run folder: what training leaves behind and everything else reads.

``runs/NAME/`` holds ``config.json``, ``metrics.csv``, ``model.safetensors``, ``evaluation.json`` (after `evaluate`),
``diagnostics.json`` (of a run that is diagnosed), ``checkpoints/`` and ``tensorboard/``. A row of a study also has
``model.lowbit``, ``export.json`` (its size, or why there is none) and ``latency.json``.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from lowbit.errors import LowbitError, UsageError
from lowbit.files import sha256_of, write_whole

# What a run is, and what is known of it: no command writes over these by the way.
OWN_FILES = frozenset(
    {
        "config.json",
        "metrics.csv",
        "model.safetensors",
        "evaluation.json",
        "diagnostics.json",
        "export.json",
        "latency.json",
        "last.ckpt",
    }
)
# What config.json holds of these is a JSON object.
OBJECTS = ("model", "method", "recipe", "data", "preprocessing", "calibration", "rest", "best", "best_test")


def write_json(path: Path, data: Any) -> None:
    """Write ``data`` as indented JSON, whole or not at all."""
    with write_whole(path) as file:
        file.write((json.dumps(data, indent=1, allow_nan=False) + "\n").encode())


def read_json(path: Path, object_hook: Callable[[dict[str, Any]], Any] | None = None) -> Any:
    """Read a JSON file; ``object_hook`` is `json.loads`'s.

    Raises:
        LowbitError: it is missing or is no JSON.
        PermissionError: it may not be read.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"), object_hook=object_hook)
    except FileNotFoundError:
        raise LowbitError(f"{path} does not exist") from None
    except PermissionError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise LowbitError(f"{path} cannot be read as JSON: {error}") from None


def check_output(output: Path, *inputs: Path) -> None:
    """Refuse to write over what a command reads, or over a file that a run consists of.

    Raises:
        UsageError: ``output`` is one of ``inputs``, or one of `OWN_FILES` in a run folder or its ``checkpoints/``.
    """
    folders = (output.parent, output.parent.parent)
    of_run = output.name in OWN_FILES and any(Run(folder).config_path.is_file() for folder in folders)
    if of_run or any(output.is_file() and path.is_file() and output.samefile(path) for path in inputs):
        raise UsageError(f"-o names {output}, which is {'a file of a run' if of_run else 'read'}; choose another name")


def check_source(path: Path) -> None:
    """Refuse a source of predictions that is not there.

    Raises:
        UsageError: neither a folder nor a file has this path.
    """
    if not path.exists():
        raise UsageError(f"{path} does not exist; give a run folder, a .safetensors file or a .lowbit file")


class _Settings(dict[str, Any]):
    """An object of config.json, which says what it lacks."""

    def __init__(self, path: Path, entries: dict[str, Any]) -> None:
        super().__init__(entries)
        self.path = path

    def __missing__(self, key: str) -> Any:
        raise LowbitError(f"{self.path} is damaged: it has no '{key}'; train again with another --out")


def follows_training(evaluation: Mapping[str, Any], config: Mapping[str, Any]) -> bool:
    """Whether a run is finished and ``evaluation`` was made after that."""
    return "finished" in config and str(evaluation.get("date", "")) >= str(config["finished"])


def is_of_data(data_hash: str | None, config: Mapping[str, Any]) -> bool:
    """Whether images with this hash are those of a run, as far as both say."""
    own = config.get("data", {}).get("hash")
    return data_hash is None or own is None or data_hash == own


@dataclass(frozen=True)
class Run:
    """One run folder, read lazily."""

    path: Path

    @classmethod
    def of(cls, path: str | Path) -> Run:
        """The run whose folder, or a file in whose folder, ``path`` names; there may be none."""
        path = Path(path)
        return cls(path if path.is_dir() else path.parent)

    @classmethod
    def open(cls, path: str | Path) -> Run:
        """The run at ``path``.

        Raises:
            UsageError: there is no run folder there.
        """
        run = cls(Path(path))
        if not run.config_path.is_file():
            raise UsageError(f"{path} is no run folder: it has no config.json; `lowbit train --out {path}` makes one")
        return run

    @classmethod
    def finished(cls, path: str | Path) -> Run:
        """The run at ``path``, if `is_finished`.

        Raises:
            UsageError: there is no run folder there.
            LowbitError: its training has not finished.
        """
        run = cls.open(path)
        if not run.is_finished:
            raise LowbitError(f"{path} has not finished its training; `lowbit train --resume --out {path}` goes on")
        return run

    @classmethod
    def of_option(cls, option: str, path: str | Path) -> Run:
        """The finished run that an option of the command line names.

        Raises:
            UsageError: there is no run folder there, or its training has not finished.
        """
        run = cls(Path(path))
        if not run.config_path.is_file():
            raise UsageError(f"{option} {path}: it has no config.json, so is no run folder; give a finished run")
        if not run.is_finished:
            raise UsageError(f"{option} {path}: the run has not finished; `lowbit train --resume` goes on with it")
        return run

    @property
    def name(self) -> str:
        return self.path.resolve().name

    @property
    def config_path(self) -> Path:
        return self.path / "config.json"

    @property
    def metrics_path(self) -> Path:
        return self.path / "metrics.csv"

    @property
    def weights_path(self) -> Path:
        return self.path / "model.safetensors"

    @property
    def weights_sha256(self) -> str:
        """Of the weights' file, in hexadecimal: so what was made of a run knows it again."""
        return sha256_of(self.weights_path)

    @property
    def evaluation_path(self) -> Path:
        return self.path / "evaluation.json"

    @property
    def diagnostics_path(self) -> Path:
        return self.path / "diagnostics.json"

    @property
    def export_path(self) -> Path:
        return self.path / "export.json"

    @property
    def latency_path(self) -> Path:
        return self.path / "latency.json"

    @property
    def checkpoints_path(self) -> Path:
        return self.path / "checkpoints"

    @property
    def checkpoint_path(self) -> Path:
        return self.checkpoints_path / "last.ckpt"

    @property
    def config(self) -> dict[str, Any]:
        try:
            config = read_json(self.config_path, partial(_Settings, self.config_path))
        except LowbitError as error:
            raise LowbitError(f"{error}; restore it, or train again with another --out") from None
        if not isinstance(config, dict):
            raise LowbitError(f"{self.config_path} does not hold a JSON object")
        for key in OBJECTS:
            if not isinstance(config.get(key, {}), dict):
                raise LowbitError(f"{self.config_path} is damaged: its '{key}' is no object; train again")
        classes, best = config.get("classes") or [], config.get("best_test", {})
        if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
            raise LowbitError(f"{self.config_path} is damaged: its 'classes' are no names; train again")
        if not all(isinstance(best.get(key, 0), int | float) for key in ("epoch", "accuracy")):
            raise LowbitError(f"{self.config_path} is damaged: its 'best_test' holds no numbers; train again")
        if not isinstance(config.get("data", {}).get("hash", ""), str):
            raise LowbitError(f"{self.config_path} is damaged: the 'hash' of its data is no text; train again")
        return config

    @property
    def evaluation(self) -> dict[str, Any] | None:
        """Contents of ``evaluation.json``, or None before the run was evaluated."""
        if not self.evaluation_path.is_file():
            return None
        evaluation = read_json(self.evaluation_path)
        if not isinstance(evaluation, dict):
            raise self.damaged_evaluation()
        return evaluation

    def damaged_evaluation(self) -> LowbitError:
        """What to raise where ``evaluation.json`` is not what `evaluate` writes."""
        return LowbitError(f"{self.evaluation_path} is damaged; write it again with `lowbit evaluate {self.path}`")

    @property
    def is_finished(self) -> bool:
        """Whether its training has come to its end."""
        return "finished" in self.config

    @property
    def is_evaluated(self) -> bool:
        """Whether the run is finished and was evaluated after that, on its own test images."""
        evaluation, config = self.evaluation, self.config
        return (
            evaluation is not None
            and follows_training(evaluation, config)
            and is_of_data(evaluation.get("data_hash"), config)
        )

    def metrics(self) -> list[dict[str, float]]:
        """Rows of ``metrics.csv``, one per epoch; empty cells are left out."""
        try:
            with self.metrics_path.open(newline="", encoding="utf-8") as file:
                reader = csv.DictReader(file)
                rows = [{k: float(v) for k, v in row.items() if v not in ("", None)} for row in reader]
            if not all({"epoch", "test_accuracy"} <= names for names in map(set, (reader.fieldnames or (), *rows))):
                raise ValueError("it does not say the test accuracy of each epoch")
            return rows
        except FileNotFoundError:
            why = "somebody took it away" if self.is_finished else "the run has not finished its first epoch"
            raise LowbitError(f"{self.path} has no metrics.csv: {why}") from None
        except (ValueError, TypeError, csv.Error) as error:
            raise LowbitError(f"{self.metrics_path} is damaged: {error}; train again with another --out") from None
