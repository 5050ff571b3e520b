"""The name under which figures are written down."""

import platform

import pytest

from lowbit import hardware


@pytest.mark.parametrize(
    ("entries", "name"),
    [
        ({"model name": "AMD EPYC", "cpu family": "25", "model": "17"}, "AMD EPYC (family 25, model 17)"),
        ({"model name": "Some CPU", "model": "3"}, "Some CPU (model 3)"),
        ({"model name": "Some CPU"}, "Some CPU"),
        ({}, platform.processor() or platform.machine()),
    ],
)
def test_kinds_of_a_cpu_with_one_name_are_told_apart(monkeypatch, entries, name):
    monkeypatch.setattr(hardware, "_cpuinfo", lambda key: entries.get(key, ""))
    assert hardware.cpu_name() == name
