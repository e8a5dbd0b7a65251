"""Criteria that learn only which picture is better: from pairs that people compared, or from the order of scores in a batch."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from library.errors import UserError
from library.scorer_training.criteria.base import CRITERIA, Criterion
from library.scorer_training.criteria.metrics import pearson, spearman
from library.scorer_training.criteria.regression import check_scores
from library.scorers.heads import HeadSpec


def outcome_shares(preferences: Tensor) -> Tensor:
    """Preferences [N], 1 for the first, 0 for the second, 0.5 for a tie, to shares of (first, tie, second) [N, 3]; between them, linear."""
    return torch.stack([(2 * preferences - 1).clamp_min(0), 1 - (2 * preferences - 1).abs(), (1 - 2 * preferences).clamp_min(0)], dim=-1)


@CRITERIA.register("pairwise")
class Pairwise(Criterion):
    """Bradley and Terry's model of a choice between two pictures, with ties after Davidson (1970).

    Chances of (first, tie, second) = softmax(s / 2, t, -s / 2), where s is the first's score minus the second's: without a tie
    the first wins with sigmoid(s), which is Bradley and Terry's model. The tie's log odds t are the mean of a second output of both
    pictures, so some pictures may be harder to tell apart than others; it is there only if training has ties. A score is in log odds.

    Metrics: over pairs without a tie, `accuracy`, where equal scores are half right, and `log_loss`, -log sigmoid(s) of the chosen
    one's lead (0.69 for chance).
    """

    target = "pair"
    selection = "accuracy"

    def make_head(self, name: str, targets: Tensor, classes: tuple[str, ...], options: Mapping[str, Any]) -> HeadSpec:
        if not ((targets >= 0) & (targets <= 1)).all():  # NaN is neither
            raise UserError(f"dataset {name} has preferences outside 0 to 1; give 1 where the first is better, 0 the second, 0.5 for a tie")
        ties = targets == 0.5
        if ties.all():
            raise UserError(f"all {len(targets)} training pairs of dataset {name} are ties; give pairs of which one picture is better")
        return self._head(name, options, readout="value", outputs=2 if ties.any() else 1)

    def losses(self, outputs: Tensor, targets: Tensor, head: HeadSpec) -> Tensor:
        lead = outputs[:, 0, 0] - outputs[:, 1, 0]
        if head.outputs == 1:
            return F.binary_cross_entropy_with_logits(lead, targets, reduction="none")
        logits = torch.stack([lead / 2, outputs[..., 1].mean(1), -lead / 2], dim=-1)
        return F.cross_entropy(logits, outcome_shares(targets), reduction="none")

    def metrics(self, outputs: Tensor, targets: Tensor, head: HeadSpec) -> dict[str, float]:
        lead = (outputs[:, 0, 0] - outputs[:, 1, 0]) * (2 * targets - 1).sign()  # of the one that was preferred
        lead = lead[targets != 0.5].double()
        if len(lead) == 0:
            return {"accuracy": 0.5, "log_loss": float(torch.tensor(2.0).log())}
        right = (lead > 0).double() + 0.5 * (lead == 0).double()
        return {"accuracy": right.mean().item(), "log_loss": F.softplus(-lead).mean().item()}


@CRITERIA.register("rank")
class Ranking(Criterion):
    """RankNet (Burges et al. 2005): log(1 + exp(-lead)) of the better over the worse, averaged over a picture's pairs within the batch.

    It learns the order of the scores and nothing of their scale, so it suits scores whose distances mean nothing. Equal scores make no
    pair; a picture without a pair has the loss 0. A score is in log odds of being better.

    Metrics: `srcc` and `plcc`.
    """

    target = "score"
    selection = "srcc"

    def make_head(self, name: str, targets: Tensor, classes: tuple[str, ...], options: Mapping[str, Any]) -> HeadSpec:
        check_scores(targets, name)
        return self._head(name, options, readout="value")

    def losses(self, outputs: Tensor, targets: Tensor, head: HeadSpec) -> Tensor:
        better = (targets.unsqueeze(1) - targets).sign()  # [B, B], row against column
        leads = better * (outputs - outputs[:, 0])
        return (F.softplus(-leads) * better.abs()).sum(1) / better.abs().sum(1).clamp_min(1)

    def metrics(self, outputs: Tensor, targets: Tensor, head: HeadSpec) -> dict[str, float]:
        return {"srcc": spearman(outputs[:, 0], targets), "plcc": pearson(outputs[:, 0], targets)}
