"""The figures of docs/results.md are those of results/fashion_mnist."""

import json
import re
from pathlib import Path

from lowbit.study.results import read_results

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


def test_the_page_shows_the_command_of_the_study() -> None:
    study = json.loads((ROOT / "results" / "fashion_mnist" / "study.json").read_text(encoding="utf-8"))
    assert study["command"] in (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
