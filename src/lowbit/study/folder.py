"""What a row's run folder holds beyond a run: ``model.lowbit``, and ``export.json``, which says why there is none."""

from __future__ import annotations

from pathlib import Path

from lowbit.errors import LowbitError
from lowbit.runs import Run, read_json, write_json

DONE = "done"


def packed_path(run: Run) -> Path:
    """Where the packed file goes."""
    return run.path / "model.lowbit"


def _export_path(run: Run) -> Path:
    return run.path / "export.json"


def record_export(run: Run, refusal: str = "") -> None:
    """Write down the size of the packed file, or why the exporter has refused the network."""
    size = None if refusal else packed_path(run).stat().st_size
    write_json(_export_path(run), {"packed_bytes": size, "refusal": refusal})


def exported(run: Run) -> tuple[int | None, str]:
    """Size of the packed file, or None and the refusal.

    Raises:
        LowbitError: nothing is written down yet, or it is damaged.
    """
    record = read_json(_export_path(run))
    try:
        return record["packed_bytes"], record["refusal"]
    except (KeyError, TypeError):
        raise LowbitError(f"{_export_path(run)} is damaged; delete it and run the study again") from None


def is_exported(run: Run) -> bool:
    """Whether the run was packed or refused."""
    return _export_path(run).is_file()


def state(run: Run, epochs: int) -> str:
    """``to do``, ``epoch 3 of 8``, ``trained`` (but not evaluated and exported) or ``done``."""
    if not run.config_path.is_file():
        return "to do"
    if "finished" in run.config:
        return DONE if run.is_evaluated and is_exported(run) else "trained"
    epoch = len(run.metrics()) if run.metrics_path.is_file() else 0
    return f"epoch {epoch} of {epochs}"
