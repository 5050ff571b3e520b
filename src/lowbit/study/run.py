"""Train the rows of a study, each in a process of its own, some of them at a time."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from lowbit import data, methods, models
from lowbit.errors import UsageError
from lowbit.study.folder import DONE
from lowbit.study.latency import time_rows
from lowbit.study.plan import Row, Study
from lowbit.study.results import Result, collect, write_results
from lowbit.training import TrainConfig
from lowbit.training.lock import sole_process
from lowbit.training.run import print_to_stderr
from lowbit.training.settings import (
    choose_recipe,
    describe_data,
    describe_request,
    refuse_changes,
    with_later_settings,
)

Say = Callable[[str], None]
TICK = 0.1
PATIENCE = 60.0
"""Seconds that a stopped process has to end by itself."""


def run_study(study: Study, jobs: int = 1, threads: int | None = None, say: Say = print_to_stderr) -> list[Result]:
    """Do what is left to do of a study, and write its results, also when it is stopped.

    Args:
        jobs: rows at a time.
        threads: of each row; None shares the processor's out.
        say: takes a line on progress.

    Returns:
        A result per row; those of failed rows say why.

    Raises:
        UsageError: a run was started with other settings, or a model does not take the images.
        LowbitError: a data set cannot be read, or another process is at work on the study.
        KeyboardInterrupt: passed on, after all its processes have ended.
    """
    check(study)
    command = f"lowbit study {_without_machine(study.path)} --jobs {jobs}" + f" --threads {threads}" * (
        threads is not None
    )
    threads = threads or max(1, (os.cpu_count() or 1) // jobs)
    failed: dict[Row, str] = {}
    with sole_process(study.out):
        try:
            train_rows(study.rows, jobs, threads, say, failed)
            # Last, and in turn: nothing of the study itself may take the processor meanwhile.
            time_rows(study.rows, say)
        finally:
            results = collect(study, failed)
            write_results(study, results, command)
    return results


def check(study: Study, load: bool = True) -> None:
    """Compare the rows with what their folders hold, and try the data sets and models.

    Args:
        load: read each data set, which may download it, and make each model for its images, without memory.

    Raises:
        UsageError: a run was started with other settings, or a model does not take the images.
        LowbitError: a data set cannot be read.
    """
    for _, rows in groupby(sorted(study.rows, key=lambda row: row.data), key=lambda row: row.data):
        images = None
        made = set()
        for row in rows:
            config = row.config
            settings: dict[str, Any] = {}
            if load:
                images = images or data.load(config.data, config.data_dir, config.image_size)
                settings = describe_data(config, images)
                if row.model not in made:
                    made.add(row.model)
                    _try_model(config, settings)
            if row.run.config_path.is_file():
                _compare(study, row, settings)


def _compare(study: Study, row: Row, settings: dict[str, Any]) -> None:
    """Refuse a run that is there already and is not the row's; ``settings`` are those of its data, if they are known.

    Raises:
        UsageError: it was started with other settings, or from weights that are gone or have changed.
    """
    config = row.config
    for of, how, anew in ((row.teacher, "was taught by", "taught"), (row.source, "starts from", "made")):
        if of is not None and not of.run.weights_path.is_file():
            raise UsageError(
                f"{study.path}: {row.label} {how} '{of.name}', whose weights are gone; "
                f"delete {row.run.path} too, so that it is {anew} anew"
            )
    settings = settings | describe_request(config, *choose_recipe(row.method, config))
    if config.precision != "auto":
        settings["precision"] = config.precision
    if row.rest is not None:
        settings["rest"] = row.rest
    recorded = row.run.config
    if row.calibrate is not None:
        if "calibration" not in recorded:
            raise UsageError(
                f"{study.path}: {row.run.path} was trained, not calibrated; use another `out` or another name of the "
                "row"
            )
        settings = _of_calibration(row, settings, recorded)
    else:
        recorded = with_later_settings(recorded)
        if row.source is not None and "sha256" in (report := recorded.get("init_report", {})):
            settings["init_report"] = {**report, "sha256": row.source.run.weights_sha256}
    try:
        # A setting that config.json does not have came with a later version than the run's.
        refuse_changes(row.run, recorded, {key: settings[key] for key in settings if key in recorded})
    except UsageError as error:
        raise UsageError(f"{study.path}: {error}, by another `out` or another name of the row") from None


def _without_machine(path: Path) -> str:
    """A path as seen from here; of one that lies elsewhere only the name."""
    here = Path.cwd().resolve()
    return str(path.resolve().relative_to(here)) if path.resolve().is_relative_to(here) else path.name


def _of_calibration(row: Row, settings: dict[str, Any], recorded: dict[str, Any]) -> dict[str, Any]:
    """The settings that a calibrated run has: there is no recipe, and batch norms of a float network are folded unless
    it says otherwise.

    Runs of earlier versions do not say how many images they were asked for.
    """
    kept: dict[str, Any] = {key: settings[key] for key in ("model", "seed", "data", "rest") if key in settings}
    name, options = settings["method"]["name"], settings["method"]["options"]
    if row.rest is None and "fold" in methods.registry.options(name):
        options = {"fold": True, **options}
    calibration = dict(recorded["calibration"])
    if "asked" in calibration:
        calibration["asked"] = row.calibrate
    if row.source is not None:
        calibration["weights_sha256"] = row.source.run.weights_sha256
    return {**kept, "method": {"name": name, "options": options}, "calibration": calibration}


def _try_model(config: TrainConfig, settings: dict[str, Any]) -> None:
    given = {key: settings[key] for key in ("num_classes", "in_channels", "image_size")}
    with torch.device("meta"):
        models.create(config.model, **given, **config.model_options)


class _Process:
    """A row at work. What it prints goes to ``NAME.log`` beside its run folder, and on to the study's own output."""

    def __init__(self, row: Row, threads: int, say: Say) -> None:
        self.row = row
        self.say = say
        self.log_path = row.run.path.with_name(f"{row.name}.log")
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        settings = {key: str(value) if isinstance(value, Path) else value for key, value in asdict(row.config).items()}
        job = {"settings": settings, "calibrate": row.calibrate, "rest": row.rest, "threads": threads}
        command = [sys.executable, "-m", "lowbit.study.worker", json.dumps(job)]
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        with self.log_path.open("a", encoding="utf-8") as log:
            self.log = self.log_path.open(encoding="utf-8", errors="replace")
            self.log.seek(0, os.SEEK_END)
            # Its own session: Ctrl-C reaches the study alone, which then stops its processes.
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=log, stderr=log, env=environment, start_new_session=True
            )
        self.last_line = self.unfinished = ""

    def poll(self) -> int | None:
        """Pass on what was printed; the exit status, once there is one."""
        status = self.process.poll()
        lines, self.unfinished = whole_lines(self.unfinished + self.log.read(), ended=status is not None)
        for line in lines:
            self.last_line = line
            self.say(f"{self.row.label}: {line}")
        return status

    def reason(self, status: int) -> str:
        """Why it failed: its last line is the sentence of an error, unless it had no time for one."""
        if status < 0:
            return f"it was killed by signal {-status}"
        return self.last_line.removeprefix("lowbit: ") or f"it ended with exit status {status}"

    def stop(self) -> None:
        """Ask the process to end."""
        assert self.process.stdin is not None
        with contextlib.suppress(OSError):
            self.process.stdin.close()

    def close(self) -> None:
        """Wait for the end of a process that was asked to, and enforce it after `PATIENCE`."""
        self.stop()
        try:
            self.process.wait(PATIENCE)
        finally:
            self.process.kill()
            self.process.wait()
            self.log.close()


