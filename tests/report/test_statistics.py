"""McNemar's test against values worked out by hand and against SciPy's distributions."""

import numpy as np
import pytest
from scipy.stats import binomtest, chi2

from lowbit.report.statistics import EXACT_BELOW, mcnemar


def outcomes(both, only_first, only_second, neither):
    """Labels and two predictions with these counts."""
    first = [1] * (both + only_first) + [0] * (only_second + neither)
    second = [1] * both + [0] * only_first + [1] * only_second + [0] * neither
    return [1] * len(first), first, second


@pytest.mark.parametrize(
    ("b", "c", "p_value", "exact"),
    [
        (0, 0, 1.0, True),
        (1, 0, 1.0, True),  # 2 * 1/2
        (5, 0, 2 / 32, True),  # 2 * (1/2)^5
        (1, 9, 22 / 1024, True),  # 2 * (1 + 10) / 2^10
        (3, 3, 1.0, True),  # 2 * P(B <= 3) is above 1
        (121, 59, 5.45e-6, False),  # chi-square (121 - 59 - 1)^2 / 180 = 20.67
        (20, 20, 1.0, False),
    ],
)
def test_by_hand(b, c, p_value, exact):
    test = mcnemar(*outcomes(7, b, c, 3))
    assert (test.both, test.only_first, test.only_second, test.neither) == (7, b, c, 3)
    assert test.p_value == pytest.approx(p_value, rel=1e-3)
    assert test.exact is exact


def test_against_scipy():
    rng = np.random.default_rng(0)
    for _ in range(200):
        b, c = (int(n) for n in rng.integers(0, 40, 2))
        test = mcnemar(*outcomes(1, b, c, 1))
        if b + c < EXACT_BELOW:
            expected = binomtest(b, b + c).pvalue if b + c else 1.0
        else:
            expected = chi2.sf(max(abs(b - c) - 1, 0) ** 2 / (b + c), 1)
        assert test.p_value == pytest.approx(expected, rel=1e-9)


def test_lengths_must_agree():
    with pytest.raises(ValueError, match="zip"):
        mcnemar([1, 2], [1, 2], [1])
