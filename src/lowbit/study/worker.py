"""One row of a study, in a process of its own: train (or go on, or calibrate), evaluate, export.

``python -m lowbit.study.worker JOB``, with the arguments of `work` as JSON. The process stops, as by
Ctrl-C, when its standard input ends: that is how its study stops it, and what happens when its study is killed.
"""

from __future__ import annotations

import _thread
import json
import os
import signal
import sys
import threading
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from lowbit import data
from lowbit.deploy import export_run
from lowbit.errors import LowbitError, UsageError, sentence
from lowbit.evaluation import evaluate
from lowbit.runs import Run
from lowbit.study.folder import is_exported, packed_path, record_export
from lowbit.training import TrainConfig, calibrate_run, train


def work(settings: dict[str, Any], calibrate: int | None, rest: dict[str, Any] | None, threads: int) -> None:
    """Do what is left to do of a row.

    Args:
        settings: of a `TrainConfig`.
        calibrate: None trains; a number calibrates with so many images, from the run that ``init_from`` names.
        rest: of a run that is calibrated from a low-bit one, see `lowbit.study.plan.Row`.
        threads: of torch; a run that was started before keeps its own number, on which its sums depend.
    """
    torch.set_num_threads(threads)
    run = Run(Path(settings["out"]))
    config = TrainConfig(**settings)
    started = run.config_path.is_file()
    if calibrate is None:
        train(replace(config, resume=True, threads=None if started else threads))
    elif not started:
        _calibrate(run, config, calibrate, rest or {"name": config.method, "options": config.method_options})
    if not run.is_evaluated:
        evaluate(run.path, data.load(config.data, config.data_dir, config.image_size))
    if not is_exported(run):
        try:
            packed = export_run(run.path)
        except UsageError as error:
            record_export(run, str(error))
        else:
            packed.save(packed_path(run))
            record_export(run)


def _calibrate(run: Run, config: TrainConfig, images: int, method: Mapping[str, Any]) -> None:
    assert config.init_from is not None
    calibrate_run(
        config.init_from,
        run.path,
        method["name"],
        method["options"],
        images=images,
        seed=config.seed,
        data_dir=config.data_dir,
    )


def stop_with_input() -> None:
    """Raise KeyboardInterrupt in the main thread when standard input ends."""
    # A study in the background of a shell script ignores SIGINT, and so would its children.
    signal.signal(signal.SIGINT, signal.default_int_handler)

    def wait() -> None:
        while os.read(0, 1):
            pass
        _thread.interrupt_main()

    threading.Thread(target=wait, daemon=True).start()


def main() -> None:
    """Exit status: 0 done, 1 failed with a sentence on standard error, 130 stopped."""
    stop_with_input()
    try:
        work(**json.loads(sys.argv[1]))
    except (LowbitError, PermissionError) as error:
        print(f"lowbit: {sentence(error)}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
