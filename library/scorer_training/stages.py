"""A stage of a scorer's training, and what folds have found of its length."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from library.scorers.worth import Worth, worth_from
from library.settings.shared import OptimizerConfig

if TYPE_CHECKING:
    from library.scorer_training.tasks import Task
    from library.scorer_training.validation import SigmaTable


@dataclass(frozen=True)
class Chosen:
    """What folds have found: after how many steps a scorer of these pictures is best.

    Attributes:
        folds: how many, and how often the pictures were parted.
        tables: how well it then does on the pictures that it was not trained on, by task.
        worth: the same on clean latents with its interval; None for a criterion without a rank correlation.
    """

    steps: int
    folds: tuple[int, int]
    tables: Mapping[str, SigmaTable]
    worth: Worth | None

    def to_dict(self) -> dict[str, Any]:
        """As JSON values, for the record and for states."""
        worth = None if self.worth is None else self.worth.to_dict()
        return {"steps": self.steps, "folds": list(self.folds), "tables": dict(self.tables), "worth": worth}

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Chosen:
        return cls(record["steps"], tuple(record["folds"]), record["tables"], worth_from(record["worth"], ""))


@dataclass(frozen=True)
class Stage:
    """One training of a scorer.

    Attributes:
        name: for the logs and the record.
        tasks: what is learned at once.
        selecting: names of the tasks by whose metrics the best state is chosen.
        steps, optimizer: how long, and by what. first_step: where its steps stand in the logs.
        pretraining: whether only the backbone is kept.
        chosen: by folds, when it ends, and what it is worth then.
    """

    name: str
    tasks: Sequence[Task]
    selecting: Sequence[str]
    steps: int
    optimizer: OptimizerConfig
    first_step: int = 0
    pretraining: bool = False
    chosen: Chosen | None = None

    @property
    def end(self) -> int:
        """After how many steps it ends at the latest; its schedule is that of `steps`."""
        return self.steps if self.chosen is None else self.chosen.steps
