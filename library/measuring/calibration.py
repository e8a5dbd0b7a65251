"""Which strength deserves to be called 1? A slider is measured on a ladder of multipliers, and the multiplier at which it
does what is wanted of it is folded into its alpha.

Then it is said what a weight does, with intervals, and whether that holds on seeds that had no part in choosing the strength.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
from scipy.interpolate import PchipInterpolator

from library.measuring.response_curve import CurveSummary, ResponseCurve, summarise_curve
from library.measuring.statistics import Interval


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """The multiplier that is to become 1, and what weights then do.

    Attributes:
        scale: what to multiply alpha with, above 0.
        gain: at weight +1, in within-prompt standard deviations: the target, where it is reached.
        reached: whether that is the target.
        note: in plain words, for a person who downloads the file.
        choice: the first sentence of the note: which strength was chosen.
        target: the gain that was asked for.
        up, down: gain at +1 and at -1 with intervals, as the ladder predicts it.
        curve: over the calibrated weight; None where nothing was measured.
        line: its slope, R2 and usable range.
        verified_up, verified_down: the gains at +1 and -1 on other seeds; None before `verified`.
        judges: what the judges say of +1 and -1, by name, in their own within-prompt standard deviations.
    """

    scale: float
    gain: float
    reached: bool
    note: str
    choice: str = ""
    target: float | None = None
    up: Interval | None = None
    down: Interval | None = None
    curve: ResponseCurve | None = None
    line: CurveSummary | None = None
    verified_up: Interval | None = None
    verified_down: Interval | None = None
    judges: Mapping[str, tuple[float, float]] = field(default_factory=dict)

    def verified(self, measured: ResponseCurve) -> "Calibration":
        """With the gains at weight +1 and -1 (multipliers `scale` and -`scale` of `measured`) on prompts' seeds that chose nothing.

        Judges that were asked here replace those of the ladder.
        """
        again = measured.rescaled(self.scale)
        up, down = again.interval_at(1.0), again.interval_at(-1.0)
        judges = {name: (again.gain_at(1.0, name), again.gain_at(-1.0, name)) for name in again.judges} or self.judges
        return _with_note(replace(self, verified_up=up, verified_down=down, judges=judges))

    @property
    def preferred_weight(self) -> float:
        """1, or the strongest usable weight where 1 is too much."""
        if self.line is None or self.line.usable[1] <= 0:
            return 1.0
        return min(1.0, self.line.usable[1])

    def metadata(self) -> dict[str, object]:
        """`ss_leco_` entries of the LoRA's metadata."""
        entries: dict[str, object] = {"leco_calibration_scale": round(self.scale, 6), "leco_calibration_target": self.target}
        intervals = {"gain_up": self.up, "gain_down": self.down, "verified_up": self.verified_up, "verified_down": self.verified_down}
        for name, interval in intervals.items():
            if interval is not None:
                entries[f"leco_{name}"] = _rounded(interval)
        if self.line is not None:
            entries["leco_slope"] = _rounded(self.line.slope)
            entries["leco_r2"] = None if math.isnan(self.line.r2) else round(self.line.r2, 4)
            entries["leco_usable_range"] = [round(end, 2) for end in self.line.usable]
        if self.judges:
            entries["leco_judges"] = {name: [round(gain, 3) for gain in gains] for name, gains in self.judges.items()}
        return entries


def choose_scale(response: ResponseCurve, target_gain: float = 1.0, max_drift: float | None = None) -> Calibration:
    """The smallest multiplier s whose gain is the target; it becomes weight +1. What -s does is told, not promised.

    The promise is made for +1 and not for the mean of both signs, so that it is literally true of the weight that people use. The curve
    is read by monotone cubic interpolation, and only as far out as its upper arm keeps rising and both arms stay within `max_drift`.
    Where the target is not reached, s is the end of that range; where the range is empty, 1.
    """
    multipliers = np.array(response.multipliers)
    assert np.array_equal(multipliers, -multipliers[::-1]) and 0 in multipliers, f"not symmetric around 0: {response.multipliers}"
    assert target_gain > 0, f"the target is above 0, not {target_gain}"
    centre = len(multipliers) // 2
    rungs, arm = multipliers[centre:], np.array(response.gains)[centre:]  # [K], 0 first
    drifts = np.maximum(np.array(response.drifts)[centre:], np.array(response.drifts)[centre::-1])  # [K]

    falling = np.diff(arm) <= 0
    monotone_end = float(rungs[np.argmax(falling)] if falling.any() else rungs[-1])
    drift_end = float(rungs[-1]) if max_drift is None else _first_crossing(rungs, drifts, max_drift, beyond=float(rungs[-1]))
    end = min(monotone_end, drift_end)
    if end == 0:
        choice = "The slider does not raise its training score even when it is weakest, so its strength was left as trained."
        return _calibration(response, 1.0, target_gain, False, choice, max_drift)
    wanted = _first_crossing(multipliers, np.array(response.gains), target_gain, beyond=np.inf)
    if wanted <= end:
        return _calibration(response, wanted, target_gain, True, f"Weight 1 is {wanted:.3g} of the trained strength.", max_drift)
    reason = "the largest that was tried"
    if end < rungs[-1]:
        reason = "beyond which " + ("the pictures drift too far" if drift_end < monotone_end else "the score stops following the weight")
    choice = f"The target of {target_gain:.3g} standard deviations is not reached: weight 1 is {end:.3g} of the trained strength, {reason}."
    return _calibration(response, end, target_gain, False, choice, max_drift)


