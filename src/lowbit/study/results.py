"""What a study found: results.csv, a line per row and seed; results.md, seeds put together; study.json; report.html."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from itertools import groupby
from pathlib import Path
from statistics import mean
from typing import Any

from lowbit.files import write_whole
from lowbit.report import compare
from lowbit.report.costs import common_machine
from lowbit.report.gather import Entry, gather, test_between
from lowbit.report.statistics import McNemar, mean_and_margin
from lowbit.runs import write_json
from lowbit.study.folder import DONE
from lowbit.study.plan import Row, Study


@dataclass(frozen=True)
class Result:
    """One line of results.csv. What a row that is not done does not have yet is None.

    Attributes:
        row, data, model, seed: name the run.
        method, options: of the method, as the study's file gives them, as JSON.
        bits_w, bits_a, bits_g: of weights, activations and gradients; 32 is float.
        start: the row whose weights it started from; empty if from scratch.
        epochs: of training; those of ``start`` and ``teacher`` come on top.
        state: ``done``, ``failed``, or how far it is.
        test_accuracy: 0 to 1, of the weights that the run keeps.
        weights_epoch, chosen_by: the ``last epoch``, or the best on the ``validation`` images; or ``calibration``.
        test_images: that the accuracy is over.
        best_test_accuracy, best_test_epoch: of the epoch that is best on the test images. It chose nothing: for a
            comparison it is too good.
        p_value: of McNemar's test against the float twin, the first row of method ``float`` with the same data, model
            and seed.
        packed_bytes: of the packed file.
        float_bytes: of the same network's tensors in float32.
        milliseconds: median time of one image on one thread of the engine.
        timed_on: the CPU, the instruction set and the day of that; ``disturbed`` if other programs took the processor.
        seconds: of training, with the measurement after each epoch.
        note: why there is no packed file, or what went wrong.
        teacher: the row whose logits it learned from; empty if from the labels alone.
    """

    row: str
    data: str
    model: str
    seed: int
    method: str
    options: str
    bits_w: int
    bits_a: int
    bits_g: int
    start: str
    epochs: int
    state: str
    test_accuracy: float | None = None
    weights_epoch: int | None = None
    chosen_by: str = ""
    test_images: int | None = None
    best_test_accuracy: float | None = None
    best_test_epoch: int | None = None
    p_value: float | None = None
    packed_bytes: int | None = None
    float_bytes: int | None = None
    milliseconds: float | None = None
    timed_on: str = ""
    seconds: float | None = None
    note: str = ""
    teacher: str = ""


def collect(study: Study, failed: Mapping[Row, str] | None = None) -> list[Result]:
    """A result per row, seeds of one row together, otherwise in the order of the file.

    Args:
        failed: rows that failed, and why.

    Raises:
        LowbitError: a file of a run is damaged.
    """
    failed = failed or {}
    done = [row for row in study.rows if row.state == DONE]
    entries = dict(zip(done, gather([row.run for row in done]), strict=True))
    machine = common_machine([entry.costs for entry in entries.values()])
    results = []
    for row in _seeds_together(study.rows):
        config = row.config
        result = Result(
            row=row.name,
            data=row.data,
            model=row.model,
            seed=config.seed,
            method=row.method.name,
            options=json.dumps(dict(config.method_options)),
            bits_w=row.method.bits_w,
            bits_a=row.method.bits_a,
            bits_g=row.method.bits_g,
            start="" if row.source is None else row.source.name,
            epochs=row.epochs,
            state="failed" if row in failed else row.state,
            note=without_paths(failed.get(row, ""), study.out, config.data_dir),
            teacher="" if row.teacher is None else row.teacher.name,
        )
        if row in entries:
            recorded, evaluation = entries[row].config, entries[row].evaluation
            assert evaluation is not None
            costs = entries[row].costs
            latency = costs.latencies.get(machine)
            by_validation, best_test = recorded.get("best"), recorded.get("best_test", {})
            chosen_by = "validation" if by_validation else "last epoch"
            result = dataclasses.replace(
                result,
                test_accuracy=evaluation["accuracy"],
                weights_epoch=by_validation["epoch"] if by_validation else recorded["epochs"],
                chosen_by=chosen_by if row.calibrate is None else "calibration",
                test_images=evaluation["total"],
                best_test_accuracy=best_test.get("accuracy"),
                best_test_epoch=best_test.get("epoch"),
                p_value=_against_float(row, study, entries),
                packed_bytes=costs.packed_bytes,
                float_bytes=evaluation["profile"]["float32_bytes"],
                milliseconds=latency.milliseconds if latency else None,
                timed_on=f"{machine}, {latency.note}" if latency else "",
                seconds=recorded["seconds"],
                note=costs.refusal,
            )
        results.append(result)
    return results


def _against_float(row: Row, study: Study, entries: Mapping[Row, Entry]) -> float | None:
    twins = (other for other in study.rows if other.method.name == "float" and _cell(other) == _cell(row))
    twin = next(twins, row)
    test = test_between(entries[row], entries[twin]) if twin is not row and twin in entries else None
    return test.p_value if isinstance(test, McNemar) else None


def _cell(row: Row) -> tuple[str, str, int]:
    return row.data, row.model, row.config.seed


def _seeds_together(rows: Sequence[Row]) -> list[Row]:
    order = {key: position for position, key in enumerate(dict.fromkeys((r.data, r.model, r.name) for r in rows))}
    return sorted(rows, key=lambda row: order[row.data, row.model, row.name])


def write_results(study: Study, results: Sequence[Result], command: str) -> None:
    """Write results.csv, results.md and study.json into the study's folder, and report.html once a row is done.

    The first three hold no path of this machine, so that they can be published as they are.

    Args:
        results: of `collect`.
        command: that ran the study.

    Raises:
        LowbitError: the disk is full, or a file of a run is damaged.
    """
    done = [row for row in _seeds_together(study.rows) if row.state == DONE]
    about = describe(study.path.name, done, command)
    write_json(study.out / "study.json", about)
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, [field.name for field in dataclasses.fields(Result)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(result) for result in results)
    with write_whole(study.out / "results.csv") as file:
        file.write(text.getvalue().encode())
    with write_whole(study.out / "results.md") as file:
        file.write(markdown(results, about).encode())
    if done:
        several = len({result.seed for result in results}) > 1
        over_seeds = summary_rows(results) if several else []
        compare([row.run for row in done], study.out / "report.html", f"Study {study.path.stem}", over_seeds)


def describe(name: str, done: Sequence[Row], command: str) -> dict[str, Any]:
    """What figures can be traced by: command, date, machines, versions, and the settings of each run."""
    configs = {row.label: row.run.config for row in done}
    return {
        "study": name,
        "command": command,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "hardware": _different([config["hardware"] for config in configs.values()]),
        "versions": _different([config["versions"] for config in configs.values()]),
        "runs": {
            label: {
                **{
                    key: config[key]
                    for key in ("recipe", "precision", "threads", "started", "finished")
                    if key in config
                },
                "data": {key: config["data"][key] for key in ("hash", "train_images", "test_images", "val_fraction")},
                **({"calibration_images": config["calibration"]["images"]} if "calibration" in config else {}),
            }
            for label, config in configs.items()
        },
    }


def _different(records: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Each record once; one that only says less than another is left out."""
    unique = [record for position, record in enumerate(records) if record not in records[:position]]
    return [a for a in unique if not any(a.items() < b.items() for b in unique)]


