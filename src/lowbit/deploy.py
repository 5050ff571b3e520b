"""From a run folder to a packed file that says where it comes from."""

from __future__ import annotations

from pathlib import Path

import torch

from lowbit.exporter import Export
from lowbit.exporter import export as export_model
from lowbit.models import load_run
from lowbit.preprocessing import Preprocessing
from lowbit.runs import Run


def export_run(path: str | Path) -> Export:
    """Pack the trained network of a run folder, with its classes, preprocessing and provenance.

    Raises:
        LowbitError: there is no finished run, or its network has a part that the packed file cannot hold.
    """
    run = Run.finished(path)
    config = run.config
    preprocessing = Preprocessing.from_dict(config["preprocessing"])
    return export_model(
        load_run(path),
        torch.zeros(1, *preprocessing.shape),
        classes=config["classes"],
        preprocessing=preprocessing,
        provenance={
            "run": run.name,
            "model": config["model"],
            "method": config["method"],
            "data": {key: config["data"][key] for key in ("spec", "image_size", "hash")},
            "epochs": config["epochs"],
            "seed": config["seed"],
            **{key: config[key] for key in ("rest", "calibration") if key in config},
        },
    )
