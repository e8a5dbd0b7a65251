"""Which terms a training is made of, and how they are put together."""

import logging
import math
from dataclasses import dataclass

from library.errors import UserError
from library.objectives.base import TERMS, Term, TrainingContext
from library.prompts.leco_files import is_leco_file, unused_leco_keys
from library.settings.options import key_value_pairs, option

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """What training is made of."""

    objective: tuple[str, ...] = option(
        (),
        choices=TERMS,
        help="What to learn from, one or several: score, the scorers; leco, differences between prompts; image_pairs, differences between "
        "pictures; images, pictures; anchors, prompts that must not change. Default: score if a scorer is given, else leco if prompts_file "
        "is one of sd-scripts' LECO files; anchors come with anchor_prompts_file.",
    )
    objective_weights: tuple[str, ...] = option(
        (), help='Weights of the terms in the loss, "term=weight" each, such as leco=4; 1 for those that are not named.'
    )

    def __post_init__(self) -> None:
        for name, weight in self.weights.items():
            if not 0 < weight < math.inf:
                raise UserError(f"objective_weights has {name}={weight:g}, but a weight must be above 0; leave the term out of objective")

    @property
    def weights(self) -> dict[str, float]:
        try:
            return {name: float(text) for name, text in key_value_pairs("objective_weights", self.objective_weights).items()}
        except ValueError as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"objective_weights is {' '.join(self.objective_weights)}, but each weight must be a number: leco=4") from None


def term_names(config: ObjectiveConfig, *, scored: bool, leco_file: str | None, anchored: bool) -> list[str]:
    """The terms that the settings ask for.

    Args:
        scored: whether a scorer is given. anchored: whether anchor prompts are.
        leco_file: where words would be learned from.

    Raises:
        UserError: they contradict each other.
    """
    is_words = not scored and leco_file and is_leco_file(leco_file)
    names = list(dict.fromkeys(config.objective or (["leco"] if is_words else ["score"])))
    if "score" not in names and scored:
        raise UserError(f"a scorer is given, but objective is {', '.join(names)}; add score to it, or leave the scorer out")
    if anchored and "anchors" not in names:
        names.append("anchors")
    if lacking := config.weights.keys() - set(names):
        raise UserError(f"objective_weights has {', '.join(sorted(lacking))}, but objective is {', '.join(names)}; weigh one of these")
    return names


def build_terms(context: TrainingContext, config: ObjectiveConfig) -> dict[str, Term]:
    """The terms of the training objective, by name.

    Raises:
        UserError: a term lacks what it learns from.
    """
    prompts_file = context.rollout.prompts_file
    leco_file = context.settings["leco"].leco_prompts_file or prompts_file
    anchored = bool(context.settings["anchors"].anchor_prompts_file)
    names = term_names(config, scored=bool(context.reward.goals), leco_file=leco_file, anchored=anchored)
    if prompts_file and (prompts_file != leco_file or "leco" not in names) and (unused := unused_leco_keys(prompts_file)):
        logger.warning("%s: %s are for objective leco; %s does not use them", prompts_file, ", ".join(unused), " and ".join(names))
    terms = {name: TERMS[name].build(context, context.settings.get(name)) for name in names}
    for name, weight in config.weights.items():
        terms[name].weight = weight
    return terms
