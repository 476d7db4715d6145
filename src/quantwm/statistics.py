"""Intervals for success rates, and paired comparisons of two arms on the same episodes.

Success rates carry Wilson's score interval (Wilson, JASA 22, 1927). Two arms that met the same
episodes are compared pairwise: an exact McNemar test, and an interval of the difference. Many
comparisons at once are corrected after Holm or Benjamini and Hochberg.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
from scipy import optimize, stats

from quantwm.errors import UsageError

SIGNIFICANCE = 0.05
"""Two-sided level of `separable`; its intervals have confidence 0.95."""

Successes: TypeAlias = Sequence[bool] | npt.NDArray[np.bool_]
"""Whether each episode succeeded (n,)."""


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
    _check_confidence(confidence)
    # scipy has it only with an exact test beside, a hundred times slower.
    z = float(stats.norm.ppf((1 + confidence) / 2))
    rate, shrink = successes / n, 1 + z**2 / n
    center = (rate + z**2 / (2 * n)) / shrink
    reach = z / shrink * math.sqrt(rate * (1 - rate) / n + z**2 / (4 * n**2))
    low = max(center - reach, 0.0) if successes > 0 else 0.0
    high = min(center + reach, 1.0) if successes < n else 1.0
    return low, high


@dataclass(frozen=True)
class PairedDifference:
    """Success of a treatment minus success of a reference on the same episodes.

    Attributes:
        difference: treatment's rate minus reference's, in [-1, 1].
        low, high: interval of the difference, of confidence 0.95 unless another was asked for.
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
    treatment: Successes,
    reference: Successes,
    *,
    confidence: float = 0.95,
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
        confidence: of the interval, strictly between 0 and 1.
        resamples: bootstrap resamples.
        seed: of the resampling; the result depends on the arguments alone.

    Raises:
        UsageError: no episodes, or not the same number of them.
    """
    return pooled_difference(
        [(treatment, reference)], confidence=confidence, resamples=resamples, seed=seed
    )


def pooled_difference(
    pairs: Sequence[tuple[Successes, Successes]],
    *,
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> PairedDifference:
    """The mean of k paired differences on the same episodes; of one, it is `paired_difference`.

    Resampling draws whole episodes, so that an episode which is hard in every pair counts once.
    The score interval joins those of the k pairs as if they were independent (the square root of
    the sum of squares: MOVER, Zou and Donner, Statistics in Medicine 27, 2008); again the result
    holds both. `wins` are the episodes that treatments solved more often than references did, and
    the test is the exact sign test on wins and losses.

    Args:
        pairs: (treatment, reference) each (n,), all on the same episodes in the same order.
        confidence, resamples, seed: as in `paired_difference`.

    Raises:
        UsageError: no pair, no episodes, or not the same number of them.
    """
    tables = [
        (_booleans("treatment", treatment), _booleans("reference", reference))
        for treatment, reference in pairs
    ]
    sizes = {array.size for table in tables for array in table}
    if len(sizes) > 1:
        raise UsageError(f"paired arms need the same episodes, got {sorted(sizes)} of them")
    if sizes in (set(), {0}):
        raise UsageError("a paired comparison needs at least 1 pair and 1 episode, got none")
    if resamples < 1:
        raise UsageError(f"resamples must be at least 1, got {resamples}")
    _check_confidence(confidence)
    gains = np.sum([treated.astype(int) - referred for treated, referred in tables], axis=0)
    k, n = len(tables), gains.size
    wins, losses = int(np.sum(gains > 0)), int(np.sum(gains < 0))
    difference = int(gains.sum()) / (n * k)
    bootstrap = _bootstrap_interval(gains, k, confidence, resamples, seed)
    scores = [_newcombe_interval(treated, referred, confidence) for treated, referred in tables]
    below = math.sqrt(sum(below**2 for below, _ in scores)) / k
    above = math.sqrt(sum(above**2 for _, above in scores)) / k
    p_value = min(1.0, 2 * float(stats.binom.cdf(min(wins, losses), wins + losses, 0.5)))
    return PairedDifference(
        difference=difference,
        low=min(bootstrap[0], max(difference - below, -1.0)),
        high=max(bootstrap[1], min(difference + above, 1.0)),
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


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values adjusted after Holm (Scandinavian Journal of Statistics 6, 1979).

    Calling every adjusted value below 0.05 a difference makes a single mistake among all of them
    with a chance of at most 0.05, however the tests depend on one another.

    Raises:
        UsageError: a value is not in [0, 1].
    """
    values = _p_values(p_values)
    order = np.argsort(values, kind="stable")
    steps = values[order] * np.arange(values.size, 0, -1)
    adjusted = np.empty_like(values)
    adjusted[order] = np.minimum(np.maximum.accumulate(steps), 1.0)
    return [float(value) for value in adjusted]


def benjamini_hochberg(p_values: Sequence[float]) -> list[float]:
    """p-values adjusted after Benjamini and Hochberg (JRSS B 57, 1995).

    Of the values below 0.05 called differences, a share of at most 0.05 is expected to be wrong,
    for tests that are independent or positively dependent.

    Raises:
        UsageError: a value is not in [0, 1].
    """
    values = _p_values(p_values)
    if values.size == 0:
        return []
    return [float(value) for value in stats.false_discovery_control(values, method="bh")]


