"""The criterion of masked pretraining, which needs pictures and no ratings; it is none of CRITERIA, since no score comes of it."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from library.scorer_training.criteria.base import Criterion
from library.scorers.heads import HeadSpec


class MaskedCells(Criterion):
    """Filling in hidden cells: `library.scorers.masked_latents` computes the error, so the outputs [B, 1] are the losses themselves.

    Metrics: `closeness`, minus the mean error.
    """

    name = "masked"
    target = "picture"
    selection = "closeness"

    def make_head(self, name: str, targets: Tensor, classes: tuple[str, ...], options: Mapping[str, Any]) -> HeadSpec:
        return HeadSpec(name=name, criterion=self.name)

    def losses(self, outputs: Tensor, targets: Tensor, head: HeadSpec) -> Tensor:
        return outputs[:, 0]

    def metrics(self, outputs: Tensor, targets: Tensor, head: HeadSpec) -> dict[str, float]:
        return {"closeness": -outputs.double().mean().item()}
