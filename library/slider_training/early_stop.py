"""What the measurements of a run, one after the other, say: whether training should stop, and whether anything moves at all."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from library.measuring.record import EvaluationRecord
from library.measuring.warnings import FLAT_GAIN, SliderWarning, no_effect

PATIENCE = 3  # measurements
FLAT_MEASUREMENTS = 3  # without effect, until that is said


@dataclass(frozen=True, kw_only=True)
class Gains:
    """What is remembered of a measurement: the training score's and the judges' mean gain over both signs; NaN where there are none."""

    step: int
    score: float
    judge: float


@dataclass(kw_only=True)
class EarlyStop:
    """Remembers every measurement of a run. It stops when both signs gain enough; when the judges' gain has been below its best for
    `PATIENCE` measurements while the training score rose; and when there is nothing more to gain.

    Attributes:
        gain: stop when both signs gain as much, in within-prompt standard deviations; None never.
        network_scale: alpha / dim, what the network's output is multiplied with; for advice.
    """

    gain: float | None
    network_scale: float
    history: list[Gains] = field(default_factory=list)

    def add(self, step: int, record: EvaluationRecord, *, plateau: bool = False) -> tuple[str | None, list[SliderWarning]]:
        """Remember a measurement -> why training should stop, or None; and a warning if the last ones were without effect.

        Args:
            plateau: whether the running gain no longer grows.
        """
        self.history.append(Gains(step=step, score=record.mean_score_gain, judge=record.mean_judge_gain))
        flat = no_effect(record, self.network_scale) if sum(gains.step > 0 for gains in self.history) >= FLAT_MEASUREMENTS else None
        return self._reason(record, plateau), [] if flat is None else [flat]

    def state_dict(self) -> dict[str, Any]:
        return {"history": [asdict(gains) for gains in self.history]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.history = [Gains(**gains) for gains in state["history"]]

    def _reason(self, record: EvaluationRecord, plateau: bool) -> str | None:
        if self.gain is not None and all(record.score_gain(place) >= self.gain for place in record.ends):
            return f"both weights move the training score by {self.gain:g} standard deviations or more, which is strong enough"
        judged = [gains for gains in self.history if not math.isnan(gains.judge)]
        if len(judged) > PATIENCE:
            best, now = max(judged, key=lambda gains: gains.judge), judged[-1]
            since = [gains for gains in judged if gains.step > best.step]
            if len(since) >= PATIENCE and best.judge - now.judge > FLAT_GAIN and all(gains.score > best.score for gains in since):
                return (
                    f"since step {best.step} the judges' gain has fallen from {best.judge:.2f} to {now.judge:.2f} standard deviations "
                    f"while the training score's rose from {best.score:.2f} to {now.score:.2f}: the score is gamed"
                )
        now, before = self.history[-1], self.history[:-1]
        if plateau and before and now.score < max(gains.score for gains in before if gains.step < now.step) + FLAT_GAIN:
            return f"the gain has not grown since step {before[-1].step}, so there is nothing more to gain"
        return None
