"""The best weights of a run, so that training on past them costs nothing but time."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from library.measuring.record import EvaluationRecord
from library.measuring.warnings import FLAWS, SliderWarning
from networks.lora import LoRANetwork

USUAL_GAIN = 2.0  # standard deviations: what the training score can earn without judges, where early_stop_gain does not say


def selection_score(record: EvaluationRecord, warnings: Sequence[SliderWarning], early_stop_gain: float | None) -> float:
    """How good a slider is, by those who were not asked to train it; higher is better.

    With judges: their mean gain over both signs, in within-prompt standard deviations; the training score does not count, because it is
    what may be gamed. Without: the training score's mean gain as far as `early_stop_gain` (what is beyond is where gaming begins), minus
    the drift in units of the distance between two seeds, so that of two equal gains the one that leaves the pictures more as they were
    is better. Each warning of the kinds in `FLAWS` halves it: a slider with a flaw loses to one of half its strength without, not to one
    that does nothing. NaN where there is neither judge nor score: no step is better then.
    """
    gain = record.mean_judge_gain
    if math.isnan(gain):
        ceiling = USUAL_GAIN if early_stop_gain is None else early_stop_gain
        gain = min(record.mean_score_gain, ceiling) - record.relative_drift
    flaws = sum(warning.kind in FLAWS for warning in warnings)
    return gain * 2.0 ** (-flaws if gain > 0 else flaws)


class KeepBest:
    """Holds the weights of the best measured step so far, on the CPU.

    Attributes:
        step: the number of updates of the weights that are held, or None.
        score: their selection score.
        record: what was measured.
    """

    def __init__(self) -> None:
        self.step: int | None = None
        self.score = -math.inf
        self.record: EvaluationRecord | None = None
        self._weights: dict[str, Tensor] = {}

    def offer(self, step: int, score: float, record: EvaluationRecord, network: LoRANetwork) -> bool:
        """Hold the network's weights if they are better than those that are held -> whether they are."""
        if not score > self.score:
            return False
        self.step, self.score, self.record = step, score, record
        self._weights = {name: tensor.detach().to("cpu", copy=True) for name, tensor in network.state_dict().items()}
        return True

    def restore(self, network: LoRANetwork) -> None:
        """Put the weights that are held into the network."""
        assert self.step is not None, "nothing was offered"
        network.load_state_dict(self._weights)

    def state_dict(self) -> dict[str, Any]:
        record = None if self.record is None else self.record.to_dict()
        return {"step": self.step, "score": self.score, "record": record, "weights": dict(self._weights)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.step, self.score, self._weights = state["step"], state["score"], dict(state["weights"])
        self.record = None if state["record"] is None else EvaluationRecord.from_dict(state["record"])
