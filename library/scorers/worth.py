"""What a scorer is worth: how well it ranked pictures that it never saw, and how sure that is."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from library.scorers.base import ScorerSpec

DOUBTFUL = 0.3  # a rank correlation that may be lower says next to nothing
OF_FOLDS = 1.4  # how much wider the interval of folds is: they share most of what they learn from (docs/experiments.md)


@dataclass(frozen=True)
class Worth:
    """Spearman's rank correlation with the ratings of pictures that training did not see, on clean latents, and its 95 % interval.

    Attributes:
        name: the scorer's.
        num_pictures: of the validation set, or of all folds together.
        in_folds: whether it is of folds.
        bounds: the interval, where it does not follow from these: see `through`.
    """

    name: str
    correlation: float
    num_pictures: int
    in_folds: bool = False
    bounds: tuple[float, float] | None = None

    @property
    def interval(self) -> tuple[float, float]:
        """By Fisher's z with the standard error of ranks (Bonett and Wright 2000, doi 10.1007/BF02294183); -1 to 1 below 5 pictures.

        That of folds is too narrow by itself (Bates, Hastie and Tibshirani, arXiv 2104.00673).
        """
        if self.bounds is not None:
            return self.bounds
        if self.num_pictures < 5:
            return -1.0, 1.0
        z = math.atanh(max(-0.999999, min(0.999999, self.correlation)))
        spread = 1.96 * math.sqrt((1 + self.correlation**2 / 2) / (self.num_pictures - 3)) * (OF_FOLDS if self.in_folds else 1)
        return math.tanh(z - spread), math.tanh(z + spread)

    def through(self, teacher: Sequence[float]) -> Worth:
        """Of a scorer that learned another one's marks, and agrees with those of pictures that it never saw to `correlation`: how well it
        ranks what the other one was measured by. Correlations multiply where errors know nothing of each other.

        Args:
            teacher: the other one's rank correlation with ratings that it had not learned, and its 95 % interval.
        """
        value, low, high = (max(self.correlation, 0.0) * number for number in teacher)
        return replace(self, correlation=value, bounds=(low, high))

    @property
    def doubtful(self) -> bool:
        return self.interval[0] < DOUBTFUL

    def __str__(self) -> str:
        low, high = self.interval
        on = f"on {self.num_pictures} pictures that it never saw" if self.bounds is None else "with ratings that were not learned from"
        text = f"scorer {self.name}: rank correlation {self.correlation:.2f} ({low:.2f} to {high:.2f}) {on}"
        if low <= 0:
            return f"{text}: too few to tell whether it learned anything, rate more pictures"
        return text + (": what it says is in doubt, rate more pictures" if self.doubtful else "")

    def to_dict(self) -> dict[str, Any]:
        """For the header of a scorer's file."""
        own = {"srcc": self.correlation, "interval": list(self.interval), "pictures": self.num_pictures, "in_folds": self.in_folds}
        return own | ({} if self.bounds is None else {"through_marks": True})


def worth_in(table: Sequence[Mapping[str, float]] | None, num_pictures: int, *, in_folds: bool = False) -> Worth | None:
    """From a table of metrics by noise level; None where it has no rank correlation."""
    try:
        return Worth("", float(next(row for row in table or () if row["sigma"] == 0)["srcc"]), num_pictures, in_folds)
    except (KeyError, TypeError, ValueError, StopIteration):
        return None


def worth_of(spec: ScorerSpec, name: str) -> Worth | None:
    """From what the scorer's file says of its validation; None where it says nothing (made from ready-made weights, or not by ratings)."""
    return worth_from(spec.training.get("worth"), name)


def worth_from(record: Any, name: str) -> Worth | None:
    """What `Worth.to_dict` made, else None."""
    try:
        low, high = record["interval"]
        bounds = (float(low), float(high)) if "through_marks" in record else None
        return Worth(name, float(record["srcc"]), int(record["pictures"]), bool(record["in_folds"]), bounds)
    except (KeyError, TypeError, ValueError):
        return None
