"""Which scores a slider moves: their settings, and how scorer files become the reward."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from library.errors import UserError
from library.models.vae import LatentSpace, VaeFingerprint
from library.objectives.rewards import Goal, Limit, Reward, ScorerEnsemble
from library.scorers.base import Scorer
from library.scorers.heads import READOUTS
from library.scorers.io import check_scorer_fits, load_scorer
from library.settings.options import option

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class RewardConfig:
    """Which scores the slider moves, which it must leave alone, and how far they are trusted."""

    scorer: tuple[str, ...] = option((), help="Latent scorer files, made by train_latent_scorer.py.")
    scorer_weights: tuple[float, ...] = option((), help="Weight of each scorer; below 0 lowers that score. Default 1 each.")
    scorer_limits: tuple[str, ...] = option(
        (),
        help="One word a scorer: none; hold=0.2 keeps it within 0.2 of its standard deviations of the frozen model, and neither raises "
        "nor lowers it; max=7.5 or min=4 are brakes, in its own units: a picture beyond is pushed no farther, "
        "so that the mean may end somewhat beyond.",
    )
    scorer_ensemble: bool = option(
        False, help="The scorers are of one opinion: take their mean, and their disagreement as uncertainty.", expert=True
    )
    force_scorer: bool = option(False, help="Use a scorer that never saw noise on noisy latents all the same.", expert=True)
    allow_code: tuple[str, ...] = option(
        (), help="Code that scorer files may run, as they ask for it, such as my_scorer.py:score; also for judge_scorers.", expert=True
    )

    def __post_init__(self) -> None:
        count = self.num_scores
        counted = "the one score of an ensemble" if self.scorer_ensemble else f"{count} scorers"
        if len(self.scorer_weights) not in (0, count):
            raise UserError(f"scorer_weights holds {len(self.scorer_weights)} numbers for {counted}; give one a score, or none")
        if len(self.scorer_limits) not in (0, count):
            raise UserError(f"scorer_limits holds {len(self.scorer_limits)} words for {counted}; give one a score (none for no limit)")
        for weight, limit in zip(self.weights, self.limits, strict=True):
            if limit is not None and limit.kind == "hold" and weight != 0:
                raise UserError(f"scorer_weights has {weight:g} for a score that scorer_limits holds; a held score has weight 0")
        if count and not any(self.weights):
            raise UserError("no score is to rise or fall: all are held or have weight 0; give one a weight in scorer_weights and no hold")

    @property
    def num_scores(self) -> int:
        return min(len(self.scorer), 1) if self.scorer_ensemble else len(self.scorer)

    @property
    def limits(self) -> list[Limit | None]:
        """One a score. Raises UserError for a word that is none."""
        return [Limit.parse(word) for word in self.scorer_limits] or [None] * self.num_scores

    @property
    def weights(self) -> list[float]:
        """One a score, 0 where it is held."""
        held = [limit is not None and limit.kind == "hold" for limit in self.limits]
        return list(self.scorer_weights) or [0.0 if hold else 1.0 for hold in held]


def load_reward(
    config: RewardConfig, vae: VaeFingerprint | LatentSpace | None, *, needs_noise_aware: bool, gradient_checkpointing: bool = False
) -> Reward:
    """Load scorer files and check that they can judge this model's latents at the noise levels they will be shown.

    Args:
        vae: the model's, or what is known of it before the model is loaded.
        needs_noise_aware: whether noisy latents will be scored.
        gradient_checkpointing: let scorers that can save memory do so.

    Raises:
        UserError: a file that is no scorer, one for another VAE, a noise-blind one that is needed noise-aware, two of one name.
    """
    scorers = []
    for path in config.scorer:
        scorer = load_scorer(path, config.allow_code)
        if vae is not None:
            check_scorer_fits(scorer, vae)
        if needs_noise_aware and not scorer.spec.noise_aware:
            advice = f"scorer {path} was trained on clean latents only, and this score_estimator scores noisy ones"
            if not config.force_scorer:
                raise UserError(f"{advice}; use score_estimator x0, or train the scorer with noise, or set force_scorer")
            logger.warning("%s; used all the same (force_scorer)", advice)
        if gradient_checkpointing:
            scorer.enable_gradient_checkpointing()
        scorers.append(scorer)
    if config.scorer_ensemble and scorers:
        _check_distinct([str(Path(path).resolve()) for path in config.scorer])
        scorers = [ScorerEnsemble(scorers)]
    _check_distinct([scorer.name for scorer in scorers])
    return Reward(
        [
            Goal(scorer=scorer.requires_grad_(False).eval(), weight=weight, limit=limit, pessimism=float(states_uncertainty(scorer)))
            for scorer, weight, limit in zip(scorers, config.weights, config.limits, strict=True)
        ]
    )


def states_uncertainty(scorer: Scorer) -> bool:
    """Whether a scorer says how sure it is: by members that may disagree, or by a spread that it was trained to state."""
    if isinstance(scorer, ScorerEnsemble):
        return True
    head = scorer.spec.head()
    _, stated = READOUTS[head.readout](torch.zeros(1, 1, head.outputs), head)
    return head.members > 1 or stated is not None


def _check_distinct(names: Sequence[str]) -> None:
    if len(set(names)) < len(names):
        raise UserError(f"two scorers have the name {max(names, key=names.count)!r}; train or save one under another output_name")
