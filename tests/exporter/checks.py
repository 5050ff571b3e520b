"""What every exported net is held to."""

from __future__ import annotations

from interpreter import Interpreter
from torch import Tensor, nn

import lowbit
from lowbit.exporter import Export
from lowbit.exporter.verify import VerifyReport, verify


def checked(model: nn.Module, images: Tensor) -> tuple[Export, VerifyReport]:
    """Export ``model`` and verify it with the interpreter, then with the engine: every code and every sum equal."""
    exported = lowbit.export(model, images)
    for runner in (Interpreter(exported.packed), lowbit.Engine(exported.packed)):
        report = verify(model, exported.packed, images, engine=runner)
        assert report.passed, report
        assert all(check.different == 0 for check in report.layers if check.exact)
    return exported, report


def ops(exported: Export) -> list[str]:
    """The kinds of its ops."""
    return [op["op"] for op in exported.packed.ops]
