"""The criterion that learns how people voted, not only their mean."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from library.errors import UserError
from library.scorer_training.criteria.base import CRITERIA, Criterion
from library.scorer_training.criteria.metrics import pearson, root_mean_square, spearman
from library.scorers.heads import READOUTS, HeadSpec


def vote_shares(votes: Tensor) -> Tensor:
    """Counts of votes [..., K], or any multiple of them, to their distribution."""
    return votes / votes.sum(-1, keepdim=True).clamp_min(1e-12)


def cumulative_difference(probabilities: Tensor, shares: Tensor) -> Tensor:
    """Difference of the cumulative distributions at each bin [..., K]; the earth mover's distance is its norm."""
    return (probabilities - shares).cumsum(-1)


@CRITERIA.register("emd")
class EarthMovers(Criterion):
    """The squared earth mover's distance between the predicted and the given votes over K ordered bins.

    mean_k (CDF_k - CDF'_k)^2: r = 2, as NIMA trains with (Talebi and Milanfar, arXiv 1709.05424), without its root, whose gradient
    has no bound where the two agree (Hou et al., arXiv 1611.05916). The score is the mean of the votes, its stated spread theirs.

    Metrics: `srcc`, `plcc` and `rmse` of the mean vote, `srcc_std` of the standard deviation of the votes, and `emd`, the distance with
    r = 1: mean_k |CDF_k - CDF'_k|.
    """

    target = "votes"
    selection = "srcc"

    def make_head(self, name: str, targets: Tensor, classes: tuple[str, ...], options: Mapping[str, Any]) -> HeadSpec:
        if not targets.isfinite().all() or (targets < 0).any() or (targets.sum(1) <= 0).any():
            raise UserError(f"dataset {name} has pictures whose votes are missing or negative; give counts of votes, or leave them out")
        shares = vote_shares(targets.double())
        if shares.std(0, correction=0).max() < 1e-6:
            raise UserError(f"all {len(targets)} training pictures of dataset {name} have the same votes; take pictures that differ")
        values = tuple(float(value) for value in range(1, targets.shape[1] + 1))
        return self._head(name, options, readout="distribution", outputs=len(values), values=values)

    def losses(self, outputs: Tensor, targets: Tensor, head: HeadSpec) -> Tensor:
        return cumulative_difference(outputs.softmax(-1), vote_shares(targets)).square().mean(-1)

    def metrics(self, outputs: Tensor, targets: Tensor, head: HeadSpec) -> dict[str, float]:
        shares = vote_shares(targets)
        read = READOUTS[head.readout]
        (means, stds), (true_means, true_stds) = read(outputs, head), read(shares.log(), head)  # softmax(log p) is p
        assert stds is not None and true_stds is not None
        return {
            "srcc": spearman(means, true_means),
            "plcc": pearson(means, true_means),
            "rmse": root_mean_square(means - true_means),
            "srcc_std": spearman(stds, true_stds),
            "emd": cumulative_difference(outputs.softmax(-1), shares).abs().mean().item(),
        }
