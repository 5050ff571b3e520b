"""A small study as a user runs it: killed, stopped, gone on with, two rows at a time, one row that fails."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from lowbit.cli import main
from lowbit.errors import LowbitError
from lowbit.report.statistics import mcnemar
from lowbit.runs import Run, write_json
from lowbit.study import read_results, read_study, worker
from lowbit.study.folder import record_export
from lowbit.study.latency import cpu_and_kernels, time_rows
from lowbit.study.run import whole_lines
from lowbit.training.lock import sole_process

EPOCHS = 12
STUDY = f"""
out = "study"
data = "digits"
model = {{ name = "lenet", width = 0.25 }}
precision = "float32"
epochs = {EPOCHS}

[[run]]
method = "float"

[[run]]
method = "xnor_net"
epochs = 1
distill_from = "float"
diagnose = true

[[run]]
name = "diverges"
method = "float"
recipe = {{ learning_rate = 1e30, warmup = 0 }}

[[run]]
method = "bnn"
init_from = "diverges"

[[run]]
name = "int8"
method = "affine"
init_from = "float"
calibrate = 64
"""
CELL = Path("study/digits/lenet-width-0.25/seed-0")


def start(folder: Path, *options: str) -> subprocess.Popen[str]:
    # Ctrl-C is ignored by what a shell starts in the background, and by all that it starts.
    code = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); from lowbit.cli import main; main()"
    )
    command = [sys.executable, "-c", code, "study", "s.toml", "--threads", "1"]
    return subprocess.Popen([*command, *options], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(text: str, study: subprocess.Popen[str]) -> str:
    """What the study prints, up to a line with ``text``."""
    assert study.stderr is not None
    seen = ""
    for line in study.stderr:
        seen += line
        if text in line:
            return seen
    raise AssertionError(f"no '{text}' in: {seen}")


def wait_until_free(folder: Path) -> None:
    """Until no process trains into ``folder`` any more."""
    end = time.monotonic() + 120
    while True:
        try:
            with sole_process(folder):
                return
        except LowbitError:
            assert time.monotonic() < end, f"a process of the killed study still trains into {folder}"
            time.sleep(0.05)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str]]:
    """The folder of the study after it was killed, stopped and then run to its end; and what it printed then."""
    folder = tmp_path_factory.mktemp("study")
    (folder / "s.toml").write_text(STUDY)

    killed = start(folder)
    wait_for(f"float: epoch 1/{EPOCHS}", killed)
    killed.kill()
    killed.wait()
    wait_until_free(folder / CELL / "float")
    assert "finished" not in json.loads((folder / CELL / "float" / "config.json").read_text())

    stopped = start(folder)
    seen = wait_for("float: resuming after epoch", stopped)
    assert "float: epoch " in seen.splitlines()[0]
    stopped.send_signal(signal.SIGINT)
    out, err = stopped.communicate(timeout=300)
    assert (stopped.returncode, out) == (130, "")
    assert err.splitlines()[-1] == "stopped; what is done is in study; `lowbit study s.toml` goes on"
    assert not (folder / CELL / "float" / ".lock").exists()
    with (folder / "study/results.csv").open() as file:
        assert next(csv.DictReader(file))["state"].startswith("epoch ")

    last = start(folder, "--jobs", "2", "--json")
    out, err = last.communicate(timeout=600)
    assert last.returncode == 1, err
    yield folder, err
    assert [row["row"] for row in json.loads(out)] == ["float", "xnor_net", "diverges", "bnn", "int8"]


def test_the_study_ends_in_a_table(finished: tuple[Path, str]) -> None:
    folder, _ = finished
    results = {result.row: result for result in read_results(folder / "study/results.csv")}
    states = {row: result.state for row, result in results.items()}
    assert states == {"float": "done", "xnor_net": "done", "diverges": "failed", "bnn": "failed", "int8": "done"}
    evaluations = {}
    for row in ("float", "xnor_net", "int8"):
        evaluation = evaluations[row] = json.loads((folder / CELL / row / "evaluation.json").read_text())
        assert results[row].test_accuracy == evaluation["accuracy"]
        assert results[row].test_images == len(evaluation["labels"])
        assert results[row].packed_bytes == (folder / CELL / row / "model.lowbit").stat().st_size
        times = json.loads((folder / CELL / row / "latency.json").read_text())
        assert results[row].milliseconds == times[cpu_and_kernels()]["milliseconds"] > 0
        assert results[row].timed_on.startswith(f"{cpu_and_kernels()}, 20")
    assert results["float"].p_value is None
    for row in ("xnor_net", "int8"):
        predictions = [evaluations[name]["predictions"] for name in (row, "float")]
        assert results[row].p_value == pytest.approx(mcnemar(evaluations[row]["labels"], *predictions).p_value)
    assert (results["float"].weights_epoch, results["float"].chosen_by) == (EPOCHS, "last epoch")
    assert (results["int8"].epochs, results["int8"].chosen_by, results["int8"].start) == (0, "calibration", "float")
    assert "`int8`" in (folder / "study/results.md").read_text()
    taught = json.loads((folder / CELL / "xnor_net" / "config.json").read_text())["distill_from"]
    assert (results["xnor_net"].teacher, taught["run"]) == ("float", str(CELL / "float"))
    assert "scratch, taught by float" in (folder / "study/results.md").read_text()
    assert (folder / CELL / "xnor_net" / "diagnostics.json").is_file()
    assert 'id="milliseconds"' in (folder / "study/report.html").read_text()


def test_only_rows_without_a_good_time_are_timed(finished: tuple[Path, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(finished[0])
    study = read_study("s.toml")
    paths = {row.name: row.run.latency_path for row in study.rows if row.run.latency_path.is_file()}
    assert list(paths) == ["float", "xnor_net", "int8"]
    for path, disturbed in zip(paths.values(), (True, False), strict=False):
        found = json.loads(path.read_text())
        found[cpu_and_kernels()] |= {"disturbed": disturbed, "date": "2020"}
        write_json(path, {"Other": found[cpu_and_kernels()], **found})
    paths["int8"].unlink()
    said: list[str] = []
    time_rows(study.rows, said.append)
    assert said == [f"timing 2 packed rows on {cpu_and_kernels()}"]
    dates = {name: json.loads(path.read_text())[cpu_and_kernels()]["date"] for name, path in paths.items()}
    assert [name for name, date in dates.items() if date == "2020"] == ["xnor_net"]
    assert "Other" in json.loads(paths["float"].read_text())
    record_export(Run(CELL / "int8"))
    assert not paths["int8"].exists(), "it was of the file before"


def test_a_failing_row_stops_only_what_needs_it(finished: tuple[Path, str]) -> None:
    folder, printed = finished
    results = {result.row: result for result in read_results(folder / "study/results.csv")}
    assert "is not finite; train again with a lower learning rate" in results["diverges"].note
    assert "in epoch 1, step" in printed
    assert results["bnn"].note == "it needs 'diverges', which failed"
    assert "2 of 5 rows failed, the first of them 'diverges'" in printed.splitlines()[-1]
    assert "not finite" in (folder / CELL / "diverges.log").read_text()


def test_results_can_be_published_as_they_are(finished: tuple[Path, str]) -> None:
    folder, _ = finished
    for name in ("results.csv", "results.md", "study.json"):
        text = (folder / "study" / name).read_text()
        assert not any(path in text for path in (str(folder), str(Path.home()), sys.prefix, os.getcwd())), name
    about = json.loads((folder / "study/study.json").read_text())
    assert about["command"] == "lowbit study s.toml --jobs 2 --threads 1"
    assert about["hardware"][0]["cores"] == os.cpu_count()
    assert len(about["hardware"]) == len(about["versions"]) == 1
    assert len(about["runs"]) == 3


def test_a_dry_run_lists_what_is_left(
    finished: tuple[Path, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(finished[0])
    with pytest.raises(SystemExit) as end:
        main(["study", "s.toml", "--dry-run", "--json"])
    assert not end.value.code
    states = {row["row"]: row["state"] for row in json.loads(capsys.readouterr().out)}
    left = {"diverges": f"epoch 0 of {EPOCHS}", "bnn": "to do"}
    assert states == {"float": "done", "xnor_net": "done", **left, "int8": "done"}


def refusal(study: str, capsys: pytest.CaptureFixture[str]) -> str:
    """What is said of a study that is refused before anything runs."""
    with pytest.raises(SystemExit) as end:
        main(["study", study, "--dry-run"])
    assert end.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        ("epochs = 1\n", "epochs = 2\n", "xnor_net was started with epochs 1, not 2"),
        ("calibrate = 64", "calibrate = 65", "int8 was started with calibration.asked 64, not 65"),
    ],
)
def test_other_settings_are_not_mixed_in(
    finished: tuple[Path, str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    old: str,
    new: str,
    sentence: str,
) -> None:
    monkeypatch.chdir(finished[0])
    Path("changed.toml").write_text(STUDY.replace(old, new))
    assert refusal("changed.toml", capsys).startswith(f"lowbit: changed.toml: {CELL}/{sentence}")


def test_a_row_calibrated_from_other_weights_is_named(
    finished: tuple[Path, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(finished[0])
    path = Path(CELL, "int8", "config.json")
    now = path.read_text()
    config = json.loads(now)
    config["calibration"]["weights_sha256"] = "another"
    path.write_text(json.dumps(config))
    try:
        said = refusal("s.toml", capsys)
    finally:
        path.write_text(now)
    assert f"{CELL}/int8 was started with calibration.weights_sha256" in said


def test_a_row_whose_teacher_is_gone_is_named(
    finished: tuple[Path, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(finished[0])
    weights = Run(CELL / "float").weights_path
    kept = weights.rename(weights.with_name("kept"))
    try:
        said = refusal("s.toml", capsys)
    finally:
        kept.rename(weights)
    taught = (
        "digits/lenet-width-0.25/seed-0/xnor_net was taught by 'float', whose weights are gone; "
        f"delete {CELL}/xnor_net too, so that it is taught anew"
    )
    assert said == f"lowbit: s.toml: {taught}\n"


def test_a_row_of_a_version_with_fewer_settings_is_done(
    finished: tuple[Path, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(finished[0])
    path = Path(CELL, "float", "config.json")
    now = path.read_text()
    config = json.loads(now)
    del config["recipe"]["crop"], config["distill_from"]
    path.write_text(json.dumps(config))
    try:
        with pytest.raises(SystemExit) as end:
            main(["study", "s.toml", "--dry-run", "--json"])
    finally:
        path.write_text(now)
    assert not end.value.code
    assert {row["row"]: row["state"] for row in json.loads(capsys.readouterr().out)}["float"] == "done"


def test_a_line_that_was_read_in_two_pieces_is_one_line() -> None:
    """The reason why a row failed is its last line, whole, whenever it was looked at."""
    lines, unfinished = whole_lines("epoch 1\nlowbit: the folder 'runs", ended=False)
    assert (lines, unfinished) == (["epoch 1"], "lowbit: the folder 'runs")
    assert whole_lines(unfinished + "' is in use\n", ended=False) == (["lowbit: the folder 'runs' is in use"], "")
    assert whole_lines("cut off", ended=True) == (["cut off"], "")
    assert whole_lines("", ended=False) == ([], "")


LOW_BIT_REST = """
out = "study"
data = "digits"
model = { name = "lenet", width = 0.25 }
precision = "float32"
epochs = 1

