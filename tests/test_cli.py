"""The user's road through the command line; some steps are processes of their own, most are called in this one."""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command import called, lowbit
from PIL import Image

from lowbit import packed
from lowbit.cli import app
from lowbit.data import registry
from lowbit.errors import LowbitError

TRAIN = ("--model", "lenet", "--data", "digits", "--set", "model.width=0.25", "--threads", "1")


@pytest.fixture(scope="module")
def road(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a float and an XNOR-Net run, evaluated, and the packed file of the latter."""
    folder = tmp_path_factory.mktemp("road")
    for method, run in (("float", called), ("xnor_net", lowbit)):
        run("train", "--method", method, *TRAIN, "--epochs", "2", "--out", folder / method)
        run("evaluate", folder / method)
    lowbit("export", folder / "xnor_net", "-o", folder / "model.lowbit")
    return folder


def test_evaluation_of_the_run_and_of_its_packed_file_agree(road: Path) -> None:
    run = json.loads(called("evaluate", road / "xnor_net", "--json", "--batch-size", "100").stdout)
    packed = json.loads(called("evaluate", road / "model.lowbit", "--json").stdout)
    assert run["correct"] > 0.5 * run["total"]
    differing = sum(a != b for a, b in zip(run["predictions"], packed["predictions"], strict=True))
    assert differing <= 1
    assert packed["loss"] == pytest.approx(run["loss"], rel=1e-3)


def test_verify_passes_on_its_own_run_and_fails_on_another(road: Path) -> None:
    report = json.loads(called("verify", road / "xnor_net", road / "model.lowbit", "--images", "16", "--json").stdout)
    assert report["passed"]
    refused = lowbit("verify", road / "float", road / "model.lowbit", "--images", "16", status=1)
    assert refused.stderr.startswith("lowbit: ")


def test_export_makes_the_rest_8_bit_and_says_both_accuracies(road: Path) -> None:
    packed, run = road / "int8.lowbit", road / "xnor_net-int8"
    said = called("export", road / "xnor_net", "--rest", "int8", "-o", packed, "--json")
    quantized = [part["packed"] for part in json.loads(said.stdout) if part["kind"].startswith("Quant")]
    assert quantized
    assert all(quantized)
    evaluations = [json.loads((path / "evaluation.json").read_text()) for path in (road / "xnor_net", run)]
    before, after = (each["accuracy"] for each in evaluations)
    assert f"test accuracy {100 * before:.2f} % -> {100 * after:.2f} %" in said.stderr
    assert after > before - 0.02
    assert json.loads(called("verify", run, packed, "--images", "16", "--json").stdout)["passed"]
    called("evaluate", packed)
    on_engine = json.loads((road / "int8.lowbit.evaluation.json").read_text())
    differing = sum(a != b for a, b in zip(on_engine["predictions"], evaluations[1]["predictions"], strict=True))
    assert differing <= 1
    assert {kind.split("x")[0] for kind in on_engine["profile"]["macs"]} == {"1", "8"}
    assert packed.stat().st_size < (road / "model.lowbit").stat().st_size


def test_the_rest_of_the_run_in_this_folder_becomes_8_bit(road: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of "." the name is known only once it is resolved; what stands in the way must be such a run itself."""
    monkeypatch.chdir(road / "xnor_net")
    called("export", ".", "--rest", "int8", "-o", road / "here.lowbit")
    config = json.loads((road / "xnor_net-int8" / "config.json").read_text())
    assert config["rest"] == {"name": "affine", "options": {"observer": "mse"}}
    shutil.copytree(road / "xnor_net", road / "other")
    called("calibrate", road / "other", "--out", road / "other-int8", "--bits-w", "4", "--images", "16")
    refused = called("export", road / "other", "--rest", "int8", "-o", road / "other.lowbit", status=2)
    assert "other-int8 exists, but is not the 8-bit rest of" in refused.stderr


@pytest.mark.parametrize(
    "data", [5, {"spec": 5}, {"spec": "digits", "data_dir": 5}, {"spec": "digits", "image_size": "a"}]
)
def test_a_packed_file_that_says_nonsense_of_its_data_is_refused(road: Path, tmp_path: Path, data: Any) -> None:
    model = packed.read(road / "model.lowbit")
    path = tmp_path / "model.lowbit"
    packed.write(path, dataclasses.replace(model, provenance={"data": data}))
    refused = called("evaluate", path, status=2)
    assert "does not say what it was trained on; name a data set with --data" in refused.stderr


def test_predict_names_the_class_of_an_image_file(road: Path) -> None:
    from lowbit import data

    digits = data.load("digits")
    path = road / "digit.png"
    Image.fromarray(digits.test_images[0, :, :, 0]).save(path)
    (row,) = json.loads(called("predict", road / "model.lowbit", path, "--json").stdout)
    evaluation = json.loads((road / "xnor_net" / "evaluation.json").read_text())
    assert row["class"] == digits.classes[evaluation["predictions"][0]]
    assert 0 < row["probability"] <= 1


def test_predict_refuses_what_it_would_have_to_clip(road: Path) -> None:
    path = road / "deep.png"
    Image.new("I;16", (32, 32), 40_000).save(path)
    refused = lowbit("predict", road / "model.lowbit", path, status=1)
    assert refused.stderr == f"lowbit: {path} has more than 8 bits a pixel; convert it to 8 bits\n"


@pytest.mark.parametrize("target", ["a folder", "a pipe"])
def test_what_is_no_file_is_not_replaced_by_one(road: Path, tmp_path: Path, target: str) -> None:
    """As root, a file would take the place even of /dev/null."""
    output = tmp_path / "there"
    if target == "a folder":
        output.mkdir()
    else:
        os.mkfifo(output)
    refused = called("export", road / "xnor_net", "-o", output, status=1)
    assert f"{output} is {'a folder' if target == 'a folder' else 'no regular file'}; choose another" in refused.stderr
    assert not output.is_file()
    assert list(tmp_path.iterdir()) == [output]


@pytest.mark.parametrize("name", ["config.json", "metrics.csv", "model.safetensors", "evaluation.json"])
@pytest.mark.parametrize("command", ["export", "evaluate", "compare"])
def test_no_output_takes_the_place_of_a_file_of_a_run(road: Path, command: str, name: str) -> None:
    output = road / "float" / name
    before = output.read_bytes()
    refused = called(command, road / "xnor_net", "-o", output, status=2)
    assert f"-o names {output}, which is a file of a run; choose another name" in refused.stderr
    assert output.read_bytes() == before


def test_no_output_takes_the_place_of_what_is_read(road: Path) -> None:
    packed_file = road / "model.lowbit"
    assert "which is read" in called("evaluate", packed_file, "-o", packed_file, status=2).stderr
    packed.read(packed_file)


def test_what_may_not_be_read_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> Path:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("lowbit.pretrained.find", refuse)
    assert called("inspect", "x.lowbit", status=1).stderr.startswith("lowbit: x.lowbit: permission denied; ")


@pytest.fixture
def digits_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Load the digits once, not for each of hundreds of commands."""
    monkeypatch.setitem(registry._entries, "digits", functools.cache(registry["digits"]))


def keys(settings: dict[str, Any], prefix: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The keys of a JSON object and of those in it, as paths."""
    for key, value in settings.items():
        yield (*prefix, key)
        if isinstance(value, dict):
            yield from keys(value, (*prefix, key))


def refusals(road: Path, tmp_path: Path, spoil: Any) -> Iterator[tuple[tuple[str, ...], str]]:
    """What commands say of a run whose config.json is spoilt at a key, for each key; any other exception passes.

    Args:
        spoil: called with the object that holds the key, and the key.
    """
    run = tmp_path / "run"
    shutil.copytree(road / "xnor_net", run)
    whole = json.loads((run / "config.json").read_text())
    for path in (path for path in keys(whole) if path[0] not in ("versions", "hardware")):
        config = copy.deepcopy(whole)
        inner = config
        for key in path[:-1]:
            inner = inner[key]
        spoil(inner, path[-1])
        (run / "config.json").write_text(json.dumps(config))
        for command in (
            ("evaluate", run, "-o", tmp_path / "evaluation.json"),
            ("export", run, "-o", tmp_path / "model.lowbit"),
            ("compare", run, road / "float", "-o", tmp_path / "report.html"),
            ("train", "--resume", "--out", run),
        ):
            try:
                app([str(argument) for argument in command], standalone_mode=False)
            except LowbitError as error:
                yield path, str(error)


@pytest.mark.usefixtures("digits_once")
def test_a_config_that_lacks_a_key_is_taken_or_named(road: Path, tmp_path: Path) -> None:
    refused = refusals(road, tmp_path, lambda settings, key: settings.pop(key))
    named = {path for path, sentence in refused if f"it has no '{path[-1]}'" in sentence}
    assert {("model",), ("method", "name"), ("preprocessing",), ("data", "hash"), ("classes",)} <= named


@pytest.mark.usefixtures("digits_once")
@pytest.mark.parametrize("value", [None, ["x"], -1, "x"], ids=repr)
def test_a_config_of_other_types_is_taken_or_refused(road: Path, tmp_path: Path, value: Any) -> None:
    refused = {path for path, _ in refusals(road, tmp_path, lambda settings, key: settings.update({key: value}))}
    assert {("model",), ("recipe",), ("num_classes",), ("model", "options"), ("preprocessing", "size")} <= refused


@pytest.mark.parametrize(
    ("command", "packed"),
    [("predict", "model.lowbit"), ("inspect", "model.lowbit"), ("predict", "digits-1bit"), ("models", "--pretrained")],
)
def test_deployment_commands_import_no_torch(road: Path, command: str, packed: str) -> None:
    image = road / "grey.png"
    Image.fromarray(np.full((40, 30), 128, np.uint8)).save(image)
    file = str(road / packed) if packed == "model.lowbit" else packed
    arguments = [command, file, *([str(image)] if command == "predict" else [])]
    code = (
        "import sys; sys.modules['torch'] = None\n"
        f"from lowbit.cli import app; app({arguments!r}, standalone_mode=False)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


def test_inspect_lists_ops_and_provenance(road: Path) -> None:
    inside = json.loads(called("inspect", road / "model.lowbit", "--json").stdout)
    assert [op["kind"] for op in inside["ops"]].count("binary_conv2d") == 2
    assert inside["provenance"]["method"]["name"] == "xnor_net"
    assert inside["input"] == [1, 32, 32]


def test_a_run_becomes_a_network_with_a_name(road: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "studies"))
    from package import package

    card = package(road / "xnor_net", "tiny-1bit", "a note", out=tmp_path)
    assert json.loads((tmp_path / "tiny-1bit.json").read_text()) == card
    assert (tmp_path / "tiny-1bit.lowbit").read_bytes() == (road / "model.lowbit").read_bytes()
    evaluation = json.loads((road / "xnor_net" / "evaluation.json").read_text())
    assert abs(card["correct"] - evaluation["correct"]) <= 1
    assert card["data"]["copy"] == "a note"
    train, packaged = card["commands"]
    assert train.startswith("lowbit train --method xnor_net --model lenet --data digits --recipe default --epochs 2 ")
    assert "--set model.width=0.25" in train
    assert packaged == 'python studies/package.py runs/NAME tiny-1bit --note "a note"'
    assert str(road) not in json.dumps(card)
    assert card["distill_from"] is None
    with pytest.raises(LowbitError, match="'Tiny' is no name"):
        package(road / "xnor_net", "Tiny", out=tmp_path)


def test_the_command_on_a_card_names_teacher_and_size_of_images(road: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "studies"))
    from package import train_command

    config = json.loads((road / "xnor_net" / "config.json").read_text())
    config["distill_from"] = {"run": "somewhere/teacher", "weights": "0"}
    config["data"] |= {"spec": "folder:/home/me/pictures", "image_size": 48}
    command = train_command(config)
    assert " --distill-from runs/teacher " in command
    assert " --data folder:PATH " in command
    assert " --image-size 48 " in command


