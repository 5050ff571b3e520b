"""Convolutions of bytes give torch's bits, and take over nothing else."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lowbit.layers import integer
from lowbit.layers.integer import IntegerConvolutions

# channels in, out, kernel, stride, padding, dilation, (height, width), largest integer
CASES = [
    (3, 5, (3, 3), (1, 1), (1, 1), (1, 1), (7, 6), 1),
    (64, 32, (3, 3), (2, 2), (1, 1), (1, 1), (9, 8), 127),
    (5, 1, (2, 4), (1, 3), (0, 2), (2, 1), (8, 11), 128),
    (8, 7, (1, 1), (1, 1), (0, 0), (1, 1), (1, 1), 3),
]


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of what was multiplied as bytes."""
    seen: list[tuple[int, ...]] = []
    product = torch._int_mm

    def counted(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        seen.append(tuple(left.shape))
        return product(left, right)

    monkeypatch.setattr(torch, "_int_mm", counted)
    monkeypatch.setattr(integer, "cpu_flags", lambda: {"avx512_vnni"})
    return seen


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_same_sums(case, channels_last, products, monkeypatch):
    c_in, c_out, kernel, stride, padding, dilation, size, largest = case
    monkeypatch.setattr(integer, "WINDOW_BYTES", 2000)
    conv = nn.Conv2d(c_in, c_out, kernel, stride, padding, dilation, bias=False)
    x = torch.randint(-largest, min(largest, 127) + 1, (5, c_in, *size)).float()
    conv.weight.data = torch.randint(-largest, min(largest, 127) + 1, conv.weight.shape).float()
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        expected = conv(x)
        with IntegerConvolutions():
            assert torch.equal(conv(x), expected)
    assert products


@pytest.mark.parametrize(
    "change",
    [
        lambda conv, x: (conv, x + 0.5),
        lambda conv, x: (conv, x + 200),
        lambda conv, x: (conv, x * torch.nan),
        lambda conv, x: (conv.double(), x.double()),
        lambda conv, x: (nn.Conv2d(4, 4, 3, bias=True), x),
        lambda conv, x: (nn.Conv2d(4, 4, 3, groups=2, bias=False), x),
        lambda conv, x: (nn.Conv2d(4, 4, 3, padding="same", bias=False), x),
    ],
)
def test_all_else_is_torchs(change, products):
    conv, x = nn.Conv2d(4, 4, 3, bias=False), torch.ones(2, 4, 6, 6)
    conv.weight.data.round_()
    conv, x = change(conv, x)
    with torch.no_grad(), IntegerConvolutions():
        conv(x)
    assert not products
    if x.dtype == torch.float32:
        with IntegerConvolutions():
            assert conv(x).requires_grad
