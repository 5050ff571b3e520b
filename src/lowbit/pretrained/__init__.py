"""Packed networks that come with lowbit: ``NAME.lowbit``, and ``NAME.json``, which says what it is.

`studies/package.py` makes both from a run folder.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

from lowbit.errors import UsageError
from lowbit.runs import read_json

FOLDER = Path(__file__).parent


def names() -> list[str]:
    """Names of the networks, in alphabetical order."""
    return sorted(path.stem for path in FOLDER.glob("*.lowbit"))


def card(name: str) -> dict[str, Any]:
    """The model card: data and its copy, method, recipe, epochs, seed, accuracy, confusion matrix, commands.

    Raises:
        UsageError: there is no such network.
    """
    found: dict[str, Any] = read_json(_known(name).with_suffix(".json"))
    return found


def summary() -> list[dict[str, Any]]:
    """A row for each network, of what its card says."""
    return [
        {
            "name": each["name"],
            "data": each["data"]["name"],
            "model": each["model"]["name"],
            "method": each["method"]["name"],
            "test accuracy, %": f"{100 * each['accuracy']:.2f}",
            "bytes": each["bytes"],
        }
        for each in map(card, names())
    ]


def find(path_or_name: str | Path) -> Path:
    """The packed file at a path, or else the one that comes with lowbit under that name.

    A path that exists wins; so does anything that can only be a path, by its ending or a slash.

    Raises:
        UsageError: a plain name that is neither a file nor one of the networks.
    """
    path = Path(path_or_name)
    if path.exists() or path.suffix == ".lowbit" or len(path.parts) != 1:
        return path
    return _known(str(path))


def _known(name: str) -> Path:
    known = names()
    if name in known:
        return FOLDER / f"{name}.lowbit"
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]}?" if near else f"choose one of {', '.join(known)}"
    raise UsageError(f"'{name}' is neither a packed file nor a network that comes with lowbit: {hint}")
