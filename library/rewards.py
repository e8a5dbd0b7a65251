"""Several scorers become one reward."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from library.errors import UserError
from library.models.vae import VaeFingerprint
from library.scorers.base import Scorer
from library.scorers.io import check_scorer_fits, load_scorer
from library.types import Conditioning, PromptSpec, RewardOutput

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Reward:
    """The weighted sum of scores, each in its own standard deviations, so that weights mean the same for every scorer.

    Attributes:
        scorers: frozen, on the model's device.
        weights: one a scorer; below 0 when a positive slider is to lower that score.
    """

    scorers: Sequence[Scorer]
    weights: Sequence[float]

    def to(self, device: torch.device | str) -> "Reward":
        return Reward([scorer.to(device) for scorer in self.scorers], self.weights)

    def __call__(self, latents: Tensor, sigmas: Tensor, cond: Conditioning | None, prompts: Sequence[PromptSpec]) -> RewardOutput:
        """Reward of variance-preserving latents [B, C, h, w] at sigmas [B]; differentiable in the latents."""
        texts = [prompt.prompt for prompt in prompts]
        with torch.autocast(latents.device.type, enabled=False):  # half precision would round the gradient of a small change away
            terms = {
                scorer.name: (scorer(latents.float(), sigmas.float(), cond, texts) - scorer.spec.mean) / scorer.spec.std
                for scorer in self.scorers
            }
        total = torch.stack([weight * term for weight, term in zip(self.weights, terms.values(), strict=True)]).sum(0)
        return RewardOutput(total, {name: term.detach() for name, term in terms.items()})


def load_reward(
    paths: Sequence[str],
    weights: Sequence[float],
    vae: VaeFingerprint,
    *,
    needs_noise_aware: bool,
    force: bool,
    gradient_checkpointing: bool = False,
) -> Reward:
    """Load scorer files and check that they can judge this model's latents at the noise levels they will be shown.

    Args:
        weights: one a file; none is 1 for each.
        needs_noise_aware: whether noisy latents will be scored.
        force: use a scorer all the same when it never saw noise.
        gradient_checkpointing: let scorers that can save memory do so.

    Raises:
        UserError: a file that is no scorer, one for another VAE, a noise-blind one that is needed noise-aware, weights that do not match.
    """
    weights = list(weights) or [1.0] * len(paths)
    if len(weights) != len(paths):
        raise UserError(f"scorer_weights holds {len(weights)} numbers for {len(paths)} scorers; give one a scorer, or none")
    scorers = []
    for path in paths:
        scorer = load_scorer(path)
        check_scorer_fits(scorer, vae)
        if needs_noise_aware and not scorer.spec.noise_aware:
            advice = "scorer {} was trained on clean latents only, and score_estimator prev scores noisy ones"
            if not force:
                raise UserError(advice.format(path) + "; use score_estimator x0, or train the scorer with noise, or set force_scorer")
            logger.warning(advice.format(path) + "; used all the same (force_scorer)")
        if gradient_checkpointing:
            scorer.enable_gradient_checkpointing()
        scorers.append(scorer.requires_grad_(False).eval())
    names = [scorer.name for scorer in scorers]
    if len(set(names)) < len(names):
        raise UserError(f"two scorers have the name {max(names, key=names.count)!r}; train or save one under another output_name")
    return Reward(scorers, weights)
