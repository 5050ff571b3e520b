"""docs/studies.md names every field of a recipe."""

import re
from dataclasses import fields
from pathlib import Path

from lowbit.methods.base import Recipe

PAGE = Path(__file__).parents[2] / "docs" / "studies.md"


def test_the_table_of_a_recipe_s_fields_is_whole() -> None:
    table = PAGE.read_text(encoding="utf-8").partition("## Fields of a recipe\n")[2].partition("\n## ")[0]
    named = {name for row in re.findall(r"^\| (`.*?) \|", table, re.MULTILINE) for name in re.findall(r"`(\w+)`", row)}
    described = set(re.findall(r"`(\w+)`", table))
    wanted = {field.name for field in fields(Recipe)} - {"source"}
    assert named <= wanted | {"name"}
    assert wanted <= described
