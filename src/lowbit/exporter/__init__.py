"""From a trained torch model to a packed file: capture the graph, lower it to ops, decide codes by thresholds.

Names are resolved on first use, so that `lowbit.exporter.bench` runs where torch is not installed.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lowbit.exporter.lower import Export, ExportedPart, export

__all__ = ["Export", "ExportedPart", "export"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(importlib.import_module("lowbit.exporter.lower"), name)
    raise AttributeError(f"module 'lowbit.exporter' has no attribute '{name}'")
