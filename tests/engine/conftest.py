import pytest

from lowbit import _engine


@pytest.fixture(params=_engine.available_isas())
def isa(request, monkeypatch):
    """Forces each instruction set of this machine in turn."""
    monkeypatch.setenv("LOWBIT_ISA", request.param)
    return request.param
