"""The published methods, one file each. ``methods.registry`` finds them by file."""

from lowbit.methods.base import Method, Recipe, registry

__all__ = ["Method", "Recipe", "registry"]
