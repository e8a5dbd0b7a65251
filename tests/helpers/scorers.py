"""Scorers whose gradient is known on paper, and latents of no model for them and for others."""

from collections.abc import Sequence

import torch
from torch import Tensor

from library.models.base import DiffusionModel
from library.models.vae import VaeFingerprint
from library.objectives.rewards import ScorerEnsemble
from library.scorers.base import Scorer, ScorerSpec
from library.types import Conditioning

VAE = VaeFingerprint(scaling_factor=0.18215, probe=(0.1, -0.4, 0.9))


class StandardisedScorer(Scorer):
    """A subclass says what the score is in standard deviations around the mean of its spec."""

    def score(self, latents: Tensor, sigmas: Tensor, cond: Conditioning | None, prompts: Sequence[str] | None) -> Tensor:
        return self.standardised(latents, sigmas, cond, prompts) * self.spec.std + self.spec.mean

    def standardised(self, latents: Tensor, sigmas: Tensor, cond: Conditioning | None, prompts: Sequence[str] | None) -> Tensor:
        raise NotImplementedError


class ChannelScorer(StandardisedScorer):
    """The mean of latent channel 0: its gradient is the same everywhere."""

    def standardised(self, latents: Tensor, sigmas: Tensor, cond: Conditioning | None, prompts: Sequence[str] | None) -> Tensor:
        return latents[:, 0].mean((1, 2))


class CutScorer(ChannelScorer):
    """The same score with the gradient path cut."""

    def standardised(self, latents: Tensor, sigmas: Tensor, cond: Conditioning | None, prompts: Sequence[str] | None) -> Tensor:
        return super().standardised(latents.detach(), sigmas, cond, prompts) + 0 * latents.mean((1, 2, 3))


class WavyScorer(StandardisedScorer):
    """Something curved, so that a gradient taken at the wrong place shows."""

    def standardised(self, latents: Tensor, sigmas: Tensor, cond: Conditioning | None, prompts: Sequence[str] | None) -> Tensor:
        return (latents.sin() + 0.5 * (latents * latents.roll(1, dims=-1))).mean((1, 2, 3)) / (1 + sigmas)


class Tilted(ChannelScorer):
    """Channel 0, and channel 1 by a slope: members agree about channel 0 and not about channel 1."""

    slope: float

    def standardised(self, latents: Tensor, sigmas: Tensor, cond: Conditioning | None, prompts: Sequence[str] | None) -> Tensor:
        return super().standardised(latents, sigmas, cond, prompts) + self.slope * latents[:, 1].mean((1, 2))


def scorer_for(model: DiffusionModel, scorer_class: type[Scorer] = ChannelScorer, **spec) -> Scorer:
    return scorer_class(ScorerSpec(kind=scorer_class.__name__, architecture={}, vae=model.vae_fingerprint(), **spec))


def a_scorer(scorer_class: type[Scorer] = ChannelScorer, name: str = "", **spec) -> Scorer:
    scorer = scorer_class(ScorerSpec(kind=scorer_class.__name__, architecture={}, vae=VAE, **spec))
    scorer.name = name or scorer.name
    return scorer


def ensemble_of(*slopes: float, units: Sequence[tuple[float, float]] | None = None) -> ScorerEnsemble:
    members = []
    for slope, (mean, std) in zip(slopes, units or [(0.0, 1.0)] * len(slopes), strict=True):
        member = a_scorer(type("Tilted", (Tilted,), {"slope": slope}), name=f"slope{slope:g}", mean=mean, std=std)
        members.append(member)
    return ScorerEnsemble(members)


def some_latents(rows: int = 2, seed: int = 0) -> Tensor:
    return torch.randn(rows, 4, 8, 8, generator=torch.Generator().manual_seed(seed))


def noise(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