def test_evaluation_on_a_folder_resizes_its_images(road: Path, tmp_path: Path) -> None:
    for part in ("train", "test"):
        for digit in range(10):
            folder = tmp_path / part / str(digit)
            folder.mkdir(parents=True)
            Image.new("L", (40, 40), 20 * digit).save(folder / "0.png")
    folder = f"folder:{tmp_path}"
    refused = lowbit("evaluate", road / "model.lowbit", "--data", folder, "-o", tmp_path / "a.json", status=1)
    assert "40" in refused.stderr
    given = ("--data", folder, "--image-size", "32", "-o", tmp_path / "b.json", "--json")
    assert json.loads(called("evaluate", road / "model.lowbit", *given).stdout)["total"] == 10


def test_compare_writes_the_page(road: Path) -> None:
    page = road / "report.html"
    called("compare", road / "float", road / "xnor_net", "-o", page)
    assert page.read_text().lstrip().lower().startswith("<!doctype html>")


def test_bench_times_the_engine_and_torch(road: Path) -> None:
    result = json.loads(called("bench", road / "model.lowbit", "--against", "torch", "--json").stdout)
    text = json.dumps(result)
    assert "torch" in text
    assert "lowbit" in text


def test_bench_lists_instruction_sets_and_the_kernel_of_each_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOWBIT_ISA", "scalar")
    golden = Path(__file__).parent / "golden" / "format1-codes.lowbit"
    listed = json.loads(called("bench", golden, "--list-kernels", "--json").stdout)
    assert listed["instruction_sets"][-1] == {"isa": "scalar", "cpu": True, "chosen": True}
    assert sum(row["chosen"] for row in listed["instruction_sets"]) == 1
    kernels = {row["kind"]: (row["kernel"], row["isa"]) for row in listed["layers"]}
    assert kernels["quant_conv2d"] == ("integer_sums", "scalar")
    assert kernels["max_pool"] == ("", "")


