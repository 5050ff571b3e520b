"""Sort the rows of the survey by what is registered: a method that is not here is listed as not here."""

from __future__ import annotations

import re

_ROW = re.compile(r"^\| `(\w+)` \|(.*)$", re.MULTILINE)
NOT_HERE = "<!-- not here -->"
WITHOUT_ROW = "<!-- without a row -->"


def split(markdown: str, registered: set[str]) -> str:
    """Link the rows of registered methods to their pages and move the others to the list of what is not here yet."""
    missing: list[str] = []
    seen: set[str] = set()

    def place(match: re.Match[str]) -> str:
        name, cells = match.groups()
        seen.add(name)
        if name in registered:
            return f"| [`{name}`](methods/{name}.md) |{cells}"
        missing.append(match[0])
        return ""

    text = _ROW.sub(place, markdown)
    text = re.sub(r"(\|\n)\n+(?=\|)", r"\1", text)
    header = re.search(r"^\| method \|.*\n\|[-|]+\|$", markdown, re.MULTILINE)
    assert header is not None
    text = text.replace(NOT_HERE, "\n".join([header[0], *missing]) if missing else "")
    rest = sorted(registered - seen)
    listed = ", ".join(f"[`{name}`](methods/{name}.md)" for name in rest)
    return text.replace(WITHOUT_ROW, f"Registered, with a page but not yet in this table: {listed}." if rest else "")
