"""The slider's gain as training itself shows it, at no evaluation of the U-Net.

Every update says how much better its latents score than the frozen model's, at each sign: the gain of a whole trajectory, if all of its
steps' gains lasted. They do not: a share lasts, which is another for every model and score. The trajectories that end all the time say
which: what they scored at the end, over what their steps promised. So promise times share is the gain at weight +1 and -1, with an
interval; an observation of whole pictures, where one was made, sharpens the share.
"""

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from library.measuring.statistics import Interval

PRIOR_SHARE, PRIOR_STD = 0.4, 0.3  # of the steps' gains that last, before anything has ended (docs/experiments.md)
WINDOW = 16  # updates whose promises are averaged
HALF_LIFE = 150.0  # updates after which what was seen of the share counts half: it falls as a slider grows
MAX_SKIP = 0.5  # of the stronger sign's trajectories that are given to the weaker one
SIGNS = (1, -1)


@dataclass
class _Arm:
    """One sign. Sums over what was seen, older updates counting less: promise^2, promise * gain and count, each over its variance."""

    promises: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW))
    information: float = PRIOR_STD**-2
    weighted: float = PRIOR_SHARE * PRIOR_STD**-2

    def age(self, updates: float) -> None:
        keep = 0.5 ** (updates / HALF_LIFE)
        # what is forgotten is replaced by the prior, a tenth as strong: a share that was learned is not forgotten for want of news
        self.information = keep * self.information + (1 - keep) * 0.1 * PRIOR_STD**-2
        self.weighted = keep * self.weighted + (1 - keep) * 0.1 * PRIOR_SHARE * PRIOR_STD**-2

    def add(self, promise: float, gain: float, variance: float) -> None:
        self.information += promise**2 / variance
        self.weighted += promise * gain / variance

    @property
    def promise(self) -> tuple[float, float]:
        """Mean of the window, and the variance of that mean."""
        values = np.array(self.promises)
        return float(values.mean()), float(values.var(ddof=1) / len(values)) if len(values) > 1 else math.inf

    def gain(self) -> Interval:
        if not self.promises:
            return Interval(math.nan, math.nan, math.nan)
        promise, variance = self.promise
        share = self.weighted / self.information
        spread = 1.96 * math.sqrt(promise**2 / self.information + share**2 * variance)
        return Interval(share * promise, share * promise - spread, share * promise + spread)


class RunningGain:
    """Gains at +1 and -1, in the direction that the weight's sign says, in within-prompt standard deviations.

    Args:
        unit: the base model's within-prompt standard deviation of the reward.
        base: mean reward of the base model's pictures by prompt.
        spread: standard deviation of those means over the prompts.
        life: updates that a trajectory takes.
    """

    def __init__(self, unit: float, base: Mapping[str, float], spread: float, life: int) -> None:
        assert unit > 0, "a score that does not vary has no unit"
        self.unit, self.base, self.spread, self.life = unit, base, spread, life
        self.arms = {sign: _Arm() for sign in SIGNS}
        self._recent: deque[dict[int, float]] = deque(maxlen=life)

    def add_step(self, multipliers: Sequence[float], promised: Sequence[float]) -> None:
        """One update: each sample's multiplier, and the gain of its whole trajectory that its step promises, in the reward's units."""
        means = {}
        for sign in SIGNS:
            own = [
                gain / abs(weight) for weight, gain in zip(multipliers, promised, strict=True) if weight * sign > 0 and math.isfinite(gain)
            ]
            self.arms[sign].age(1)
            if own:
                means[sign] = float(np.mean(own)) / self.unit
                self.arms[sign].promises.append(means[sign])
        self._recent.append(means)

    def add_finished(self, prompt: str, multiplier: float, direction: float, score: float) -> None:
        """A trajectory that ended, and its reward."""
        sign = 1 if multiplier > 0 else -1
        promises = [means[sign] for means in self._recent if sign in means]
        if not promises or not math.isfinite(score):
            return
        known = prompt in self.base
        mean = self.base[prompt] if known else float(np.mean(list(self.base.values())))
        wanted = math.copysign(1, multiplier * direction)
        gain = wanted * (score - mean) / self.unit / abs(multiplier)
        # one picture scatters by a standard deviation, and so does what is known of its prompt's mean; or as prompts differ
        variance = (1.0 + (0.34 if known else (self.spread / self.unit) ** 2)) / multiplier**2
        self.arms[sign].add(float(np.mean(promises)), gain, variance)

    def add_observation(self, sign: int, gain: Interval) -> None:
        """Measured on whole pictures, now."""
        arm = self.arms[sign]
        if arm.promises and gain.high > gain.low:
            promise, own = arm.promise
            # the promise's own variance, not share^2 of it: the share drifts, and other prompts are measured than trained on
            variance = ((gain.high - gain.low) / 3.92) ** 2 + (own if math.isfinite(own) else 0.0)
            arm.add(promise, gain.value, max(variance, 1e-4))

    def gain(self, sign: int) -> Interval:
        """At weight `sign`, in the wanted direction; NaN before the first update."""
        return self.arms[sign].gain()

    @property
    def weaker(self) -> Interval:
        """The gain of the sign that gains less."""
        return min((self.gain(sign) for sign in SIGNS), key=lambda gain: gain.value)

    def skip(self) -> tuple[int, float]:
        """The sign that gains more for sure, and the share of its trajectories that the other should have: 0 where neither does."""
        up, down = (self.gain(sign) for sign in SIGNS)
        if not up.value + down.value > 0:
            return 1, 0.0
        stronger, more, less = (1, up, down) if up.value > down.value else (-1, down, up)
        sure = more.value - less.value > 0.5 * math.hypot(more.high - more.value, less.high - less.value)
        lead = (more.value - max(less.value, 0.0)) / (more.value + max(less.value, 0.0))
        return stronger, min(MAX_SKIP, 2 * lead) if sure else 0.0

    def metrics(self) -> dict[str, float]:
        """For the trackers; at -1 below 0 when all is well, as measured gains are."""
        numbers = {}
        for sign in SIGNS:
            gain = self.gain(sign)
            bounds = (gain.value, gain.low, gain.high) if sign > 0 else (-gain.value, -gain.high, -gain.low)
            numbers |= dict(zip((f"running_gain_at_{sign:+d}{end}" for end in ("", "_low", "_high")), bounds, strict=True))
        return numbers

    def state_dict(self) -> dict[str, Any]:
        arms = {sign: (list(arm.promises), arm.information, arm.weighted) for sign, arm in self.arms.items()}
        return {"arms": arms, "recent": [dict(means) for means in self._recent]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for sign, (promises, information, weighted) in state["arms"].items():
            self.arms[sign] = _Arm(deque(promises, maxlen=WINDOW), information, weighted)
        self._recent = deque(state["recent"], maxlen=self.life)
