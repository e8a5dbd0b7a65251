"""How far two opinions of the same pictures agree: a scorer's and a person's, or a person's on two days."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from library.measuring.statistics import Interval

BOOTSTRAPS = 300


def rank_correlation(first: np.ndarray, second: np.ndarray) -> float:
    """Spearman's; 0 with something constant."""
    from scipy.stats import rankdata

    if len(first) < 2 or np.ptp(first) == 0 or np.ptp(second) == 0:
        return 0.0
    return float(np.corrcoef(rankdata(first), rankdata(second))[0, 1])


def concordance(scores: np.ndarray, stars: np.ndarray) -> float:
    """Share of two pictures with different stars that are in the same order by scores; equal scores are half right. 0.5 without any."""
    order = (stars[:, None] - stars) > 0
    leads = scores[:, None] - scores
    return float((((leads > 0) + 0.5 * (leads == 0)) * order).sum() / order.sum()) if order.any() else 0.5


def pair_accuracy(leads: np.ndarray, preference: np.ndarray) -> float:
    """Share of pairs without a tie whose better one has the higher score. 0.5 without any."""
    decided = preference != 0.5
    right = (leads * (2 * preference - 1))[decided]
    return float(((right > 0) + 0.5 * (right == 0)).mean()) if decided.any() else 0.5


def bootstrapped(statistic: Callable[..., float], *columns: np.ndarray, rng: np.random.Generator) -> Interval:
    """The statistic of columns [N], and its interval over rows drawn anew."""
    count = len(columns[0])
    draws = [statistic(*(column[rows] for column in columns)) for rows in rng.integers(count, size=(BOOTSTRAPS, count))]
    return Interval(statistic(*columns), *map(float, np.quantile(draws, (0.025, 0.975))))


def star_agreement(first: np.ndarray, second: np.ndarray, spread: float) -> Interval:
    """Correlation of two ratings of the same pictures, from how far they are apart: 1 - mean squared difference / (2 variance).

    Not the correlation of so few, which knows nothing. The interval is that of the error's variance (chi-squared).

    Args:
        first, second: stars [R]. spread: the variance of all stars.
    """
    from scipy.stats import chi2

    squares, count = float(((first - second) ** 2).sum()), len(first)
    worst, best = (squares / 2 / bound / spread for bound in chi2.ppf((0.025, 0.975), count))
    return Interval(*(float(np.clip(1 - error, 0, 1)) for error in (squares / 2 / count / spread, worst, best)))


def share_interval(share: float, count: float) -> Interval:
    """A share of so many, with Wilson's interval: all of 30 does not mean all of any."""
    z = 1.96
    middle, half = share * count + z**2 / 2, z * math.sqrt(share * (1 - share) * count + z**2 / 4)
    return Interval(share, (middle - half) / (count + z**2), (middle + half) / (count + z**2))


def ceiling_of(agreement: Interval, *, pairs: bool) -> Interval:
    """What a scorer that knows the person without their errors would reach: of correlations the square root (Spearman 1904); of pairs,
    where each answer is wrong with chance e, two agree with (1 - e)^2 + e^2 and one is right with 1 - e."""
    values = (agreement.value, agreement.low, agreement.high)
    return Interval(*(((1 + math.sqrt(max(0.0, 2 * v - 1))) / 2 if pairs else math.sqrt(max(0.0, v))) for v in values))
