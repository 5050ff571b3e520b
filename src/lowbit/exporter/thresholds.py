"""Where a code changes: found by running the model's own modules, never by re-implementing them.

Between a number (the exact sum of a quantized layer, or a float32 value) and the code that the next quantizer makes of
it lies a chain of pointwise modules: scale, bias, batch norm, ReLU. Each channel's code is a step function of the
number. As long as it only rises or only falls it is given by ``2^bits - 1`` thresholds, and finding them is a search,
not algebra: no rounding of the chain can be missed.

    code = number of k with v >= t[k]   (rising)        code = number of k with v <= t[k]   (falling)

Max-pools inside the chain move behind it: ``after(max(v)) = max(after(v))`` where what follows the pool rises, and
``min(after(v))`` where it falls. That direction is the pool's own, not the whole chain's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit.errors import UsageError

# Up to this many sums every one of them is tried; more are searched by bisection and checked in places.
EXHAUSTIVE = 1 << 17
_ELEMENTS = 1 << 22
_SAMPLES = 4096


@dataclass(frozen=True)
class Domain:
    """The numbers that a chain can start from, in their order, each with an integer key.

    Attributes:
        lowest, highest: keys of the ends.
        values: from keys (int64) to float32 numbers, rising.
        thresholds: from keys to thresholds as the packed file stores them, int32 or float32; a key outside the domain
            gives the end of the type's range.
        samples: n keys in places where errors are likely, shape (n,).
    """

    lowest: int
    highest: int
    values: Callable[[Tensor], Tensor]
    thresholds: Callable[[Tensor], Tensor]
    samples: Callable[[int], Tensor]


def sums(largest: int) -> Domain:
    """The integers of ``-largest .. largest``; a sum is its own key. Unreachable thresholds are the ends of int32.

    ``largest`` leaves room for them, see `lowbit.exporter.grids.largest_sum`.
    """
    ends = torch.iinfo(torch.int32)

    def stored(keys: Tensor) -> Tensor:
        return keys.where(keys >= -largest, ends.min).where(keys <= largest, ends.max).to(torch.int32)

    def samples(n: int) -> Tensor:
        everywhere = torch.randint(-largest, largest + 1, (n - n // 2,), generator=_generator())
        near_zero = torch.randn(n // 2, generator=_generator()) * largest**0.5
        return torch.cat([everywhere, near_zero.round().long().clamp(-largest, largest)])

    return Domain(-largest, largest, lambda keys: keys.to(torch.float32), stored, samples)


def floats() -> Domain:
    """The float32 numbers of ``-2^64 .. 2^64``, by their place in the order of all of them; the two zeros share key 0.

    The same bits as an int32 are the key of a number that is not negative, and its negative that of its mirror image.
    Outside the range, which no activation reaches, chains overflow to infinity and NaN. Unreachable thresholds are
    infinite.
    """
    largest = int(torch.tensor(2.0**64).view(torch.int32))

    def values(keys: Tensor) -> Tensor:
        return keys.abs().to(torch.int32).view(torch.float32) * keys.sign()

    def stored(keys: Tensor) -> Tensor:
        inside = values(keys.clamp(-largest, largest))
        return inside.where(keys >= -largest, -torch.inf).where(keys <= largest, torch.inf)

    def samples(n: int) -> Tensor:
        everywhere = torch.randint(-largest, largest + 1, (n - n // 2,), generator=_generator())
        usual = torch.randn(n // 2, generator=_generator()) * torch.logspace(-3, 3, n // 2)
        return torch.cat([everywhere, usual.abs().view(torch.int32).long() * usual.sign().long()])

    return Domain(-largest, largest, values, stored, samples)


@dataclass(frozen=True)
class Chain:
    """What lies between a number and a code.

    Attributes:
        run: from numbers (n, C) float32 to what enters each max-pool on the way, and last the codes, (n, C) each.
        channels: C.
        levels: the largest code, ``2^bits - 1``.
        name: what an error calls it.
    """

    run: Callable[[Tensor], list[Tensor]]
    channels: int
    levels: int
    name: str


@dataclass(frozen=True)
class Thresholds:
    """A chain as the packed file stores it.

    Attributes:
        values: (C, levels), int32 or float32. Non-decreasing along the levels where the channel rises, non-increasing
            where it falls; a level that is always or never reached has a threshold at the end of the range.
        falling: (C,) uint8, 1 where the code falls.
        pools: for each max-pool of the chain, (C,) uint8: 1 where the pool takes the minimum of codes.
    """

    values: Tensor
    falling: Tensor
    pools: list[Tensor]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Thresholds) or len(self.pools) != len(other.pools):
            return False
        mine, theirs = ([self.values, self.falling, *self.pools], [other.values, other.falling, *other.pools])
        return all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


@torch.no_grad()
def find(chain: Chain, domain: Domain) -> Thresholds:
    """The thresholds of ``chain`` over ``domain``.

    Raises:
        UsageError: a channel both rises and falls.
    """
    count = domain.highest - domain.lowest + 1
    first, slopes = _try_all(chain, domain) if count <= EXHAUSTIVE else _bisect(chain, domain)
    *before, whole = slopes
    falling = whole < 0
    # `first` is where the code reaches a level on its way up, or falls below it; a falling threshold is the key before.
    # At the lowest key, or above the highest, the level is always or never reached: a key outside the domain says so.
    outside = (first == domain.lowest) | (first > domain.highest)
    keys = first - (falling[:, None] & ~outside).long() - (first == domain.lowest).long()
    pools = [((slope * whole) < 0).to(torch.uint8) for slope in before]
    return Thresholds(domain.thresholds(keys), falling.to(torch.uint8), pools)


def _try_all(chain: Chain, domain: Domain) -> tuple[Tensor, list[Tensor]]:
    """Run every number of the domain: for each channel and level the first key past the step, and the slopes."""
    found = torch.zeros(chain.channels * (chain.levels + 1), dtype=torch.int64)
    channel = torch.arange(chain.channels) * (chain.levels + 1)
    slopes = _Slopes(chain.name)
    rows = max(1, _ELEMENTS // chain.channels)
    for start in range(domain.lowest, domain.highest + 1, rows):
        keys = torch.arange(start, min(start + rows, domain.highest + 1))
        traces = chain.run(domain.values(keys)[:, None].expand(-1, chain.channels).contiguous())
        slopes.add(traces)
        found += torch.bincount((traces[-1] + channel).flatten(), minlength=len(found))
    # How many numbers have a code of at least 1, 2, ...
    reached = found.reshape(chain.channels, -1).flip(1).cumsum(1).flip(1)[:, 1:]
    rising = slopes.total[-1][:, None] >= 0
    return torch.where(rising, domain.highest + 1 - reached, domain.lowest + reached), slopes.total


def _bisect(chain: Chain, domain: Domain) -> tuple[Tensor, list[Tensor]]:
    """Bisect for each channel and level, then try the numbers around each step and at random."""
    shape = (chain.levels, chain.channels)
    low, high = torch.full(shape, domain.lowest), torch.full(shape, domain.highest)
    level = torch.arange(1, chain.levels + 1)[:, None]

    def codes(keys: Tensor) -> Tensor:
        return chain.run(domain.values(keys))[-1]

    rising = codes(high)[:1] >= codes(low)[:1]

    def past(keys: Tensor) -> Tensor:
        return (codes(keys) >= level) == rising

    always, never = past(low), ~past(high)
    while bool((high - low > 1).any()):
        middle = low + (high - low) // 2
        beyond = past(middle)
        low, high = torch.where(beyond, low, middle), torch.where(beyond, middle, high)
    first = high.where(~always, domain.lowest).where(~never, domain.highest + 1)

    around = (first[:, None] + torch.arange(-3, 3)[:, None]).flatten(0, 1)
    elsewhere = domain.samples(_SAMPLES)[:, None].expand(-1, chain.channels)
    keys = torch.cat(
        [low.new_tensor([domain.lowest, domain.highest])[:, None].expand(-1, chain.channels), around, elsewhere]
    )
    keys = keys.clamp(domain.lowest, domain.highest).sort(dim=0).values
    slopes = _Slopes(chain.name)
    ordered = first.T.contiguous().sort(dim=1).values
    wrong = torch.zeros(chain.channels, dtype=torch.bool)
    for part in torch.split(keys, max(1, _ELEMENTS // chain.channels)):
        traces = chain.run(domain.values(part))
        slopes.add(traces)
        # The number of steps at or below each key; where codes fall, they are the levels that are lost.
        steps = torch.searchsorted(ordered, part.T.contiguous(), right=True).T
        wrong |= (steps.where(rising, chain.levels - steps) != traces[-1]).any(dim=0)
    if wrong.any():
        slopes.refuse(wrong, "code")
    return first.T, slopes.total


class _Slopes:
    """Whether each trace rises (1), falls (-1) or stays (0) in each channel, over numbers that rise."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.total: list[Tensor] = []
        self._last: list[Tensor] = []

    def add(self, traces: list[Tensor]) -> None:
        """Take the next rows of each trace, (n, C)."""
        joined = (
            [torch.cat([last, trace]) for last, trace in zip(self._last, traces, strict=True)] if self._last else traces
        )
        up = [(t[1:] > t[:-1]).any(dim=0) for t in joined]
        down = [(t[1:] < t[:-1]).any(dim=0) for t in joined]
        before = self.total or [torch.zeros(t.shape[1], dtype=torch.int8) for t in traces]
        for index, total in enumerate(before):
            what = "code" if index == len(before) - 1 else "input of a max-pool"
            self.refuse((up[index] | (total > 0)) & (down[index] | (total < 0)), what)
        self.total = [
            (t + u.to(torch.int8) - d.to(torch.int8)).sign() for t, u, d in zip(before, up, down, strict=True)
        ]
        self._last = [t[-1:].clone() for t in traces]

    def refuse(self, channels: Tensor, what: str) -> None:
        if bool(channels.any()):
            raise UsageError(
                f"{self.name}: the {what} of channel {int(channels.nonzero()[0])} both rises and falls with its input, "
                "which thresholds cannot express; put a rising function in its place"
            )


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)
