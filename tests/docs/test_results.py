"""The figures of docs/results.md are those of the files in results/."""

import json
import re
from pathlib import Path

import pytest

from lowbit import pretrained
from lowbit.runs import Run
from lowbit.study.results import read_results, summarise

ROOT = Path(__file__).parents[2]


def test_every_row_of_the_page_is_a_row_of_the_study() -> None:
    lines = re.findall(
        r"^\| `(\w[\w-]*)`[^|]*\| (\d+) \| (\d+) \| (\d+) \| ([\d.]+) % \|",
        (ROOT / "docs" / "results.md").read_text(encoding="utf-8"),
        re.MULTILINE,
    )
    results = read_results(ROOT / "results" / "fashion_mnist" / "results.csv")
    rows = [
        (
            result.row if result.row.startswith("float") else result.method,
            *map(str, (result.bits_w, result.bits_a, result.bits_g)),
            f"{100 * result.test_accuracy:.2f}",
        )
        for result in results
        if result.test_accuracy is not None
    ]
    assert len(rows) == len(results)
    assert sorted(lines) == sorted(rows)


def section(title: str) -> str:
    """What docs/results.md says under a title."""
    text = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    return text.partition(f"## {title}\n")[2].partition("\n## ")[0]


@pytest.mark.parametrize(
    ("title", "runs", "count"),
    [
        ("One bit on CIFAR-10", "cifar10/patchnet_*", 4),
        ("The float VGG16, longer", "cifar10/float_longer", 1),
        ("BIN_VGG16, longer", "cifar10/bin_vgg16_*", 2),
        ("One bit on Fashion-MNIST", "fashion_mnist_patchnet/*", 5),
        ("One bit in minutes", "cifar10_fast/*", 3),
        ("One bit within 45 minutes", "cifar10_minutes/*", 9),
        ("The same in one study, the rest in 8 bits", "cifar10_minutes_int8/*", 9),
        ("With squares cleared", "cifar10_cutout/*", 5),
        ("The NIN of 2018", "cifar10_nin/*", 6),
        ("One bit by two on CIFAR-10", "cifar10_vgg_small/*", 5),
    ],
)
def test_the_runs_of_the_page_are_those_of_their_files(title: str, runs: str, count: int) -> None:
    text = section(title)
    folders = sorted((ROOT / "results").glob(runs))
    assert len(folders) == count
    for path in folders:
        run = Run(path)
        evaluation = run.evaluation
        assert evaluation is not None
        shown = re.search(rf"\| `{path.name}`[^|]*\| (\d+) \| ([\d.]+) % \| ([\d.]+) \|", text)
        assert shown is not None
        accuracy, hours = f"{100 * evaluation['accuracy']:.2f}", f"{run.config['seconds'] / 3600:.2f}"
        assert shown.groups() == (str(run.config["epochs"]), accuracy, hours)


@pytest.mark.parametrize(("packaged", "title"), [("cifar10-1bit", "CIFAR-10"), ("fashion-1bit", "Fashion-MNIST")])
def test_the_page_says_what_the_packaged_networks_get_right(packaged: str, title: str) -> None:
    assert f"{pretrained.card(packaged)['correct']:,} images of 10,000" in section(f"One bit on {title}")


def test_the_page_shows_the_command_of_the_study() -> None:
    study = json.loads((ROOT / "results" / "fashion_mnist" / "study.json").read_text(encoding="utf-8"))
    assert study["command"] in (ROOT / "docs" / "results.md").read_text(encoding="utf-8")


@pytest.fixture
def ledger(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(ROOT / "studies"))
    import ledger

    return ledger


def test_the_ledger_is_that_of_the_files(ledger) -> None:
    assert ledger.PAGE.read_text(encoding="utf-8") == ledger.written(), "run python studies/ledger.py"


def test_the_ledger_holds_ours_against_theirs(ledger) -> None:
    figure = {"method": "bwn", "model": "vgg16", "data": "cifar10", "bits_w": 1, "bits_a": 32}
    say = {"accuracy": 90.5, "epochs": 300, "says": "paper", "source": "a paper"}
    near, far = (
        ledger.Ours("a", "bwn", "vgg16", "", "cifar10", 1, 32, 300, "", 88.125, ""),
        ledger.Ours("b", "bwn", "vgg11", "width 0.5", "cifar10", 1, 32, 8, "float", 70.0, "a copy"),
    )
    others = [
        ledger.Ours("c", "bwn", "vgg16", "", "cifar10", 1, 1, 300, "", 99.0, ""),
        ledger.Ours("d", "bwn", "vgg16", "", "digits", 1, 32, 300, "", 99.0, ""),
    ]
    assert ledger.nearest(figure, [far, near, *others]) == [near]
    assert ledger.nearest(figure, [far, *others]) == [far]
    assert ledger.differs(figure, 300, near) == "nothing"
    assert ledger.differs(figure, 300, far) == (
        "a copy; vgg11 with width 0.5, not vgg16; 8 epochs, not 300; starts from float"
    )
    table = ledger.ledger({"figure": [figure | say, figure | say | {"says": "user", "accuracy": [1, 2.5]}]}, [near])
    assert "| `bwn`, vgg16, W1 A32 | CIFAR-10 | 90.50 (1) |  | 1 to 2.5 (1) | 88.12 | `a`: nothing |" in table
    assert "not run on CIFAR-10 |" in ledger.ledger({"figure": [figure | say]}, others)


def test_three_seeds_have_the_accuracies_that_the_page_says() -> None:
    text = section("How much of a difference is chance")
    summaries = summarise(read_results(ROOT / "results" / "fashion_mnist_seeds" / "results.csv"))
    assert len(re.findall(r"^\| `", text, re.MULTILINE)) == len(summaries)
    for summary in summaries:
        (accuracy, margin), first = summary.accuracy, summary.first
        assert accuracy is not None
        assert margin is not None
        assert len(summary.results) == 3
        each = ", ".join(f"{100 * (result.test_accuracy or 0):.2f}" for result in summary.results)
        figures = f"{100 * accuracy:.2f} ± {100 * margin:.2f} %"
        assert f"| `{first.row}` | {first.bits_w} | {first.bits_a} | {figures} | {each} |" in text
