"""What a study's file may say, and the sentence for what it may not."""

from __future__ import annotations

from pathlib import Path

import pytest

from lowbit.errors import UsageError
from lowbit.study import Study, check, read_study

STUDIES = Path(__file__).parents[2] / "studies"

SMALL = """
out = "study"
data = "digits"
model = "lenet"
epochs = 1

[[run]]
method = "float"
"""


def study(text: str, folder: Path) -> Study:
    path = folder / "s.toml"
    path.write_text(text)
    return read_study(path)


def test_rows_are_the_product_of_everything(tmp_path: Path) -> None:
    text = """
    out = "study"
    data = ["digits", { name = "fashion_mnist", data_dir = "images" }]
    model = ["lenet", { name = "vgg_small", width = 1 }]
    seeds = [0, 7]
    epochs = 3
    val_fraction = 0.1
    recipe = { batch_size = 64, weight_decay = 0 }

    [[run]]
    method = "float"

    [[run]]
    method = "dorefa"
    options = { bits_g = 6 }
    grid = { bits_w = [1, 2], bits_a = [2, 4] }
    init_from = "float"
    recipe = { batch_size = 32, milestones = [0.5], schedule = "step" }
    epochs = 2

    [[run]]
    name = "taught"
    method = "bnn"
    init_from = "dorefa-g6-w2-a4"
    distill_from = "float"
    diagnose = true

    [[run]]
    name = "int8"
    method = "affine"
    init_from = "float"
    calibrate = 100
    """
    rows = study(text, tmp_path).rows
    assert len(rows) == len({row.label for row in rows}) == 2 * 2 * 2 * (1 + 4 + 1 + 1)
    names = ["float", *(f"dorefa-g6-w{w}-a{a}" for w in (1, 2) for a in (2, 4)), "taught", "int8"]
    assert [row.name for row in rows[:7]] == names
    assert {row.config.seed for row in rows[:28]} == {0}
    first, last, taught = rows[-7], rows[-3], rows[-2]
    assert last.label == "fashion_mnist/vgg_small-width-1.0/seed-7/dorefa-g6-w2-a4"
    assert last.config.out == Path("study") / last.label
    assert last.config.init_from == Path("study/fashion_mnist/vgg_small-width-1.0/seed-7/float")
    assert last.config.method_options == {"bits_g": 6, "bits_w": 2, "bits_a": 4}
    assert last.config.model_options == {"width": 1.0}
    assert last.config.data_dir == "images"
    assert last.config.overrides == {
        "batch_size": 32,
        "weight_decay": 0.0,
        "milestones": (0.5,),
        "schedule": "step",
    }
    assert (last.epochs, first.epochs, rows[-1].epochs) == (2, 3, 0)
    assert (rows[-1].calibrate, rows[-1].needs) == (100, (first,))
    assert (taught.source, taught.teacher, taught.needs) == (last, first, (last, first))
    assert taught.config.distill_from == first.config.out
    assert (taught.config.diagnose, last.config.diagnose) == (True, False)
    assert taught.to_dict()["taught by"] == "float"
    assert (last.method.bits_w, last.method.bits_a, last.method.bits_g) == (2, 4, 6)
    assert all(row.state == "to do" for row in rows)


def test_a_row_may_have_a_model_of_its_own(tmp_path: Path) -> None:
    """It is made once, and the rows of every model may learn from it."""
    text = """
    out = "study"
    data = "digits"
    model = ["lenet", { name = "lenet", width = 0.5 }]
    seeds = [0, 1]

    [[run]]
    method = "float"
    model = { name = "vgg_small", width = 0.25 }

    [[run]]
    method = "xnor_net"
    distill_from = "float"

    [[run]]
    name = "int8"
    method = "affine"
    options = { observer = "mse" }
    init_from = "xnor_net"
    calibrate = 9

    [[run]]
    name = "tuned"
    method = "xnor_net"
    init_from = "int8"
    """
    rows = study(text, tmp_path).rows
    assert [row.label for row in rows[:4]] == [
        "digits/vgg_small-width-0.25/seed-0/float",
        "digits/lenet/seed-0/xnor_net",
        "digits/lenet/seed-0/int8",
        "digits/lenet/seed-0/tuned",
    ]
    assert len(rows) == len({row.label for row in rows}) == 2 * (1 + 2 * 3)
    assert {row.teacher for row in rows if row.name == "xnor_net"} == {rows[0], rows[7]}
    assert rows[0].config.model_options == {"width": 0.25}
    int8, tuned = rows[2], rows[3]
    assert (int8.method.name, int8.rest) == ("xnor_net", {"name": "affine", "options": {"observer": "mse"}})
    assert (tuned.source, tuned.rest, tuned.calibrate) == (int8, int8.rest, None)
    started = text.replace("model = { name", 'init_from = "base"\n    model = { name', 1)
    with pytest.raises(
        UsageError, match="init_from is 'base', which is a row for each model; give that row a model of"
    ):
        study(
            started.replace("    [[run]]", '    [[run]]\n    name = "base"\n    method = "float"\n    [[run]]', 1),
            tmp_path,
        )


