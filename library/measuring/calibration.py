"""What becomes weight 1, and what a weight then does, with intervals: the record of a calibration, and its words."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from library.measuring.response_curve import CurveSummary, ResponseCurve, summarise_curve
from library.measuring.statistics import Interval


@dataclass(frozen=True, kw_only=True)
class CalibrationTarget:
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
    target: CalibrationTarget | None = None
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


def calibrated(curve: ResponseCurve, scale: float, target: CalibrationTarget, reached: bool, choice: str) -> Calibration:
    """With `scale` as weight 1 of a slider whose curve this is; `choice` is the first sentence of the note."""
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
        visible=min(curve.visible_at(-1.0), curve.visible_at(1.0)),
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


def _rounded(interval: Interval) -> list[float | None]:
    return [None if math.isnan(bound) else round(bound, 4) for bound in (interval.value, interval.low, interval.high)]
