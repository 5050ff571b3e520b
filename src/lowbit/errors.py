"""The two kinds of failure a user meets: each is one sentence that names the culprit and the mend."""

from collections.abc import Collection


class LowbitError(Exception):
    """A run, file or network that cannot do what was asked. The command line prints it and exits with status 1."""


class UsageError(LowbitError, ValueError):
    """A wrong name, option or argument. The command line prints it and exits with status 2."""


def sentence(error: LowbitError | PermissionError) -> str:
    """What a user is told, in one line, also of a file or folder that may not be read or written."""
    text = f"{error}"
    if not isinstance(error, LowbitError):
        text = f"{error.filename or error}: permission denied; change its rights, or take another place"
    return "".join(each if each.isprintable() else ascii(each)[1:-1] for each in text)


def briefly(error: BaseException) -> str:
    """What an error of another library says, in a line that fits a sentence."""
    lines = str(error).splitlines() or [type(error).__name__]
    return lines[0] if len(lines[0]) <= 200 else f"{lines[0][:200]}..."


def check_choice(what: str, value: object, choices: Collection[object]) -> None:
    """Raise a `UsageError` that starts with ``what`` unless ``value`` is one of ``choices``."""
    if value not in choices:
        raise UsageError(f"{what} is '{value}', but must be one of {', '.join(map(str, choices))}")
