"""How a slider answers to its weight: the curve, and what it comes to in three numbers: slope, straightness and usable range."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from scipy.interpolate import PchipInterpolator

from library.measuring.slider_evaluation import SliderEvaluation
from library.measuring.statistics import Interval, bootstrap_gains, linear_fit, percentile_interval

WIDEST = 2.0  # weights beyond -2 and 2 are not asked about
EFFECT_SHARE = 0.5  # a usable weight has at least this share of the effect per weight that the curve has at its best nearer to 0
CLIPPING_RISE = 0.2  # share of pixel values: a weight that clips this much more of them than the base model burns its pictures
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
    """

    multipliers: tuple[float, ...]
    gains: tuple[float, ...]
    drifts: tuple[float, ...]
    clipped: tuple[float, ...] = ()
    resamples: np.ndarray | None = field(default=None, repr=False)
    judges: Mapping[str, tuple[float, ...]] = field(default_factory=dict)

    def rescaled(self, scale: float) -> "ResponseCurve":
        """The curve over the weight of a slider whose weight 1 is the multiplier `scale`."""
        return replace(self, multipliers=tuple(multiplier / scale for multiplier in self.multipliers))

    def gain_at(self, multiplier: float, judge: str | None = None) -> float:
        """The gain (of a judge, if one is named) between the rungs, by monotone cubic interpolation; NaN beyond them."""
        return _between(self.multipliers, self.gains if judge is None else self.judges[judge], multiplier)

    def interval_at(self, multiplier: float) -> Interval:
        """The gain with its 95 % interval, which is NaN where there are no resamples."""
        value = self.gain_at(multiplier)
        if self.resamples is None or math.isnan(value):
            return Interval(value, math.nan, math.nan)
        return percentile_interval(value, PchipInterpolator(self.multipliers, self.resamples, axis=1, extrapolate=False)(multiplier))


@dataclass(frozen=True, kw_only=True)
class CurveSummary:
    """A slider's curve between the weights -2 and 2, in three numbers.

    Attributes:
        slope: of the least-squares line through the measured gains, in within-prompt standard deviations per unit of weight.
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
    def usable_words(self) -> str:
        if self.usable == (0, 0):
            return "usable at no weight"
        low, high = (
            (f"{end:+.3g}" if end else "0") + (" (no farther measured)" if end == measured and abs(end) < WIDEST else "")
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
    base_scores: np.ndarray | None = None,
    clipped: Sequence[float] = (),
    judges: Mapping[str, np.ndarray] | None = None,
) -> ResponseCurve:
    """The curve of scores [P, S, M], with resamples for its intervals.

    Args:
        multipliers: ascending, 0 among them.
        directions: [P], +1 where a positive multiplier is to raise the score, -1 where it is to lower it; None is +1 everywhere.
        base_scores: more scores of the base model [P, S'], for a unit that is better known than from the S of multiplier 0: with P
            prompts and S seeds its relative error is about 1 / sqrt(2 P (S - 1)), 12 % with 12 prompts and 4 seeds.
        judges: scores [P, S, M] of independent judges by name; those that do not vary without the slider, or answer yes (1) or no (0),
            are left out.
    """
    base = list(multipliers).index(0)
    signs = np.ones(len(scores)) if directions is None else np.sign(directions)

    def changes(values: np.ndarray) -> np.ndarray:
        return (values - values[:, :, base, None]) * signs[:, None, None]

    gains, resamples = bootstrap_gains(changes(scores), scores[:, :, base] if base_scores is None else base_scores, rng)
    judges = {name: values for name, values in (judges or {}).items() if not ((values == 0) | (values == 1)).all()}
    units = {name: math.sqrt(values[:, :, base].var(axis=1, ddof=1).mean()) for name, values in judges.items()}
    return ResponseCurve(
        multipliers=tuple(map(float, multipliers)),
        gains=tuple(map(float, gains)),
        drifts=tuple(map(float, drifts)),
        clipped=tuple(map(float, clipped)),
        resamples=resamples,
        judges={name: tuple(map(float, changes(values).mean((0, 1)) / units[name])) for name, values in judges.items() if units[name] > 0},
    )


def curve_of(evaluation: SliderEvaluation, name: str) -> ResponseCurve:
    """The curve of one score of an evaluation. Its judges are those of the evaluation.

    Raises:
        UserError: the score does not vary without the slider.
    """
    response = evaluation.responses[name]
    judges = {key: other.values for key, other in evaluation.responses.items() if other.role == "judge"}
    return response_curve(
        evaluation.multipliers,
        response.values,
        evaluation.statistics.latent_drift,
        np.random.default_rng(0),
        directions=response.signs,
        clipped=evaluation.statistics.clipped,
        judges=judges,
    )


def summarise_curve(curve: ResponseCurve, max_drift: float | None = None) -> CurveSummary:
    """Slope, R2 and usable range of a slider's curve over its weight, between -2 and 2 or as far as it was measured."""
    weights, gains = np.array(curve.multipliers), np.array(curve.gains)
    inside = np.abs(weights) <= WIDEST + 1e-9
    slope, r2 = linear_fit(weights[inside], gains[inside])
    interval = Interval(slope, math.nan, math.nan)
    if curve.resamples is not None:
        interval = percentile_interval(slope, np.polyfit(weights[inside], curve.resamples[:, inside].T, 1)[0])
    measured = (max(float(weights[0]), -WIDEST), min(float(weights[-1]), WIDEST))
    usable = tuple(_usable_end(curve, end, max_drift) for end in measured)
    return CurveSummary(slope=interval, r2=r2, usable=(usable[0], usable[1]), measured=measured)


def _usable_end(curve: ResponseCurve, end: float, max_drift: float | None) -> float:
    """How far out from 0 towards `end` the slider may be used, on the grid; 0 if not at all."""
    sign, reach = math.copysign(1, end), abs(end)
    last, last_gain, best_rate = 0.0, 0.0, 0.0
    clipped_limit = _between(curve.multipliers, curve.clipped, 0.0) + CLIPPING_RISE if curve.clipped else math.inf
    for step in [*np.arange(GRID, reach - 1e-9, GRID).round(6).tolist(), reach]:
        gain = sign * _between(curve.multipliers, curve.gains, sign * step)
        best_rate = max(best_rate, gain / step) if step > 0 else 0.0
        drifted = max_drift is not None and _between(curve.multipliers, curve.drifts, sign * step) > max_drift
        burnt = bool(curve.clipped) and _between(curve.multipliers, curve.clipped, sign * step) > clipped_limit
        if gain <= last_gain or gain < EFFECT_SHARE * best_rate * step or drifted or burnt:
            break
        last, last_gain = sign * step, gain
    return last


def _between(x: Sequence[float], y: Sequence[float], at: float) -> float:
    """Monotone cubic interpolation (Fritsch and Butland 1984, as in SciPy); NaN outside."""
    return float(PchipInterpolator(x, y, extrapolate=False)(at))
