"""The benchmarks' scripts, with tiny settings: what they compute, merge and write. Nothing is timed in earnest."""

from __future__ import annotations

import importlib
import json
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import lowbit
from lowbit.errors import UsageError
from lowbit.exporter import bench

ROOT = Path(__file__).parents[1]
# Of a page: its part's name and the script that writes it.
PARTS = {
    "headline": ("engine", "xnor_headline"),
    "cost_growth": ("engine", "cost_growth"),
    "where_time_goes": ("engine", "where_time_goes"),
    "two_threads": ("engine", "two_threads"),
    "training": ("results", "training"),
    "training_bf16": ("results", "training"),
}
PAGE = "before\n\n" + "\n".join(f"<!-- begin {part} -->\n<!-- end {part} -->\n" for part in PARTS)


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports a script of benchmarks/, its measuring cut short."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.setattr(bench, "MOST", 2)

    def load(name: str) -> ModuleType:
        module = importlib.import_module(name)
        if hasattr(module, "SECONDS"):
            monkeypatch.setattr(module, "SECONDS", 0.0)
        return module

    return load


def row(net: str, kind: str, batch: int, milliseconds: float, runtime: str = "lowbit amx") -> dict[str, Any]:
    return {
        "net": net,
        "class": kind,
        "threads": 1,
        "batch": batch,
        "runtime": runtime,
        "milliseconds": milliseconds,
        "low": milliseconds,
        "high": milliseconds,
        "runs": 7,
        "processor_share": 1.0,
        "date": "2026-01-02T03:04:05+00:00",
        "command": f"python benchmarks/engine.py --batches {batch}",
    }


def test_rows_measured_again_replace_those_of_the_same_key(script: Any) -> None:
    engine = script("engine")
    old = [
        row("conv256", "AMX", 1, 1.0),
        row("conv256", "AMX", 1, 3.0, "torch 2 float32"),
        row("vgg16", "AMX", 1, 2.0),
    ]
    new = [row("conv256", "AMX", 1, 0.5), row("conv256", "AVX2", 1, 4.0), row("conv256", "AMX", 16, 5.0)]
    found = [(r["net"], r["class"], r["batch"], r["milliseconds"]) for r in engine.merged(old, new)]
    assert found == [
        ("conv256", "AMX", 1, 0.5),
        ("conv256", "AMX", 16, 5.0),
        ("conv256", "AVX2", 1, 4.0),
        ("vgg16", "AMX", 1, 2.0),
    ]


def test_figures_of_another_machine_are_not_mixed_in(script: Any, tmp_path: Path) -> None:
    engine = script("engine")
    record = {**engine.opened(tmp_path), "rows": [row("conv256", "AMX", 1, 1.0)]}
    script("measured").publish(record, tmp_path, engine.table, engine.plot)
    assert len(engine.opened(tmp_path)["rows"]) == 1
    record = json.loads((tmp_path / "results.json").read_text())
    (tmp_path / "results.json").write_text(json.dumps({**record, "cpu": "Another CPU"}))
    with pytest.raises(SystemExit, match="other cpu: Another CPU"):
        engine.opened(tmp_path)


def test_the_table_has_the_best_of_each_form_and_every_peer(script: Any) -> None:
    engine = script("engine")
    rows = [
        row("conv256", "AMX", 1, 2.0),
        row("conv256", "AMX", 1, 1.0, "lowbit amx 8-bit rest"),
        row("conv256", "AMX", 1, 9.0, "torch 2 float32, channels last"),
        row("conv256", "AMX", 1, 8.0, "openvino 3 float32"),
        row("conv256", "AMX", 1, 5.0, "openvino 3 int8 and bf16"),
        row("conv256", "AMX", 1, 3.0, "openvino 3 binary"),
    ]
    shown = engine.table({"cpu": "A CPU", "cores": 2, "rows": rows})
    summary = next(line for line in shown.splitlines() if line.startswith("| conv256"))
    assert [cell.strip() for cell in summary.split("|")[6:-1]] == [
        "1.000 (1.000 to 1.000)",
        "8.000 (8.000 to 8.000), 4.00x, openvino",
        "-",
        "5.000 (5.000 to 5.000), 2.50x and 5.00x, openvino",
        "3.000 (3.000 to 3.000), 1.50x, openvino",
    ]
    assert "| torch 2 float32, channels last | 9.000 (9.000 to 9.000) | 4.50 |" in shown


