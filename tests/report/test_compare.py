"""What the page says, without a browser."""

import html
import json
import re
import subprocess
import sys

import pytest
from fake_runs import CIFAR10, MACHINE, latency, make_run
from hypothesis import given
from hypothesis import strategies as st

from lowbit.errors import LowbitError, UsageError
from lowbit.report import compare
from lowbit.report.costs import common_machine, compare_costs, pareto_front
from lowbit.report.diagnostics import SHOWN_HISTOGRAMS
from lowbit.report.gather import gather
from lowbit.report.tables import EVERY_PAIR_UP_TO, lead, significance
from lowbit.runs import write_json

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"'&amp;<!--"


def page(runs, folder, **options):
    """The page of ``runs``, without plotly's script."""
    text = compare(runs, folder / "report.html", **options).read_text()
    start = text.index("/**\n* plotly.js")
    return text[:start] + text[text.index("</script>", start) :]


def test_a_page_of_several_seeds_puts_them_together(tmp_path):
    rows = [
        {"row": "float", "data": "digits", "test accuracy, %": "89.73 ± 0.23 (n = 3)"},
        {"row": HOSTILE, "data": "digits", "test accuracy, %": "79.67 ± 0.21 (n = 3)"},
    ]
    runs = [make_run(tmp_path / "float", method="float")]
    section = page(runs, tmp_path, over_seeds=rows).partition('<h2 id="seeds">')[2].partition("</section>")[0]
    assert all(row["test accuracy, %"] in section for row in rows)
    assert html.escape(HOSTILE) in section
    assert HOSTILE not in section
    assert "digits" not in section
    assert rows[0]["test accuracy, %"] in page(runs, tmp_path, over_seeds=rows[:1])
    assert '<h2 id="seeds">' not in page(runs, tmp_path)


def test_the_page_has_the_numbers(tmp_path):
    runs = [make_run(tmp_path / "float", method="float", accuracy=0.9), make_run(tmp_path / "binary")]
    text = page(runs, tmp_path, title="Two runs")
    assert "<h1>Two runs</h1>" in text
    for run in runs:
        result = run.evaluation
        assert f"{100 * result['accuracy']:.2f} %" in text
        assert f"{result['correct']:,} of 10,000" in text
    assert "311,427,072" in text
    assert "27.9&times; below float32" in text
    assert "float</bdi> is better" in text
    data = json.loads(re.search(r'id="data">(.*?)</script>', text).group(1))
    assert data[1]["curves"]["test_accuracy"] == [row["test_accuracy"] for row in runs[1].metrics()]
    assert data[1]["evaluation"]["matrix"] == runs[1].evaluation["confusion_matrix"]


def test_settings_that_differ_and_those_that_do_not(tmp_path):
    runs = [make_run(tmp_path / "a", method="float", seed=1), make_run(tmp_path / "b", seed=2)]
    text = page(runs, tmp_path)
    differing = text[text.index("Settings that differ") : text.index("<details>")]
    assert "<bdi>recipe.<wbr>optimizer</bdi>" in differing
    assert "<bdi>seed</bdi>" in differing
    assert "<bdi>precision</bdi>" not in differing
    assert "<bdi>precision</bdi>" in text


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"classes": ["x", *CIFAR10[1:]]}, "the runs have different classes"),
        ({"test_seed": 1}, "the runs were evaluated on different data"),
        ({"data": {"name": "cifar10", "hash": "other"}}, "the runs were evaluated on different data"),
        ({"evaluated_on": "other"}, "the runs were evaluated on different data"),
    ],
)
def test_runs_that_cannot_be_tested_against_each_other(tmp_path, settings, reason):
    runs = [make_run(tmp_path / "a"), make_run(tmp_path / "b", **settings)]
    assert f"No test: {reason}." in page(runs, tmp_path)


