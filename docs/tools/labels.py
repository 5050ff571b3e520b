"""Set off the labelled lines of a docstring ("Forward: ...", "Backward: ...") as paragraphs of their own."""

from __future__ import annotations

import re
from typing import Any

import griffe

_LABEL = re.compile(r"(?P<label>[A-Z][^.$|]{2,100}?|Gradient [^:]{2,100}):(?P<rest> .*|$)")
_SENTENCE_ENDS = (".", ":", "$", "```", ")")


def set_off(text: str) -> str:
    """``text`` with each labelled line in a paragraph of its own and its label in bold.

    A label starts a line that follows a finished sentence, and ends at the first colon. Code and the indented sections
    of a docstring (``Args:`` and the like) stay as they are.
    """
    lines = text.splitlines()
    out: list[str] = []
    fenced = False
    for i, line in enumerate(lines):
        fenced ^= line.startswith("```")
        match = _LABEL.match(line)
        before = lines[i - 1].rstrip() if i else ""
        after = lines[i + 1] if i + 1 < len(lines) else ""
        opens_section = not (match and match["rest"]) and after.startswith(" ")
        if not match or fenced or opens_section or (before and not before.endswith(_SENTENCE_ENDS)):
            out.append(line)
            continue
        if out and out[-1]:
            out.append("")
        out.append(f"**{match['label']}:**{match['rest']}")
    return "\n".join(out)


class Labels(griffe.Extension):
    """Applies `set_off` to every docstring that griffe reads."""

    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring:
            obj.docstring.value = set_off(obj.docstring.value)
