"""The best weights of a run, so that training on past them costs nothing but time."""

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from library.measuring.observation import Observation
from library.measuring.verdict import GAMING_MARKS, complaints
from networks.lora import LoRANetwork

USUAL_GAIN = 2.0  # standard deviations: what the training score can earn without judges, where early_stop_gain does not say


def merit(observation: Observation, early_stop_gain: float | None) -> float:
    """How good a slider is, by those who were not asked to train it; higher is better.

    With judges: their mean gain over both signs, in within-prompt standard deviations; the training score does not count, because it is
    what may be gamed. Without: the training score's mean gain as far as `early_stop_gain` (what is beyond is where gaming begins), minus
    the drift in units of the distance between two seeds, so that of two equal gains the one that leaves the pictures more as they were
    is better. Each limit that is broken (`GAMING_MARKS`, a yes-or-no judge that falls) halves the merit: a slider with a flaw loses to
    one of half its strength without, not to one that does nothing. NaN where there is neither judge nor score: no step is better then.
    """
    gain = observation.mean_judge_gain
    if gain is None:
        ceiling = USUAL_GAIN if early_stop_gain is None else early_stop_gain
        gain = min(observation.mean_score_gain, ceiling) - observation.relative_drift
    broken = sum(key.startswith(GAMING_MARKS) for key in complaints(observation))
    return gain * 2.0 ** (-broken if gain > 0 else broken)


class KeepBest:
    """Holds the weights of the best observation so far, on the CPU.

    Attributes:
        step: the number of updates of the weights that are held, or None.
        merit: theirs.
        words: what was observed, in words.
    """

    def __init__(self) -> None:
        self.step: int | None = None
        self.merit = -math.inf
        self.words = ""
        self._weights: dict[str, Tensor] = {}

    def offer(self, observation: Observation, merit: float, network: LoRANetwork) -> bool:
        """Hold the network's weights if they are better than those that are held -> whether they are."""
        if not merit > self.merit:
            return False
        self.step, self.merit, self.words = observation.step, merit, str(observation)
        self._weights = {name: tensor.detach().to("cpu", copy=True) for name, tensor in network.state_dict().items()}
        return True

    def restore(self, network: LoRANetwork) -> None:
        """Put the weights that are held into the network."""
        assert self.step is not None, "nothing was offered"
        network.load_state_dict(self._weights)

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step, "merit": self.merit, "words": self.words, "weights": dict(self._weights)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.step, self.merit, self.words, self._weights = state["step"], state["merit"], state["words"], dict(state["weights"])