def read_results(path: Path) -> list[Result]:
    """Results from a results.csv."""
    kinds = typing.get_type_hints(Result)

    def value(kind: Any, text: str) -> Any:
        optional = typing.get_args(kind)
        if optional:
            return optional[0](text) if text else None
        return kind(text)

    with path.open(newline="", encoding="utf-8") as file:
        return [Result(**{key: value(kinds[key], text) for key, text in row.items()}) for row in csv.DictReader(file)]


@dataclass(frozen=True)
class Summary:
    """A row of results.md: the results of one row for all seeds that are done.

    Attributes:
        first: the result of the first seed: what does not depend on the seed is read from it.
        results: of the seeds that are done.
        accuracy: mean test accuracy, and half the width of its 95 % interval, which is None for a single seed; both are
            None for none.
        seconds: mean.
    """

    first: Result
    results: tuple[Result, ...]
    accuracy: tuple[float | None, float | None]
    seconds: float | None


def summarise(results: Sequence[Result]) -> list[Summary]:
    """Put the seeds of each row together; ``results`` are ordered as by `collect`."""
    summaries = []
    for _, group in groupby(results, key=lambda result: (result.data, result.model, result.row)):
        seeds = tuple(group)
        done = tuple(result for result in seeds if result.state == DONE)
        accuracies = [result.test_accuracy for result in done if result.test_accuracy is not None]
        accuracy: tuple[float | None, float | None] = (accuracies[0], None) if accuracies else (None, None)
        if len(accuracies) > 1:
            accuracy = mean_and_margin(accuracies)
        seconds = [result.seconds for result in done if result.seconds is not None]
        summaries.append(Summary(seeds[0], done, accuracy, mean(seconds) if seconds else None))
    return summaries


