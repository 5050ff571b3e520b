"""Every network that comes with lowbit is what its card says, and is found by its name."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from lowbit import data, pretrained
from lowbit.errors import UsageError
from lowbit.runtime import Engine


@pytest.mark.parametrize("name", pretrained.names())
def test_the_card_is_true(name: str) -> None:
    card, path = pretrained.card(name), pretrained.find(name)
    engine = Engine(path)
    assert card["name"] == name
    assert card["bytes"] == path.stat().st_size < 1_000_000
    assert card["classes"] == engine.classes
    assert {key: card[key] for key in ("model", "epochs", "seed")}.items() <= engine.model.provenance.items()
    assert card["method"] == engine.model.provenance["method"]
    assert card["data"]["hash"] == engine.model.provenance["data"]["hash"]
    matrix = np.array(card["confusion_matrix"])
    assert (matrix.sum(), matrix.trace()) == (card["total"], card["correct"])
    assert card["accuracy"] == card["correct"] / card["total"]
    assert card["recipe"]["epochs"] == card["epochs"]
    assert len(card["commands"]) == 2
    if card["data"]["name"] == "digits":  # the others are not on every machine
        images = data.load("digits")
        predictions = engine(images.preprocessing.normalise(images.test_images)).argmax(axis=1)
        found = np.zeros_like(matrix)
        np.add.at(found, (images.test_labels, predictions), 1)
        np.testing.assert_array_equal(found, matrix)


def test_a_path_that_exists_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    packaged = pretrained.find("digits-1bit")
    assert packaged.parent == pretrained.FOLDER
    (tmp_path / "digits-1bit").write_bytes(b"mine")
    assert pretrained.find("digits-1bit") == Path("digits-1bit")
    for path in ("missing.lowbit", "folder/missing"):
        assert pretrained.find(path) == Path(path), "it can only be a path: reading it says that it is missing"


def test_an_unknown_name_gives_the_list() -> None:
    with pytest.raises(UsageError, match=r"'vgg' is neither .*: choose one of .*digits-1bit"):
        pretrained.find("vgg")
    with pytest.raises(UsageError, match=r"did you mean digits-1bit\?"):
        pretrained.card("digits-1bits")
