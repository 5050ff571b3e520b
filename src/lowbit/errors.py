"""The two kinds of failure a user meets: each is one sentence that names the culprit and the mend."""


class LowbitError(Exception):
    """A run, file or network that cannot do what was asked. The command line prints it and exits with status 1."""


class UsageError(LowbitError, ValueError):
    """A wrong name, option or argument. The command line prints it and exits with status 2."""