def test_resume_goes_on_from_the_recorded_settings(road: Path) -> None:
    called("train", "--method", "bnn", *TRAIN, "--epochs", "1", "--seed", "3", "--out", road / "bnn")
    again = called("train", "--resume", "--out", road / "bnn")
    assert "nothing to do" in again.stderr
    more = called("train", "--resume", "--precision", "bf16", "--out", road / "bnn", status=2)
    assert "--method is missing" in more.stderr
    changed = lowbit("train", "--method", "bnn", *TRAIN, "--epochs", "2", "--resume", "--out", road / "bnn", status=2)
    assert "seed" in changed.stderr or "epochs" in changed.stderr


@pytest.mark.parametrize("table", ["methods", "models", "datasets"])
def test_tables_as_json(table: str) -> None:
    names = [row["name"] for row in json.loads(called(table, "--json").stdout)]
    assert {"methods": "xnor_net", "models": "vgg16", "datasets": "cifar10"}[table] in names


def test_a_method_is_described_with_its_options() -> None:
    described = json.loads(called("methods", "xnor_net", "--json").stdout)
    assert {option["option"] for option in described["options"]} >= {"gradient", "center", "clamp"}
    assert list(described["recipes"]) == ["default", "paper", "bin_vgg16", "nin"]
    assert described["recipes"]["nin"]["epochs"] == 320


