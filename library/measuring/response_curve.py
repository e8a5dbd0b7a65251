"""A slider's gain over its weight: the curve, and what it comes to in three numbers: slope, straightness and usable range."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import scipy

from library.measuring.record import EvaluationRecord
from library.measuring.statistics import Interval, PairedChanges, bootstrap_gains, linear_fit, percentile_interval
from library.measuring.warnings import is_sound

WIDEST = 2.0  # weights between whose opposites the line is fitted
EFFECT_SHARE = 0.5  # a usable weight has at least this share of the effect per weight that the curve has at its best nearer to 0
BURNT_CLIPPING = 0.2  # of the pixel values: a weight that clips so many more of them than the base model is not usable
VISIBLE_SHARE, CONFIDENCE = 0.9, 0.9  # of all pictures, to be told from the base model's; how surely, by those that were measured
FAINT = 0.01  # times a visible change: less is as good as none
GRID = 0.1  # the usable range is given on multiples of this


@dataclass(frozen=True, kw_only=True, eq=False)
class ResponseCurve:
    """Gain of the training score and drift over the multiplier.

    Attributes:
        multipliers: ascending [M], 0 among them.
        gains: in within-prompt standard deviations [M], 0 at multiplier 0.
        drifts: mean RMS distance of the latents from the base model's [M], 0 at multiplier 0.
        clipped: share of pixel values at or beyond black or white [M]; empty where no pixels were made.
        resamples: of the gains, for intervals [R, M]; None where only means are known.
        judges: mean gains of independent judges, by name, in their own within-prompt standard deviations [M].
        visible: the `EvaluationRecord.visibility` that `VISIBLE_SHARE` of all pictures exceed surely [M]; empty where no pixels were made.
        sound: whether judges and pictures held there (`warnings.is_sound`) [M]; empty where nobody looked.
    """

    multipliers: tuple[float, ...]
    gains: tuple[float, ...]
    drifts: tuple[float, ...]
    clipped: tuple[float, ...] = ()
    resamples: np.ndarray | None = field(default=None, repr=False)
    judges: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    visible: tuple[float, ...] = ()
    sound: tuple[bool, ...] = ()

    def rescaled(self, scale: float) -> "ResponseCurve":
        """The curve over the weight of a slider whose weight 1 is the multiplier `scale`."""
        return replace(self, multipliers=tuple(multiplier / scale for multiplier in self.multipliers))

    def joined(self, other: "ResponseCurve") -> "ResponseCurve":
        """With the multipliers of `other` that this curve lacks; both are of the same pictures."""
        new = [place for place, multiplier in enumerate(other.multipliers) if multiplier not in self.multipliers]
        order = np.argsort([*self.multipliers, *(other.multipliers[place] for place in new)])

        def join(own: Sequence[Any], others: Sequence[Any]) -> tuple[Any, ...]:
            return tuple(np.array([*own, *(others[place] for place in new)])[order].tolist()) if own else ()

        resamples = None
        if self.resamples is not None and other.resamples is not None:
            resamples = np.concatenate([self.resamples, other.resamples[:, new]], axis=1)[:, order]
        return ResponseCurve(
            multipliers=join(self.multipliers, other.multipliers),
            gains=join(self.gains, other.gains),
            drifts=join(self.drifts, other.drifts),
            clipped=join(self.clipped, other.clipped),
            resamples=resamples,
            judges={name: join(gains, other.judges[name]) for name, gains in self.judges.items()},
            visible=join(self.visible, other.visible),
            sound=join(self.sound, other.sound),
        )

    def gain_at(self, multiplier: float, judge: str | None = None) -> float:
        """The gain (of a judge, if one is named) between the rungs, by monotone cubic interpolation; NaN beyond them."""
        return _between(self.multipliers, self.gains if judge is None else self.judges[judge], multiplier)

    def visible_at(self, multiplier: float) -> float:
        """How visible the slider is between the rungs; NaN beyond them, and where no pixels were made."""
        return _between_on_arm(self.multipliers, self.visible, multiplier) if self.visible else math.nan

    def interval_at(self, multiplier: float) -> Interval:
        """The gain with its 95 % interval, which is NaN where there are no resamples."""
        value = self.gain_at(multiplier)
        if self.resamples is None or math.isnan(value):
            return Interval(value, math.nan, math.nan)
        return percentile_interval(
            value, scipy.interpolate.PchipInterpolator(self.multipliers, self.resamples, axis=1, extrapolate=False)(multiplier)
        )


@dataclass(frozen=True, kw_only=True)
class CurveSummary:
    """A slider's curve in three numbers.

    Attributes:
        slope: of the least-squares line through the gains between -2 and 2, in within-prompt standard deviations per unit of weight.
        r2: of that line; NaN where the gains do not vary.
        usable: the weights around 0 between which the gain rises with every step, keeps at least half of its effect per weight
            (`EFFECT_SHARE`), and the pictures neither drift nor clip too far.
        measured: the weights between which there were measurements.
    """

    slope: Interval
    r2: float
    usable: tuple[float, float]
    measured: tuple[float, float]

    def __str__(self) -> str:
        interval = "" if math.isnan(self.slope.low) else f" ({self.slope.low:.2f} to {self.slope.high:.2f})"
        r2 = "" if math.isnan(self.r2) else f", R2 {self.r2:.3f}"
        return f"{self.slope.value:.2f} per unit of weight{interval}{r2}, {self.usable_words}"

    @property
    def preferred_weight(self) -> float:
        """The weight to begin with: 1, or the strongest usable one where 1 is too much; below 0 where only that side is usable; 0 where
        no weight is."""
        low, high = self.usable
        return min(1.0, high) if high > 0 else max(-1.0, low)

    @property
    def usable_words(self) -> str:
        if self.usable == (0, 0):
            return "usable at no weight"
        low, high = (
            (f"{end:+.3g}" if end else "0") + (" (no farther measured)" if end == measured else "")
            for end, measured in zip(self.usable, self.measured, strict=True)
        )
        return f"usable from {low} to {high}"


def response_curve(
    multipliers: Sequence[float] | np.ndarray,
    scores: np.ndarray,
    drifts: Sequence[float] | np.ndarray,
    rng: np.random.Generator,
    *,
    directions: np.ndarray | None = None,
    clipped: Sequence[float] = (),
    base_scores: np.ndarray | None = None,
    others: Sequence[PairedChanges] = (),
) -> ResponseCurve:
    """The curve of scores [P, S, M], with resamples for its intervals.

    Args:
        multipliers: ascending, 0 among them.
        directions: [P], +1 where a positive multiplier is to raise the score, -1 where it is to lower it; None is +1 everywhere.
        base_scores: of more of the base model's pictures of the same prompts [P, S'], for the unit; None takes those of `scores`.
        others: the same slider on other prompts, at the same multipliers.

    Raises:
        UserError: the score does not vary without the slider.
    """
    base = list(multipliers).index(0)
    signs = np.ones(len(scores)) if directions is None else np.sign(directions)
    changes = (scores - scores[:, :, base, None]) * signs[:, None, None]
    own = PairedChanges(scores[:, :, base] if base_scores is None else base_scores, changes)
    gains, resamples = bootstrap_gains([own, *others], rng)
    return ResponseCurve(
        multipliers=tuple(map(float, multipliers)),
        gains=tuple(map(float, gains)),
        drifts=tuple(map(float, drifts)),
        clipped=tuple(map(float, clipped)),
        resamples=resamples,
    )


def curve_of(
    record: EvaluationRecord, name: str, base_scores: np.ndarray | None = None, others: Sequence[PairedChanges] = ()
) -> ResponseCurve:
    """The curve of one score of a record, with its judges.

    Args:
        base_scores, others: as in `response_curve`.

    Raises:
        UserError: the score does not vary without the slider.
    """
    response, clipped = record.responses[name], record.statistics.get("clipped", ())
    drifts, rng = record.statistics["latent_drift"], np.random.default_rng(0)
    curve = response_curve(
        record.multipliers,
        response.values,
        drifts,
        rng,
        directions=response.signs,
        clipped=clipped,
        base_scores=base_scores,
        others=others,
    )
    visible = () if record.visibility is None else exceeded(record.visibility).tolist()
    return replace(
        curve,
        judges={judge.name: tuple(gain.value for gain in judge.gains_std) for judge in record.judges},
        visible=tuple(visible),
        sound=tuple(is_sound(record, place) for place in range(len(record.multipliers))),
    )


def exceeded(visibility: np.ndarray) -> np.ndarray:
    """What `VISIBLE_SHARE` of all pictures exceed with `CONFIDENCE`, by those measured [P, S, M] -> [M]; 0 where none changes.

    The lower tolerance bound of a log-normal distribution (NIST/SEMATECH e-Handbook of Statistical Methods, 7.2.6.3). The quantile of two
    dozen pictures themselves is exceeded by fewer of the others.
    """
    logs = np.log(np.maximum(visibility.reshape(-1, visibility.shape[-1]), FAINT))
    count = max(2, len(logs))
    factor = scipy.stats.nct.ppf(CONFIDENCE, count - 1, scipy.stats.norm.ppf(VISIBLE_SHARE) * count**0.5) / count**0.5
    found = np.exp(logs.mean(0) - factor * logs.std(0, ddof=min(1, len(logs) - 1)))
    return np.where(visibility.max((0, 1)) > FAINT, found, 0.0)


def summarise_curve(curve: ResponseCurve, max_drift: float | None = None) -> CurveSummary:
    """Slope and R2 between the weights -2 and 2, and the usable range as far as it was measured.

    The line is that of the measured weights. An arm on which none was measured up to 2 (of a slider that is much too strong) has the
    curve's value at 1 and at 2 in their place.
    """
    measured = (curve.multipliers[0], curve.multipliers[-1])
    inside = [weight for weight in curve.multipliers if abs(weight) <= WIDEST + 1e-9]
    for sign in (-1.0, 1.0):
        if not any(weight * sign > 0 for weight in inside):
            inside += [sign, sign * WIDEST]
    weights = np.array(sorted(inside))
    slope, r2 = linear_fit(weights, scipy.interpolate.PchipInterpolator(curve.multipliers, curve.gains)(weights))
    interval = Interval(slope, math.nan, math.nan)
    if curve.resamples is not None:
        resamples = scipy.interpolate.PchipInterpolator(curve.multipliers, curve.resamples, axis=1)(weights)  # [R, weights]
        interval = percentile_interval(slope, resamples @ _slope_weights(weights))
    usable = tuple(_usable_end(curve, end, max_drift) for end in measured)
    return CurveSummary(slope=interval, r2=r2, usable=(usable[0], usable[1]), measured=measured)


def _slope_weights(x: np.ndarray) -> np.ndarray:
    """What values at x are multiplied with to give the slope of their least-squares line."""
    centred = x - x.mean()
    return centred / np.square(centred).sum()


def _usable_end(curve: ResponseCurve, end: float, max_drift: float | None) -> float:
    """How far out from 0 towards `end` the slider may be used, on the grid; 0 if not at all."""
    sign, farthest = math.copysign(1, end), abs(end)
    last, last_gain, best_rate = 0.0, 0.0, 0.0
    clipped_limit = _between(curve.multipliers, curve.clipped, 0.0) + BURNT_CLIPPING if curve.clipped else math.inf
    for step in [*np.arange(GRID, farthest - 1e-9, GRID).round(6).tolist(), farthest]:
        gain = sign * _between(curve.multipliers, curve.gains, sign * step)
        best_rate = max(best_rate, gain / step) if step > 0 else 0.0
        drifted = max_drift is not None and _between_on_arm(curve.multipliers, curve.drifts, sign * step) > max_drift
        burnt = bool(curve.clipped) and _between_on_arm(curve.multipliers, curve.clipped, sign * step) > clipped_limit
        if gain <= last_gain or gain < EFFECT_SHARE * best_rate * step or drifted or burnt:
            break
        last, last_gain = sign * step, gain
    return last


def _between(x: Sequence[float], y: Sequence[float], at: float) -> float:
    """Monotone cubic interpolation (Fritsch and Butland 1984, as in SciPy); NaN outside."""
    return float(scipy.interpolate.PchipInterpolator(x, y, extrapolate=False)(at))


def _between_on_arm(x: Sequence[float], y: Sequence[float], at: float) -> float:
    """As `_between`, on the side of 0 that `at` is on: what grows with the distance from weight 0 has a corner there, which one smooth
    curve through both sides rounds off to a parabola that is too low beside it."""
    weights, values = zip(*((weight, value) for weight, value in zip(x, y, strict=True) if weight * at >= 0), strict=True)
    return _between(weights, values, at)