@dataclass(frozen=True)
class Auc:
    """How well a score tells two groups apart.

    Attributes:
        auc: chance that a positive scores above a negative, a tie counting half; 0.5 is no better
            than a coin.
        low, high: 95% interval.
        positives, negatives: how many of each.
    """

    auc: float
    low: float
    high: float
    positives: int
    negatives: int


def auc(scores: Sequence[float] | npt.NDArray[np.float64], positive: Successes) -> Auc | None:
    """Area under the ROC curve of a score, which is Mann and Whitney's U over all pairs.

    The interval is Newcombe's method 5 (Statistics in Medicine 25, 2006): a score interval on
    Hanley and McNeil's variance, which keeps its width where the groups separate perfectly.

    Args:
        scores: (n,), higher for what is expected to be positive; infinities are taken.
        positive: (n,).

    Returns:
        None where all are positive or none is: there is nothing to tell apart.

    Raises:
        UsageError: not the same number of both, or a score is NaN.
    """
    labels = _booleans("positive", positive)
    values = np.asarray(scores, np.float64)
    if values.shape != labels.shape:
        raise UsageError(f"auc needs a score a label, got {values.shape} and {labels.shape}")
    if np.isnan(values).any():
        raise UsageError("auc cannot rank scores that are NaN; leave those out first")
    m, n = int(labels.sum()), int((~labels).sum())
    if m == 0 or n == 0:
        return None
    ranks = stats.rankdata(values)
    area = float(ranks[labels].sum() - m * (m + 1) / 2) / (m * n)
    return Auc(area, *_auc_interval(area, m, n), positives=m, negatives=n)


def _auc_interval(area: float, m: int, n: int) -> tuple[float, float]:
    z = float(stats.norm.ppf(0.975))
    size = (m + n) / 2 - 1

    def excess(truth: float) -> float:
        spread = 1 + size * (1 - truth) / (2 - truth) + size * truth / (1 + truth)
        return (area - truth) ** 2 - z**2 * truth * (1 - truth) * spread / (m * n)

    # Outside the interval the squared distance exceeds z² variances, at its bounds they are equal.
    # Where the groups separate perfectly both are 0 at the area itself, which is no bound.
    nearly = 1e-12
    low = float(optimize.brentq(excess, 0.0, min(area, 1 - nearly))) if area > 0 else 0.0
    high = float(optimize.brentq(excess, max(area, nearly), 1.0)) if area < 1 else 1.0
    return low, high


def _p_values(values: Sequence[float]) -> npt.NDArray[np.float64]:
    array = np.asarray(values, np.float64)
    if array.ndim != 1 or not np.all((array >= 0) & (array <= 1)):
        raise UsageError(f"p-values must be a list of numbers in [0, 1], got {values!r}")
    return array


def _check_confidence(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise UsageError(f"confidence must lie between 0 and 1, got {confidence}")


def _booleans(name: str, values: Successes) -> npt.NDArray[np.bool_]:
    array = np.asarray(values)
    if array.ndim != 1:
        raise UsageError(f"{name} must be a list of booleans, got shape {array.shape}")
    if array.size and array.dtype != np.bool_:
        raise UsageError(f"{name} must hold booleans, got {array.dtype}")
    return array.astype(np.bool_)


def _bootstrap_interval(
    gains: npt.NDArray[np.int_], k: int, confidence: float, resamples: int, seed: int
) -> tuple[float, float]:
    """Percentile interval of the mean of `gains` / k, where gains are integers in [-k, k].

    The mean of n episodes resampled with replacement depends only on how often each value is
    drawn, so one multinomial draw is one resample.
    """
    generator = np.random.default_rng(seed)
    values = np.array(sorted(range(-k, k + 1), key=lambda value: (-abs(value), -value)))
    chances = np.array([np.sum(gains == value) for value in values]) / gains.size
    drawn = generator.multinomial(gains.size, chances, size=resamples)
    tail = (1 - confidence) / 2
    low, high = np.quantile(drawn @ values / (gains.size * k), [tail, 1 - tail])
    return float(low), float(high)


def _newcombe_interval(
    treated: npt.NDArray[np.bool_], referred: npt.NDArray[np.bool_], confidence: float
) -> tuple[float, float]:
    """Newcombe's method 10: Wilson limits of the two rates, joined through their correlation.

    Returns:
        How far the interval reaches below and above the difference.
    """
    n = treated.size
    both, wins = int(np.sum(treated & referred)), int(np.sum(treated & ~referred))
    losses = int(np.sum(~treated & referred))
    treated_low, treated_high = wilson_interval(both + wins, n, confidence)
    referred_low, referred_high = wilson_interval(both + losses, n, confidence)
    rate_treated, rate_referred = (both + wins) / n, (both + losses) / n
    phi = _correlation(both, wins, losses, n - both - wins - losses)

    def distance(own: float, other: float) -> float:
        # Rounding can push the sum a hair below zero when phi is 1.
        return math.sqrt(max(own**2 - 2 * phi * own * other + other**2, 0.0))

    below = distance(rate_treated - treated_low, referred_high - rate_referred)
    above = distance(rate_referred - referred_low, treated_high - rate_treated)
    return below, above


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
