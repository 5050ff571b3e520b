"""The layers that a method leaves in float, made 8-bit on the way to the packed file."""

from __future__ import annotations

from pathlib import Path

from lowbit import data
from lowbit.errors import UsageError
from lowbit.evaluation import evaluate
from lowbit.runs import Run
from lowbit.training import calibrate_run

# Behind a whitening few activations are large: a range as wide as theirs leaves the others few levels.
METHOD = "affine"
OPTIONS = {"observer": "mse"}


def int8_rest(source: str | Path, data_dir: str | Path | None = None) -> Run:
    """The run SOURCE-int8, whose float layers are calibrated to 8 bits; both runs are evaluated afterwards.

    Ranges of activations are those of the least squared error (`lowbit.quantizers.observers.MeanSquaredError`).

    What is there already is not made again: neither the run, if it comes in this way from the weights that ``source``
    has now, nor an evaluation.

    Args:
        source: a finished run of a method that leaves layers in float.
        data_dir: where the data set lies now, if not where the source found it.

    Raises:
        UsageError: ``source`` is a float run, it has nothing to calibrate (see `lowbit.training.calibrate_run`), or
            SOURCE-int8 is something else.
        LowbitError: the source is not finished, or the data set is not the one that it was trained on.
    """
    run = Run.open(source)
    # Of "." and ".." the name is only known once they are resolved.
    here = run.path if run.path.name == run.name else run.path.resolve()
    made = Run(here.with_name(f"{run.name}-int8"))
    if run.config["method"]["name"] == "float":
        raise UsageError(
            f"{source} is a float run, of which all would be the rest; "
            f"`lowbit calibrate {source} --out {made.path}` makes it 8-bit, and that run can be exported"
        )
    if not _comes_from(made, run):
        if made.config_path.is_file():
            raise UsageError(f"{made.path} exists, but is not the 8-bit rest of {source} as it is now; move it away")
        calibrate_run(run.path, made.path, METHOD, OPTIONS, data_dir=data_dir)
    used = run.config["data"]
    for each in (run, made):
        if not each.is_evaluated:
            evaluate(each.path, data.load(used["spec"], data_dir or used["data_dir"], used["image_size"]))
    return made


def _comes_from(made: Run, run: Run) -> bool:
    """Whether ``made`` is ``run`` as `calibrate_run` makes it here, from the weights that it has now."""
    if not made.config_path.is_file() or not run.weights_path.is_file():
        return False
    config = made.config
    same = config.get("rest") == {"name": METHOD, "options": OPTIONS}
    return same and bool(config["calibration"]["weights_sha256"] == run.weights_sha256)
