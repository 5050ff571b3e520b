"""Network families, one file each: a topology is a table, and a model knows no method."""

from lowbit.models.base import create, load_run, quantize_rest_, registry

__all__ = ["create", "load_run", "quantize_rest_", "registry"]
