"""Which strength deserves to be called 1? A slider is measured on a ladder of multipliers, and the multiplier at which it
does what is wanted of it is folded into its alpha."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, kw_only=True)
class ResponseCurve:
    """Gain of the training score and drift over the multiplier.

    Attributes:
        multipliers: ascending [M], symmetric around the 0 among them.
        gains: in within-prompt standard deviations [M], 0 at multiplier 0.
        drifts: mean RMS distance of the latents from the base model's [M], 0 at multiplier 0.
    """

    multipliers: tuple[float, ...]
    gains: tuple[float, ...]
    drifts: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """The multiplier that is to become 1.

    Attributes:
        scale: what to multiply alpha with, above 0.
        gain: the smaller of the two gains (up at +scale, down at -scale), in within-prompt standard deviations.
        reached: whether that is the target.
        note: one sentence in plain words.
    """

    scale: float
    gain: float
    reached: bool
    note: str


def choose_scale(response: ResponseCurve, target_gain: float = 1.0, max_drift: float | None = None) -> Calibration:
    """The smallest multiplier s with a gain of at least the target at +s and at most minus the target at -s.

    The curve is read by linear interpolation, and only as far out as both its arms keep going their way and stay within
    `max_drift`. Where the target is not reached, s is the end of that range; where the range is empty, 1.
    """
    multipliers = np.array(response.multipliers)
    assert np.array_equal(multipliers, -multipliers[::-1]) and 0 in multipliers, f"not symmetric around 0: {response.multipliers}"
    assert target_gain > 0, f"the target is above 0, not {target_gain}"
    centre = len(multipliers) // 2
    rungs = multipliers[centre:]  # [K], 0 first
    arms = np.stack([np.array(response.gains)[centre:], -np.array(response.gains)[centre::-1]])  # [2, K], up and down
    drifts = np.maximum(np.array(response.drifts)[centre:], np.array(response.drifts)[centre::-1])  # [K]

    falling = (np.diff(arms, axis=1) <= 0).any(0)
    monotone_end = float(rungs[np.argmax(falling)] if falling.any() else rungs[-1])
    drift_end = float(rungs[-1]) if max_drift is None else _first_crossing(rungs, drifts, max_drift, beyond=float(rungs[-1]))
    end = min(monotone_end, drift_end)
    if end == 0:
        return Calibration(
            scale=1.0,
            gain=float(np.interp(1.0, rungs, arms.min(0))),
            reached=False,
            note="The slider does not move its training score both ways even when it is weakest, so its strength was left as trained.",
        )
    wanted = max(_first_crossing(rungs, arm, target_gain, beyond=np.inf) for arm in arms)
    scale = min(wanted, end)
    gain = min(float(np.interp(scale, rungs, arm)) for arm in arms)
    if wanted <= end:
        note = f"Weight 1 is {scale:.3g} of the trained strength and moves the training score by {gain:.2f} standard deviations."
        return Calibration(scale=scale, gain=gain, reached=True, note=note)
    if end < rungs[-1]:
        reason = "the pictures drift too far" if drift_end < monotone_end else "the score stops following the weight"
        limit = f"beyond which {reason}"
    else:
        limit = "the largest that was tried"
    note = (
        f"The target of {target_gain:.3g} standard deviations is not reached: weight 1 is {scale:.3g} of the trained strength, {limit}, "
        f"and moves the training score by {gain:.2f} standard deviations."
    )
    return Calibration(scale=scale, gain=gain, reached=False, note=note)


def _first_crossing(x: np.ndarray, y: np.ndarray, level: float, beyond: float) -> float:
    """The smallest x where the line through (x, y) reaches `level`; `beyond` if it never does."""
    above = np.flatnonzero(y >= level)
    if len(above) == 0:
        return beyond
    right = int(above[0])
    if right == 0:
        return float(x[0])
    left = right - 1
    return float(x[left] + (x[right] - x[left]) * (level - y[left]) / (y[right] - y[left]))
