"""What commands print: tables, and the same as JSON."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from lowbit.methods import Recipe
    from lowbit.registry import Registry

notes = Console(stderr=True, highlight=False, soft_wrap=True, markup=False)


def describe(
    registry: Registry[Callable[..., Any]],
    name: str,
    as_json: bool,
    recipes: Mapping[str, Recipe] | None = None,
) -> None:
    """Print what the entry ``name`` is, a table of its options, recipes, and all else that its docstring says."""
    documentation = inspect.cleandoc(registry[name].__doc__ or "")
    rows = [
        {"option": p.name, "type": _type_name(p.annotation), "default": p.default}
        for p in registry.options(name).values()
    ]
    if as_json:
        described: dict[str, Any] = {"name": name, "documentation": documentation, "options": rows}
        if recipes is not None:
            described["recipes"] = {key: {**r.settings(), "source": r.source} for key, r in recipes.items()}
        print_json(described)
        return
    what, _, formulas = documentation.partition("\n\n")
    Console().print(what, markup=False, highlight=False)
    if rows:
        print_rows(f"Options of {name}", rows, False)
    for key, recipe in (recipes or {}).items():
        settings = ", ".join(f"{field} {plain(value)}" for field, value in recipe.settings().items())
        Console().print(f"\nRecipe {key}: {settings}.\nFrom: {recipe.source}.", markup=False, highlight=False)
    if formulas:
        Console().print(f"\n{formulas}", markup=False, highlight=False)


def plain(value: Any) -> str:
    """A value of a recipe for reading: numbers in four digits, those of a tuple with slashes."""
    if isinstance(value, tuple):
        return " / ".join(map(plain, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _type_name(annotation: Any) -> str:
    return annotation.__name__ if isinstance(annotation, type) else str(annotation).replace("typing.", "")


def first_line(function: Callable[..., Any]) -> str:
    """The first line of a function's docstring."""
    return (function.__doc__ or "").strip().split("\n")[0]


def short(value: Any) -> str:
    """A value on one line: a list with commas, all else as JSON in ASCII, which no terminal obeys."""
    return ", ".join(map(str, value)) if isinstance(value, list) else json.dumps(value)


def alike(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What is the same in all of several rows, which have the same keys: it needs no column in a table of them."""
    if len(rows) < 2:
        return {}
    return {key: value for key, value in rows[0].items() if all(row[key] == value for row in rows)}


def print_rows(title: str, rows: Sequence[dict[str, Any]], as_json: bool, brief: bool = False) -> None:
    """Print rows, which have the same keys, as a table or as a JSON list. If ``brief``, a line above the table names
    what is `alike` in all of them, in place of its columns.
    """
    if as_json:
        print_json(list(rows))
        return
    same = alike(rows) if brief else {}
    if named := ", ".join(f"{key} {value}" for key, value in same.items() if value not in ("", None)):
        Console().print(f"All rows: {named}.", markup=False, highlight=False)
    rows = [{key: value for key, value in row.items() if key not in same} for row in rows]
    table = Table(title=escape(title), title_justify="left", header_style="bold")
    for column, value in (rows[0] if rows else {}).items():
        table.add_column(column, justify="right" if type(value) in (int, float) else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(f"{v:,}" if type(v) is int else str(v)) for v in row.values()))
    Console().print(table)


def print_json(data: Any) -> None:
    """Print ``data`` as indented JSON on standard output."""
    print(json.dumps(data, indent=1, default=str))
