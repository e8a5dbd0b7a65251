"""Which terms a training is made of, and how they are put together."""

from dataclasses import dataclass

from library.errors import UserError
from library.objectives.base import TERMS, Term, TrainingContext
from library.prompts.leco_files import is_leco_file
from library.settings.options import option


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


def build_terms(context: TrainingContext, config: ObjectiveConfig) -> dict[str, Term]:
    """The terms of the training objective, by name.

    Raises:
        UserError: a term lacks what it learns from.
    """
    names = list(dict.fromkeys(config.objective or _default_objective(context)))
    if "score" not in names and context.reward.goals:
        raise UserError(f"a scorer is given, but objective is {', '.join(names)}; add score to it, or leave the scorer out")
    if context.settings["anchors"].anchor_prompts_file and "anchors" not in names:
        names.append("anchors")
    return {name: TERMS[name].build(context, context.settings.get(name)) for name in names}


def _default_objective(context: TrainingContext) -> list[str]:
    file = context.settings["leco"].leco_prompts_file or context.rollout.prompts_file
    return ["score"] if context.reward.goals or not (file and is_leco_file(file)) else ["leco"]
