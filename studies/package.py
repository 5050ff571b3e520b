"""Make a network that comes with lowbit from a run: pack it, verify it, evaluate the packed file, write its card.

    python studies/package.py runs/NAME NAME-1bit --note "a copy in class folders, JPEG quality 75"

Everything on the card but the note is read from the run folder or measured here.
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from lowbit import data, methods, pretrained
from lowbit.deploy import export_run
from lowbit.errors import LowbitError
from lowbit.evaluation import evaluate
from lowbit.exporter.verify import verify
from lowbit.files import write_whole
from lowbit.models import load_run
from lowbit.packed import parse
from lowbit.runs import Run
from lowbit.training import TrainConfig
from lowbit.training.settings import choose_recipe

LARGEST = 1_000_000
VERIFIED = 64


def package(folder: Path, name: str, note: str = "", out: Path = pretrained.FOLDER) -> dict[str, Any]:
    """Write ``NAME.lowbit`` and ``NAME.json`` into ``out``, the latter as returned.

    Args:
        folder: a finished run.
        note: on the copy of the data, for the card.

    Raises:
        LowbitError: the run is not finished or not packable, the packed file is not what was trained, or has a million
            bytes or more.
    """
    if not re.fullmatch(r"[a-z0-9][a-z0-9-]*", name):
        raise LowbitError(f"'{name}' is no name for a network: use lower case letters, digits and '-'")
    config = Run.open(folder).config
    packed = export_run(folder).packed.to_bytes()
    if len(packed) >= LARGEST:
        raise LowbitError(f"the packed file of {folder} has {len(packed):,} bytes, but must have less than {LARGEST:,}")
    used = config["data"]
    images = data.load(used["spec"], used["data_dir"], used["image_size"])
    inputs = torch.from_numpy(images.preprocessing.normalise(images.test_images[:VERIFIED]))
    if not verify(load_run(folder), parse(packed), inputs).passed:
        raise LowbitError(f"the packed file does not give what {folder} gives")
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / f"{name}.lowbit"
        path.write_bytes(packed)
        scores = evaluate(path, images)
    card = {
        "name": name,
        "model": config["model"],
        "method": config["method"],
        **({"rest": config["rest"]} if "rest" in config else {}),
        "data": {
            **{key: used[key] for key in ("name", "hash", "train_images", "test_images", "val_fraction")},
            "copy": note,
        },
        "recipe": config["recipe"],
        "init_from": config["init_from"] and Path(config["init_from"]).name,
        "distill_from": teacher_of(config),
        **{key: config[key] for key in ("epochs", "seed", "precision", "threads", "versions", "hardware", "finished")},
        "best_test_epoch_which_chose_nothing": config["best_test"],
        "bytes": len(packed),
        **{key: scores[key] for key in ("accuracy", "correct", "total", "loss", "classes", "confusion_matrix")},
        "evaluated": scores["date"],
        "commands": [
            train_command(config),
            f"python studies/package.py runs/NAME {name}" + f' --note "{note}"' * bool(note),
        ],
    }
    for suffix, content in ((".lowbit", packed), (".json", (_layout(card) + "\n").encode())):
        with write_whole(out / f"{name}{suffix}") as file:
            file.write(content)
    return card


def train_command(config: dict[str, Any]) -> str:
    """The command that trains such a run again; the recipe's fields only where they are not the registered one's."""
    method, model, recipe = config["method"], config["model"], config["recipe"]
    asked = TrainConfig(method=method["name"], recipe=recipe["name"], out="runs")
    registered = asdict(choose_recipe(methods.registry[method["name"]](**method["options"]), asked)[1])
    changed = {
        key: value
        for key, value in recipe.items()
        if key not in ("name", "source", "epochs") and value != _as_json(registered[key])
    }
    settings = {
        **method["options"],
        **{f"model.{key}": value for key, value in model["options"].items()},
        **{f"recipe.{key}": value for key, value in changed.items()},
    }
    used, teacher = config["data"], teacher_of(config)
    spec = "folder:PATH" if used["spec"].startswith("folder:") else used["spec"]
    given = {"method": method["name"], "model": model["name"], "data": spec, "recipe": recipe["name"]}
    given |= {key: config[key] for key in ("epochs", "seed", "precision", "threads")}
    optional = {
        "image-size": used["image_size"],
        "val-fraction": used["val_fraction"],
        "init-from": config["init_from"] and f"runs/{Path(config['init_from']).name}",
        "distill-from": teacher and f"runs/{teacher}",
    }
    given |= {key: value for key, value in optional.items() if value}
    parts = [f"--{key} {value}" for key, value in given.items()]
    parts += [f"--set {key}={_as_text(value)}" for key, value in settings.items()]
    return " ".join(["lowbit train", *parts, "--out runs/NAME"])


def teacher_of(config: dict[str, Any]) -> str | None:
    """The name of the run whose logits the run learnt from."""
    teacher = config.get("distill_from")
    return Path(teacher["run"]).name if teacher else None


def _as_json(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _as_text(value: Any) -> str:
    """As ``--set`` reads it."""
    if isinstance(value, list):
        return ",".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else str(value)


def _layout(card: dict[str, Any]) -> str:
    """JSON with the matrix's rows on a line each."""
    text = json.dumps(card, indent=1, ensure_ascii=False)
    return re.sub(r"\[[\s\d,]+\]", lambda found: "[" + ", ".join(re.findall(r"\d+", found.group())) + "]", text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="a finished run folder")
    parser.add_argument("name", help="of the network, such as cifar10-1bit")
    parser.add_argument("--note", default="", help="on the copy of the data that it was trained with")
    parser.add_argument(
        "--out", type=Path, default=pretrained.FOLDER, help="folder to write to; by default the package"
    )
    arguments = parser.parse_args()
    try:
        card = package(arguments.run, arguments.name, arguments.note, arguments.out)
    except LowbitError as error:
        parser.exit(1, f"package.py: {error}\n")
    print(f"{card['name']}: {card['bytes']:,} bytes, {100 * card['accuracy']:.2f} % of {card['total']:,} test images")


if __name__ == "__main__":
    main()