def test_many_runs_are_tested_against_the_first_on_their_data(tmp_path):
    others = {"data": {"name": "other", "hash": "other"}}
    made = [
        make_run(tmp_path / f"{i}", images=100, **(others if i % 3 == 2 else {})) for i in range(EVERY_PAIR_UP_TO + 1)
    ]
    all_pairs = significance(gather(made[:-1]))
    assert all_pairs.count("<small>against ") == EVERY_PAIR_UP_TO * (EVERY_PAIR_UP_TO - 1) // 2
    assert "No test: " in all_pairs
    text = significance(gather(made))
    found = re.findall(r"<bdi>(\d)</bdi><small>against <bdi>(\d)</bdi>", text)
    assert found == [("2" if i % 3 == 2 else "0", str(i)) for i in range(len(made)) if i not in (0, 2)]
    assert "No test: " not in text
    assert "each is held against the first one on the same data" in text


def test_one_run_alone(tmp_path):
    text = page([make_run(tmp_path / "only")], tmp_path)
    assert "needs two evaluated runs" in text
    assert "recipe.<wbr>optimizer" in text


def test_a_run_in_progress_without_evaluation(tmp_path):
    text = page([make_run(tmp_path / "young", finished=4, evaluated=False)], tmp_path)
    assert "is in progress or was stopped: 4 of 10 epochs are finished" in text
    assert "<code>lowbit evaluate" in text


def test_a_run_before_its_first_epoch(tmp_path):
    assert "has no curves" in page([make_run(tmp_path / "new", finished=0, evaluated=False)], tmp_path)


@pytest.mark.parametrize(("date", "stale"), [("2026-11-02T12:00:00+00:00", False), ("2026-10-31", True), ("", True)])
def test_an_evaluation_from_before_the_end_of_training_is_noted(tmp_path, date, stale):
    run = make_run(tmp_path / "again")
    write_json(run.config_path, {**run.config, "finished": "2026-11-01T12:00:00+00:00"})
    write_json(run.evaluation_path, {**run.evaluation, "date": date})
    assert ("was evaluated before its training ended" in page([run], tmp_path)) == stale


@pytest.mark.parametrize("rows", ["1,2.0,3.0,4.0", "1,x", '1,"2\n\0'], ids=["too many", "no number", "no end"])
def test_damaged_metrics_are_named(tmp_path, rows):
    run = make_run(tmp_path / "a")
    run.metrics_path.write_text(f"epoch,train_loss\n{rows}\n")
    with pytest.raises(LowbitError, match=r"metrics\.csv is damaged"):
        gather([run])


def test_numbers_that_are_not_finite_are_left_out(tmp_path):
    run = make_run(tmp_path / "diverged", evaluated=False)
    run.metrics_path.write_text("epoch,train_loss,test_accuracy\n1,2.0,0.3\n2,nan,0.2\n3,inf,nan\n")
    [entry] = gather([run])
    assert entry.curves()["train_loss"] == [2.0, None, None]
    assert entry.best("test_accuracy")["epoch"] == 1
    assert entry.best("val_accuracy") is None
    page([run], tmp_path)


def test_hostile_names_are_only_text(tmp_path):
    folder = tmp_path / HOSTILE.replace("/", "\u2215")
    classes = [HOSTILE, "${title}", "%{x}", *CIFAR10[3:]]
    run = make_run(folder, classes=classes, **{HOSTILE: HOSTILE})
    text = page([run, make_run(tmp_path / "b", classes=classes)], tmp_path, title=HOSTILE)
    assert "<img" not in text
    assert "alert(1)</script>" not in text
    assert text.count("<script") == text.count("</script>") == 3
    data = json.loads(re.search(r'id="data">(.*?)</script>', text).group(1))
    assert data[0]["evaluation"]["classes"] == classes


