"""Which strength becomes weight 1? From what is known of a slider's strength, a few more are measured until the wanted one is bracketed;
it is confirmed by more pictures at fresh seeds and folded into the alpha.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import scipy

from library.measuring.calibration import Calibration, CalibrationTarget, calibrated
from library.measuring.response_curve import ResponseCurve, summarise_curve

WEAKEST, STRONGEST = 0.02, 50.0  # of the trained strength: beyond these a training went wrong, and no weight can repair it
STEP_UP, STEP_DOWN = (1.5, 2.5), 0.1  # times the strengths that were measured: where the next one may lie
READ_OFF = 0.4  # times the weakest strength that was measured: weaker ones are not read off the curve


@dataclass(frozen=True)
class _Arm:
    """The upper arm of a curve, from multiplier 0 up: strengths and gains [K], the strength up to which it can be trusted, because from
    there on the score falls (`monotone_end`) or the pictures drift too far (`drift_end`), and the one that the target wants (infinite
    where the curve does not reach it)."""

    strengths: np.ndarray
    gains: np.ndarray
    monotone_end: float
    drift_end: float
    wanted: float
    wanted_gain: float  # the part of `wanted` that is for the gain

    @property
    def end(self) -> float:
        return min(self.monotone_end, self.drift_end)

    @staticmethod
    def of(curve: ResponseCurve, target: CalibrationTarget) -> "_Arm":
        multipliers = np.array(curve.multipliers)
        assert np.allclose(multipliers, -multipliers[::-1]) and 0 in multipliers, f"not symmetric around 0: {curve.multipliers}"
        centre = len(multipliers) // 2

        def worse(values: Sequence[float] | np.ndarray, of: Callable[..., np.ndarray]) -> np.ndarray:
            """Of both arms, by strength."""
            return of(np.array(values)[centre:], np.array(values)[centre::-1])

        strengths, gains = multipliers[centre:], np.array(curve.gains)[centre:]
        falling = np.diff(gains) <= 0
        top = float(strengths[-1])
        monotone_end = float(strengths[np.argmax(falling)]) if falling.any() else top
        drift_end = top
        if target.max_drift is not None:
            drift_end = _first_crossing(strengths, worse(curve.drifts, np.maximum), target.max_drift, beyond=top)
        wanted = wanted_gain = _first_crossing(multipliers, np.array(curve.gains), target.gain, beyond=np.inf)
        if target.visible and curve.visible and wanted_gain < np.inf:
            seen = _first_crossing(strengths, np.maximum.accumulate(worse(curve.visible, np.minimum)), 1.0, beyond=np.inf)
            sound = worse(curve.sound, np.logical_and) if curve.sound else np.ones(len(strengths), bool)
            bound = min(monotone_end, drift_end) if sound.all() else float(strengths[np.argmin(sound) - 1])
            usable = summarise_curve(curve, target.max_drift).usable  # weight -1 is to be of use, too
            bound = min(bound, -usable[0], usable[1])
            if not np.isinf(seen) or bound < top:
                seen = min(seen, bound)
            wanted = max(wanted_gain, seen)
        return _Arm(strengths, gains, monotone_end, drift_end, wanted, wanted_gain)


def choose_scale(curve: ResponseCurve, target: CalibrationTarget) -> Calibration:
    """The smallest multiplier s that has what the target says; it becomes weight +1. What -s does is told, not promised.

    The promise is made for +1 and not for the mean of both signs, so that it is literally true of the weight that people use. The curve
    is read by monotone cubic interpolation, and only as far out as its upper arm keeps rising and both arms stay within the drift.
    Where the target is not reached, s is the end of that range; where the range is empty, 1; and never below `WEAKEST`.
    """
    arm = _Arm.of(curve, target)
    wished = f"{target.gain:.3g} standard deviation{'' if target.gain == 1 else 's'}"
    words = f"The target of {wished}"
    if arm.end == 0:
        choice = "The slider does not raise its training score even when it is weakest, so its strength was left as trained."
        return calibrated(curve, 1.0, target, False, choice)
    if arm.wanted < WEAKEST:
        choice = (
            f"{words} would need {arm.wanted:.2g} of the trained strength: weight 1 is {WEAKEST:g} of it, the least that is tried; lower "
            "learning_rate."
        )
        return calibrated(curve, WEAKEST, target, False, choice)
    wanted = arm.wanted if arm.wanted < np.inf else min(arm.end, float(arm.strengths[-1])) if arm.wanted_gain < np.inf else np.inf
    most = target.max_strength
    if most is not None and min(wanted, arm.end) >= most and wanted != most:
        choice = f"Weight 1 is {most:.3g} of the trained strength and no more, because what the scorer says is in doubt."
        return calibrated(curve, most, target, arm.wanted_gain <= most, choice)
    if wanted <= arm.end:
        farther = wanted > 1.01 * arm.wanted_gain
        reason = f", so that it can be seen; {wished} would be weight {arm.wanted_gain / wanted:.2f}" if farther else ""
        return calibrated(curve, wanted, target, True, f"Weight 1 is {wanted:.3g} of the trained strength{reason}.")
    far, reason = f"weight 1 is {arm.end:.3g} of the trained strength", "the largest that was tried"
    if arm.end < arm.strengths[-1]:
        cause = "the pictures drift too far" if arm.drift_end < arm.monotone_end else "the score stops following the weight"
        reason = f"beyond which {cause}"
    elif not all(curve.sound):
        reason = "where judges fall, pixels clip or what was asked for is lost, so that no more was tried"
    return calibrated(curve, arm.end, target, False, f"{words} is not reached: {far}, {reason}.")


def next_strength(curve: ResponseCurve, target: CalibrationTarget) -> float | None:
    """The strength to measure next, so that the target lies between strengths that were measured; None where it does, or cannot.

    A slider that is too strong is measured where the curve now has the target, until it is no longer read off far below the weakest
    strength that was measured; one that is too weak farther out, as long as its score clearly rises and its pictures neither drift too far
    nor burn out.
    """
    arm = _Arm.of(curve, target)
    weakest, strongest = float(arm.strengths[1]), float(arm.strengths[-1])
    if arm.wanted < READ_OFF * weakest:
        return None if weakest <= WEAKEST else max(arm.wanted, WEAKEST, STEP_DOWN * weakest)
    if arm.wanted < np.inf or arm.end < strongest or strongest >= (target.max_strength or STRONGEST):
        return None
    if not curve.interval_at(strongest).low > 0:
        return None
    if curve.sound and not (curve.sound[0] and curve.sound[-1]):
        return None
    ratio = 1.1 * target.gain / float(arm.gains[-1])
    if arm.wanted_gain < np.inf:  # strong enough, and not yet to be seen
        ratio = 1.1 / max(min(curve.visible[0], curve.visible[-1]), 1e-3)
    return min(max(ratio, STEP_UP[0]), STEP_UP[1]) * strongest if strongest * STEP_UP[1] < STRONGEST else STRONGEST


def confirm(curve: ResponseCurve, measured: ResponseCurve, target: CalibrationTarget) -> Calibration:
    """Choose again where more pictures were measured at one strength and its opposite: by the curve `at_level`, which has them, too.

    Where an arm was found to go the other way, the curve is not believed, and its choice is returned with what was measured.
    """
    level = at_level(curve, measured)
    return choose_scale(curve, target).verified(measured) if level is None else choose_scale(level.joined(measured), target)


def at_level(curve: ResponseCurve, measured: ResponseCurve) -> ResponseCurve | None:
    """A curve in which each arm agrees with what was measured at its end; so do the intervals, the judges and the visibility.

    `curve` tells the form, from few pictures at some strengths; `measured` tells the level, from many pictures at -s, 0 and s. None where
    an arm was found to go the other way.
    """
    assert len(measured.multipliers) == 3, "the level is measured at one strength and its opposite"
    factors = _level(curve, measured)
    if factors is None:
        return None
    gains = np.array(curve.gains) * factors
    resamples = None
    if measured.resamples is not None:
        relative = measured.resamples / np.where(np.array(measured.gains) == 0, 1, measured.gains)  # [R, 3]
        resamples = gains * np.where(np.array(curve.multipliers) < 0, relative[:, :1], relative[:, 2:])
    judges = dict(curve.judges)
    for name in judges.keys() & measured.judges.keys():
        own = _level(curve, measured, name)
        judges[name] = judges[name] if own is None else tuple(map(float, np.array(judges[name]) * own))
    visible = curve.visible
    if visible and measured.visible:
        at = [curve.visible_at(strength) for strength in (measured.multipliers[0], measured.multipliers[2])]
        low, high = (seen / before if before > 0 else 1.0 for seen, before in zip(measured.visible[::2], at, strict=True))
        visible = tuple(value * (low if strength < 0 else high) for strength, value in zip(curve.multipliers, visible, strict=True))
    return replace(curve, gains=tuple(map(float, gains)), resamples=resamples, judges=judges, visible=visible)


def _level(curve: ResponseCurve, measured: ResponseCurve, judge: str | None = None) -> np.ndarray | None:
    """What the gains of a curve [M] are to be multiplied with, so that each arm agrees with `measured` at its two strengths; None where an
    arm goes the other way."""
    low, high = measured.multipliers[0], measured.multipliers[2]
    before = np.array([curve.gain_at(strength, judge) for strength in (low, high)])
    now = np.array([measured.gain_at(strength, judge) for strength in (low, high)])
    if not (before * now > 0).all():  # NaN, too
        return None
    factors = now / before
    return np.where(np.array(curve.multipliers) < 0, factors[0], factors[1])


def _first_crossing(x: Sequence[float] | np.ndarray, y: Sequence[float] | np.ndarray, level: float, beyond: float) -> float:
    """The smallest x from 0 on where the monotone cubic through (x, y) rises to `level`; `beyond` if it never does.

    Between two neighbours the cubic is monotone, so that the crossing is bracketed.
    """
    curve = scipy.interpolate.PchipInterpolator(x, y)
    for low, high, below, above in zip(x[:-1], x[1:], y[:-1], y[1:], strict=True):
        if low >= 0 and below < level <= above:
            return float(scipy.optimize.root_scalar(lambda at: float(curve(at)) - level, bracket=(low, high), method="brentq").root)
    return beyond
