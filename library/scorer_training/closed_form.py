"""A linear head in one step, on a backbone that learned to see without ratings: ridge regression on the pictures' clean features.

A backbone of many weights overfits fifty ratings. Where its features are given, a score is a linear function of them, and how far
the ratings are to be believed is one number, which the ratings left out one at a time decide.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn

from library.scorer_training.criteria.ensembles import bootstrap_weights, mean_outputs
from library.scorer_training.criteria.regression import SquaredError, standardised
from library.scorer_training.folds import REPEATS, mean_table
from library.scorer_training.run import ScorerRun
from library.scorer_training.tasks import Task
from library.scorer_training.validation import SigmaTable, format_table, table_of, validate
from library.scorers.base import BackboneScorer
from library.scorers.heads import Head
from library.scorers.worth import worth_in

logger = logging.getLogger(__name__)

PENALTIES = tuple(10.0**exponent for exponent in torch.arange(-4, 3.25, 0.5).tolist())  # times the features' mean square


def ridge(features: Tensor, targets: Tensor, weights: Tensor | None = None) -> tuple[Tensor, float]:
    """The linear function of features [N, D] that predicts targets [N]: its weights [D] and its bias, float64.

    Its penalty is the one of PENALTIES with the least squared error of pictures left out one at a time, by the formula that needs no
    refitting (Hastie, Tibshirani and Friedman 2009, equation 7.64); `weights` [N] say how much a picture counts.
    """
    x, y = features.double(), targets.double()
    weights = torch.ones_like(y) if weights is None else weights.double()
    share = weights / weights.sum()
    centre, level = share @ x, share @ y
    root = (weights / weights.mean()).sqrt()
    x, y = root[:, None] * (x - centre), root * (y - level)
    scale = x.square().sum() / len(x)
    values, vectors = torch.linalg.eigh(x @ x.T / scale)  # [N], [N, N]: as many as there are pictures, however many features
    seen, best = vectors.T @ y, (torch.inf, 0.0)
    for penalty in PENALTIES:
        kept = values.clamp_min(0) / (values.clamp_min(0) + penalty)
        pull = (vectors.square() * kept).sum(1) + share  # of each picture on its own prediction, the bias's included
        error = ((y - vectors @ (kept * seen)) / (1 - pull).clamp_min(1e-12)).square().mean().item()
        best = min(best, (error, penalty))
    weight = x.T @ (vectors @ (seen / (values.clamp_min(0) + best[1]))) / scale
    return weight, float(level - centre @ weight)


def fits_head(scorer: BackboneScorer, tasks: list[Task]) -> bool:
    """Whether the head is fitted here: there is one score to learn, by its squared error, on given features.

    Raises:
        UserError: the backbone gives features, but has not learned to see.
    """
    scorer.backbone.check_taught()
    return scorer.backbone.features_are_given and len(tasks) == 1 and isinstance(tasks[0].criterion, SquaredError)


@torch.no_grad()
def fit_head(run: ScorerRun) -> dict[str, Any]:
    """Give the scorer of `run` its head, and return the record of that as JSON values.

    How good it is say the validation pictures; where there are none, heads of folds do, each on the pictures that it was not fitted to.
    """
    task, size = run.stage.tasks[0], run.settings.train_batch_size
    run.scorer.eval()
    order = torch.cat([batch.indices for batch in task.train.in_order(size)])
    numbers, weights = task.train_pictures[order], task.train.weights[order]

    def features_of(dataset: Any) -> dict[float, tuple[Tensor, Tensor]]:
        return validate(run.features, dataset, batch_size=size)  # [N, D] and targets [N], for each noise level

    train = features_of(task.train)

    def heads(rows: Tensor) -> Tensor:
        """Fitted to these pictures: weights and bias of each member [D + 1, members]."""
        features, targets = (part[rows] for part in train[0.0])
        shares = bootstrap_weights(task.head.members, numbers[rows], run.settings.seed) * weights[rows, None]
        fitted = [ridge(features, standardised(targets, task.head), own) for own in shares.unbind(1)]
        return torch.stack([torch.cat([weight, weight.new_tensor([bias])]) for weight, bias in fitted], dim=1)

    def table(found: dict[float, tuple[Tensor, Tensor]], outputs: dict[float, Tensor]) -> SigmaTable:
        return table_of({sigma: (mean_outputs(outputs[sigma], task.head), found[sigma][1]) for sigma in found}, task.criterion, task.head)

    everything = torch.arange(len(order))
    if task.folds is None:
        found = features_of(task.validation)
        fitted, pictures = heads(everything), len(task.validation)
        measured = table(found, {sigma: _outputs(own[0], fitted) for sigma, own in found.items()})
    else:
        tables = []
        for repeat in range(REPEATS):
            outputs = {sigma: torch.zeros(len(order), task.head.members, 1) for sigma in train}
            for fold in task.folds(repeat):
                inside = torch.isin(numbers, fold.train_pictures)
                fitted = heads(everything[inside])
                for sigma, own in train.items():
                    outputs[sigma][~inside] = _outputs(own[0][~inside], fitted)
            tables.append(table(train, outputs))
        measured, pictures = mean_table(tables), len(order)
    own_head = run.scorer.heads[task.name]
    assert isinstance(own_head, Head)
    for member, own in zip(own_head.members, heads(everything).float().unbind(1), strict=True):
        assert isinstance(member, nn.Linear)
        member.weight.copy_(own[None, :-1])
        member.bias.copy_(own[-1:])
    logger.info("%s, the head fitted to %d pictures at once:\n%s", task.name, len(order), format_table(measured))
    worth = worth_in(measured, pictures, in_folds=task.folds is not None)
    record = {"steps": 0, "best_step": 0, "head": "ridge", "tasks": {task.name: task.describe()}, "validation": measured}
    return {**record, "validation_by_task": {task.name: measured}, "worth": worth and worth.to_dict()}


def _outputs(features: Tensor, heads: Tensor) -> Tensor:
    """Features [N, D] and heads [D + 1, members] to outputs [N, members, 1]."""
    return (features.double() @ heads[:-1] + heads[-1]).float()[..., None]
