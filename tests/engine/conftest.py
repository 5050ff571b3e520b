import pytest

from lowbit import _engine


@pytest.fixture(params=_engine.available_isas())
def isa(request, monkeypatch):
    """Forces each instruction set of this machine in turn, and the kernels that it takes without measuring."""
    monkeypatch.setenv("LOWBIT_ISA", request.param)
    monkeypatch.setenv("LOWBIT_TUNE", "0")
    return request.param
