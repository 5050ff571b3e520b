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


CPUINFO = b"""processor\t: 0
vendor_id\t: AuthenticAMD
model name\t: Some \xff CPU
flags\t\t: fpu avx2
bugs\t\t:

processor\t: 1
vendor_id\t: another
flags\t\t: fpu
"""


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (CPUINFO, ("AuthenticAMD", "Some \ufffd CPU", {"fpu", "avx2"})),
        (None, ("", platform.processor() or platform.machine(), set())),
    ],
    ids=["two processors", "no file"],
)
def test_what_linux_tells_of_the_first_processor(monkeypatch, tmp_path, text, found):
    if text is not None:
        (tmp_path / "cpuinfo").write_bytes(text)
    monkeypatch.setattr(hardware, "CPUINFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(hardware, "_entries", hardware._entries.__wrapped__)
    assert (hardware.cpu_vendor(), hardware.cpu_name(), hardware.cpu_flags()) == found
