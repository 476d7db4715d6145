"""How many episodes a comparison needs, and what a number of episodes can show.

Two arms meet the same episodes and are compared by the exact McNemar test
(`quantwm.statistics.paired_difference`), so only episodes where they disagree carry information.
Everything here takes episodes as independent of one another.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
from scipy import optimize, stats

from quantwm.errors import UsageError
from quantwm.seeds import MAX_EPISODES
from quantwm.statistics import (
    SIGNIFICANCE,
    PairedDifference,
    Successes,
    pooled_difference,
)

POWER = 0.8
"""The chance of finding a difference that a study is planned for."""


def mcnemar_power(n: int, losses: float, wins: float, *, level: float = SIGNIFICANCE) -> float:
    """Chance that the exact two-sided McNemar test finds the treatment worse than the reference.

    The number of disagreements is binomial, and so are the wins among them; both are summed over
    exactly. Rejections in the wrong direction do not count.

    Args:
        n: episodes that both arms meet, at least 1.
        losses: chance that only the reference solves an episode.
        wins: chance that only the treatment does.
        level: of the test, both sides together.

    Raises:
        UsageError: a number is out of range.
    """
    if n < 1:
        raise UsageError(f"a comparison needs at least 1 episode, got n={n}")
    if min(losses, wins) < 0 or losses + wins > 1:
        raise UsageError(
            f"losses and wins are chances of which the sum is at most 1, got {losses} and {wins}"
        )
    _check_chance("level", level)
    if losses + wins == 0:
        return 0.0
    disagreements = np.arange(n + 1)
    # The most wins at which the test still rejects: twice their lower tail is below the level.
    critical = stats.binom.ppf(level / 2, disagreements, 0.5) - 1
    found = stats.binom.cdf(critical, disagreements, wins / (losses + wins))
    return float(stats.binom.pmf(disagreements, n, losses + wins) @ found)


def minimal_detectable_difference(
    n: int, *, discordance: float = 0.0, power: float = POWER, level: float = SIGNIFICANCE
) -> float | None:
    """The smallest loss of success that paired episodes would find.

    Two arms of equal success still disagree at random in a share `discordance` of the episodes,
    as often one way as the other; a loss of d adds a share d that only the reference solves.

    Args:
        n: episodes that both arms meet, at least 1.
        discordance: 0 is the most favourable case, where only the loss makes them disagree.
        power: chance of finding it.
        level: of the exact McNemar test, both sides together.

    Returns:
        A difference of success rates; None where not even the largest possible one would be found
        (with fewer than 6 episodes at level 0.05, whatever happens).

    Raises:
        UsageError: a number is out of range.
    """
    _check_chance("power", power)
    if not 0 <= discordance < 1:
        raise UsageError(f"discordance is a share of the episodes, 0 to 1, got {discordance}")
    half = discordance / 2

    def excess(difference: float) -> float:
        return mcnemar_power(n, half + difference, half, level=level) - power

    largest = 1 - discordance
    if excess(largest) < 0:
        return None
    if excess(0.0) >= 0:
        return 0.0
    return float(optimize.brentq(excess, 0.0, largest, xtol=1e-6))


def unpaired_resolution(n: int, rate: float) -> float:
    """Half the width of the 95% interval of a difference of two arms on different episodes.

    The normal approximation √(2 rate (1 − rate) / n) · 1.96, good for rates that are not near 0
    or 1: 50 episodes each at a rate of 0.9 leave ±0.12. No observed difference below it can be
    told from none. It takes twice that to be found with a chance of more than 0.97.

    Args:
        n: episodes of each arm, at least 1.
        rate: success rate of both, strictly between 0 and 1.

    Raises:
        UsageError: a number is out of range.
    """
    if n < 1:
        raise UsageError(f"a comparison needs at least 1 episode, got n={n}")
    _check_chance("rate", rate)
    return float(stats.norm.ppf(0.975)) * math.sqrt(2 * rate * (1 - rate) / n)


def episodes_needed(
    pairs: Sequence[tuple[Successes, Successes]],
    decided: Callable[[PairedDifference], bool],
    *,
    confidence: float = 0.95,
    most: int = MAX_EPISODES,
) -> int | None:
    """After how many episodes a comparison would be decided if what was seen goes on.

    Repeats the episodes in proportion, so that the rates and the share of disagreements stay as
    observed, and asks at growing numbers (by a twentieth each) whether the interval that results
    decides. It is a forecast from the observed rates, which are themselves uncertain; it is worth
    the more, the more disagreements were seen.

    Args:
        pairs: (treatment, reference), each (n,), as in `quantwm.statistics.pooled_difference`.
        decided: of the difference and its interval, such as
            `lambda seen: seen.low > -0.1 or seen.high < -0.1`.
        confidence: of the interval.
        most: where to give up.

    Returns:
        A number of episodes, at least n; None if `most` would not decide it either.

    Raises:
        UsageError: as `pooled_difference`.
    """
    # Sorting puts equal outcomes side by side, so that stretching repeats each in proportion.
    columns = np.array([column for pair in pairs for column in pair], np.bool_)
    outcomes = columns[:, np.lexsort(columns)]
    n = int(columns.shape[1])
    number = n
    while number <= most:
        stretched = outcomes[:, np.arange(number) * n // number]
        repeated = list(zip(stretched[::2], stretched[1::2], strict=True))
        if decided(pooled_difference(repeated, confidence=confidence, resamples=2000)):
            return number
        number = max(number + 1, math.ceil(number * 1.05))
    return None


def _check_chance(name: str, value: float) -> None:
    if not 0 < value < 1:
        raise UsageError(f"{name} must lie between 0 and 1, got {value}")
