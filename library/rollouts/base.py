"""What a rollout is: a source of batches for training."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from library.rollouts.trajectories import Trajectories
from library.settings.registry import Registry
from library.types import Finished, RolloutBatch


class Rollout(ABC):
    """A source of batches, over trajectories that it starts, moves and drops as it likes. It carries no gradient.

    Attributes:
        config_class: its settings, a dataclass of options; None if it has none.

    Args:
        trajectories: all freshly started.
        settings: of `config_class`; None if there is none.
    """

    config_class: ClassVar[type | None] = None

    def __init__(self, trajectories: Trajectories, settings: Any = None) -> None:
        self.trajectories, self.settings = trajectories, settings

    @abstractmethod
    def next_batch(self) -> RolloutBatch:
        """Where trajectories of one picture size stand; sizes take turns at random, as often as their prompts weigh."""

    @abstractmethod
    def advance(self, eps: Tensor) -> Finished | None:
        """What the last batch leads to: eps [B, C, h, w] is its guided prediction, without gradient. Those that ended, if any did."""

    def pass_over(self, batch: RolloutBatch) -> None:  # noqa: B027 - empty on purpose
        """Go on from the last batch without training on it. Nothing, for rollouts that draw each batch anew."""

    def renew_broken(self) -> None:
        """Begin anew what is not finite, which no step makes finite again."""
        self.trajectories.restart_broken()

    def state_dict(self) -> dict[str, Any]:
        """All that the future batches depend on: tensors and plain containers."""
        return {"trajectories": self.trajectories.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raises UserError if the state was saved with other prompts, sizes or another batch size."""
        self.trajectories.load_state_dict(state["trajectories"])


ROLLOUTS: Registry[type[Rollout]] = Registry("rollout", "library.rollouts")
