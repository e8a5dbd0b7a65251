"""One look at a slider while it trains: gains at +1 and -1 with intervals, what the judges say, and how far the two are apart."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from library.measuring.measurement import REWARD, BasePictures, Measured
from library.measuring.statistics import Interval, Response, summarise_response

SIGNS = (1, -1)
WEIGHTS = (-1.0, 0.0, 1.0)  # the multipliers of the responses of an observation
FIRM_GAIN = 0.5  # within-prompt standard deviations; a score that moved less is not yet worth a ratio


def hack_index(score_gain: float, judge_gain: float, kept: float = 1.0) -> float:
    """The share of the training score's gain that the judges do not see: (score - kept * judge) / score.

    0: the judges gain as much. 1: they do not move. 2: they lose what the score gains. Below 0: they gain more. A score that gained less
    than `FIRM_GAIN` is divided by that instead, so that the index is finite, and 0 at the start. Gains are in within-prompt standard
    deviations, in the wanted direction.

    Args:
        kept: the share of the pictures that still show what was asked for (`share_kept`). What judges gain on the others is no gain: a
            judge is taken in by pictures such as nobody has ever rated.
    """
    return (score_gain - judge_gain * (kept if judge_gain > 0 else 1.0)) / max(score_gain, FIRM_GAIN)


def share_kept(judges: Iterable[Response], place: int, base: int) -> float:
    """How many pictures the strictest yes-or-no judge says yes to at the weight in `place`, over those at the weight in `base`; at most 1,
    and 1 without such judges."""
    means = [judge.means for judge in judges if judge.is_share and judge.means[base].value > 0]
    return min([mean[place].value / mean[base].value for mean in means] + [1.0])


@dataclass(frozen=True)
class Bound:
    """A value that a training score is not to pass.

    Attributes:
        side: +1 where it is not to be above, -1 where it is not to be below.
        value: in the scorer's standard deviations, as scores are measured.
        words: the bound in the score's own units, "above 7.5".
    """

    side: int
    value: float
    words: str

    def share_beyond(self, values: np.ndarray) -> float:
        """Of pictures [P, S]."""
        return float((self.side * (values - self.value) > 0).mean())


@dataclass(frozen=True, kw_only=True, eq=False)
class Observation:
    """What a slider does after `step` updates.

    Attributes:
        responses: of the reward, the training scores and the judges, at the weights -1, 0 and +1.
        statistics: those of `library.measuring.measurement.Measured` at weight -1 and at +1.
        base_statistics: those of `library.measuring.measurement.BasePictures`.
        held: training scores that are neither to rise nor to fall, and how far they may move, in the scorer's standard deviations.
        beyond: of training scores with a bound: the bound in words, and the shares of pictures beyond it at the weights -1, 0 and +1.
        warnings: sentences that were not said before.
        stop: why training should stop now, or None.
    """

    step: int
    responses: Mapping[str, Response]
    statistics: Mapping[int, Mapping[str, float]]
    base_statistics: Mapping[str, float]
    held: Mapping[str, float] = field(default_factory=dict)
    beyond: Mapping[str, tuple[str, tuple[float, ...]]] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    stop: str | None = None

    @property
    def judges(self) -> list[Response]:
        """Those whose answer is to rise and fall with the weight."""
        return [response for response in self.responses.values() if response.role == "judge" and not response.is_share]

    @property
    def share_judges(self) -> list[Response]:
        """Those that answer yes or no: what they say must not fall, at either sign."""
        return [response for response in self.responses.values() if response.is_share]

    def gain(self, name: str, sign: int) -> Interval:
        """Of one score at weight `sign`, above 0 when it moves the way the sign says, in within-prompt standard deviations."""
        gain = self.responses[name].gains_std[1 + sign]
        return gain if sign > 0 else Interval(-gain.value, -gain.high, -gain.low)

    def score_gain(self, sign: int) -> Interval:
        """`gain` of the reward; NaN when training follows no score."""
        return self.gain(REWARD, sign) if REWARD in self.responses else Interval(math.nan, math.nan, math.nan)

    def judge_gain(self, sign: int) -> float | None:
        """Mean gain of the judges, above 0 when they move the way the weight's sign says; None when none has a unit."""
        gains = [gain for judge in self.judges if not math.isnan(gain := self.gain(judge.name, sign).value)]
        return float(np.mean(gains)) if gains else None

    @property
    def mean_score_gain(self) -> float:
        return (self.score_gain(1).value + self.score_gain(-1).value) / 2

    @property
    def mean_judge_gain(self) -> float | None:
        up, down = self.judge_gain(1), self.judge_gain(-1)
        return None if up is None or down is None else (up + down) / 2

    def hack_index_at(self, sign: int) -> float | None:
        score, judge = self.score_gain(sign).value, self.judge_gain(sign)
        kept = share_kept(self.share_judges, 1 + sign, 1)
        return None if judge is None or math.isnan(score) else hack_index(score, judge, kept)

    @property
    def hack_index(self) -> float | None:
        """That of the worse sign; None without judges or without a training score."""
        indices = [index for sign in SIGNS if (index := self.hack_index_at(sign)) is not None]
        return max(indices, default=None)

    @property
    def relative_drift(self) -> float:
        """RMS distance of the latents from the base model's, mean of both signs, over that between two seeds of the base model: 1 is
        another picture."""
        return float(np.mean([self.statistics[sign]["drift"] for sign in SIGNS])) / max(self.base_statistics["latent_diversity"], 1e-6)

    def share_lost(self, judge: Response) -> float:
        """By how much a yes-or-no judge's share of pictures fell at the worse sign; below 0 when it rose at both."""
        return max(judge.means[1].value - judge.means[1 + sign].value for sign in SIGNS)

    def metrics(self) -> dict[str, float]:
        """Flat names and numbers, for the trackers. Gains are raw here: at -1 they are below 0 when all is well."""
        numbers: dict[str, float] = {}
        for name, response in self.responses.items():
            prefix = "" if name == REWARD else f"judge/{name}/" if response.role == "judge" else f"score/{name}/"
            for sign in SIGNS:
                if response.is_share:
                    numbers[f"{prefix}share_at_{sign:+d}"] = response.means[1 + sign].value
                else:
                    gain = response.gains_std[1 + sign]
                    numbers |= {f"{prefix}gain_at_{sign:+d}{end}": bound for end, bound in _bounds(gain)}
            if response.is_share:
                numbers[f"{prefix}share_of_base"] = response.means[1].value
        if (index := self.hack_index) is not None:
            numbers["hack_index"] = index
        for sign in SIGNS:
            numbers |= {f"{name}_at_{sign:+d}": value for name, value in self.statistics[sign].items()}
        return numbers

    def __str__(self) -> str:
        parts = [f"training score {_moves(self.responses[REWARD])}"] if REWARD in self.responses else []
        parts += [f"judge {judge.name} {_moves(judge)}" for judge in self.judges]
        parts += [
            f"{judge.name} {judge.means[1].value:.0%} of the base model's pictures, {judge.means[2].value:.0%} at +1, "
            f"{judge.means[0].value:.0%} at -1"
            for judge in self.share_judges
        ]
        if (index := self.hack_index) is not None:
            parts.append(f"hack index {index:.2f}")
        return f"step {self.step}: " + "; ".join(parts)


