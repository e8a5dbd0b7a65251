"""Numbers that say how well outputs fit targets, over a whole validation set on the CPU."""

import numpy as np
import scipy
import torch
from torch import Tensor


def pearson(predicted: Tensor, true: Tensor) -> float:
    """Pearson's correlation of [N] and [N]; 0 with something constant."""
    first, second = predicted.double().numpy(), true.double().numpy()
    if np.ptp(first) == 0 or np.ptp(second) == 0:
        return 0.0
    return float(np.corrcoef(first, second)[0, 1])


def spearman(predicted: Tensor, true: Tensor) -> float:
    """Spearman's rank correlation of [N] and [N]: Pearson's of the ranks, where ties share their mean rank; 0 with something constant."""
    return pearson(_ranks(predicted), _ranks(true))


def root_mean_square(errors: Tensor) -> float:
    return errors.double().square().mean().sqrt().item()


def top_k_accuracy(outputs: Tensor, labels: Tensor, k: int) -> float:
    """Share of pictures whose class [N] has one of the k highest outputs [N, K]."""
    highest = outputs.topk(min(k, outputs.shape[1]), dim=1).indices
    return (highest == labels.unsqueeze(1)).any(1).double().mean().item()


def balanced_accuracy(outputs: Tensor, labels: Tensor) -> float:
    """Mean over the classes that occur of the share of their pictures that are classified right (Brodersen et al. 2010)."""
    hits = (outputs.argmax(1) == labels).double()
    return float(np.mean([hits[labels == label].mean().item() for label in labels.unique()]))


def average_precision(scores: np.ndarray, relevant: np.ndarray) -> float:
    """Sum over thresholds n of (recall_n - recall_n-1) precision_n for scores [N] and 0 or 1 [N], at least one 1.

    Equal scores are one threshold, as in scikit-learn's average_precision_score: their order in the array must not matter.
    """
    order = np.argsort(-scores, kind="stable")
    ranked = scores[order]
    thresholds = np.flatnonzero(np.append(ranked[1:] != ranked[:-1], True))  # the last place of each group of equal scores
    true_positives = np.cumsum(relevant[order])[thresholds]
    recall_steps = np.diff(true_positives, prepend=0) / true_positives[-1]
    return float((recall_steps * true_positives / (thresholds + 1)).sum())


def mean_average_precision(outputs: Tensor, tags: Tensor) -> float:
    """Mean of the average precision of every tag that occurs: outputs [N, K] and tags of 0 and 1 [N, K]; 0 if none does."""
    scores, relevant = outputs.numpy(), tags.numpy()
    values = [average_precision(scores[:, tag], relevant[:, tag]) for tag in np.flatnonzero(relevant.any(0))]
    return float(np.mean(values)) if values else 0.0


def micro_f1(outputs: Tensor, tags: Tensor) -> float:
    """2 TP / (2 TP + FP + FN) over all pictures and tags [N, K], where an output above 0 says that a tag applies; 0 if none does."""
    said, true = outputs > 0, tags > 0.5
    counted = (said.sum() + true.sum()).item()
    return 2 * (said & true).sum().item() / counted if counted else 0.0


def _ranks(values: Tensor) -> Tensor:
    return torch.from_numpy(scipy.stats.rankdata(values.double().numpy()))