def test_runs_of_the_same_name_can_be_told_apart(tmp_path):
    runs = [make_run(tmp_path / "a" / "run"), make_run(tmp_path / "b" / "run")]
    assert [entry.label for entry in gather(runs)] == ["a/run", "b/run"]
    assert [entry.label for entry in gather([runs[0], runs[0]])] == ["a/run (1)", "a/run (2)"]


@pytest.mark.parametrize(
    "change",
    [
        {"confusion_matrix": [[1, 2]]},
        {"confusion_matrix": "x"},
        {"classes": [1, 2]},
        {"predictions": []},
        {"per_class": [{}] * 10},
        {"accuracy": None},
        {"accuracy": 10**400},
    ],
    ids=lambda change: f"{change}"[:30],
)
def test_a_damaged_evaluation_is_named(tmp_path, change):
    run = make_run(tmp_path / "a")
    write_json(run.evaluation_path, {**run.evaluation, **change})
    with pytest.raises(LowbitError, match=r"evaluation\.json is damaged"):
        compare([run], tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


def test_an_evaluation_that_is_no_object_is_named(tmp_path):
    run = make_run(tmp_path / "a")
    write_json(run.evaluation_path, [1])
    with pytest.raises(LowbitError, match=r"evaluation\.json is damaged; write it again with `lowbit evaluate"):
        compare([run], tmp_path / "report.html")


def test_diagnostics_have_a_section_and_a_table(tmp_path):
    runs = [make_run(tmp_path / "plain"), make_run(tmp_path / "diagnosed", epochs=40, layers=4)]
    assert 'id="diagnostics"' not in page(runs[:1], tmp_path)
    text = page(runs, tmp_path)
    assert 'id="diagnostics"' in text
    written = json.loads(runs[1].diagnostics_path.read_text())
    last = written["epochs"][-1]["layers"]["features.3.conv"]
    table = text[text.index("after epoch 40, in numbers") : text.index("Settings that differ")]
    row = table[table.index("<bdi>features.3.conv</bdi>") :]
    assert f"<td>{100 * last['flip_ratio']:.3g} %</td>" in row
    assert f"<td>{last['gradient_cosine']:.2f}</td>" in row
    assert table.count("&ndash;") == 2, "what the first layer reads is not quantized"
    assert "64 train images, with 4 directions of width 0.3" in table
    data = json.loads(re.search(r'id="data">(.*?)</script>', text).group(1))
    assert data[0]["diagnostics"] is None
    drawn = data[1]["diagnostics"]
    cosines = [epoch["layers"]["features.1.conv"]["gradient_cosine"] for epoch in written["epochs"]]
    assert drawn["figures"]["gradient_cosine"][1] == cosines
    shown = drawn["histograms"]["epochs"]
    assert (len(shown), shown[0], shown[-1]) == (SHOWN_HISTOGRAMS, 1, 40)
    assert shown == sorted(set(shown))
    assert drawn["histograms"]["layers"][2][-1] == written["epochs"][-1]["layers"]["features.2.conv"]["weights"]


def test_a_run_in_its_first_epoch_has_no_diagnostics_yet(tmp_path):
    run = make_run(tmp_path / "young", finished=0, evaluated=False, layers=2)
    assert json.loads(run.diagnostics_path.read_text())["epochs"] == []
    assert 'id="diagnostics"' not in page([run], tmp_path)


@pytest.mark.parametrize("epochs", [1, 2, 23, 24, 25])
def test_histograms_of_any_number_of_epochs(tmp_path, epochs):
    [entry] = gather([make_run(tmp_path / "a", epochs=epochs, layers=1)])
    shown = entry.diagnostics.chart_data()["histograms"]["epochs"]
    assert shown == sorted(set(shown))
    assert (shown[0], shown[-1], len(shown)) == (1, epochs, min(epochs, SHOWN_HISTOGRAMS))


@given(st.lists(st.tuples(st.integers(1, 5), st.integers(1, 5))))
def test_the_pareto_front(points):
    front = pareto_front(points)
    best = {}
    for cost, accuracy in points:
        best[cost] = max(accuracy, best.get(cost, 0))
    # Going up in cost, a point is on the front when its accuracy is a record.
    records = {(c, a) for c, a in best.items() if all(a > best[other] for other in best if other < c)}
    assert front == [point in records for point in points]


def test_accuracy_against_bytes_and_time(tmp_path):
    costs = {"large": (0.90, 58_000, 20.0), "small": (0.80, 2_000, 2.0), "worse": (0.70, 3_000, 1.0)}
    runs = [
        make_run(tmp_path / name, accuracy=accuracy, packed_bytes=size, milliseconds=time)
        for name, (accuracy, size, time) in costs.items()
    ]
    assert 'id="costs"' not in page(runs[:1], tmp_path), "one run has no front"
    write_json(runs[1].latency_path, {"Faster CPU": latency(0.1), MACHINE: latency(2.0, disturbed=True)})
    text = page([*runs, make_run(tmp_path / "unpacked")], tmp_path)
    assert f"one image at a time, on {MACHINE}." in text
    section = text[text.index('id="costs"') : text.index('id="training"')]
    cells = [re.findall(r"<td>(.*?)</td>", row)[1:] for row in re.findall(r"<tr><th scope=.row.*?</tr>", section)]
    day = "<small>2026-11-01{}</small>"
    assert cells == [
        ["● 58,000", "● 20.000" + day.format("")],
        ["● 2,000", "● 2.000" + day.format(", disturbed")],
        ["3,000", "● 1.000" + day.format("")],
    ]
    data = json.loads(re.search(r'id="data">(.*?)</script>', text).group(1))
    assert data[2]["costs"]["packed_bytes"] == {"cost": 3000, "front": False}
    assert data[3]["costs"] is None


def test_times_are_of_the_machine_that_has_most_of_them(tmp_path):
    runs = [make_run(tmp_path / name, milliseconds=1.0) for name in "ab"]
    write_json(runs[0].latency_path, {"Newer": latency(1, date="2027"), MACHINE: latency(1)})
    costs = [entry.costs for entry in gather(runs)]
    assert common_machine(costs) == MACHINE
    assert common_machine(costs[:1]) == "Newer"
    assert common_machine([]) == ""


def test_runs_on_other_images_neither_beat_each_other_nor_are_compared(tmp_path):
    """Two on easy images, two on hard ones: each pair has a front of its own, and the first sentence stays with one."""
    easy, hard = ({"data": {"name": name, "hash": name}} for name in ("easy", "hard"))
    runs = [
        make_run(tmp_path / "a", accuracy=0.95, packed_bytes=100, **easy),
        make_run(tmp_path / "b", accuracy=0.88, packed_bytes=50, **easy),
        make_run(tmp_path / "c", accuracy=0.80, packed_bytes=120, **hard),
        make_run(tmp_path / "d", accuracy=0.70, packed_bytes=60, **hard),
    ]
    entries = gather(runs)
    found = compare_costs([(e.evaluation["accuracy"], e.costs, e.data_hash) for e in entries])
    assert found.fronts["packed_bytes"] == [True] * 4
    sentence = lead(entries)
    assert "<bdi>b</bdi></strong> reaches" in sentence
    assert "<bdi>c</bdi>" not in sentence


def test_an_evaluation_on_other_images_is_noted(tmp_path):
    runs = [make_run(tmp_path / "a", data={"name": "cifar10", "hash": "own"}, evaluated_on="other")]
    assert "was evaluated on other images than its own" in page(runs, tmp_path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("export", []),
        ("export", {"packed_bytes": -1, "refusal": ""}),
        ("export", {"packed_bytes": "1", "refusal": ""}),
        ("export", {"packed_bytes": 1}),
        ("latency", []),
        ("latency", {"CPU": 1}),
        ("latency", {"CPU": latency(0)}),
        ("latency", {"CPU": latency(10**400)}),
        ("latency", {"CPU": latency(True)}),
        ("latency", {"CPU": latency(1, disturbed="no")}),
        ("latency", {"CPU": latency(1, date=None)}),
    ],
)
def test_damaged_costs_are_named(tmp_path, name, content):
    run = make_run(tmp_path / "a")
    write_json(run.path / f"{name}.json", content)
    with pytest.raises(LowbitError, match=rf"{name}\.json is damaged; delete it and run the study again"):
        compare([run], tmp_path / "report.html")


