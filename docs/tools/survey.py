"""Link the rows of the survey to the pages of their methods."""

from __future__ import annotations

import re

_ROW = re.compile(r"^\| `(\w+)` \|", re.MULTILINE)
WITHOUT_ROW = "<!-- without a row -->"


def linked(markdown: str, registered: set[str]) -> str:
    """Link each row to its method's page, and name the methods that have none below the table.

    Raises:
        ValueError: a row is of no registered method.
    """
    rows = set(_ROW.findall(markdown))
    if unknown := sorted(rows - registered):
        raise ValueError(f"docs/survey.md has rows for {', '.join(unknown)}, which lowbit.methods does not register")
    text = _ROW.sub(lambda row: f"| [`{row[1]}`](methods/{row[1]}.md) |", markdown)
    listed = ", ".join(f"[`{name}`](methods/{name}.md)" for name in sorted(registered - rows))
    return text.replace(WITHOUT_ROW, f"Registered, with a page but not yet in this table: {listed}." if listed else "")
