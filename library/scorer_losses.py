"""What a scorer is asked to learn: criteria by name. To add one, write its functions and add its row to CRITERIA."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import torch
from scipy import stats
from torch import Tensor
from torch.nn import functional as F

from library.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Criterion:
    """A loss and the numbers that say how well it went.

    Attributes:
        target: the manifest's column that it learns: "score" ([B] float) or "label" ([B] int64).
        loss: (outputs, targets, std) -> loss of each picture [B]. Outputs are [B] for a score, [B, number of classes] for a label.
            `std` is the standard deviation of the training scores, the unit of a score's error; labels have none.
        metrics: (outputs, targets) over a whole validation set -> numbers by name.
        selection: the metric that chooses the best checkpoint; higher is better.
    """

    target: str
    loss: Callable[[Tensor, Tensor, float], Tensor]
    metrics: Callable[[Tensor, Tensor], dict[str, float]]
    selection: str


def mse_loss(outputs: Tensor, targets: Tensor, std: float) -> Tensor:
    """((output - target) / std)^2. On noisy latents its minimum is the expected score of the pictures that they can become."""
    return ((outputs - targets) / std).square()


def huber_loss(outputs: Tensor, targets: Tensor, std: float) -> Tensor:
    """Squared up to one standard deviation and linear beyond (Huber 1964), for ratings with outliers."""
    return F.smooth_l1_loss(outputs / std, targets / std, reduction="none")


def classification_loss(outputs: Tensor, targets: Tensor, _std: float) -> Tensor:
    """Cross entropy with label smoothing 0.1; Szegedy et al., arXiv 1512.00567."""
    return F.cross_entropy(outputs, targets, reduction="none", label_smoothing=0.1)


def regression_metrics(outputs: Tensor, targets: Tensor) -> dict[str, float]:
    """Spearman's rank correlation (SRCC), Pearson's correlation (PLCC) and root mean squared error (RMSE) of [N] and [N].

    A correlation with something constant is 0.
    """
    predicted, true = outputs.double().numpy(), targets.double().numpy()
    rmse = float(np.sqrt(np.square(predicted - true).mean()))
    if np.ptp(predicted) == 0 or np.ptp(true) == 0:
        return {"srcc": 0.0, "plcc": 0.0, "rmse": rmse}
    return {"srcc": _correlation(stats.rankdata(predicted), stats.rankdata(true)), "plcc": _correlation(predicted, true), "rmse": rmse}


def _correlation(first: np.ndarray, second: np.ndarray) -> float:
    return float(np.corrcoef(first, second)[0, 1])


def classification_metrics(outputs: Tensor, targets: Tensor) -> dict[str, float]:
    """Share of pictures whose class has the highest output (top1), or one of the five highest (top5). [N, classes] and [N]."""
    ranked = outputs.topk(min(5, outputs.shape[1]), dim=1).indices  # [N, 5]
    hits = ranked == targets.unsqueeze(1)
    return {"top1": hits[:, 0].double().mean().item(), "top5": hits.any(1).double().mean().item()}


CRITERIA: Mapping[str, Criterion] = MappingProxyType(
    {
        "mse": Criterion(target="score", loss=mse_loss, metrics=regression_metrics, selection="srcc"),
        "huber": Criterion(target="score", loss=huber_loss, metrics=regression_metrics, selection="srcc"),
        "classification": Criterion(target="label", loss=classification_loss, metrics=classification_metrics, selection="top1"),
    }
)


def criteria_of(target: str) -> tuple[str, ...]:
    """Names of the criteria that learn this column."""
    return tuple(name for name, criterion in CRITERIA.items() if criterion.target == target)


def score_scale(scores: Tensor) -> tuple[float, float]:
    """Mean and standard deviation of the training scores [N]: what a network learns is (score - mean) / std.

    Raises:
        UserError: if all scores are the same.
    """
    mean, std = scores.double().mean().item(), scores.double().std(correction=0).item()
    if not torch.tensor(std).isfinite() or std <= 1e-9 * max(1.0, abs(mean)):
        raise UserError(f"all {len(scores)} training scores are {mean:g}, so there is nothing to learn; rate pictures that differ")
    return mean, std
