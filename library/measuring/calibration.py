"""Which strength becomes weight 1? From what is known of a slider's strength, a few more are measured until the wanted one is bracketed;
it is confirmed by more pictures at fresh seeds and folded into the alpha. Then it is said what a weight does, with intervals.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import scipy

from library.measuring.response_curve import CurveSummary, ResponseCurve, summarise_curve
from library.measuring.statistics import Interval

WEAKEST, STRONGEST = 0.02, 50.0  # of the trained strength: beyond these a training went wrong, and no weight can repair it
STEP_UP, STEP_DOWN = (1.5, 2.5), 0.1  # times the strengths that were measured: where the next one may lie


@dataclass(frozen=True, kw_only=True)
class Target:
    """What weight +1 is to do.

    Attributes:
        gain: of the training score, in within-prompt standard deviations.
        visible: raise the strength, where that gain is too small to be seen, until a person tells the pictures from the base model's
            (`response_curve.VISIBLE_SHARE`), as far as judges and pictures hold and both signs are usable.
        max_drift: latents may be no farther (RMS) from the base model's; None is no bound.
        max_strength: weight 1 is no more of the trained strength, because the scorer is in doubt: to raise what it says is then to raise
            its errors. None is no bound.
    """

    gain: float = 1.0
    visible: bool = False
    max_drift: float | None = None
    max_strength: float | None = None

    def __post_init__(self) -> None:
        assert self.gain > 0, f"the target is above 0, not {self.gain}"


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """The multiplier that is to become 1, and what weights then do.

    Attributes:
        scale: what to multiply alpha with, above 0.
        gain: at weight +1, in within-prompt standard deviations: at least the target, where it is reached.
        reached: whether it is.
        note: in plain words, for a person who downloads the file.
        choice: the first sentence of the note: which strength was chosen.
        target: what was asked for.
        visible: perceptual distance that nearly all pictures exceed at the worse of +1 and -1, over a visible one; NaN where unknown.
        up, down: gain at +1 and at -1 with intervals, as the curve has it.
        curve: over the calibrated weight; None where nothing was measured.
        line: its slope, R2 and usable range.
        verified_up, verified_down: the gains at +1 and -1 on other seeds; None before `verified`.
        judges: what the judges say of +1 and -1, by name, in their own within-prompt standard deviations.
        pictured_at: the weight of those pictures of the slider, of all that were made, that are nearest to weight 1.
    """

    scale: float
    gain: float
    reached: bool
    note: str
    choice: str = ""
    target: Target | None = None
    visible: float = math.nan
    up: Interval | None = None
    down: Interval | None = None
    curve: ResponseCurve | None = None
    line: CurveSummary | None = None
    verified_up: Interval | None = None
    verified_down: Interval | None = None
    judges: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    pictured_at: float = 1.0

    def verified(self, measured: ResponseCurve) -> "Calibration":
        """With the gains at weight +1 and -1 (multipliers `scale` and -`scale` of `measured`) on prompts' seeds that chose nothing.

        Judges that were asked here replace those of the curve.
        """
        again = measured.rescaled(self.scale)
        up, down = again.interval_at(1.0), again.interval_at(-1.0)
        judges = {name: (again.gain_at(1.0, name), again.gain_at(-1.0, name)) for name in again.judges} or self.judges
        return _with_note(replace(self, verified_up=up, verified_down=down, judges=judges))

    @property
    def preferred_weight(self) -> float:
        """See `CurveSummary.preferred_weight`; 1 where nothing was measured."""
        return 1.0 if self.line is None else self.line.preferred_weight

    def metadata(self) -> dict[str, object]:
        """`ss_leco_` entries of the LoRA's metadata."""
        entries: dict[str, object] = {
            "leco_calibration_scale": round(self.scale, 6),
            "leco_calibration_target": None if self.target is None else self.target.gain,
        }
        intervals = {"gain_up": self.up, "gain_down": self.down, "verified_up": self.verified_up, "verified_down": self.verified_down}
        for name, interval in intervals.items():
            if interval is not None:
                entries[f"leco_{name}"] = _rounded(interval)
        if not math.isnan(self.visible):
            entries["leco_visibility"] = round(self.visible, 3)
        if self.line is not None:
            entries["leco_slope"] = _rounded(self.line.slope)
            entries["leco_r2"] = None if math.isnan(self.line.r2) else round(self.line.r2, 4)
            entries["leco_usable_range"] = [round(end, 2) for end in self.line.usable]
        if self.judges:
            entries["leco_judges"] = {name: [round(gain, 3) for gain in gains] for name, gains in self.judges.items()}
        return entries


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
    def of(curve: ResponseCurve, target: Target) -> "_Arm":
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