def summary_rows(results: Sequence[Result]) -> list[dict[str, Any]]:
    """The rows of results.md, short enough for a terminal."""
    return [
        {
            "row": summary.first.row,
            "data": summary.first.data,
            "model": summary.first.model,
            "W": summary.first.bits_w,
            "A": summary.first.bits_a,
            "G": summary.first.bits_g,
            "test accuracy, %": accuracy(summary) or summary.first.state,
            "p against float": _p_values(summary),
            "packed bytes": _bytes(result.packed_bytes for result in summary.results),
            "ms per image": _milliseconds(summary.results),
        }
        for summary in summarise(results)
    ]


COLUMNS = {
    "row": "",
    "options": "",
    "W": "r",
    "A": "r",
    "G": "r",
    "starts from": "",
    "test accuracy, %": "r",
    "p against float": "r",
    "packed bytes": "r",
    "float bytes": "r",
    "ms per image": "r",
    "epochs": "r",
    "seconds": "r",
    "best test epoch, %": "r",
}


def without_paths(note: str, *folders: str | Path | None) -> str:
    """A note in which folders of this machine have only their names."""
    for folder in folders:
        if folder is not None and Path(folder).is_absolute():
            note = note.replace(str(folder), Path(folder).name)
    return note


def markdown(results: Sequence[Result], about: Mapping[str, Any]) -> str:
    """results.md: a table for each data set and model."""
    parts = [f"# Study {about['study']}", traced(results, about), _how_to_read(results)]
    for (data, model), group in groupby(summarise(results), key=lambda s: (s.first.data, s.first.model)):
        summaries = list(group)
        parts += [f"## {data}, {model}", table(summaries)]
        notes = [
            f"- `{result.row}`, seed {result.seed}: {result.note or result.state}."
            for result in results
            if (result.data, result.model) == (data, model) and (result.note or result.state != DONE)
        ]
        parts += ["\n".join(notes)] if notes else []
    return "\n\n".join(parts) + "\n"


def traced(results: Sequence[Result], about: Mapping[str, Any]) -> str:
    """One line: the command, n, hardware, versions and date."""
    seeds = len({result.seed for result in results if result.state == DONE})
    images = sorted({result.test_images for result in results if result.test_images})
    machines = [
        f"{machine['cpu']}, {machine['cores']} cores" + f", {machine['device']}" * (machine["device"] != "cpu")
        for machine in about["hardware"]
    ]
    versions = [f"lowbit {found['lowbit']}, torch {found['torch']}" for found in about["versions"]]
    parts = [
        f"`{about['command']}`",
        f"n = {seeds} seed{'s' * (seeds != 1)}, {' or '.join(f'{n:,}' for n in images) or 'no'} test images",
        *machines,
        *versions,
        about["date"][:10],
    ]
    return "; ".join(parts) + "."


