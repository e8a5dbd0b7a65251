"""Statistics of a slider's effect. P prompts, S seeds, M multipliers.

The unit of a gain is the base model's within-prompt standard deviation: how far the score of one prompt's pictures
spreads over seeds without the slider. Scores of one pair (prompt, seed) are compared at different multipliers, so the
difference is the slider's alone.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from library.errors import UserError

Role = Literal["scorer", "judge", "stay", "share"]


@dataclass(frozen=True)
class Interval:
    """An estimate and its bootstrap interval, 95 %."""

    value: float
    low: float
    high: float

    def __truediv__(self, unit: float) -> "Interval":
        """The same in another unit; NaN where the unit is 0."""
        return Interval(*(bound / unit if unit > 0 else math.nan for bound in (self.value, self.low, self.high)))

    @property
    def std(self) -> float:
        """The standard deviation of a normal distribution whose interval goes as far up."""
        return (self.high - self.value) / 1.96

    def stretched(self, factor: float, least: float, most: float) -> "Interval":
        """Its bounds so many times as far from the value, within what is possible at all."""
        low, high = (self.value + factor * (bound - self.value) for bound in (self.low, self.high))
        return Interval(self.value, max(low, least), min(high, most))

    def __str__(self) -> str:
        return f"{self.value:+.2f} [{self.low:+.2f}, {self.high:+.2f}]"

    def to_list(self) -> list[float | None]:
        """As JSON values: value, low, high; NaN becomes None."""
        return [nan_to_none(bound) for bound in (self.value, self.low, self.high)]


@dataclass(frozen=True, kw_only=True, eq=False)
class Response:
    """What one score does over the multiplier.

    Attributes:
        name: the score's name.
        role: "scorer" when training follows it; of those that it does not follow, "judge" if it is to rise and fall with the weight, "stay"
            if it is not to move, "share" if it answers yes or no.
        values: of every sample [P, S, M].
        std: the within-prompt standard deviation of the base model, in the score's units.
        means: mean over samples, one a multiplier.
        gains: mean change against multiplier 0 in the wanted direction of each prompt, in the score's units, one a multiplier.
        moved: share of pairs that moved the way the multiplier's sign says; NaN at multiplier 0.
        monotone: whether the mean gain rises with every multiplier.
        slope, r2: of the straight line through the mean gains, in the score's units per unit of multiplier.
        directions: +1 or -1 for each of the P prompts: which way a positive multiplier is to move it; empty is +1 for all.
    """

    name: str
    role: Role
    values: np.ndarray
    std: float
    means: tuple[Interval, ...]
    gains: tuple[Interval, ...]
    moved: tuple[float, ...]
    monotone: bool
    slope: float
    r2: float
    directions: tuple[float, ...] = ()

    @property
    def signs(self) -> np.ndarray:
        """+1 or -1 for each prompt [P]."""
        return np.array(self.directions) if self.directions else np.ones(len(self.values))

    @property
    def gains_std(self) -> tuple[Interval, ...]:
        """The gains in within-prompt standard deviations; NaN where the base model's score does not vary.

        The standard deviation is held fixed as a unit: seeds drawn with replacement would spread too little.
        """
        return tuple(gain / self.std for gain in self.gains)

    @property
    def is_share(self) -> bool:
        """Whether it is a judge that answers yes or no (1 or 0), such as "is the caption obeyed": to be kept, not raised."""
        return self.role == "share" or (self.role == "judge" and bool(((self.values == 0) | (self.values == 1)).all()))

    def to_dict(self) -> dict[str, Any]:
        """As JSON values; NaN becomes None."""
        return {
            "role": self.role,
            "within_prompt_std": self.std,
            "means": [mean.to_list() for mean in self.means],
            "gains": [gain.to_list() for gain in self.gains],
            "gains_std": [gain.to_list() for gain in self.gains_std],
            "moved": [nan_to_none(share) for share in self.moved],
            "monotone": self.monotone,
            "slope": self.slope,
            "r2": nan_to_none(self.r2),
            "directions": list(self.directions),
            "values": self.values.tolist(),
        }

    @staticmethod
    def from_dict(name: str, data: dict[str, Any]) -> "Response":
        return Response(
            name=name,
            role=data["role"],
            values=np.array(data["values"], dtype=float),
            std=data["within_prompt_std"],
            means=tuple(Interval(*map(none_to_nan, mean)) for mean in data["means"]),
            gains=tuple(Interval(*map(none_to_nan, gain)) for gain in data["gains"]),
            moved=tuple(map(none_to_nan, data["moved"])),
            monotone=data["monotone"],
            slope=data["slope"],
            r2=none_to_nan(data["r2"]),
            directions=tuple(data.get("directions", ())),
        )


def within_prompt_std(base_scores: np.ndarray) -> float:
    """Pooled standard deviation over seeds of scores [P, S]: sqrt of the mean over prompts of the sample variance (ddof 1).

    Raises:
        UserError: with fewer than 2 seeds.
    """
    if base_scores.shape[1] < 2:
        raise UserError(f"{base_scores.shape[1]} seed per prompt cannot tell a slider from chance; give at least 2 seeds per prompt")
    return float(np.sqrt(base_scores.var(axis=1, ddof=1).mean()))


def bootstrap_means(values: np.ndarray, rng: np.random.Generator, num_resamples: int = 1000) -> tuple[Interval, ...]:
    """Means over prompts and seeds of values [P, S, M], with 95 % percentile intervals.

    Prompts are drawn with replacement, then seeds within each drawn prompt (two-stage bootstrap, Davison and Hinkley 1997, 3.8).
    """
    num_prompts, num_seeds, num_multipliers = values.shape
    means = np.empty((num_resamples, num_multipliers))
    for row in means:
        prompts = rng.integers(num_prompts, size=(num_prompts, 1))
        row[:] = values[prompts, rng.integers(num_seeds, size=(num_prompts, num_seeds))].mean((0, 1))
    low, high = np.percentile(means, [2.5, 97.5], axis=0)
    return tuple(Interval(*map(float, row)) for row in zip(values.mean((0, 1)), low, high, strict=True))


@dataclass(frozen=True, eq=False)
class PairedChanges:
    """What a slider did to the pictures of P prompts.

    Attributes:
        base: scores of the base model's pictures [P, S'], S' at least 2.
        changes: against the base model's score of the same prompt and seed, in the wanted direction [P, S, M]; None where the slider was
            not measured on these prompts, so that they tell the unit alone.
    """

    base: np.ndarray
    changes: np.ndarray | None = None


def bootstrap_gains(
    measured: Sequence[PairedChanges], rng: np.random.Generator, num_resamples: int = 1000
) -> tuple[np.ndarray, np.ndarray]:
    """Mean gains in within-prompt standard deviations, and resamples of them in which the unit is as uncertain as it is.

    Prompts are drawn with replacement from each of the sets that were measured, then seeds within each prompt; the unit is that of the
    drawn prompts with all their seeds, because seeds drawn with replacement would spread too little. Prompts whose scores spread widely
    are also moved farther, so that a gain over its own prompts' unit is surer than either. Each prompt weighs the same.

    Args:
        measured: sets of prompts, at the same M multipliers; at least one of them with changes.

    Returns:
        The gains [M] and their resamples [num_resamples, M].

    Raises:
        UserError: the base model's score does not vary over seeds, so that there is no unit.
    """
    moved = [part.changes for part in measured if part.changes is not None]
    share = 1 / sum(map(len, moved))
    unit = math.sqrt(_mean_variance([part.base for part in measured]))
    if unit == 0:
        raise UserError("the base model's score does not vary between seeds, so a gain has no unit; give other prompts")
    resamples = np.zeros((num_resamples, moved[0].shape[-1]))
    for row in resamples:
        drawn = []
        for part in measured:
            prompts = rng.integers(len(part.base), size=len(part.base))
            if part.changes is not None:
                num_prompts, num_seeds = part.changes.shape[:2]
                row += share * part.changes[prompts[:, None], rng.integers(num_seeds, size=(num_prompts, num_seeds))].mean(1).sum(0)
            drawn.append(part.base[prompts])
        row /= math.sqrt(_mean_variance(drawn)) or math.nan
    return np.concatenate([changes.mean(1) for changes in moved]).mean(0) / unit, resamples


def _mean_variance(scores: Sequence[np.ndarray]) -> float:
    """Within-prompt variance (ddof 1) of sets of scores [P, S], each weighted by its degrees of freedom."""
    weights = [len(part) * (part.shape[1] - 1) for part in scores]
    return float(np.average([part.var(axis=1, ddof=1).mean() for part in scores], weights=weights))


def percentile_interval(value: float, resamples: np.ndarray) -> Interval:
    """The estimate with the 2.5 and 97.5 percentiles of its resamples [R] (NaN among them is left out)."""
    low, high = np.nanpercentile(resamples, [2.5, 97.5])
    return Interval(float(value), float(low), float(high))


def paired_difference(first: "Response", second: "Response", rng: np.random.Generator) -> tuple[Interval, ...]:
    """How much more the first slider gains than the second, one a multiplier, in the base model's within-prompt standard deviations.

    Both were measured on the same prompts, seeds and multipliers, so what prompts and seeds do to both falls out of the difference.
    """
    assert first.values.shape == second.values.shape, "sliders measured on different prompts, seeds or multipliers have no pairs"
    signs = first.signs[:, None, None]
    return tuple(difference / first.std for difference in bootstrap_means((first.values - second.values) * signs, rng))


def linear_fit(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """Slope and R2 of the least-squares line; R2 is NaN where y does not vary."""
    if np.ptp(y) == 0:
        return 0.0, math.nan
    slope, intercept = np.polyfit(x, y, 1)
    unexplained = np.square(y - slope * x - intercept).sum() / np.square(y - y.mean()).sum()
    return float(slope), float(1 - unexplained)


def summarise_response(
    name: str,
    role: Role,
    values: np.ndarray,
    multipliers: Sequence[float],
    rng: np.random.Generator,
    directions: np.ndarray | None = None,
    std: float | None = None,
) -> Response:
    """Statistics of one score.

    Args:
        values: [P, S, M], at M ascending multipliers, 0 among them.
        directions: [P], +1 where a positive multiplier is to raise the score, -1 where it is to lower it; None is +1 everywhere.
        std: the within-prompt standard deviation, where it is known from more pictures of the base model; None is that of `values`.
    """
    strengths = np.asarray(multipliers, dtype=float)
    signs = np.ones(len(values)) if directions is None else np.sign(directions)
    base = values[:, :, list(multipliers).index(0)]
    changes = (values - base[:, :, None]) * signs[:, None, None]
    gains = bootstrap_means(changes, rng)
    line = np.array([gain.value for gain in gains])
    slope, r2 = linear_fit(strengths, line)
    moved = np.where(strengths == 0, np.nan, (changes * np.sign(strengths) > 0).mean((0, 1)))
    return Response(
        name=name,
        role=role,
        values=values,
        std=within_prompt_std(base) if std is None else std,
        means=bootstrap_means(values, rng),
        gains=gains,
        moved=tuple(map(float, moved)),
        monotone=bool(np.all(np.diff(line) > 0)),
        slope=slope,
        r2=r2,
        directions=() if (signs == 1).all() else tuple(map(float, signs)),
    )


def nan_to_none(value: float) -> float | None:
    """JSON has no NaN."""
    return None if math.isnan(value) else value


def none_to_nan(value: float | None) -> float:
    return math.nan if value is None else value
