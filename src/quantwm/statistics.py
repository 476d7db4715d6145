"""Intervals for success rates, and paired comparisons of two arms on the same episodes.

Success rates carry Wilson's score interval (Wilson, JASA 22, 1927). Two arms that met the same
episodes are compared pairwise: an exact McNemar test, and an interval of the difference.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import stats

from quantwm.errors import UsageError

SIGNIFICANCE = 0.05
"""Two-sided level of `separable`; its intervals have confidence 0.95."""


def wilson_interval(successes: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a success rate, as (low, high) in [0, 1].

    Args:
        successes: 0 to `n`.
        n: number of episodes, at least 1.
        confidence: coverage, strictly between 0 and 1.

    Raises:
        UsageError: a number is out of range.
    """
    if n < 1:
        raise UsageError(f"a success rate needs at least 1 episode, got n={n}")
    if not 0 <= successes <= n:
        raise UsageError(f"successes must be 0 to n={n}, got {successes}")
    if not 0 < confidence < 1:
        raise UsageError(f"confidence must lie between 0 and 1, got {confidence}")
    result = stats.binomtest(int(successes), int(n))
    interval = result.proportion_ci(confidence_level=confidence, method="wilson")
    return float(interval.low), float(interval.high)


@dataclass(frozen=True)
class PairedDifference:
    """Success of a treatment minus success of a reference on the same episodes.

    Attributes:
        difference: treatment's rate minus reference's, in [-1, 1].
        low, high: 95% interval of the difference.
        p_value: exact two-sided McNemar test of "no difference"; 1 without discordant episodes.
        wins: episodes that only the treatment solved.
        losses: episodes that only the reference solved.
        n: number of episodes.
    """

    difference: float
    low: float
    high: float
    p_value: float
    wins: int
    losses: int
    n: int

    def __str__(self) -> str:
        return f"{self.difference:+.2f} [{self.low:+.2f}, {self.high:+.2f}]"


def paired_difference(
    treatment: Sequence[bool] | npt.NDArray[np.bool_],
    reference: Sequence[bool] | npt.NDArray[np.bool_],
    *,
    resamples: int = 10_000,
    seed: int = 0,
) -> PairedDifference:
    """Compare two arms on the same episodes, given in the same order.

    The interval is the narrowest one that holds both the percentile bootstrap over episodes and
    Newcombe's paired score interval (Statistics in Medicine 17, 1998, method 10). The bootstrap
    alone is overconfident where few episodes disagree: it has width zero when none does, and it
    excludes zero after four losses of 16 without a win, which a fair coin gives with p = 0.125.

    Args:
        treatment, reference: success of each episode (n,).
        resamples: bootstrap resamples.
        seed: of the resampling; the result depends on the arguments alone.

    Raises:
        UsageError: no episodes, or not the same number of them.
    """
    if len(treatment) != len(reference):
        raise UsageError(
            f"paired arms need the same episodes, got {len(treatment)} and {len(reference)}"
        )
    treated, referred = _booleans("treatment", treatment), _booleans("reference", reference)
    n = treated.size
    if n == 0:
        raise UsageError("a paired comparison needs at least 1 episode, got none")
    if resamples < 1:
        raise UsageError(f"resamples must be at least 1, got {resamples}")
    both = int(np.sum(treated & referred))
    wins, losses = int(np.sum(treated & ~referred)), int(np.sum(~treated & referred))
    bootstrap = _bootstrap_interval(wins, losses, n, resamples, seed)
    score = _newcombe_interval(both, wins, losses, n)
    p_value = 1.0
    if wins + losses:
        p_value = float(stats.binomtest(wins, wins + losses, 0.5).pvalue)
    return PairedDifference(
        difference=(wins - losses) / n,
        low=min(bootstrap[0], score[0]),
        high=max(bootstrap[1], score[1]),
        p_value=p_value,
        wins=wins,
        losses=losses,
        n=n,
    )


def separable(difference: PairedDifference) -> bool:
    """Whether the episodes support calling the two arms different.

    Both must say so: the interval excludes zero, and the exact test has p < 0.05.
    """
    excludes_zero = difference.low > 0 or difference.high < 0
    return excludes_zero and difference.p_value < SIGNIFICANCE


def _booleans(name: str, values: Sequence[bool] | npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    array = np.asarray(values)
    if array.ndim != 1:
        raise UsageError(f"{name} must be a list of booleans, got shape {array.shape}")
    if array.size and array.dtype != np.bool_:
        raise UsageError(f"{name} must hold booleans, got {array.dtype}")
    return array.astype(np.bool_)


def _bootstrap_interval(
    wins: int, losses: int, n: int, resamples: int, seed: int
) -> tuple[float, float]:
    """Percentile interval. The mean of n episodes resampled with replacement depends only on how
    many wins and losses are drawn, so one multinomial draw is one resample.
    """
    generator = np.random.default_rng(seed)
    chances = np.array([wins, losses, n - wins - losses]) / n
    drawn = generator.multinomial(n, chances, size=resamples)
    low, high = np.quantile((drawn[:, 0] - drawn[:, 1]) / n, [0.025, 0.975])
    return float(low), float(high)


def _newcombe_interval(both: int, wins: int, losses: int, n: int) -> tuple[float, float]:
    """Newcombe's method 10: Wilson limits of the two rates, joined through their correlation."""
    neither = n - both - wins - losses
    treated, referred = both + wins, both + losses
    treated_low, treated_high = wilson_interval(treated, n)
    referred_low, referred_high = wilson_interval(referred, n)
    rate_treated, rate_referred = treated / n, referred / n
    phi = _correlation(both, wins, losses, neither)

    def distance(own: float, other: float) -> float:
        # Rounding can push the sum a hair below zero when phi is 1.
        return math.sqrt(max(own**2 - 2 * phi * own * other + other**2, 0.0))

    difference = rate_treated - rate_referred
    below = distance(rate_treated - treated_low, referred_high - rate_referred)
    above = distance(rate_referred - referred_low, treated_high - rate_treated)
    return max(difference - below, -1.0), min(difference + above, 1.0)


def _correlation(both: int, wins: int, losses: int, neither: int) -> float:
    """The phi coefficient with Newcombe's continuity correction; 0 where a margin is empty."""
    n = both + wins + losses + neither
    margins = (both + wins) * (losses + neither) * (both + losses) * (wins + neither)
    if margins == 0:
        return 0.0
    product = float(both * neither - wins * losses)
    if product > 0:
        product = max(product - n / 2, 0.0)
    return product / math.sqrt(margins)
