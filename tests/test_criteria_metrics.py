"""Metrics against scipy and what can be computed by hand."""

import itertools

import numpy as np
import pytest
import torch
from scipy import stats

from library.scorer_training.criteria.base import get_criterion
from library.scorer_training.criteria.metrics import (
    average_precision,
    balanced_accuracy,
    mean_average_precision,
    micro_f1,
    pearson,
    spearman,
    top_k_accuracy,
)
from library.scorers.heads import HeadSpec
from tests.helpers.toy_targets import randn, rng


def test_correlations_equal_scipys_with_ties() -> None:
    truth = torch.randint(0, 5, (200,), generator=rng(1)).float()
    guess = randn(200) + truth
    metrics = get_criterion("mse").metrics(guess.unsqueeze(1), truth, HeadSpec())
    assert metrics["srcc"] == pytest.approx(np.asarray(stats.spearmanr(guess.numpy(), truth.numpy()))[0])
    assert metrics["plcc"] == pytest.approx(np.asarray(stats.pearsonr(guess.numpy(), truth.numpy()))[0], rel=1e-5)
    assert metrics["rmse"] == pytest.approx((guess - truth).square().mean().sqrt().item(), rel=1e-5)
    assert spearman(torch.ones(4), torch.arange(4.0)) == 0 and pearson(torch.arange(4.0), torch.ones(4)) == 0


def test_accuracies() -> None:
    outputs = torch.tensor([[6.0, 5, 4, 3, 2, 1, 0]] * 4)
    assert top_k_accuracy(outputs, torch.tensor([0, 0, 4, 6]), 1) == 0.5
    assert top_k_accuracy(outputs, torch.tensor([0, 0, 4, 6]), 5) == 0.75
    assert top_k_accuracy(outputs[:, :2], torch.tensor([0, 1, 1, 1]), 5) == 1
    assert balanced_accuracy(outputs, torch.tensor([0, 0, 0, 6])) == 0.5  # all of one class, none of the other; the rest does not occur


@pytest.mark.parametrize(
    ("scores", "relevant", "expected"),
    [
        ([0.9, 0.8, 0.7, 0.6], [1, 0, 1, 0], 1 / 2 + 1 / 2 * 2 / 3),
        ([0.5, 0.5, 0.5, 0.1], [1, 0, 0, 1], 1 / 2 * 1 / 3 + 1 / 2 * 2 / 4),  # three equal scores are one threshold
        ([0.1, 0.1, 0.1, 0.1], [0, 1, 0, 0], 1 / 4),
        ([4, 3, 2, 1], [0, 0, 0, 1], 1 / 4),
        ([4, 3, 2, 1], [1, 1, 0, 0], 1),
    ],
)
def test_average_precision_by_hand(scores: list[float], relevant: list[int], expected: float) -> None:
    for order in itertools.permutations(range(4)):
        assert average_precision(np.array(scores)[[*order]], np.array(relevant)[[*order]]) == pytest.approx(expected)


def test_mean_average_precision_is_over_the_tags_that_occur() -> None:
    outputs = torch.tensor([[2.0, -1, 5], [1, -3, 5], [-1, -2, 5]])
    tags = torch.tensor([[0.0, 1, 0], [1, 0, 0], [0, 1, 0]])
    assert mean_average_precision(outputs, tags) == pytest.approx((1 / 2 + 1) / 2)
    assert mean_average_precision(outputs, torch.zeros(3, 3)) == 0
    assert micro_f1(outputs, tags) == pytest.approx(2 * 1 / (2 * 1 + 4 + 2))
    assert micro_f1(-outputs.abs(), torch.zeros(3, 3)) == 0