def settle(response: ResponseCurve, measured: ResponseCurve, target_gain: float = 1.0, max_drift: float | None = None) -> Calibration:
    """Choose again where more pictures were measured at one strength and its opposite.

    The ladder `response` tells the form of the curve, from few pictures at many strengths; `measured` tells its level, from many pictures
    at -s, 0 and s. Each arm is scaled to agree with what was measured at its end; so are the intervals and the judges. Where an arm was
    found to go the other way, the ladder is not believed, and its choice is returned with what was measured.
    """
    assert len(measured.multipliers) == 3, "the level is measured at one strength and its opposite"
    gains = _levelled(response, measured)
    if gains is None:
        return choose_scale(response, target_gain, max_drift).verified(measured)
    resamples = None
    if measured.resamples is not None:
        relative = measured.resamples / np.where(np.array(measured.gains) == 0, 1, measured.gains)  # [R, 3]
        resamples = gains * np.where(np.array(response.multipliers) < 0, relative[:, :1], relative[:, 2:])
    judges = dict(response.judges)
    for name in judges.keys() & measured.judges.keys():
        levelled = _levelled(response, measured, name)
        judges[name] = judges[name] if levelled is None else tuple(map(float, levelled))
    level = replace(response, gains=tuple(map(float, gains)), resamples=resamples, judges=judges)
    return choose_scale(level, target_gain, max_drift)


def _levelled(response: ResponseCurve, measured: ResponseCurve, judge: str | None = None) -> np.ndarray | None:
    """The gains of a curve [M], each arm scaled to agree with `measured` at its two strengths; None where an arm goes the other way."""
    curve, ends = (one.gains if judge is None else one.judges[judge] for one in (response, measured))
    low, high = (ends[place] / response.gain_at(measured.multipliers[place], judge) for place in (0, 2))
    if not (low > 0 and high > 0):  # NaN, too
        return None
    return np.array(curve) * np.where(np.array(response.multipliers) < 0, low, high)


def _calibration(response: ResponseCurve, scale: float, target: float, reached: bool, choice: str, max_drift: float | None) -> Calibration:
    curve = response.rescaled(scale)
    up, down = curve.interval_at(1.0), curve.interval_at(-1.0)
    chosen = Calibration(
        scale=scale,
        gain=up.value,
        reached=reached,
        note="",
        choice=choice,
        target=target,
        up=up,
        down=down,
        curve=curve,
        line=summarise_curve(curve, max_drift),
        judges={name: (curve.gain_at(1.0, name), curve.gain_at(-1.0, name)) for name in curve.judges},
    )
    return _with_note(chosen)


def _with_note(calibration: Calibration) -> Calibration:
    up, down, line = calibration.up, calibration.down, calibration.line
    assert up is not None and down is not None and line is not None
    words = [
        calibration.choice,
        f"Weight +1 moves the training score by {_gain(up)} standard deviations, -1 by {_gain(down)}; slope {line}.",
    ]
    if calibration.verified_up is not None and calibration.verified_down is not None:
        words.append(f"On other seeds: {_gain(calibration.verified_up)} at +1, {_gain(calibration.verified_down)} at -1.")
    words += [f"Judge {name}: {up_gain:+.2f} at +1, {down_gain:+.2f} at -1." for name, (up_gain, down_gain) in calibration.judges.items()]
    return replace(calibration, note=" ".join(words))


def _gain(gain: Interval) -> str:
    return f"{gain.value:+.2f}" + ("" if math.isnan(gain.low) else f" ({gain.low:+.2f} to {gain.high:+.2f})")


def _first_crossing(x: np.ndarray, y: np.ndarray, level: float, beyond: float) -> float:
    """The smallest x from 0 on where the monotone cubic through (x, y) is at `level`; `beyond` if it never is."""
    roots = np.atleast_1d(PchipInterpolator(x, y).solve(level, extrapolate=False))
    roots = roots[roots >= 0]  # not NaN either
    return float(roots.min()) if len(roots) else beyond


def _rounded(interval: Interval) -> list[float | None]:
    return [None if math.isnan(bound) else round(bound, 4) for bound in (interval.value, interval.low, interval.high)]