LAYER = ("epochs", 1, "layers", "features.0.conv")
HUGE = 10**400


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ((), []),
        ((), None),
        (("epochs",), {}),
        (("epochs",), None),
        (("epochs", 0), []),
        (("epochs", 0, "epoch"), 2),
        (("epochs", 0, "epoch"), True),
        (("epochs", 0, "epoch"), "1"),
        (("epochs", 0, "epoch"), HUGE),
        (("epochs", 1, "layers"), []),
        (("epochs", 1, "layers"), {}),
        (LAYER, None),
        (LAYER, []),
        ((*LAYER, "flip_ratio"), 1.5),
        ((*LAYER, "flip_ratio"), -HUGE),
        ((*LAYER, "gradient_cosine"), "1"),
        ((*LAYER, "gradient_cosine"), float("nan")),
        ((*LAYER, "dead"), True),
        ((*LAYER, "saturated"), [0.5]),
        ((*LAYER, "weights"), 1),
        ((*LAYER, "weights", "low"), 5.0),
        ((*LAYER, "weights", "high"), float("inf")),
        ((*LAYER, "weights", "high"), HUGE),
        ((*LAYER, "weights", "counts"), []),
        ((*LAYER, "weights", "counts"), [0, 0]),
        ((*LAYER, "weights", "counts"), [1.5]),
        ((*LAYER, "weights", "counts"), [-1, 2]),
        ((*LAYER, "weights", "counts"), [HUGE]),
        ((*LAYER, "weights", "counts"), [1] * 100_000),
        ((*LAYER, "weights", "counts"), "111"),
        (("probe",), None),
        (("probe", "images"), -1),
        (("probe", "width"), "<b>"),
    ],
)
def test_damaged_diagnostics_are_named(tmp_path, place, value):
    run = make_run(tmp_path / "a", epochs=2, layers=2)
    whole = json.loads(run.diagnostics_path.read_text())
    part = holder = {"": whole}
    for key in ("", *place)[:-1]:
        part = part[key]
    part[("", *place)[-1]] = value
    run.diagnostics_path.write_text(json.dumps(holder[""]))
    with pytest.raises(LowbitError, match=r"diagnostics\.json is damaged; delete it, or train the run again"):
        compare([run], tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"{", b"[" * 100_000, b'{"epochs": [' + b"1" * 5000 + b"]}"])
def test_diagnostics_that_are_no_json_are_named(tmp_path, content):
    run = make_run(tmp_path / "a", layers=2)
    run.diagnostics_path.write_bytes(content)
    with pytest.raises(LowbitError, match=r"diagnostics\.json cannot be read as JSON"):
        compare([run], tmp_path / "report.html")


def test_a_missing_quantity_is_damage(tmp_path):
    run = make_run(tmp_path / "a", layers=2)
    run.diagnostics_path.write_text(run.diagnostics_path.read_text().replace("saturated", "other"))
    with pytest.raises(LowbitError, match=r"diagnostics\.json is damaged"):
        compare([run], tmp_path / "report.html")


def test_no_run_is_an_error(tmp_path):
    with pytest.raises(UsageError, match="nothing to compare"):
        compare([], tmp_path / "report.html")


def test_the_report_needs_no_torch():
    code = "import sys, lowbit.report; sys.exit(any(name in sys.modules for name in ('torch', 'sklearn', 'scipy')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