def _how_to_read(results: Sequence[Result]) -> str:
    sentences = [
        "W, A and G: bits of weights, activations and gradients; 32 is float.",
        "Test accuracy: of the weights that the run keeps, those of "
        + (" or ".join(sorted({_CHOSEN_BY[r.chosen_by] for r in results} - {""})) or "the last epoch")
        + "; ± is half the 95 % interval of the mean over seeds (Student's t).",
        "p: McNemar's test against the float twin of the same seed, two-sided and not corrected for their number.",
        "Epochs and seconds: of this row's own training; those of rows that it starts or learns from come on top.",
        "Best test epoch: for reference only, it chose nothing and is too good for a comparison.",
    ]
    timed = sorted({result.timed_on.removesuffix(_DISTURBED) for result in results} - {""})
    if timed:
        sentences.append(
            f"Ms per image: median in lowbit's engine, one thread, one image at a time ({'; '.join(timed)})."
        )
    if any(result.timed_on.endswith(_DISTURBED) for result in results):
        sentences.append("~: other programs took the processor meanwhile, the time is too high.")
    return " ".join(sentences)


_DISTURBED = ", disturbed"
_CHOSEN_BY = {
    "validation": "the epoch that is best on the validation images",
    "last epoch": "the last epoch",
    "calibration": "",
    "": "",
}


def table(summaries: Sequence[Summary]) -> str:
    """A Markdown table, a line per summary."""
    lines = [list(COLUMNS), ["--:" if side == "r" else "---" for side in COLUMNS.values()]]
    return "\n".join("| " + " | ".join(line) + " |" for line in [*lines, *map(_cells, summaries)])


def _cells(summary: Summary) -> list[str]:
    first, done = summary.first, summary.results
    options = ", ".join(f"{key}={_plain(value)}" for key, value in json.loads(first.options).items())
    best = [f"{100 * r.best_test_accuracy:.2f} ({r.best_test_epoch})" for r in done if r.best_test_accuracy is not None]
    return [
        f"`{first.row}`",
        f"`{options}`" if options else "",
        *map(str, (first.bits_w, first.bits_a, first.bits_g)),
        (first.start or "scratch")
        + ", calibrated" * any(r.chosen_by == "calibration" for r in done)
        + f", taught by {first.teacher}" * bool(first.teacher),
        accuracy(summary) or first.state,
        _p_values(summary),
        _bytes(result.packed_bytes for result in done) or "not packed, see below" * bool(done),
        _bytes(result.float_bytes for result in done),
        _milliseconds(done),
        str(first.epochs),
        "" if summary.seconds is None else f"{summary.seconds:,.0f}",
        ", ".join(best),
    ]


def accuracy(summary: Summary) -> str:
    """``91.20``, or ``91.20 ± 0.31 (n = 3)``; empty before a seed is done."""
    value, margin = summary.accuracy
    if value is None:
        return ""
    return f"{100 * value:.2f}" + ("" if margin is None else f" ± {100 * margin:.2f} (n = {len(summary.results)})")


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _p_values(summary: Summary) -> str:
    found = [result.p_value for result in summary.results if result.p_value is not None]
    return ", ".join("< 0.0001" if p < 1e-4 else f"{p:.4f}" for p in found)


def _bytes(sizes: Iterable[int | None]) -> str:
    """The size, or the sizes where seeds differ in it."""
    return " or ".join(f"{size:,}" for size in sorted({size for size in sizes if size is not None}))


def _milliseconds(results: Iterable[Result]) -> str:
    """Mean over the seeds; ~ if one was disturbed."""
    results = list(results)
    times = [result.milliseconds for result in results if result.milliseconds is not None]
    disturbed = any(result.timed_on.endswith(_DISTURBED) for result in results)
    return "~" * disturbed + f"{mean(times):.3f}" if times else ""
