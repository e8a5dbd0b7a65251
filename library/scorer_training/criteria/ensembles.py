"""Heads of several members: the pictures that each sees, their losses, and their mean."""

import math

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from library.scorer_training.criteria.base import Criterion
from library.scorers.heads import LOG_VARIANCE_RANGE, HeadSpec


def bootstrap_weights(num_members: int, indices: Tensor, seed: int) -> Tensor:
    """Weights [B, num_members] of pictures in the losses of an ensemble's members: the Bayesian bootstrap (Rubin 1981).

    They are exponential(1), and a function of the seed, the member and the picture's index [B] alone: a member meets the same
    reweighting of the pictures in every epoch, whatever the batches. A single member has nobody to differ from: its weights are 1.
    """
    if num_members == 1:
        return torch.ones(len(indices), 1)
    pictures = indices.cpu().numpy().astype(np.uint64)[:, None]
    members = _scrambled(_scrambled(np.full((1, 1), seed, dtype=np.uint64)) + np.arange(num_members, dtype=np.uint64))
    uniform = (_scrambled(members + pictures) >> np.uint64(11)) * 2.0**-53  # [B, num_members] in [0, 1)
    return torch.from_numpy(-np.log1p(-uniform)).float()


def member_losses(criterion: Criterion, outputs: Tensor, targets: Tensor, head: HeadSpec, weights: Tensor | None = None) -> Tensor:
    """Mean over the members of their weighted losses [B].

    Args:
        outputs: [B, members, K], for pairs [B, 2, members, K].
        targets: [B, ...]. weights: [B, members], or None for equal ones.
    """
    losses = torch.stack([criterion.losses(own, targets, head) for own in outputs.float().unbind(-2)], dim=1)  # [B, members]
    return (losses if weights is None else losses * weights).mean(1)


def mean_outputs(outputs: Tensor, head: HeadSpec) -> Tensor:
    """The ensemble as one member, for metrics: [..., members, K] to [..., K].

    What is averaged is what makes a readout linear, so that reading the result gives the score of
    `library.scorers.heads.score_and_uncertainty`: probabilities of votes and of being above a level, log odds of tags and classes
    (for more than two classes the score is the same to first order in the members' disagreement). Of normal and vote
    distributions it is the mixture, so the standard deviation is the same, too.
    """
    outputs = outputs.float()
    if head.readout == "gaussian":
        means, variances = outputs[..., 0], outputs[..., 1].clamp(*LOG_VARIANCE_RANGE).exp()
        return torch.stack([means.mean(-1), (variances.mean(-1) + means.var(-1, correction=0)).log()], dim=-1)
    if head.readout == "distribution":
        return _log_mean_exp(outputs.log_softmax(-1))
    if head.readout == "ordinal":
        return _log_mean_exp(F.logsigmoid(outputs)) - _log_mean_exp(F.logsigmoid(-outputs))
    return outputs.mean(-2)


def _log_mean_exp(values: Tensor) -> Tensor:
    """log of the mean over the members of exp(values): [..., members, K] to [..., K]."""
    return values.logsumexp(-2) - math.log(values.shape[-2])


def _scrambled(numbers: np.ndarray) -> np.ndarray:
    """A hash of each uint64 to a uniform one: SplitMix64 (Steele et al. 2014), whose arithmetic is modulo 2^64."""
    mixed = numbers + np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))
