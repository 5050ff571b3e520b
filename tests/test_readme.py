"""What the README shows is run as it stands there."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import lowbit
from lowbit import data, methods, models
from lowbit.preprocessing import Preprocessing

README = Path(__file__).parent.parent / "README.md"
CIFAR10 = README.parent / "results" / "cifar10"


def test_the_python_of_the_readme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (block,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    theirs = nn.Sequential()
    for name, layer in (("stem", nn.Linear(8, 8)), ("middle", nn.Linear(8, 8)), ("fc", nn.Linear(8, 2))):
        theirs.add_module(name, layer)
    names: dict[str, Any] = {"any_torch_model": theirs}
    monkeypatch.chdir(tmp_path)
    exec(block.replace("\n# lowbit.quantize_", "\nlowbit.quantize_"), names)
    assert type(theirs.fc) is nn.Linear
    assert type(theirs.middle) is not nn.Linear
    with torch.inference_mode():
        expected = names["model"].eval()(torch.from_numpy(names["images"])).numpy()
    np.testing.assert_allclose(names["logits"], expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_the_deployment_of_the_readme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (block,) = re.findall(r"```py\n(.*?)```", README.read_text(), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    preprocessing = Preprocessing("L", (32, 32), 0, (0.5,), (0.5,))
    model = lowbit.models.create("lenet", 3, "xnor_net", in_channels=1, width=0.2).eval()
    lowbit.export(model, torch.zeros(1, 1, 32, 32), classes=list("abc"), preprocessing=preprocessing).save(
        "model.lowbit"
    )
    Image.new("L", (32, 32), 77).save("photo.png")
    names: dict[str, np.ndarray] = {}
    exec(block, names)
    assert names["probabilities"].shape == (1, 3)
    assert names["probabilities"].sum() == pytest.approx(1)


def test_the_commands_of_the_readme_exist() -> None:
    from typer.main import get_command

    from lowbit.cli import app

    known = set(get_command(app).commands)
    blocks = re.findall(r"```sh\n(.*?)```", README.read_text(), re.DOTALL)
    shown = {name for block in blocks for name in re.findall(r"^lowbit ([a-z]+)", block, re.MULTILINE)}
    assert {"train", "export"} <= shown
    assert shown <= known


def test_the_table_of_the_readme_names_all_that_is_registered() -> None:
    rows = dict(re.findall(r"^\| ([\w -]+) \| (`.*) \|$", README.read_text(), re.MULTILINE))
    named = {row: re.findall(r"`([\w:]+)`", text) for row, text in rows.items()}
    assert sorted(named.pop("models")) == sorted(models.registry)
    assert sorted(named.pop("data sets")) == sorted([*data.registry, "folder:PATH"])
    made = {name: method() for name in methods.registry if (method := methods.registry[name])}
    del made["float"]
    assert sorted(name for names in named.values() for name in names) == sorted(made)
    for name, method in made.items():
        of_bits = {(1, 1): "1-bit weights and activations", (method.bits_w, 32): "low-bit weights alone"}
        row = of_bits.get((method.bits_w, method.bits_a), "few bits")
        assert name in named[row], row


@pytest.mark.parametrize(("method", "name"), [("float", "float"), ("xnor_net", "XNOR-Net")])
def test_the_figures_of_the_readme_are_those_of_its_files(method: str, name: str) -> None:
    results = README.parent / "results" / "digits"
    evaluation = json.loads((results / f"{method}.lowbit.evaluation.json").read_text())
    engine, *peers = json.loads((results / f"{method}.bench.json").read_text())["rows"]
    torch_row = min(peers, key=lambda row: float(row["milliseconds"]))
    cells = (
        name,
        f"{100 * evaluation['accuracy']:.2f} % ({evaluation['correct']} of {evaluation['total']})",
        f"{evaluation['profile']['weight_bytes']:,}",
        f"{engine['milliseconds']:.3f}",
        f"{torch_row['milliseconds']:.3f}",
        f"{torch_row['ratio']:.1f}",
    )
    assert f"| {' | '.join(cells)} |" in README.read_text()


@pytest.mark.parametrize(
    ("run", "method", "name"),
    [
        ("float", "float", "float"),
        ("xnor_net", "xnor_net", "XNOR-Net"),
        ("xnor_net_from_float", "xnor_net", "XNOR-Net, from float"),
    ],
)
def test_the_accuracies_of_the_readme_are_those_of_its_files(run: str, method: str, name: str) -> None:
    evaluation, config = (json.loads((CIFAR10 / run / f"{file}.json").read_text()) for file in ("evaluation", "config"))
    assert (config["model"]["name"], config["method"]["name"], config["epochs"]) == ("vgg16", method, 10)
    assert (config["init_from"] is not None) == name.endswith("from float")
    accuracy = f"{100 * evaluation['accuracy']:.2f} % ({evaluation['correct']:,} of {evaluation['total']:,})"
    assert f"| {name} | {accuracy} | {evaluation['loss']:.4f} |" in README.read_text()


def test_the_packed_vgg16_of_the_readme_is_that_of_its_files() -> None:
    packed, trained, float_twin = (
        json.loads((CIFAR10 / file).read_text())
        for file in (
            "xnor_net_from_float.lowbit.evaluation.json",
            "xnor_net_from_float/evaluation.json",
            "float/evaluation.json",
        )
    )
    bench = json.loads((CIFAR10 / "xnor_net_from_float.bench.json").read_text())
    assert packed["predictions"] == trained["predictions"]
    assert not bench["disturbed"]
    assert (bench["threads"], bench["batch"]) == (1, 1)
    engine, *peers = bench["rows"]
    torch_row = min(peers, key=lambda row: float(row["milliseconds"]))
    small, large = packed["profile"]["weight_bytes"], float_twin["profile"]["weight_bytes"]
    text = README.read_text()
    assert f"classifies the same {packed['correct']:,} images" in text
    assert f"take {small:,} bytes where the float network has {large:,}: {large / small:.1f} times fewer" in text
    assert (
        f"takes {engine['milliseconds']:.3f} ms on one thread, and {torch_row['milliseconds']:.3f} ms in torch" in text
    )
    assert f"{torch_row['ratio']:.1f} times as long" in text


def test_the_engine_table_of_the_readme_is_that_of_its_files() -> None:
    """The columns of AMX are from a machine that has it, the others from one that has not, as is another's sentence."""
    results = README.parent / "results"
    folders = {"AMX": "engine", "AVX-512": "engine_epyc", "AVX2": "engine_epyc"}
    text = README.read_text()
    unwrapped = " ".join(text.split())

    def rows_of(folder: str) -> list[dict[str, Any]]:
        of_file = json.loads((results / folder / "results.json").read_text())["rows"]
        table = (results / folder / "table.md").read_text()
        assert all(f"`{row['command']}`" in table for row in of_file)
        return [row for row in of_file if row["threads"] == 1]

    def cells(rows: list[dict[str, Any]], net: str, kind: str, batch: int) -> list[str]:
        """Ours, and the fastest float32 and int8 peer over ours; the latter over ours with an 8-bit rest, if any."""
        engine, *others = [row for row in rows if (row["net"], row["class"], row["batch"]) == (net, kind, batch)]
        best = {
            form: min(row["milliseconds"] for row in others if row["runtime"].split()[2].strip(",") == form)
            for form in ("float32", "int8")
        }
        ours = engine["milliseconds"]
        beside_int8 = next((row["milliseconds"] for row in others if row["runtime"].endswith("8-bit rest")), ours)
        return [f"{ours:.3g}", f"{best['float32'] / ours:.1f}", f"{best['int8'] / beside_int8:.2f}"]

    found = {folder: rows_of(folder) for folder in folders.values()}
    for net, batch in dict.fromkeys((row["net"], row["batch"]) for row in found["engine"]):
        of_classes = [cell for kind, folder in folders.items() for cell in cells(found[folder], net, kind, batch)]
        assert f", {batch} | {' | '.join(of_classes)} |" in text
    epyc = [row for row in found["engine_epyc"] if (row["net"], row["class"]) == ("resnet18", "AVX-512")]
    binary = []
    for batch in (1, 16):
        of_batch = {row["runtime"].partition(" ")[2]: row["milliseconds"] for row in epyc if row["batch"] == batch}
        peer = min(ms for name, ms in of_batch.items() if "binary" in name)
        binary.append(f"{peer / of_batch['avx512_vpopcntdq 8-bit rest']:.2f}")
    assert f"ResNet-18 is {' and '.join(binary)} times ahead of the latter" in unwrapped
    nets = ("vgg16", "vgg_small", "resnet18", "vgg_small_2bit")
    for folder in sorted(path.name for path in results.glob("engine*")):
        rows = rows_of(folder)
        above = [kind for kind, shown in folders.items() if shown == folder]
        for kind in dict.fromkeys(row["class"] for row in rows if row["class"] not in above):
            of_nets = (", ".join(cells(rows, net, kind, batch)[2] for batch in (1, 16)) for net in nets)
            assert f"| {kind} | {' | '.join(of_nets)} |" in text, f"{folder}, {kind}"
