"""The criterion that learns a score of few levels by asking, at each step between them, whether the picture is above it."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from library.errors import UserError
from library.scorer_training.criteria.base import CRITERIA, Criterion
from library.scorer_training.criteria.metrics import pearson, spearman
from library.scorer_training.criteria.regression import check_scores
from library.scorers.heads import READOUTS, HeadSpec

MAX_LEVELS = 100


def steps_below(scores: Tensor, head: HeadSpec) -> Tensor:
    """Whether each score [N] is above each of the levels but the highest: 0 and 1 [N, K]."""
    return (scores.unsqueeze(-1) > scores.new_tensor(head.values[:-1])).float()


@CRITERIA.register("ordinal")
class Ordinal(Criterion):
    """Binary cross entropy of "is it above level k?" for every step k between the L distinct scores, averaged over the L - 1 steps.

    Frank and Hall 2001, as a network with an output for each step (Niu et al. 2016). CORAL (arXiv 1901.07884) ties the steps'
    weights together and CORN (arXiv 2111.08851) makes their chances conditional, both so that the chance of being above falls from
    step to step; the score does not need that, since a mean is the sum of these chances whether or not they fall.

    It assumes nothing of how far levels are apart, so it suits stars, grades and ratings whose scale is bent. It does not mix: the
    mean of two levels is not a level.

    Metrics: `srcc` and `plcc` of the expected level, and `mae`, how many levels the median is off.
    """

    target = "score"
    selection = "srcc"

    def make_head(self, name: str, targets: Tensor, classes: tuple[str, ...], options: Mapping[str, Any]) -> HeadSpec:
        check_scores(targets, name)
        levels = tuple(targets.unique().tolist())  # ascending
        if len(levels) > MAX_LEVELS:
            raise UserError(f"dataset {name} has {len(levels)} different scores, but ordinal takes {MAX_LEVELS} at most; use criterion mse")
        return self._head(name, options, readout="ordinal", outputs=len(levels) - 1, values=levels)

    def losses(self, outputs: Tensor, targets: Tensor, head: HeadSpec) -> Tensor:
        return F.binary_cross_entropy_with_logits(outputs, steps_below(targets, head), reduction="none").mean(-1)

    def metrics(self, outputs: Tensor, targets: Tensor, head: HeadSpec) -> dict[str, float]:
        scores, _ = READOUTS[head.readout](outputs, head)
        median = (outputs > 0).sum(-1)
        off = (median - steps_below(targets, head).sum(-1)).abs()
        return {"srcc": spearman(scores, targets), "plcc": pearson(scores, targets), "mae": off.double().mean().item()}
