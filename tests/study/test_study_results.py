"""What becomes of results: seeds put together, files that can be read again and hold no path of the machine."""

from __future__ import annotations

import csv
import dataclasses
import io
import math

import pytest

from lowbit.study import Result, read_results, summary_rows
from lowbit.study.results import accuracy, markdown, summarise, traced, without_paths

ROW = Result(
    row="bnn",
    data="digits",
    model="lenet",
    seed=0,
    method="bnn",
    options='{"stochastic": true}',
    bits_w=1,
    bits_a=1,
    bits_g=32,
    start="",
    epochs=8,
    state="done",
    test_accuracy=0.90,
    weights_epoch=8,
    chosen_by="last epoch",
    test_images=10_000,
    best_test_accuracy=0.91,
    best_test_epoch=7,
    p_value=0.0312,
    packed_bytes=1234,
    float_bytes=39_000,
    milliseconds=0.25,
    timed_on="Some CPU, avx2, 2026-01-02",
    seconds=100.5,
)
LATER = [
    dataclasses.replace(ROW, seed=1, test_accuracy=0.92, p_value=1e-9, milliseconds=0.35, seconds=101.5),
    dataclasses.replace(ROW, seed=2, test_accuracy=0.94, p_value=None, milliseconds=None, timed_on=""),
]
UNFINISHED = Result(
    **{key: getattr(ROW, key) for key in ("data", "model", "seed", "method", "options", "bits_w", "bits_a", "bits_g")},
    row="other",
    start="bnn",
    epochs=8,
    state="failed",
    note="in epoch 1, step 2, the loss is not finite",
)
ABOUT = {
    "study": "s.toml",
    "command": "lowbit study s.toml --jobs 1",
    "date": "2026-01-02T03:04:05+00:00",
    "hardware": [{"cpu": "Some CPU", "cores": 2, "device": "cpu"}, {"cpu": "Other", "cores": 8, "device": "Some GPU"}],
    "versions": [{"lowbit": "0.1.0", "torch": "2.6.0"}],
}


def test_seeds_give_a_mean_and_its_interval() -> None:
    one, several, none = (summarise(results)[0] for results in ([ROW], [ROW, *LATER], [UNFINISHED]))
    assert (accuracy(one), one.seconds) == ("90.00", 100.5)
    # Student's t for 2 degrees of freedom and 95 % is 4.303; the standard deviation is 0.02.
    assert accuracy(several) == f"92.00 ± {4.303 * 2 / math.sqrt(3):.2f} (n = 3)"
    assert several.seconds == pytest.approx((100.5 + 101.5 + 100.5) / 3)
    assert accuracy(none) == ""
    failed = dataclasses.replace(UNFINISHED, row="bnn", seed=3)
    assert accuracy(summarise([ROW, *LATER, failed])[0]) == accuracy(several)


def test_the_table() -> None:
    text = markdown([ROW, *LATER, UNFINISHED], ABOUT)
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    head, _, bnn, other = rows
    assert len(head) == len(bnn) == len(other)
    found = dict(zip(head, bnn, strict=True))
    assert found["options"] == "`stochastic=true`"
    assert found["starts from"] == "scratch"
    assert found["test accuracy, %"].startswith("92.00 ± ")
    assert found["p against float"] == "0.0312, < 0.0001"
    assert found["packed bytes"] == "1,234"
    assert found["ms per image"] == "0.300"
    assert "one image at a time (Some CPU, avx2, 2026-01-02)." in text
    assert "too high" not in text
    disturbed = dataclasses.replace(ROW, timed_on="Some CPU, avx2, 2026-01-02, disturbed")
    text_of_disturbed = markdown([disturbed], ABOUT)
    assert "| ~0.250 |" in text_of_disturbed
    assert "the time is too high" in text_of_disturbed
    assert found["best test epoch, %"] == "91.00 (7), 91.00 (7), 91.00 (7)"
    assert dict(zip(head, other, strict=True))["test accuracy, %"] == "failed"
    assert "- `other`, seed 0: in epoch 1, step 2, the loss is not finite." in text


def test_notes_hold_no_path_of_the_machine(tmp_path) -> None:
    note = f"cannot write {tmp_path}/study/digits/float/config.json: no space"
    assert without_paths(note, tmp_path / "study", None) == "cannot write study/digits/float/config.json: no space"
    assert without_paths("no space in study", "study") == "no space in study"


def test_figures_can_be_traced() -> None:
    assert traced([ROW, *LATER], ABOUT) == (
        "`lowbit study s.toml --jobs 1`; n = 3 seeds, 10,000 test images; Some CPU, 2 cores; Other, 8 cores, Some GPU; "
        "lowbit 0.1.0, torch 2.6.0; 2026-01-02."
    )
    assert "n = 0 seeds, no test images" in traced([], ABOUT)


def test_results_are_read_as_they_were_written(tmp_path) -> None:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, [field.name for field in dataclasses.fields(Result)])
    writer.writeheader()
    writer.writerows(dataclasses.asdict(result) for result in (ROW, *LATER, UNFINISHED))
    (tmp_path / "results.csv").write_text(text.getvalue())
    assert read_results(tmp_path / "results.csv") == [ROW, *LATER, UNFINISHED]


def test_a_summary_names_data_and_model() -> None:
    rows = summary_rows([ROW, dataclasses.replace(ROW, data="cifar10")])
    assert [row["data"] for row in rows] == [ROW.data, "cifar10"]
    assert {row["model"] for row in rows} == {ROW.model}
