"""Thresholds against the chain itself, number by number."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lowbit.errors import UsageError
from lowbit.exporter import thresholds
from lowbit.exporter.thresholds import Chain, find, floats, sums


def apply(found: thresholds.Thresholds, numbers: Tensor) -> Tensor:
    """The codes that thresholds give: docs/contract.md, word for word."""
    rising = (numbers[..., None] >= found.values).sum(-1)
    falling = (numbers[..., None] <= found.values).sum(-1)
    return torch.where(found.falling.bool(), falling, rising)


def levels_of(function: Callable[[Tensor], Tensor], channels: int, levels: int) -> Chain:
    """A chain whose codes are ``function`` rounded to 0 .. levels."""
    return Chain(lambda x: [function(x).round().clamp(0, levels).to(torch.uint8)], channels, levels, "test")


SLOPES = torch.tensor([0.031, -0.031, 0.0, 1e-9, -7.0, 7.0, 1.0])
SHIFTS = torch.tensor([1.2, 2.0, 2.0, 0.4, 3.0, -900.0, 0.5])


def affine(x: Tensor) -> Tensor:
    return x * SLOPES + SHIFTS


@pytest.mark.parametrize("levels", [1, 3, 15, 255])
@pytest.mark.parametrize("search", ["every sum", "bisection"])
def test_integer_thresholds_give_the_code_of_every_sum(
    levels: int, search: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if search == "bisection":
        monkeypatch.setattr(thresholds, "EXHAUSTIVE", 1)
    chain = levels_of(affine, len(SLOPES), levels)
    found = find(chain, sums(500))
    numbers = torch.arange(-500, 501)
    expected = chain.run(numbers.float()[:, None].expand(-1, len(SLOPES)))[-1]
    assert found.values.dtype == torch.int32
    assert torch.equal(apply(found, numbers[:, None]), expected.long())
    assert found.falling.tolist() == [0, 1, 0, 0, 1, 0, 0]


@pytest.mark.parametrize("levels", [3, 255])
def test_both_searches_agree_beyond_the_exhaustive_limit(levels: int) -> None:
    chain = levels_of(lambda x: affine(x * 1e-2), len(SLOPES), levels)
    largest = thresholds.EXHAUSTIVE // 2 - 1
    every, bisected = find(chain, sums(largest)), find(chain, sums(largest + 10))
    assert every == bisected


def test_the_ends_of_the_range_stand_for_always_and_never() -> None:
    found = find(levels_of(lambda x: x * 0 + torch.tensor([0.0, 1.0, 3.0]), 3, 3), sums(9))
    low, high = torch.iinfo(torch.int32).min, torch.iinfo(torch.int32).max
    assert found.values.tolist() == [[high] * 3, [low, high, high], [low] * 3]
    assert found.falling.tolist() == [0, 0, 0]


@pytest.mark.parametrize("direction", [1, -1])
@pytest.mark.parametrize("edge", [-9, -8, 8, 9])
def test_a_step_at_the_edge_of_the_range(direction: int, edge: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def step(x: Tensor) -> Tensor:
        return (direction * x >= direction * edge).float()

    numbers = torch.arange(-9, 10)[:, None]
    for limit in (thresholds.EXHAUSTIVE, 1):
        monkeypatch.setattr(thresholds, "EXHAUSTIVE", limit)
        assert torch.equal(apply(find(levels_of(step, 1, 1), sums(9)), numbers), step(numbers).long())


@settings(deadline=None, max_examples=60)
@given(
    slope=st.floats(-1e3, 1e3, width=32),
    shift=st.floats(-1e3, 1e3, width=32),
    near=st.lists(st.floats(-1e6, 1e6, width=32), min_size=20, max_size=20),
)
def test_float_thresholds_are_right_to_the_last_bit(slope: float, shift: float, near: list[float]) -> None:
    chain = levels_of(lambda x: x * slope + shift, 1, 3)
    found = find(chain, floats())
    steps = found.values[found.values.isfinite()]
    below, above = (steps.nextafter(torch.tensor(end)) for end in (-torch.inf, torch.inf))
    numbers = torch.cat([steps, below, above, torch.tensor([*near, 0.0, -0.0])])[:, None]
    assert torch.equal(apply(found, numbers), chain.run(numbers)[-1].long())


def test_the_two_zeros_are_one_number() -> None:
    found = find(levels_of(lambda x: (x >= 0).float(), 1, 1), floats())
    assert found.values.tolist() == [[0.0]]
    assert apply(found, torch.tensor([[-0.0], [0.0], [-1e-45], [1e-45]])).flatten().tolist() == [1, 1, 0, 1]


@pytest.mark.parametrize("domain", [sums(200), sums(1 << 18), floats()], ids=["every sum", "bisection", "floats"])
@pytest.mark.parametrize("function", [torch.abs, lambda x: 1 - x.abs(), lambda x: (x.abs() < 100).float()])
def test_what_rises_and_falls_is_refused_by_name(
    domain: thresholds.Domain, function: Callable[[Tensor], Tensor]
) -> None:
    chain = levels_of(lambda x: torch.stack([x[:, 0], function(x[:, 1])], 1), 2, 1)
    with pytest.raises(UsageError, match="test: the code of channel 1 both rises and falls"):
        find(chain, domain)


@pytest.mark.parametrize("domain", [sums(60), sums(1 << 18), floats()], ids=["every sum", "bisection", "floats"])
def test_a_pool_takes_the_direction_of_what_follows_it(domain: thresholds.Domain) -> None:
    before = torch.tensor([1.0, 1.0, -1.0, -1.0, 1.0])
    after = torch.tensor([1.0, -1.0, 1.0, -1.0, 0.0])
    found = find(Chain(lambda x: [x * before, (x * before * after >= 0).to(torch.uint8)], 5, 1, "test"), domain)
    assert found.falling.tolist() == [0, 1, 1, 0, 0]
    assert found.pools[0].tolist() == [0, 1, 0, 1, 0]


def test_batch_norm_gives_the_same_bits_wherever_a_number_stands() -> None:
    """What thresholds rest on: torch's batch norm in eval() depends on the number and its channel alone."""
    torch.manual_seed(0)
    for channels in (1, 3, 8, 15, 16, 17, 33):
        norm = nn.BatchNorm2d(channels).eval()
        with torch.no_grad():
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.1, 3)
            norm.weight.normal_()
            norm.bias.normal_()
            for n, h, w in ((1, 1, 1), (3, 1, 1), (2, 3, 5), (1, 8, 8), (16, 7, 7), (5, 9, 13)):
                x = torch.randn(n, channels, h, w) * 10
                one_by_one = x.permute(0, 2, 3, 1).reshape(-1, channels, 1, 1).contiguous()
                expected = norm(one_by_one).reshape(n, h, w, channels).permute(0, 3, 1, 2)
                assert torch.equal(norm(x), expected)
                assert torch.equal(norm(x.to(memory_format=torch.channels_last)), expected)
