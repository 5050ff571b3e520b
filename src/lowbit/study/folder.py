"""What a row's run folder holds beyond a run: ``model.lowbit``, and ``export.json``, which says why there is none."""

from __future__ import annotations

from pathlib import Path

from lowbit.runs import Run, write_json

DONE = "done"


def packed_path(run: Run) -> Path:
    """Where the packed file goes."""
    return run.path / "model.lowbit"


def record_export(run: Run, refusal: str = "") -> None:
    """Write down the size of the packed file, or why the exporter has refused the network."""
    size = None if refusal else packed_path(run).stat().st_size
    run.latency_path.unlink(missing_ok=True)  # it is of the file before
    write_json(run.export_path, {"packed_bytes": size, "refusal": refusal})


def is_exported(run: Run) -> bool:
    """Whether the run was packed or refused."""
    return run.export_path.is_file()


def state(run: Run, epochs: int) -> str:
    """``to do``, ``epoch 3 of 8``, ``trained`` (but not evaluated and exported) or ``done``."""
    if not run.config_path.is_file():
        return "to do"
    if "finished" in run.config:
        return DONE if run.is_evaluated and is_exported(run) else "trained"
    epoch = len(run.metrics()) if run.metrics_path.is_file() else 0
    return f"epoch {epoch} of {epochs}"