@pytest.mark.parametrize("net", ["conv256", "dense4096"])
def test_a_layer_is_timed_from_codes_to_codes(
    net: str, script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = script("engine")
    monkeypatch.setitem(engine.LAYERS, net, {"conv256": (64, 5, 3), "dense4096": (64, 1, 1)}[net])
    engine.export(net, tmp_path / "m.lowbit")
    rows = engine.measure(str(tmp_path / "m.lowbit"), net, 2, 1, ["torch"])
    assert [r["runtime"].split()[0] for r in rows] == ["lowbit", "torch", "torch", "torch"]
    assert all(r["low"] <= r["milliseconds"] <= r["high"] for r in rows)


def residual() -> nn.Module:
    """With norms of either sign."""
    options = {"width": 1 / 8, "image_size": 32, "stem": "imagenet", "shortcut": "conv"}
    model = lowbit.models.create("resnet18", method="xnor_net", **options)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, -1, 1)
    return model.eval()


def test_openvino_computes_the_same_binary_network(script: Any) -> None:
    pytest.importorskip("openvino", reason="needs openvino (`pip install 'lowbit[bench]'`)")
    binary, headline = script("openvino_binary"), script("xnor_headline")
    random = np.random.default_rng(0)
    packed = lowbit.export(residual(), torch.randn(1, 3, 32, 32)).packed
    for model, tolerance in ((headline.binary_convolution(24, 3), 0), (packed, 1e-4)):
        images = random.integers(-1, 2, (2, *model.input_shape)).astype(np.float32)  # with ties
        tensors = [model.op_tensors(index) for index in range(len(model.ops))]
        calls = binary.runners(model.input_shape, model.ops, tensors, images, 1)
        expected = lowbit.Engine(model)(images)
        outputs = next(iter(calls.values()))()[0].reshape(expected.shape)
        assert np.abs(outputs - expected).max() <= tolerance * np.abs(expected).max()
    odd = headline.binary_convolution(20, 1)
    with pytest.raises(UsageError, match="wrong for 20 channels"):
        binary.network((1, 20, 14, 14), odd.ops, [odd.op_tensors(index) for index in range(3)])


def test_the_formula_gives_the_papers_figure(script: Any) -> None:
    assert script("xnor_headline").formula(256, 3) == pytest.approx(62.27, abs=0.005)


