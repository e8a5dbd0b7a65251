"""Popularity of posts, corrected for what it owes to their age and rating."""

import bisect
import math
from collections import defaultdict
from dataclasses import dataclass

SMALLEST_BIN = 500  # posts: the standard error of a bin's mean is below 5% of the posts' spread


@dataclass(frozen=True)
class _Bins:
    """Of one rating: `first_days` ascending; `means` and `stds` of log popularity of posts from each first day to before the next."""

    first_days: list[int]
    means: list[float]
    stds: list[float]


class PopularityModel:
    """How popular a post is among its peers: those of its rating that were uploaded about when it was.

    Votes and favourites grow with the time that a post has been up, with the number of users, which has grown a hundredfold since 2005, and
    with how explicit it is: learned as they stand, they are the age and the rating of a picture more than its quality. They are near
    lognormal, so with s the votes of a post,

        y = sign(s) log(1 + |s|),    score = (y - mean y of its peers) / std y of its peers.

    Peers are posts of the same rating from a span of neighbouring days that holds at least SMALLEST_BIN of them: years at the
    beginning, single days at the end, where votes are still coming in and age matters most. A rating with fewer has one span.
    Posts are counted by day, so the memory does not depend on their number.
    """

    def __init__(self) -> None:
        self._days: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(lambda: [0, 0.0, 0.0]))  # count, sum y, sum y^2
        self._bins: dict[str, _Bins] = {}

    def add(self, votes: float, day: int, rating: str) -> None:
        """Count one post. `day`: any running number of days."""
        moments = self._days[rating][day]
        value = log_popularity(votes)
        moments[0] += 1
        moments[1] += value
        moments[2] += value * value

    def fit(self) -> None:
        """Part the posts that were counted into spans."""
        for rating, days in self._days.items():
            spans: list[tuple[int, list[float]]] = []  # newest first
            for day in sorted(days, reverse=True):
                if spans and spans[-1][1][0] < SMALLEST_BIN:
                    spans[-1] = (day, _sum(spans[-1][1], days[day]))
                else:
                    spans.append((day, list(days[day])))
            if len(spans) > 1 and spans[-1][1][0] < SMALLEST_BIN:
                day, moments = spans.pop()
                spans[-1] = (day, _sum(spans[-1][1], moments))
            spans.reverse()
            means = [total / count for _, (count, total, _) in spans]
            stds = [math.sqrt(max(squares / count - mean * mean, 0.0)) for (_, (count, _, squares)), mean in zip(spans, means, strict=True)]
            self._bins[rating] = _Bins([day for day, _ in spans], means, stds)

    def score(self, votes: float, day: int, rating: str) -> float:
        """Standard deviations above the mean of its peers; 0 where they are all alike. Only posts that were counted have peers."""
        bins = self._bins[rating]
        place = max(bisect.bisect_right(bins.first_days, day) - 1, 0)
        spread = bins.stds[place]
        return (log_popularity(votes) - bins.means[place]) / spread if spread > 1e-6 else 0.0


def log_popularity(votes: float) -> float:
    """sign(s) log(1 + |s|): votes may be negative."""
    return math.copysign(math.log1p(abs(votes)), votes)


def _sum(first: list[float], second: list[float]) -> list[float]:
    return [a + b for a, b in zip(first, second, strict=True)]
