"""Find methods, models and data sets by the files of their package: nobody keeps a list by hand."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import inspect
import math
import pkgutil
import typing
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any, Generic, TypeVar

from lowbit.errors import UsageError

F = TypeVar("F", bound=Callable[..., Any])


class Registry(Generic[F]):
    """Functions of one package, each registered under its own name by a decorator.

    All modules of the package are imported on the first look-up, so a new file is found without being named anywhere.

    Args:
        package: the package whose modules register themselves, such as ``"lowbit.methods"``.
        kind: what an entry is called in error messages, such as ``"method"``.
        given: parameters that the caller of an entry always passes, and that are therefore no options of the user.
    """

    def __init__(self, package: str, kind: str, given: Collection[str] = ()) -> None:
        self.package = package
        self.kind = kind
        self.given = frozenset(given)
        self._entries: dict[str, F] = {}
        self._discovered = False

    def register(self, function: F) -> F:
        """Enter ``function`` under its ``__name__``.

        Raises:
            UsageError: the name is taken by a function of another module.
        """
        name = function.__name__
        present = self._entries.get(name)
        if present is not None and present.__module__ != function.__module__:
            raise UsageError(
                f"{self.kind} '{name}' is defined twice, in {present.__module__} and {function.__module__}; rename one"
            )
        self._entries[name] = function
        return function

    def _discover(self) -> None:
        if self._discovered:
            return
        package = importlib.import_module(self.package)
        for module in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"{self.package}.{module.name}")
        self._discovered = True

    def __iter__(self) -> Iterator[str]:
        self._discover()
        return iter(sorted(self._entries))

    def __contains__(self, name: object) -> bool:
        self._discover()
        return name in self._entries

    def __getitem__(self, name: str) -> F:
        """The function registered under ``name``.

        Raises:
            UsageError: there is none; the message lists close matches, else all names.
        """
        self._discover()
        if not isinstance(name, str) or name not in self._entries:
            near = difflib.get_close_matches(str(name), self._entries, n=3)
            hint = f"did you mean {' or '.join(near)}?" if near else f"choose from {', '.join(self)}"
            raise UsageError(f"no {self.kind} is called '{name}': {hint}")
        return self._entries[name]

    def options(self, name: str) -> dict[str, inspect.Parameter]:
        """Keyword options of the entry ``name``, annotations resolved, in the order of its signature."""
        function = self[name]
        hints = typing.get_type_hints(function)
        parameters = inspect.signature(function).parameters.values()
        return {
            p.name: p.replace(annotation=hints.get(p.name, p.annotation))
            for p in parameters
            if p.name not in self.given
        }

    def check_options(self, name: str, keys: Iterable[str]) -> dict[str, inspect.Parameter]:
        """`options` of the entry ``name``, when each of ``keys`` is one.

        Raises:
            UsageError: one is not.
        """
        known = self.options(name)
        for key in keys:
            if key not in known:
                choices = ", ".join(known) or "none"
                raise UsageError(f"{self.kind} '{name}' has no option '{key}'; its options: {choices}")
        return known

    def check_values(self, name: str, values: Mapping[str, Any]) -> dict[str, Any]:
        """Keyword arguments of the entry ``name`` from values as TOML and JSON have them, see `check_value`.

        Raises:
            UsageError: an unknown option, or a value that the option's type does not take.
        """
        known = self.check_options(name, values)
        what = f"of {self.kind} '{name}'"
        return {
            key: check_value(value, known[key].annotation, f"option '{key}' {what}") for key, value in values.items()
        }

    def parse_options(self, name: str, settings: dict[str, str]) -> dict[str, Any]:
        """Turn ``--set key=value`` strings into keyword arguments, by the types of the entry's signature.

        Raises:
            UsageError: an unknown option, or a value that the option's type does not take.
        """
        known = self.check_options(name, settings)
        return {
            key: parse_value(text, known[key].annotation, f"option '{key}' of {self.kind} '{name}'")
            for key, text in settings.items()
        }


def parse_value(text: str, annotation: Any, what: str) -> Any:
    """``text`` as a value of the type ``annotation``.

    Args:
        text: what the user typed.
        annotation: a ``Literal``, a tuple of one type (items between commas), bool, int, float or str.
        what: names the value in messages.

    Raises:
        UsageError: the type does not take it; the message starts with ``what``.
    """
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        for choice in arguments:
            if text == str(choice):
                return choice
        raise UsageError(f"{what} is '{text}', but must be one of {', '.join(map(str, arguments))}")
    if origin is tuple:
        return tuple(parse_value(item, arguments[0], what) for item in text.split(",") if item)
    if annotation is bool:
        if text.lower() in ("true", "false"):
            return text.lower() == "true"
        raise UsageError(f"{what} is '{text}', but must be true or false")
    try:
        value = annotation(text)
    except (TypeError, ValueError):
        expected = getattr(annotation, "__name__", annotation)
        raise UsageError(f"{what} is '{text}', but must be of type {expected}") from None
    if annotation is float and not math.isfinite(value):
        raise UsageError(f"{what} is '{text}', but must be a finite number")
    return value


def check_value(value: Any, annotation: Any, what: str) -> Any:
    """``value``, as a TOML file holds it, as a value of the type ``annotation``.

    Args:
        value: a string, number, boolean or list.
        annotation: as in `parse_value`. A whole number is a float too, a list becomes a tuple.
        what: names the value in messages.

    Raises:
        UsageError: the type does not take it; the message starts with ``what``.
    """
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        if not any(type(value) is type(choice) and value == choice for choice in arguments):
            raise UsageError(f"{what} is {value!r}, but must be one of {', '.join(map(repr, arguments))}")
        return value
    if origin is tuple and type(value) is list:
        return tuple(check_value(item, arguments[0], what) for item in value)
    if annotation is float and type(value) is int:
        return float(value)
    if type(value) is not annotation:
        expected = "a list" if origin is tuple else f"of type {getattr(annotation, '__name__', annotation)}"
        raise UsageError(f"{what} is {value!r}, but must be {expected}")
    if annotation is float and not math.isfinite(value):
        raise UsageError(f"{what} is {value}, but must be a finite number")
    return value


def field_types(record: type) -> dict[str, Any]:
    """Names and types of the fields of a dataclass."""
    hints = typing.get_type_hints(record)
    return {field.name: hints[field.name] for field in dataclasses.fields(record)}