MISTAKES = {
    "unknown command": (["trian"], 2, "No such command"),
    "unknown option": (["train", "--out", "x", "--metod", "bnn"], 2, "No such option"),
    "unknown method": (["methods", "xnor_ne"], 2, "did you mean xnor_net"),
    "missing model": (["train", "--method", "bnn", "--out", "x"], 2, "--model is missing"),
    "unknown method option": (["train", "--method", "bnn", *TRAIN, "--set", "k=1", "--out", "x"], 2, "no option 'k'"),
    "wrong option value": (
        ["train", "--method", "xnor_net", *TRAIN, "--set", "gradient=best", "--out", "x"],
        2,
        "exact, paper",
    ),
    "bits that a method has not": (
        ["train", "--method", "bnn", *TRAIN, "--bits-w", "2", "--out", "x"],
        2,
        "method 'bnn' has no option 'bits_w'",
    ),
    "bits out of range": (
        ["train", "--method", "dorefa", *TRAIN, "--bits-a", "9", "--out", "x"],
        2,
        "must be one of 1",
    ),
    "not a setting": (["train", "--method", "bnn", *TRAIN, "--set", "clamp", "--out", "x"], 2, "KEY=VALUE"),
    "unknown recipe field": (
        ["train", "--method", "bnn", *TRAIN, "--set", "recipe.rate=1", "--out", "x"],
        2,
        "no field 'rate'",
    ),
    "a share of no teacher": (
        ["train", "--method", "bnn", *TRAIN, "--set", "recipe.distill_weight=0.7", "--out", "x"],
        2,
        "recipe field 'distill_weight' is for a teacher; name one with --distill-from",
    ),
    "a setting given twice": (
        ["train", "--method", "dorefa", *TRAIN, "--set", "bits_w=2", "--bits-w", "4", "--out", "x"],
        2,
        "bits_w is given twice, as 2 and as 4",
    ),
    "an option and its field": (
        ["train", "--method", "bnn", *TRAIN, "--epochs", "3", "--set", "recipe.epochs=1", "--out", "x"],
        2,
        "--epochs is 3 and recipe.epochs is 1",
    ),
    "images too large": (
        ["train", "--method", "bnn", *TRAIN[:2], "--data", "folder:.", "--image-size", "20000", "--out", "x"],
        2,
        "--image-size is 20000, but must be from 1 to 16384",
    ),
    "no run": (["evaluate", "nowhere"], 2, "nowhere does not exist"),
    "a folder without a run": (["evaluate", "."], 2, "no run folder"),
    "a folder as an image": (["predict", "digits-1bit", "."], 2, ". is no regular file"),
    "a batch beyond the memory": (["bench", "digits-1bit", "--batch", "1000000000"], 2, "more memory than there is"),
    "a batch beyond any memory": (["bench", "digits-1bit", "--batch", str(10**18)], 2, "more memory than there is"),
    "a name too long for a file": (["predict", "digits-1bit", "a" * 300], 1, "cannot be decoded"),
    "nothing to bench": (["bench"], 2, "bench needs a packed file"),
    "no packed file": (["inspect", "nowhere.lowbit"], 2, "nowhere.lowbit is no file"),
    "no image": (["predict", "digits-1bit", "nowhere.png"], 2, "nowhere.png does not exist"),
    "no run to export": (["export", "nowhere", "-o", "x"], 2, "nowhere is no run folder"),
    "no run to compare": (["compare", "nowhere", "-o", "x"], 2, "nowhere is no run folder"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_gets_one_sentence(mistake: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    arguments, status, sentence = MISTAKES[mistake]
    assert sentence in called(*arguments, status=status).stderr
    assert not (tmp_path / "x").exists()


def test_the_demo_stops_where_a_command_is_interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of an interrupted command Typer, called by another one, only returns the status."""
    went_on = []

    def steps(out: Path, threads: int | None, invoke: Any) -> None:
        invoke(["datasets"])
        went_on.append(out)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("lowbit.demo.run_demo", steps)
    monkeypatch.setattr("lowbit.cli.print_rows", interrupt)
    called("demo", status=130)
    assert went_on == []