def observe(
    step: int,
    base: BasePictures,
    up: Measured,
    down: Measured,
    judge_names: Sequence[str],
    directions: np.ndarray,
    held: Mapping[str, float] | None = None,
    bounds: Mapping[str, Bound] | None = None,
) -> Observation:
    """Put the measurements at +1 and -1 together. `directions` [P] as in `summarise_response`, `held` as in `Observation`."""
    rng = np.random.default_rng(0)
    responses = {}
    for name, values in base.scores.items():
        role = "judge" if name in judge_names else "scorer"
        table = np.stack([down.scores[name], values, up.scores[name]], axis=2)
        responses[name] = summarise_response(name, role, table, WEIGHTS, rng, directions)
    return Observation(
        step=step,
        responses=responses,
        statistics={1: up.statistics, -1: down.statistics},
        base_statistics=base.statistics,
        held=held or {},
        beyond={
            name: (bound.words, tuple(bound.share_beyond(part.scores[name]) for part in (down, base, up)))
            for name, bound in (bounds or {}).items()
        },
    )


def _bounds(interval: Interval) -> list[tuple[str, float]]:
    return [("", interval.value), ("_low", interval.low), ("_high", interval.high)]


def _moves(response: Response) -> str:
    down, _, up = response.gains_std
    return f"{up.value:+.2f} at +1, {down.value:+.2f} at -1"
