"""What a scorer can be asked to learn."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from library.errors import UserError
from library.scorers.heads import HeadSpec
from library.settings.registry import Registry


class Criterion(ABC):
    """A loss, the head that it trains, and the numbers that say how well that went. Stateless.

    Targets are tensors whose first dimension is the picture: scores [N] float32, labels [N] int64, votes [N, 10] float32, tags [N, K]
    float32 of 0 and 1, pairs [N] float32 (the preference for the first: 1, 0 or 0.5).

    Attributes:
        name: how a user calls it, its name in CRITERIA.
        target: the column it learns: "score", "label", "votes", "tags" or "pair"; "picture" for one that needs no ratings.
        selection: the metric that chooses the best checkpoint; higher is better.
        gives_score: whether a score comes of it; if not, it is for pretraining.
    """

    target: ClassVar[str]
    selection: ClassVar[str]
    gives_score: ClassVar[bool] = True

    def __init__(self, name: str) -> None:
        self.name = name

    @abstractmethod
    def make_head(self, name: str, targets: Tensor, classes: tuple[str, ...], options: Mapping[str, Any]) -> HeadSpec:
        """The head for these training targets.

        Args:
            targets: of the training pictures. classes: names of labels or tags, in the order of their numbers.
            options: `target_class`, `members` of the HeadSpec.

        Raises:
            UserError: nothing can be learned from them (a constant score, one class only, an unknown target_class).
        """

    @abstractmethod
    def losses(self, outputs: Tensor, targets: Tensor, head: HeadSpec) -> Tensor:
        """Loss of each picture [B].

        Args:
            outputs: float32 [B, K], one member's; for pairs [B, 2, K], the first's and the second's.
            targets: [B, ...]; labels as [B].
        """

    @abstractmethod
    def metrics(self, outputs: Tensor, targets: Tensor, head: HeadSpec) -> dict[str, float]:
        """Numbers by name over a whole validation set: outputs [N, K] (pairs [N, 2, K]) and targets [N, ...], on the CPU."""

    def _head(self, name: str, options: Mapping[str, Any], **fields: Any) -> HeadSpec:
        """A HeadSpec with these fields and the options that every criterion has.

        Raises:
            UserError: a target_class is given, but there are no classes.
        """
        if options.get("target_class") and not fields.get("classes"):
            raise UserError(
                f"dataset {name} has the target_class {options['target_class']!r}, but {self.name} learns no classes; leave it out"
            )
        return HeadSpec(name=name, criterion=self.name, members=options.get("members", 1), **fields)


CRITERIA: Registry[type[Criterion]] = Registry("criterion", "library.scorer_training.criteria")


def get_criterion(name: str) -> Criterion:
    """Raises UserError if there is no such criterion."""
    return CRITERIA[name](name)
