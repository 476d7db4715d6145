"""Power of the paired test, and the episodes that a study needs."""

import math

import pytest
from scipy import stats

from quantwm.errors import UsageError
from quantwm.statistics import paired_difference
from quantwm.study.power import (
    episodes_needed,
    mcnemar_power,
    minimal_detectable_difference,
    unpaired_resolution,
)


@pytest.mark.parametrize(
    ("n", "losses", "wins", "level"),
    [(12, 0.4, 0.1, 0.05), (9, 0.7, 0.0, 0.05), (10, 0.2, 0.2, 0.2)],
)
def test_power_by_enumeration(n, losses, wins, level):
    power = 0.0
    for lost in range(n + 1):
        for won in range(n + 1 - lost):
            if lost <= won or stats.binomtest(lost, lost + won).pvalue >= level:
                continue
            chances = (losses, wins, 1 - losses - wins)
            power += stats.multinomial.pmf((lost, won, n - lost - won), n, chances)
    assert mcnemar_power(n, losses, wins, level=level) == pytest.approx(power)


def test_power_published_example():
    """G*Power's manual: 50 pairs, odds ratio 0.25, 40% discordant, one-sided level 0.05."""
    assert mcnemar_power(50, 0.32, 0.08, level=0.10) == pytest.approx(0.8393, abs=1e-4)
    assert mcnemar_power(50, 0.20, 0.20, level=0.10) == pytest.approx(0.0326, abs=1e-4)


def test_no_disagreement_no_power():
    assert mcnemar_power(50, 0.0, 0.0) == 0.0
    assert mcnemar_power(5, 1.0, 0.0) == 0.0
    assert mcnemar_power(6, 1.0, 0.0) == 1.0


@pytest.mark.parametrize("discordance", [0.0, 0.1, 0.3])
@pytest.mark.parametrize("n", [24, 50, 100])
def test_the_minimal_difference_is_found_with_the_power_asked_for(n, discordance):
    least = minimal_detectable_difference(n, discordance=discordance)
    half = discordance / 2
    assert mcnemar_power(n, half + least, half) == pytest.approx(0.8, abs=1e-4)
    assert mcnemar_power(n, half + 0.9 * least, half) < 0.8


def test_the_most_favourable_case_by_hand():
    """Without random disagreement the test needs 6 losses: P(at least 6 of 50) = 0.8."""
    least = minimal_detectable_difference(50)
    assert stats.binom.sf(5, 50, least) == pytest.approx(0.8, abs=1e-4)
    assert 0.15 < least < 0.16


def test_minimal_difference_shrinks_with_episodes_and_grows_with_noise():
    by_n = [minimal_detectable_difference(n, discordance=0.1) for n in (24, 50, 100, 400)]
    assert by_n == sorted(by_n, reverse=True)
    by_noise = [minimal_detectable_difference(50, discordance=r) for r in (0.0, 0.1, 0.2, 0.4)]
    assert by_noise == sorted(by_noise)


def test_five_episodes_find_nothing():
    assert minimal_detectable_difference(5) is None
    assert minimal_detectable_difference(6) is not None


def test_unpaired_resolution_of_fifty_episodes():
    assert unpaired_resolution(50, 0.9) == pytest.approx(0.12, abs=0.005)
    assert unpaired_resolution(200, 0.9) == pytest.approx(unpaired_resolution(50, 0.9) / 2)


def excludes(margin):
    return lambda seen: seen.low > margin or seen.high < margin


def outcomes(both, wins, losses, neither):
    treatment = [True] * (both + wins) + [False] * (losses + neither)
    return treatment, [True] * both + [False] * wins + [True] * losses + [False] * neither


@pytest.mark.parametrize("table", [(40, 3, 5, 2), (46, 0, 0, 4), (30, 8, 12, 0), (20, 2, 10, 18)])
def test_episodes_needed_decide_if_rates_go_on(table):
    pair = outcomes(*table)
    assert not excludes(-0.1)(paired_difference(*pair)) or table == (46, 0, 0, 4)
    needed = episodes_needed([pair], excludes(-0.1))
    assert needed >= sum(table)
    # A little more: the forecast rounds the counts, and its bootstrap is coarser.
    times = math.ceil(1.25 * needed / sum(table))
    more = tuple(times * count for count in table)
    assert excludes(-0.1)(paired_difference(*outcomes(*more)))


def test_episodes_needed_grow_as_the_square_of_the_precision():
    """With many disagreements, half the distance to the margin takes four times the episodes."""
    pair = outcomes(60, 20, 20, 0)
    far, near = (episodes_needed([pair], excludes(-margin)) for margin in (0.08, 0.04))
    assert near / far == pytest.approx(4, rel=0.15)
    # The normal approximation of both: the variance of one episode's difference is 0.4.
    assert far == pytest.approx(1.96**2 * 0.4 / 0.08**2, rel=0.15)


def test_a_decided_comparison_needs_no_more_and_a_tie_with_the_margin_never_decides():
    assert episodes_needed([outcomes(10, 0, 40, 0)], excludes(-0.1)) == 50
    assert episodes_needed([outcomes(40, 0, 5, 5)], excludes(-0.1), most=1000) is None


def test_order_of_episodes_does_not_matter():
    treatment, reference = outcomes(40, 3, 5, 2)
    backwards = (treatment[::-1], reference[::-1])
    needed = [episodes_needed([one], excludes(-0.1)) for one in ((treatment, reference), backwards)]
    assert needed[0] == needed[1]


@pytest.mark.parametrize(
    "call",
    [
        lambda: mcnemar_power(0, 0.1, 0.1),
        lambda: mcnemar_power(10, 0.8, 0.3),
        lambda: mcnemar_power(10, -0.1, 0.3),
        lambda: mcnemar_power(10, 0.1, 0.3, level=0.0),
        lambda: minimal_detectable_difference(10, discordance=1.0),
        lambda: minimal_detectable_difference(10, power=1.0),
        lambda: unpaired_resolution(0, 0.5),
        lambda: unpaired_resolution(10, 1.0),
    ],
)
def test_numbers_out_of_range_are_refused(call):
    with pytest.raises(UsageError):
        call()