def choose_scale(curve: ResponseCurve, target: Target) -> Calibration:
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
        return _calibration(curve, 1.0, target, False, choice)
    if arm.wanted < WEAKEST:
        choice = (
            f"{words} would need {arm.wanted:.2g} of the trained strength: weight 1 is {WEAKEST:g} of it, the least that is tried; lower "
            "learning_rate."
        )
        return _calibration(curve, WEAKEST, target, False, choice)
    wanted = arm.wanted if arm.wanted < np.inf else min(arm.end, float(arm.strengths[-1])) if arm.wanted_gain < np.inf else np.inf
    most = target.max_strength
    if most is not None and min(wanted, arm.end) >= most and wanted != most:
        choice = f"Weight 1 is {most:.3g} of the trained strength and no more, because what the scorer says is in doubt."
        return _calibration(curve, most, target, arm.wanted_gain <= most, choice)
    if wanted <= arm.end:
        farther = wanted > 1.01 * arm.wanted_gain
        reason = f", so that it can be seen; {wished} would be weight {arm.wanted_gain / wanted:.2f}" if farther else ""
        return _calibration(curve, wanted, target, True, f"Weight 1 is {wanted:.3g} of the trained strength{reason}.")
    far, reason = f"weight 1 is {arm.end:.3g} of the trained strength", "the largest that was tried"
    if arm.end < arm.strengths[-1]:
        cause = "the pictures drift too far" if arm.drift_end < arm.monotone_end else "the score stops following the weight"
        reason = f"beyond which {cause}"
    elif not all(curve.sound):
        reason = "where judges fall, pixels clip or what was asked for is lost, so that no more was tried"
    return _calibration(curve, arm.end, target, False, f"{words} is not reached: {far}, {reason}.")


def next_strength(curve: ResponseCurve, target: Target) -> float | None:
    """The strength to measure next, so that the target lies between strengths that were measured; None where it does, or cannot.

    A slider that is too strong is measured where the curve now has the target, until it is no longer read off far below the weakest
    strength that was measured; one that is too weak farther out, as long as its score clearly rises and its pictures neither drift too far
    nor burn out.
    """
    arm = _Arm.of(curve, target)
    weakest, strongest = float(arm.strengths[1]), float(arm.strengths[-1])
    if arm.wanted < 0.7 * weakest:
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


def confirm(curve: ResponseCurve, measured: ResponseCurve, target: Target) -> Calibration:
    """Choose again where more pictures were measured at one strength and its opposite.

    `curve` tells the form, from few pictures at some strengths; `measured` tells the level, from many pictures at -s, 0 and s. Each arm is
    scaled to agree with what was measured at its end; so are the intervals, the judges and the visibility. Where an arm was found to go the
    other way, the curve is not believed, and its choice is returned with what was measured.
    """
    assert len(measured.multipliers) == 3, "the level is measured at one strength and its opposite"
    factors = _level(curve, measured)
    if factors is None:
        return choose_scale(curve, target).verified(measured)
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
        at = [
            float(scipy.interpolate.PchipInterpolator(curve.multipliers, visible)(strength))
            for strength in (measured.multipliers[0], measured.multipliers[2])
        ]
        low, high = (seen / before if before > 0 else 1.0 for seen, before in zip(measured.visible[::2], at, strict=True))
        visible = tuple(value * (low if strength < 0 else high) for strength, value in zip(curve.multipliers, visible, strict=True))
    level = replace(curve, gains=tuple(map(float, gains)), resamples=resamples, judges=judges, visible=visible)
    return choose_scale(level, target)


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


def _calibration(curve: ResponseCurve, scale: float, target: Target, reached: bool, choice: str) -> Calibration:
    curve = curve.rescaled(scale)
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
        line=summarise_curve(curve, target.max_drift),
        visible=float(scipy.interpolate.PchipInterpolator(curve.multipliers, curve.visible)([-1.0, 1.0]).min())
        if curve.visible
        else math.nan,
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
    if not math.isnan(calibration.visible):
        seen = "plainly seen in nine of ten pictures" if calibration.visible > 0.99 else "hard to see in some pictures"
        words.append(f"At weight 1 the change is {seen} ({calibration.visible:.2g} times a visible one).")
    if calibration.verified_up is not None and calibration.verified_down is not None:
        words.append(f"On other seeds: {_gain(calibration.verified_up)} at +1, {_gain(calibration.verified_down)} at -1.")
    words += [f"Judge {name}: {up_gain:+.2f} at +1, {down_gain:+.2f} at -1." for name, (up_gain, down_gain) in calibration.judges.items()]
    return replace(calibration, note=" ".join(words))


def _gain(gain: Interval) -> str:
    return f"{gain.value:+.2f}" + ("" if math.isnan(gain.low) else f" ({gain.low:+.2f} to {gain.high:+.2f})")


def _first_crossing(x: Sequence[float] | np.ndarray, y: Sequence[float] | np.ndarray, level: float, beyond: float) -> float:
    """The smallest x from 0 on where the monotone cubic through (x, y) rises to `level`; `beyond` if it never does.

    Between two neighbours the cubic is monotone, so that the crossing is bracketed.
    """
    curve = scipy.interpolate.PchipInterpolator(x, y)
    for low, high, below, above in zip(x[:-1], x[1:], y[:-1], y[1:], strict=True):
        if low >= 0 and below < level <= above:
            return float(scipy.optimize.root_scalar(lambda at: float(curve(at)) - level, bracket=(low, high), method="brentq").root)
    return beyond


def _rounded(interval: Interval) -> list[float | None]:
    return [None if math.isnan(bound) else round(bound, 4) for bound in (interval.value, interval.low, interval.high)]