NAMES = {
    'method = "bnn"\noptions = { stochastic = true }': "bnn-stochastic",
    'method = "xnor_net"\noptions = { center = false, gradient = "paper" }': "xnor_net-no-center-gradient-paper",
    'method = "hwgq"\ngrid = { levels = ["lloyd_max"] }': "hwgq-levels-lloyd_max",
    'method = "bnn"\nname = "B"\ngrid = { stochastic = [true] }': "B-stochastic",
}


@pytest.mark.parametrize("entry", NAMES)
def test_a_row_is_named_by_its_options(entry: str, tmp_path: Path) -> None:
    assert study(f"{SMALL}\n[[run]]\n{entry}", tmp_path).rows[-1].name == NAMES[entry]


# What is put in place of a line of SMALL, or added to it; the sentence after the file's name.
MISTAKES = {
    "no TOML": ("epochs = 1", "epochs = ", "cannot be read as TOML"),
    "unknown key": ("epochs = 1", "epoch = 1", "has no key 'epoch': did you mean epochs?"),
    "no out": ('out = "study"', "", ": out is missing"),
    "no rows": ('[[run]]\nmethod = "float"', "", ": run is missing"),
    "a file for a folder": ('out = "study"', 'out = "s.toml"', ": out is s.toml, which is a file; name a folder"),
    "wrong type": ("epochs = 1", 'epochs = "1"', ": epochs is '1', but must be a whole number"),
    "no epochs": ("epochs = 1", "epochs = 0", ", run 1 (float): recipe field epochs is 0"),
    "a seed below 0": ("epochs = 1", "seeds = [-1]", ": seeds must be at least 0"),
    "no seed": ("epochs = 1", "seeds = []", ": seeds is an empty list"),
    "a seed twice": ("epochs = 1", "seeds = [1, 2, 1]", ": seeds names 1 twice"),
    "fraction": ("epochs = 1", "val_fraction = 1", ": val_fraction is 1.0, but must be at least 0 and below 1"),
    "precision": ("epochs = 1", 'precision = "half"', ": precision is 'half', but must be one of auto"),
    "unknown data": ('"digits"', '"digit"', ": data: no data set is called 'digit': did you mean digits?"),
    "bad folder": ('"digits"', '"folder:"', "data: 'folder:' is neither"),
    "data key": ('"digits"', '{ name = "digits", dir = "x" }', ": data has no key 'dir': known are name, data_dir"),
    "unknown model": ('"lenet"', '"lene"', ": model: no model is called 'lene': did you mean lenet?"),
    "model option": ('"lenet"', '{ name = "lenet", wide = 2 }', ": model: model 'lenet' has no option 'wide'"),
    "model type": ('"lenet"', '{ name = "lenet", width = "2" }', "option 'width' of model 'lenet' is '2', but must"),
    "model twice": ('"lenet"', '["lenet", "lenet"]', ": model names lenet twice"),
    "recipe field": ("epochs = 1", "recipe = { rate = 1 }", ": recipe has no key 'rate'"),
    "recipe type": ("epochs = 1", 'recipe = { batch_size = "64" }', ": recipe.batch_size is '64', but must be of type"),
    "no method": ('method = "float"', 'name = "x"', ", run 1: method is missing"),
    "unknown method": ('"float"', '"flaot"', ", run 1 (flaot): no method is called 'flaot': did you mean float?"),
    "unknown option": ('"float"', '"bnn"\noptions = { k = 1 }', ", run 1 (bnn): method 'bnn' has no option 'k'"),
    "option type": (
        '"float"',
        '"dorefa"\noptions = { bits_w = "1" }',
        "option 'bits_w' of method 'dorefa' is '1', but",
    ),
    "option value": ('"float"', '"dorefa"\noptions = { bits_w = 9 }', ", run 1 (dorefa): bits_w of dorefa is '9', but"),
    "grid of no list": ('"float"', '"dorefa"\ngrid = { bits_w = 1 }', ": grid.bits_w is 1, but must be a list"),
    "grid and option": (
        '"float"',
        '"dorefa"\noptions = { bits_w = 1 }\ngrid = { bits_w = [2] }',
        ": 'bits_w' stands in options and in grid",
    ),
    "unknown recipe": ('"float"', '"float"\nrecipe = "fast"', ", run 1 (float): method 'float' has no recipe 'fast'"),
    "recipe range": ('"float"', '"float"\nrecipe = { momentum = 2 }', "recipe field momentum is 2.0, but must be"),
    "no effect": (
        '"float"',
        '"bnn"\nrecipe = { nesterov = true }',
        ", run 1 (bnn): recipe field nesterov has no effect beside optimizer ",
    ),
    "no teacher": (
        '"float"',
        '"float"\nrecipe = { temperature = 2 }',
        ", run 1 (float): recipe field 'temperature' is for a teacher",
    ),
    "folder as name": ('"float"', '"float"\nname = "../x"', ": name is '../x', but must be made of letters"),
    "log as name": ('"float"', '"float"\nname = "a.log"', ": name is 'a.log', but logs of rows are called so"),
    "too deep": ('"float"', "[" * 9999 + "]" * 9999, " cannot be read as TOML"),
    "key of a run": ('"float"', '"float"\nfrom = "x"', ", run 1 (float) has no key 'from'"),
    "same name": ('"float"', '"float"\n[[run]]\nmethod = "float"', ", run 2 (float): a second row is called 'float'"),
    "same row": (
        '"float"',
        '"dorefa"\n[[run]]\nmethod = "dorefa"\noptions = { bits_w = 1 }',
        ", run 2 (dorefa): 'dorefa-w1' is the same as 'dorefa' above",
    ),
    "no such start": (
        '"float"',
        '"float"\n[[run]]\nmethod = "bnn"\ninit_from = "flaot"',
        ", run 2 (bnn): init_from is 'flaot', which is no row above this one; it can be float",
    ),
    "taught by none": (
        '"float"',
        '"float"\n[[run]]\nmethod = "bnn"\ndistill_from = "flaot"',
        ", run 2 (bnn): distill_from is 'flaot', which is no row above this one; it can be float",
    ),
    "calibrated and taught": (
        '"float"',
        '"float"\n[[run]]\nmethod = "affine"\ninit_from = "float"\ncalibrate = 9\ndistill_from = "float"',
        ", run 2 (affine): a calibrated row is not trained; leave distill_from, diagnose and model out",
    ),
    "nothing to diagnose": (
        '"float"',
        '"float"\ndiagnose = true',
        ", run 1 (float): method 'float' quantizes no layer: there is nothing to diagnose; leave it out",
    ),
    "nothing to whiten": (
        '"float"',
        '"bnn"\nrecipe = { whiten = true }',
        ", run 1 (bnn): method 'bnn' quantizes the first layer, which whiten would start; leave it out",
    ),
    "nothing to freeze": (
        '"float"',
        '"bnn"\nrecipe = { freeze_first = true }',
        ", run 1 (bnn): method 'bnn' quantizes the first layer, which freeze_first would keep; leave it out",
    ),
    "diagnose": ('"float"', '"float"\ndiagnose = 1', ", run 1 (float): diagnose is 1, but must be true or false"),
    "starts from itself": ('"float"', '"float"\ninit_from = "float"', "there is none above this one"),
    "calibrates from nothing": (
        '"float"',
        '"affine"\ncalibrate = 9',
        ", run 1 (affine): calibrate starts from a trained row without calibrated layers; name one by init_from",
    ),
    "calibrates what is calibrated": (
        '"float"',
        '"float"\n[[run]]\nname = "int8"\nmethod = "affine"\ninit_from = "float"\ncalibrate = 9\n'
        '[[run]]\nmethod = "affine"\ninit_from = "int8"\ncalibrate = 9',
        ", run 3 (affine): calibrate starts from a trained row without calibrated layers; name one by init_from",
    ),
    "calibrates what was calibrated once": (
        '"float"',
        '"xnor_net"\n[[run]]\nname = "int8"\nmethod = "affine"\ninit_from = "xnor_net"\ncalibrate = 9\n'
        '[[run]]\nname = "tuned"\nmethod = "xnor_net"\ninit_from = "int8"\n'
        '[[run]]\nmethod = "affine"\ninit_from = "tuned"\ncalibrate = 9',
        ", run 4 (affine): calibrate starts from a trained row without calibrated layers",
    ),
    "calibrates where nothing is left": (
        '"float"',
        '"bnn"\n[[run]]\nmethod = "affine"\ninit_from = "bnn"\ncalibrate = 9',
        ", run 2 (affine): method 'bnn' of 'bnn' leaves no layer in float to calibrate",
    ),
    "folds a low-bit network": (
        '"float"',
        '"xnor_net"\n[[run]]\nmethod = "affine"\noptions = { fold = true }\ninit_from = "xnor_net"\ncalibrate = 9',
        ", run 2 (affine): fold is for float networks, and 'xnor_net' is one of 'xnor_net'; leave it out",
    ),
    "drops a calibrated rest": (
        '"float"',
        '"xnor_net"\n[[run]]\nname = "int8"\nmethod = "affine"\ninit_from = "xnor_net"\ncalibrate = 9\n'
        '[[run]]\nmethod = "bwn"\ninit_from = "int8"',
        ", run 3 (bwn): 'int8' is a network of 'xnor_net' with calibrated layers beside",
    ),
    "a model of its own, calibrated": (
        '"float"',
        '"float"\n[[run]]\nmethod = "affine"\nmodel = "lenet"\ninit_from = "float"\ncalibrate = 9',
        ", run 2 (affine): a calibrated row is not trained; leave distill_from, diagnose and model out",
    ),
    "an unknown model of its own": ('"float"', '"float"\nmodel = "lenett"', ", run 1 (float): model: "),
    "calibrates and trains": (
        '"float"',
        '"float"\n[[run]]\nmethod = "affine"\ninit_from = "float"\ncalibrate = 9\nepochs = 2',
        ", run 2 (affine) has no key 'epochs'",
    ),
    "nothing to calibrate": (
        '"float"',
        '"float"\n[[run]]\nmethod = "bnn"\ninit_from = "float"\ncalibrate = 9',
        ", run 2 (bnn): method 'bnn' has nothing to calibrate",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_gets_one_sentence(mistake: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    old, new, sentence = MISTAKES[mistake]
    assert old in SMALL
    with pytest.raises(UsageError) as caught:
        study(SMALL.replace(old, new), tmp_path)
    assert str(caught.value).startswith(str(tmp_path / "s.toml"))
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="does not exist; give the TOML file of a study"):
        read_study(tmp_path / "s.toml")


def test_models_meet_the_data_before_anything_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    check(study(SMALL, tmp_path))
    with pytest.raises(UsageError, match="multiple of 32"):
        check(
            study(
                SMALL.replace('"digits"', f'{{ name = "folder:{_images(tmp_path)}", image_size = 48 }}').replace(
                    '"lenet"', '"vgg16"'
                ),
                tmp_path,
            )
        )
    assert not (tmp_path / "study").exists()


def _images(folder: Path) -> Path:
    from PIL import Image

    for part in ("train", "test"):
        for name in ("a", "b"):
            (folder / "images" / part / name).mkdir(parents=True)
            Image.new("L", (20, 20)).save(folder / "images" / part / name / "0.png")
    return folder / "images"


def test_what_a_study_says_of_all_rows_need_not_act_on_each(tmp_path: Path) -> None:
    text = """
    out = "study"
    data = "digits"
    model = "lenet"
    recipe = { momentum = 0.8, distill_weight = 0.7 }

    [[run]]
    method = "float"

    [[run]]
    method = "xnor_net"
    distill_from = "float"
    """
    plain, taught = study(text, tmp_path).rows
    assert all(row.config.overrides == {"momentum": 0.8, "distill_weight": 0.7} for row in (plain, taught))


@pytest.mark.parametrize("path", sorted(STUDIES.glob("*.toml")), ids=lambda path: path.stem)
def test_the_studies_of_this_repository(path: Path) -> None:
    rows = read_study(path).rows
    assert rows[0].method.name == "float"
