"""Scorers whose gradient is known on paper."""

from collections.abc import Sequence

from torch import Tensor

from library.models.base import DiffusionModel
from library.scorers.base import Scorer, ScorerSpec
from library.types import Conditioning


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


def scorer_for(model: DiffusionModel, scorer_class: type[Scorer] = ChannelScorer, **spec) -> Scorer:
    return scorer_class(ScorerSpec(kind=scorer_class.__name__, architecture={}, vae=model.vae_fingerprint(), **spec))