@pytest.mark.skipif(shutil.which("c++") is None, reason="needs c++")
def test_the_headline_is_measured_drawn_and_put_into_its_page(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("openvino", reason="needs openvino (`pip install 'lowbit[bench]'`)")
    headline, page = script("xnor_headline"), tmp_path / "page.md"
    page.write_text(PAGE)
    for name, value in {"OUTPUTS": 8, "SIDE": 3, "POINT": (16, 3), "PLAIN_RUNS": 2}.items():
        monkeypatch.setattr(headline, name, value)
    headline.main(tmp_path, page, "1,16", "3")
    record = json.loads((tmp_path / "results.json").read_text())
    assert [(r["channels"], r["filter"]) for r in record["rows"]] == [(16, 3), (1, 3)]
    (bits, floats) = (record["rows"][0]["bytes"][form] for form in ("bits", "float32"))
    assert (bits, floats) == (8 * 9 * 8, 8 * 9 * 16 * 4)
    assert record["rows"][0]["macs"] == 8 * 9 * 9 * 16
    assert all({"plain", "float32", "int8"} == headline.speed_ups(r).keys() for r in record["rows"])
    assert headline.text(record) in page.read_text()
    assert page.read_text().startswith("before\n\n<!-- begin headline -->\n\nAt the paper's point")
    assert (tmp_path / "plot.svg").read_text().count("<svg") == 1


def test_the_growth_of_cost_is_measured_drawn_and_put_into_its_page(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    growth, page = script("cost_growth"), tmp_path / "page.md"
    page.write_text(PAGE)
    monkeypatch.setattr(growth, "USUAL", {"lenet": (1, 16, 3), "nin": (3, 8, 2)})
    growth.main(tmp_path, page, "nin,lenet")
    record = json.loads((tmp_path / "results.json").read_text())
    assert [r["model"] for r in record["rows"]] == ["lenet", "nin"]
    assert all(0 < r["binary_macs"] < r["macs"] and r["bytes"] < r["float_bytes"] for r in record["rows"])
    assert growth.text(record) in page.read_text()
    assert growth.slope([1, 10, 100], [5, 50, 500]) == pytest.approx(1)


def test_time_is_told_apart_by_kind_of_work_and_put_into_its_page(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    where, page = script("where_time_goes"), tmp_path / "page.md"
    page.write_text(PAGE)
    for name, method in (("binary", "xnor_net"), ("codes", "hwgq")):
        monkeypatch.setitem(where.NETS, name, ("nin", {"width": 0.25}, method, {}, 16))
    where.main(tmp_path, page, "binary,codes")
    record = json.loads((tmp_path / "results.json").read_text())
    assert {(r["net"], r["rest"]) for r in record["rows"]} == {
        (net, rest) for net in ("binary", "codes") for rest in ("float", "8-bit rest")
    }
    binary, rest, codes = (record["rows"][index]["by_kind"] for index in (0, 1, -2))
    assert (
        binary["1-bit products"]["macs"] > binary["float products"]["macs"] > 0 == binary["products of codes"]["macs"]
    )
    assert rest["products of codes"]["macs"] == binary["float products"]["macs"]
    assert codes["1-bit products"]["macs"] == 0 < codes["products of codes"]["macs"]
    assert all(sum(kind["milliseconds"] for kind in r["by_kind"].values()) > 0 for r in record["rows"])
    least = binary["1-bit products"]["macs"] / record["rows"][0]["binary_peak_gmacs"] / 1e6
    assert where.bound(record["rows"][-2]) == 0 < where.bound(record["rows"][0]) == pytest.approx(least)
    assert 0 < binary["1-bit products"]["least"] <= binary["1-bit products"]["milliseconds"]
    assert where.text(record) in page.read_text()
    assert (tmp_path / "plot.svg").read_text().count("<svg") == 1


def test_the_gain_of_a_second_thread_is_measured_and_put_into_its_page(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads, page = script("two_threads"), tmp_path / "page.md"
    page.write_text(PAGE)
    monkeypatch.setitem(threads.NETS, "small", ("nin", {"width": 0.25}, "xnor_net", {}, 16))
    threads.main(tmp_path, page, "small", "2,3")
    record = json.loads((tmp_path / "results.json").read_text())
    assert [(r["rest"], r["batch"]) for r in record["rows"]] == [
        ("float", 2),
        ("float", 3),
        ("8-bit rest", 2),
        ("8-bit rest", 3),
    ]
    one, two = (record["rows"][0]["by_threads"][count] for count in ("1", "2"))
    assert threads.gain(record["rows"][0]) == one["milliseconds"] / two["milliseconds"] > 0
    assert 0 < one["least"] <= one["milliseconds"]
    assert threads.text(record) in page.read_text()


def test_the_speed_of_training_is_measured_and_put_into_its_page(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training, page = script("training"), tmp_path / "page.md"
    page.write_text(PAGE)
    monkeypatch.setattr(training, "NETWORKS", (("lenet", "float"), ("nin", "xnor_net")))
    monkeypatch.setattr(training, "LAYERS", ((3, 4),))
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    for precision in ("float32", "bf16"):
        training.main(tmp_path, page, batch=2, precision=precision)
        record = json.loads((tmp_path / "results.json").read_text())
        assert record["precision"] == precision
        assert [(row["model"], set(row["steps"])) for row in record["networks"]] == [
            ("lenet", {"plain", "lowbit"}),
            ("nin", {"plain", "lowbit"}),
        ]
        assert set(record["layers"][0]["steps"]) == {"float", "xnor_net", "reactnet"}
        assert training.text(record) in page.read_text()
    with pytest.raises(UsageError, match="precision is 'half'"):
        training.main(tmp_path, page, batch=2, precision="half")
    times = {name: {"milliseconds": value} for name, value in (("plain", 6.0), ("lowbit", 4.0), ("float", 2.0))}
    assert (training.gain({"steps": times}), training.over_float({"steps": times}, "plain")) == (1.5, 3.0)


@pytest.mark.parametrize("part", PARTS)
def test_the_page_shows_the_figures_of_the_results(part: str, script: Any) -> None:
    """Nobody writes figures into them by hand; before the first run such a part is empty."""
    page, name = PARTS[part]
    results = ROOT / "results" / part / "results.json"
    shown = (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8")
    shown = shown.partition(f"<!-- begin {part} -->\n")[2].partition(f"<!-- end {part} -->")[0]
    record = json.loads(results.read_text(encoding="utf-8")) if results.exists() else None
    assert shown == (f"\n{script(name).text(record)}\n" if record else "")


def test_a_page_without_the_part_is_refused(script: Any, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("nothing\n")
    with pytest.raises(ValueError, match="no part called 'headline'"):
        script("measured").into_page(page, "headline", "text")
