"""Intervals and comparisons, against published numbers, statsmodels and exact enumeration."""

import math
from itertools import combinations, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import proportion_confint

from quantwm.errors import UsageError
from quantwm.statistics import (
    PairedDifference,
    auc,
    benjamini_hochberg,
    holm,
    paired_difference,
    pooled_difference,
    separable,
    wilson_interval,
)


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


@pytest.mark.parametrize(
    ("successes", "n"), [(0, 50), (47, 50), (13, 16), (50, 50), (1, 1), (0, 7)]
)
@pytest.mark.parametrize("confidence", [0.9, 0.95, 0.99])
def test_wilson_matches_statsmodels(successes, n, confidence):
    expected = proportion_confint(successes, n, alpha=1 - confidence, method="wilson")
    assert wilson_interval(successes, n, confidence) == pytest.approx(expected, abs=1e-12)


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


@pytest.mark.parametrize("table", [(36, 12, 2, 0), (20, 0, 6, 3), (5, 4, 9, 40), (0, 1, 0, 0)])
def test_p_value_matches_statsmodels(table):
    both, wins, losses, neither = table
    expected = mcnemar([[both, wins], [losses, neither]], exact=True).pvalue
    assert paired_difference(*pairs(*table)).p_value == pytest.approx(expected)


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


def test_confidence_widens_the_interval():
    narrow, usual, wide = (
        paired_difference(*pairs(30, 3, 9, 8), confidence=level) for level in (0.8, 0.95, 0.99)
    )
    assert wide.low < usual.low < narrow.low < usual.difference < narrow.high < wide.high
    assert usual == paired_difference(*pairs(30, 3, 9, 8))
    with pytest.raises(UsageError, match="confidence"):
        paired_difference([True], [True], confidence=1.0)


def test_pooling_one_pair_or_the_same_pair_twice():
    pair = pairs(30, 3, 9, 8)
    alone = paired_difference(*pair)
    assert pooled_difference([pair]) == alone
    # Twice the same episodes say no more than once: resampling whole episodes sees that.
    twice = pooled_difference([pair, pair])
    assert (twice.difference, twice.wins, twice.losses, twice.n) == (alone.difference, 3, 9, 50)
    assert twice.p_value == alone.p_value
    assert twice.high == pytest.approx(alone.high, abs=0.02)


def test_pooling_counts_an_episode_once():
    # Episode 0 is lost in both pairs, episode 1 won in one, episode 2 won and lost.
    first = ([False, True, True], [True, True, False])
    second = ([False, True, False], [True, False, True])
    pooled = pooled_difference([first, second])
    assert (pooled.wins, pooled.losses, pooled.n) == (1, 1, 3)
    assert pooled.difference == pytest.approx((0 - 1 / 3) / 2)


def test_pooling_independent_pairs_narrows_the_interval():
    generator = np.random.default_rng(0)
    tables = [(generator.random(200) < 0.6, generator.random(200) < 0.7) for _ in range(4)]
    alone = [paired_difference(*table) for table in tables]
    pooled = pooled_difference(tables)
    assert pooled.difference == pytest.approx(np.mean([one.difference for one in alone]))
    width = np.mean([one.high - one.low for one in alone])
    assert pooled.high - pooled.low == pytest.approx(width / 2, rel=0.1)


def test_pooled_coverage_where_widths_depend_on_one_another():
    """An episode's difficulty is shared by three widths; the truth is a difference of -0.15."""
    generator = np.random.default_rng(1)
    covered = 0
    for _ in range(200):
        hard = generator.random(30)
        tables = [(hard + generator.normal(0, 0.2, 30) < 0.5 - 0.15, hard < 0.5) for _ in range(3)]
        result = pooled_difference(tables, resamples=300)
        covered += result.low <= TRUE_DIFFERENCE <= result.high
    assert covered / 200 > 0.9


# P(U + 0.2 Z < 0.35) - 0.5 for uniform U and normal Z, by integration.
TRUE_DIFFERENCE = float(np.mean(stats.norm.cdf((0.35 - np.linspace(0, 1, 20001)) / 0.2))) - 0.5


