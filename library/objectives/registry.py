"""The terms that training can be made of, and how they are put together."""

from collections.abc import Sequence
from dataclasses import dataclass

from library.config import option
from library.errors import UserError
from library.objectives.base import Term, Workbench
from library.objectives.score_config import ScoreConfig
from library.objectives.score_term import ScoreTerm
from library.rewards import Reward
from library.types import PromptSpec


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """What training is made of."""

    objective: tuple[str, ...] = option(
        (),
        choices=("score",),
        help="What to learn from, one or several: score. Default: score.",
    )


def build_terms(
    workbench: Workbench,
    config: ObjectiveConfig,
    *,
    score: ScoreConfig,
    reward: Reward,
    prompts: Sequence[PromptSpec],
) -> list[Term]:
    """The terms of the training objective.

    Args:
        prompts: of the score.

    Raises:
        UserError: a term lacks what it learns from.
    """
    terms: list[Term] = []
    if not reward.goals:
        raise UserError("scorer is not set; give the .safetensors file that train_latent_scorer.py wrote")
    terms.append(ScoreTerm(workbench, reward, score, prompts))
    return terms
