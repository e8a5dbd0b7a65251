"""A run of train_leco_score.py in one process over the batches of two."""

from dataclasses import replace
from itertools import cycle
from pathlib import Path
from typing import Any
from unittest.mock import patch

from library.objectives.base import Term, TrainingContext
from library.objectives.registry import ObjectiveConfig, build_terms
from library.slider_training import setup
from library.training.runtime import generator
from library.types import LossOutput
from tests.helpers.tiny_leco_run import run

SETTINGS: dict[str, Any] = {"max_train_steps": 3, "seed": 5, "optimizer_type": "torch.optim.SGD", "learning_rate": 0.1}


class InTurn(Term):
    """The score's terms of two processes, a batch of each in turn."""

    @classmethod
    def build(cls, context: TrainingContext, settings: Any) -> "InTurn":
        raise NotImplementedError

    def __init__(self, context: TrainingContext, config: ObjectiveConfig) -> None:
        def of(process: int) -> Term:
            return build_terms(replace(context, generator=lambda name: generator(SETTINGS["seed"], name, process)), config)["score"]

        self.turns = cycle([of(0), of(1)])

    def __call__(self) -> LossOutput:
        return next(self.turns)()

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Any) -> None:
        pass


def run_alone(workplace: Path, output_dir: Path) -> Path:
    """One process whose gradient accumulation is over the two."""
    with patch.object(setup, "build_terms", lambda context, config: {"score": InTurn(context, config)}):
        return run(workplace, output_dir, gradient_accumulation_steps=2, **SETTINGS)
