"""Criteria that learn a score by its error: squared, Huber's, and the likelihood of a normal distribution."""

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from library.errors import UserError
from library.scorer_training.criteria.base import CRITERIA, Criterion
from library.scorer_training.criteria.metrics import pearson, root_mean_square, spearman
from library.scorers.heads import LOG_VARIANCE_RANGE, READOUTS, HeadSpec

BETA = 0.5  # of the beta-NLL


def check_scores(scores: Tensor, dataset: str) -> tuple[float, float]:
    """Mean and standard deviation of training scores [N].

    Raises:
        UserError: some are not finite, or all are the same.
    """
    if not scores.isfinite().all():
        raise UserError(f"dataset {dataset} has scores that are not finite; give every picture a number, or leave it out")
    mean, std = scores.double().mean().item(), scores.double().std(correction=0).item()
    if std <= 1e-9 * max(1.0, abs(mean)):
        raise UserError(f"all {len(scores)} training scores of dataset {dataset} are {mean:g}; rate pictures that differ")
    return mean, std


def standardised(scores: Tensor, head: HeadSpec) -> Tensor:
    return (scores - head.mean) / head.std


class ScoreRegression(Criterion):
    """What the regressions share: a head in units of the training scores, read as the score, and its correlation and error.

    Metrics: `srcc` (Spearman), `plcc` (Pearson) and `rmse` in the score's own units.
    """

    target = "score"
    selection = "srcc"
    readout: ClassVar[str] = "value"
    outputs: ClassVar[int] = 1

    def make_head(self, name: str, targets: Tensor, classes: tuple[str, ...], options: Mapping[str, Any]) -> HeadSpec:
        mean, std = check_scores(targets, name)
        return self._head(name, options, readout=self.readout, outputs=self.outputs, mean=mean, std=std)

    def metrics(self, outputs: Tensor, targets: Tensor, head: HeadSpec) -> dict[str, float]:
        scores, _ = READOUTS[head.readout](outputs, head)
        return {"srcc": spearman(scores, targets), "plcc": pearson(scores, targets), "rmse": root_mean_square(scores - targets)}


@CRITERIA.register("mse")
class SquaredError(ScoreRegression):
    """(output - target)^2 in standard deviations. On noisy latents its minimum is the mean score of the pictures that they can become."""

    def losses(self, outputs: Tensor, targets: Tensor, head: HeadSpec) -> Tensor:
        return (outputs[:, 0] - standardised(targets, head)).square()


@CRITERIA.register("huber")
class HuberError(ScoreRegression):
    """Half the squared error up to one standard deviation and linear beyond (Huber 1964): an outlier pulls no harder than that."""

    def losses(self, outputs: Tensor, targets: Tensor, head: HeadSpec) -> Tensor:
        return F.huber_loss(outputs[:, 0], standardised(targets, head), reduction="none")


@CRITERIA.register("gaussian")
class GaussianLikelihood(ScoreRegression):
    """The negative log likelihood of a normal distribution whose mean and variance are both learned (Nix and Weigend 1994).

    v^beta ((output - target)^2 / v + log v) / 2 with the variance v in the first factor taken as a constant: the beta-NLL (Seitzer et
    al., arXiv 2203.09168). Plain likelihood (beta 0) divides the error of a picture by its variance, so that what looks hard early is
    never learned; with beta 1 the mean learns as under the squared error; 0.5 lies between.

    Metrics: also `nll`, the plain negative log likelihood in standardised units (1.42 for a constant).
    """

    readout = "gaussian"
    outputs = 2

    def losses(self, outputs: Tensor, targets: Tensor, head: HeadSpec) -> Tensor:
        log_variances = outputs[:, 1].clamp(*LOG_VARIANCE_RANGE)
        outside = (outputs[:, 1] - log_variances).abs()  # where the clamp stops the gradient, this leads back
        return (BETA * log_variances.detach()).exp() * _negative_log_likelihood(outputs[:, 0], log_variances, targets, head) + outside

    def metrics(self, outputs: Tensor, targets: Tensor, head: HeadSpec) -> dict[str, float]:
        nll = _negative_log_likelihood(outputs[:, 0], outputs[:, 1].clamp(*LOG_VARIANCE_RANGE), targets, head)
        return {**super().metrics(outputs, targets, head), "nll": nll.double().mean().item() + 0.5 * math.log(2 * math.pi)}


def _negative_log_likelihood(means: Tensor, log_variances: Tensor, targets: Tensor, head: HeadSpec) -> Tensor:
    """Of a normal distribution, without the constant log(2 pi) / 2; all [B], in standardised units."""
    squared_errors = (means - standardised(targets, head)).square()
    return 0.5 * (squared_errors * torch.exp(-log_variances) + log_variances)