@pytest.mark.parametrize("given", [[], [([], [])], [([True], [True]), ([True] * 2, [True] * 2)]])
def test_pooling_refuses_what_is_not_paired(given):
    with pytest.raises(UsageError):
        pooled_difference(given)


# The example of Benjamini and Hochberg (1995, section 3.2).
THROMBOLYSIS = [0.0001, 0.0004, 0.0019, 0.0095, 0.0201, 0.0278, 0.0298, 0.0344]
THROMBOLYSIS += [0.0459, 0.3240, 0.4262, 0.5719, 0.6528, 0.7590, 1.0]


def test_benjamini_hochberg_published_example():
    assert sum(p < 0.05 for p in benjamini_hochberg(THROMBOLYSIS)) == 4
    assert sum(p < 0.05 for p in holm(THROMBOLYSIS)) == 3


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])


@pytest.mark.parametrize(
    "p_values", [[0.03], [0.02, 0.5, 0.02, 0.0, 1.0], [0.9, 0.8, 0.011, 0.04], THROMBOLYSIS[::-1]]
)
def test_corrections_match_statsmodels(p_values):
    assert holm(p_values) == pytest.approx(multipletests(p_values, method="holm")[1])
    expected = multipletests(p_values, method="fdr_bh")[1]
    assert benjamini_hochberg(p_values) == pytest.approx(expected)
    assert all(
        h >= b - 1e-12 for h, b in zip(holm(p_values), benjamini_hochberg(p_values), strict=True)
    )
    # The order carries no information.
    assert holm(p_values[::-1])[::-1] == pytest.approx(holm(p_values))


@pytest.mark.parametrize("correct", [holm, benjamini_hochberg])
def test_corrections_of_nothing_and_of_nonsense(correct):
    assert correct([]) == []
    for wrong in ([1.2], [-0.1], [math.nan], [[0.1]]):
        with pytest.raises(UsageError, match="p-values"):
            correct(wrong)


@given(
    st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=1, max_size=20),
)
def test_auc_counts_pairs(outcomes):
    scores, labels = [float(s) for s, _ in outcomes], [ok for _, ok in outcomes]
    result = auc(scores, labels)
    positives = [s for s, ok in outcomes if ok]
    negatives = [s for s, ok in outcomes if not ok]
    if not positives or not negatives:
        assert result is None
        return
    won = [(p > n) + (p == n) / 2 for p in positives for n in negatives]
    assert result.auc == pytest.approx(np.mean(won))
    assert (result.positives, result.negatives) == (len(positives), len(negatives))
    assert 0 <= result.low <= result.auc <= result.high <= 1
    assert result.low < result.high
    turned = auc([-s for s in scores], labels)
    assert (turned.auc, turned.low) == pytest.approx((1 - result.auc, 1 - result.high))


def test_auc_interval_solves_its_equation():
    """Newcombe (2006), method 5, in Hanley and McNeil's own terms Q1 and Q2."""
    result = auc([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0], [False, False, True, False, True, True, True])
    assert result.auc == pytest.approx(11 / 12)
    for truth in (result.low, result.high):
        q1, q2 = truth / (2 - truth), 2 * truth**2 / (1 + truth)
        size = 3.5  # both groups count as their mean size
        variance = truth * (1 - truth) + (size - 1) * (q1 + q2 - 2 * truth**2)
        assert abs(11 / 12 - truth) == pytest.approx(1.959964 * math.sqrt(variance / 12), rel=1e-5)


def test_auc_coverage_by_enumeration():
    """Without a relation every order of the scores is as likely, and the area is one half."""
    n = 12
    covered = [
        result.low <= 0.5 <= result.high
        for chosen in combinations(range(n), 5)
        if (result := auc(np.arange(n, dtype=float), np.isin(np.arange(n), chosen)))
    ]
    assert np.mean(covered) > 0.94


def test_auc_takes_infinities_and_refuses_nan():
    assert auc([-math.inf, 0.0, math.inf], [False, False, True]).auc == 1.0
    with pytest.raises(UsageError, match="NaN"):
        auc([math.nan, 1.0], [True, False])
    with pytest.raises(UsageError, match="score a label"):
        auc([1.0], [True, False])
