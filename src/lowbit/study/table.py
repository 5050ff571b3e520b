"""Tables of a study's TOML file, each key of which is taken once, by its type."""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from lowbit.errors import UsageError


class Table:
    """A TOML table of which each key is taken once, by its type; at the end none may be left.

    Args:
        values: the table.
        where: names it in messages.
    """

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self.values = dict(values)
        self.where = where
        self.known: list[str] = []

    def take(self, key: str, kind: Any, *default: Any) -> Any:
        """The value of ``key``, or ``default``, without which the key must be there."""
        self.known.append(key)
        if key not in self.values:
            if not default:
                raise UsageError(f"{self.where}: {key} is missing")
            return default[0]
        return self._checked(self.values.pop(key), kind, key)

    def take_list(self, key: str, kind: Any, *default: Any) -> list[Any]:
        """Like `take`, a list of one or more values; one value may stand without brackets."""
        value = self.take(key, object, *default)
        values = value if isinstance(value, list) else [value]
        if not values:
            raise UsageError(f"{self.where}: {key} is an empty list; name at least one")
        return [self._checked(item, kind, key) for item in values]

    def _checked(self, value: Any, kind: Any, key: str) -> Any:
        if kind is float and type(value) is int:
            return float(value)
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise UsageError(f"{self.where}: {key} is {value!r}, but must be {_KINDS[kind]}")
        return value

    def finish(self) -> None:
        """Refuse what was not taken."""
        check_known(self.values, self.known, self.where)


_KINDS = {
    str: "a string",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    dict: "a table",
    str | dict: "a string or a table",
}


def check_known(values: Collection[str], known: Collection[str], where: str) -> None:
    """Refuse a key that is not known, and name the one that was probably meant."""
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}"
            raise UsageError(f"{where} has no key '{key}': {hint}")


@contextlib.contextmanager
def naming(where: str) -> Iterator[None]:
    """Put ``where`` in front of a `UsageError`."""
    try:
        yield
    except UsageError as error:
        raise UsageError(f"{where}: {error}") from None