[[run]]
name = "teacher"
method = "float"
model = { name = "lenet", width = 0.125 }

[[run]]
method = "xnor_net"
distill_from = "teacher"

[[run]]
name = "int8"
method = "affine"
options = { observer = "mse" }
init_from = "xnor_net"
calibrate = 64

[[run]]
name = "tuned"
method = "xnor_net"
init_from = "int8"
"""


def test_a_low_bit_network_gets_an_8_bit_rest_and_is_trained_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("s.toml").write_text(LOW_BIT_REST)
    with pytest.raises(SystemExit) as end:
        main(["study", "s.toml", "--threads", "1"])
    assert not end.value.code
    rest = {"name": "affine", "options": {"observer": "mse"}}
    for name in ("int8", "tuned"):
        config = Run(CELL / name).config
        assert (config["method"], config["rest"]) == ({"name": "xnor_net", "options": {}}, rest)
    results = {result.row: result for result in read_results(Path("study/results.csv"))}
    assert {result.state for result in results.values()} == {"done"}
    assert results["teacher"].model == "lenet-width-0.125"
    assert {results[name].packed_bytes for name in ("int8", "tuned")} != {results["xnor_net"].packed_bytes}
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        main(["study", "s.toml", "--dry-run", "--json"])
    assert {row["state"] for row in json.loads(capsys.readouterr().out)} == {"done"}
    Path("changed.toml").write_text(LOW_BIT_REST.replace('"mse"', '"min_max"'))
    assert "int8 was started with rest.options.observer mse, not min_max" in refusal("changed.toml", capsys)


def test_a_worker_names_what_it_may_not_read(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse() -> None:
        raise PermissionError(13, "Permission denied", "x/config.json")

    monkeypatch.setattr(worker, "work", refuse)
    monkeypatch.setattr(worker, "stop_with_input", lambda: None)
    monkeypatch.setattr(sys, "argv", ["worker", "{}"])
    with pytest.raises(SystemExit) as end:
        worker.main()
    assert end.value.code == 1
    assert capsys.readouterr().err.startswith("lowbit: x/config.json: permission denied; ")
