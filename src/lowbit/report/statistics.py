"""Is one run really better than another? McNemar's test."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

EXACT_BELOW = 25


@dataclass(frozen=True)
class McNemar:
    """Outcome of McNemar's test on two runs and one test set.

    Attributes:
        both, only_first, only_second, neither: numbers of images that these classify correctly.
        p_value: two-sided, of the hypothesis that both runs are equally often right.
        exact: whether it comes from the binomial distribution, or from chi-square.
    """

    both: int
    only_first: int
    only_second: int
    neither: int
    p_value: float
    exact: bool


def mcnemar(labels: Sequence[int], first: Sequence[int], second: Sequence[int]) -> McNemar:
    """Compare the predictions of two runs on the same images.

    Only the images on which one run is right and the other is wrong tell the two apart: ``b`` where only the first is
    right, ``c`` where only the second is. If the runs are equally good, ``b`` is binomial, ``n = b + c``, chance 1/2.
    For ``n < 25`` the p-value is exact: ``2 P(B <= min(b, c))``, at most 1. Otherwise ``(|b - c| - 1)^2 / (b + c)``,
    with Edwards' continuity correction, is chi-square with one degree of freedom.

    Args:
        labels, first, second: the true classes and the two predictions, all of one length.

    Raises:
        ValueError: the lengths differ.

    Source: McNemar 1947, Psychometrika 12(2), 153-157; Edwards 1948, Psychometrika 13(3), 185-187; for classifiers,
        Dietterich 1998, Neural Computation 10(7), 1895-1923.
    """
    hits = [(a == label, b == label) for label, a, b in zip(labels, first, second, strict=True)]
    both, b, c = hits.count((True, True)), hits.count((True, False)), hits.count((False, True))
    exact = b + c < EXACT_BELOW
    p_value = _binomial(b, c) if exact else _chi_square(b, c)
    return McNemar(both, b, c, len(hits) - both - b - c, p_value, exact)


def _binomial(b: int, c: int) -> float:
    n = b + c
    return min(1.0, 2 * sum(math.comb(n, k) for k in range(min(b, c) + 1)) / (1 << n))


def _chi_square(b: int, c: int) -> float:
    statistic = max(abs(b - c) - 1, 0) ** 2 / (b + c)
    return math.erfc(math.sqrt(statistic / 2))
