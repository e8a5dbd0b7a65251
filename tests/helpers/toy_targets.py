"""Toy problems for criteria: features, true scores, and what people would say of them."""

import torch
from torch import Tensor

from library.scorer_training.criteria.base import CRITERIA, Criterion, get_criterion
from library.scorers.heads import HeadSpec

CLASSES = {"label": ("bad", "fair", "good"), "tags": ("sharp", "other", "third")}

WITH_SCORES = [name for name, criterion in CRITERIA.items() if criterion.gives_score]


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=rng(seed))


def toy_targets(criterion: Criterion, scores: Tensor, others: Tensor) -> Tensor:
    """What a criterion learns of pictures whose true score is `scores` [N] (pairs [N, 2]); `others` [N] is something else about them."""
    if criterion.target == "pair":
        lead = scores[:, 0] - scores[:, 1]
        return torch.where(lead.abs() < 0.3, 0.5, (lead > 0).float())
    if criterion.target == "label":
        return (scores > -0.5).long() + (scores > 0.5).long()
    if criterion.target == "tags":
        return torch.stack([scores > 0, others > 0, others > 1], dim=1).float()
    if criterion.target == "votes":
        return 20 * (-(torch.arange(1, 11) - (5.5 + 1.5 * scores).unsqueeze(1)).square() / 2).softmax(-1)
    return (3 * scores).round() / 3  # few enough levels for ordinal


def toy(name: str, count: int = 96, **options: object) -> tuple[Criterion, Tensor, Tensor, Tensor, HeadSpec]:
    """A criterion, features [N, 6] (pairs [N, 2, 6]), the true score of each picture, targets, and the head for them."""
    criterion = get_criterion(name)
    features = randn(*((count, 2, 6) if criterion.target == "pair" else (count, 6)))
    scores = features[..., 0] - features[..., 1] / 2
    targets = toy_targets(criterion, scores, features[..., 2])
    defaults = {"target_class": {"label": "good", "tags": "sharp"}.get(criterion.target, "")}
    return criterion, features, scores, targets, criterion.make_head("toy", targets, CLASSES.get(criterion.target, ()), defaults | options)
