"""Intervals and paired comparisons, against published numbers and exact enumeration."""

import math
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from quantwm.errors import UsageError
from quantwm.statistics import PairedDifference, paired_difference, separable, wilson_interval


def pairs(both: int, wins: int, losses: int, neither: int) -> tuple[list[bool], list[bool]]:
    """Episodes with these four outcomes, as (treatment, reference)."""
    treatment = [True] * both + [True] * wins + [False] * losses + [False] * neither
    reference = [True] * both + [False] * wins + [True] * losses + [False] * neither
    return treatment, reference


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    # Newcombe (1998, "Two-sided confidence intervals for the single proportion"), table I.
    [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_matches_published_intervals(successes, n, low, high):
    assert wilson_interval(successes, n) == pytest.approx((low, high), abs=5e-5)


def test_wilson_is_the_root_of_the_score_equation():
    z = stats.norm.ppf(0.95)
    for bound in wilson_interval(13, 16, confidence=0.9):
        assert abs(13 / 16 - bound) == pytest.approx(z * math.sqrt(bound * (1 - bound) / 16))


@pytest.mark.parametrize(
    ("successes", "n", "confidence"), [(1, 0, 0.95), (-1, 4, 0.95), (5, 4, 0.95), (1, 4, 1.0)]
)
def test_wilson_refuses_impossible_counts(successes, n, confidence):
    with pytest.raises(UsageError):
        wilson_interval(successes, n, confidence)


def test_newcombe_published_example_bounds_the_interval():
    # Newcombe (1998, "Improved confidence intervals for ... paired data"), method 10, table
    # a=36, b=12, c=2, d=0: 0.2000, interval 0.0569 to 0.3404.
    result = paired_difference(*pairs(36, 12, 2, 0))
    assert result.difference == pytest.approx(0.2)
    assert result.low == pytest.approx(0.0569, abs=1e-4)
    # Above, the bootstrap is the wider of the two or equal.
    assert result.high >= 0.3404 - 1e-4


def test_counts_and_sign():
    result = paired_difference([True, True, False, False, False], [True, False, True, True, False])
    assert (result.wins, result.losses, result.n) == (1, 2, 5)
    assert result.difference == pytest.approx(-0.2)
    assert result.low < -0.2 < result.high


@pytest.mark.parametrize(("wins", "losses"), [(0, 4), (5, 1), (3, 3), (0, 0), (7, 0)])
def test_p_value_is_the_exact_binomial(wins, losses):
    result = paired_difference(*pairs(4, wins, losses, 2))
    discordant = wins + losses
    extreme = max(wins, losses)
    tail = sum(math.comb(discordant, k) for k in range(extreme, discordant + 1)) / 2**discordant
    assert result.p_value == pytest.approx(min(1.0, 2 * tail))


@pytest.mark.parametrize(("both", "neither"), [(16, 0), (0, 16), (12, 4)])
def test_ties_leave_doubt(both, neither):
    """Sixteen equal episodes do not show that two arms are equal to within less than 10 points."""
    result = paired_difference(*pairs(both, 0, 0, neither))
    assert result.difference == 0
    assert result.p_value == 1
    assert result.low < -0.1
    assert result.high > 0.1
    assert not separable(result)


def test_more_ties_leave_less_doubt():
    widths = [paired_difference(*pairs(n, 0, 0, 0)).high for n in (16, 50, 400)]
    assert widths == sorted(widths, reverse=True)
    assert widths[-1] < 0.02


def test_four_losses_of_sixteen_are_not_separable_and_all_are():
    assert not separable(paired_difference(*pairs(12, 0, 4, 0)))
    assert separable(paired_difference(*pairs(2, 0, 14, 0)))
    assert separable(paired_difference(*pairs(2, 14, 0, 0)))


def test_separable_needs_the_interval_and_the_test():
    assert not separable(PairedDifference(-0.2, -0.4, 0.01, 0.01, 0, 4, 20))
    assert not separable(PairedDifference(-0.2, -0.4, -0.01, 0.06, 0, 4, 20))
    assert separable(PairedDifference(-0.2, -0.4, -0.01, 0.04, 0, 4, 20))


@settings(deadline=None)  # a busy machine is no failure
@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=40))
def test_interval_properties(outcomes):
    treatment = [t for t, _ in outcomes]
    reference = [r for _, r in outcomes]
    result = paired_difference(treatment, reference, resamples=500)
    assert -1 <= result.low < result.high <= 1
    assert result.low <= result.difference <= result.high
    again = paired_difference(treatment, reference, resamples=500)
    assert result == again
    swapped = paired_difference(reference, treatment, resamples=500)
    assert swapped.p_value == pytest.approx(result.p_value)
    assert swapped.difference == -result.difference
    # The order of the episodes carries no information.
    assert result == paired_difference(treatment[::-1], reference[::-1], resamples=500)


@pytest.mark.parametrize(
    "chances", [(0.7, 0.1, 0.1, 0.1), (0.6, 0.02, 0.3, 0.08), (0.9, 0, 0, 0.1)]
)
def test_coverage_by_enumeration(chances):
    """Over every possible outcome of 12 episodes, the interval holds the truth often enough."""
    n, truth, covered = 12, chances[1] - chances[2], 0.0
    for both, wins, losses in product(range(n + 1), repeat=3):
        neither = n - both - wins - losses
        if neither < 0:
            continue
        table = (both, wins, losses, neither)
        probability = stats.multinomial.pmf(table, n, chances)
        if probability < 1e-9:
            continue
        result = paired_difference(*pairs(*table), resamples=1000)
        covered += probability * (result.low <= truth <= result.high)
    assert covered > 0.94


def test_paired_accepts_arrays_and_prints():
    result = paired_difference(np.array([True, False]), np.array([True, True]))
    assert str(result).startswith("-0.50 [")


@pytest.mark.parametrize(
    ("treatment", "reference"),
    [([], []), ([True], [True, False]), ([0.4], [True]), ([[True]], [[True]])],
)
def test_paired_refuses_what_is_not_paired(treatment, reference):
    with pytest.raises(UsageError):
        paired_difference(treatment, reference)