def whole_lines(text: str, ended: bool) -> tuple[list[str], str]:
    """The lines of ``text``, and what there is of one that goes on; where all has ``ended``, none does."""
    lines = text.splitlines()
    return (lines, "") if ended or not lines or text.endswith("\n") else (lines[:-1], lines[-1])


def train_rows(rows: Sequence[Row], jobs: int, threads: int, say: Say, failed: dict[Row, str]) -> None:
    """Train, evaluate and export the rows that are not done; a failed one stops only those that need it.

    Args:
        rows: each below those that it needs.
        jobs: rows at a time.
        threads: of each.
        say: takes a line on progress.
        failed: is given the rows that fail, and why.

    Raises:
        KeyboardInterrupt: passed on, after all processes have ended.
    """
    done = {row for row in rows if row.state == DONE}
    waiting = [row for row in rows if row not in done]
    running: list[_Process] = []
    try:
        while waiting or running:
            for process in [*running]:
                if (status := process.poll()) is None:
                    continue
                running.remove(process)
                process.close()
                if status == 0:
                    done.add(process.row)
                else:
                    failed[process.row] = process.reason(status)
                    say(f"{process.row.label} failed; all it printed is in {process.log_path}")
            for row in [*waiting]:
                if missing := next((need for need in row.needs if need in failed), None):
                    waiting.remove(row)
                    failed[row] = f"it needs '{missing.name}', which failed"
                elif len(running) < jobs and done.issuperset(row.needs):
                    waiting.remove(row)
                    failures = f", {len(failed)} failed" if failed else ""
                    say(f"{row.label}: {row.state}, started ({len(done)} of {len(rows)} rows are done{failures})")
                    running.append(_Process(row, threads, say))
            time.sleep(TICK)
    finally:
        for process in running:
            process.stop()
        for process in running:
            process.close()
