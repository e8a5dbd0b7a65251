"""The terms that training can be made of, and how they are put together."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from library.errors import UserError
from library.objectives import anchors, image_pairs, images, leco
from library.objectives.anchors import AnchorConfig
from library.objectives.base import Term, Workbench
from library.objectives.image_pairs import ImagePairsConfig
from library.objectives.images import ImagesConfig
from library.objectives.leco import LecoConfig
from library.objectives.regression import RegressionConfig
from library.objectives.rewards import Reward
from library.objectives.score_config import ScoreConfig
from library.objectives.score_term import ScoreTerm
from library.prompts.leco_files import is_leco_file
from library.settings.options import option
from library.types import PromptSpec


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """What training is made of."""

    objective: tuple[str, ...] = option(
        (),
        choices=("score", "leco", "image_pairs", "images"),
        help="What to learn from, one or several: score, the scorers; leco, differences between prompts; image_pairs, differences between "
        "pictures; images, pictures. Default: score if a scorer is given, else leco if prompts_file is one of sd-scripts' LECO files.",
    )


@dataclass(frozen=True, kw_only=True)
class TermConfigs:
    """The settings of every term, those in use and the others."""

    score: ScoreConfig
    leco: LecoConfig
    image_pairs: ImagePairsConfig
    images: ImagesConfig
    anchors: AnchorConfig
    regression: RegressionConfig


def build_terms(
    workbench: Workbench, config: ObjectiveConfig, configs: TermConfigs, reward: Reward, prompts: Sequence[PromptSpec]
) -> list[Term]:
    """The terms of the training objective; anchors come with anchor_prompts_file.

    Args:
        reward: without goals if no scorer is given.
        prompts: of the score.

    Raises:
        UserError: a term lacks what it learns from.
    """
    builders: dict[str, Callable[[], Term]] = {
        "score": lambda: ScoreTerm(workbench, reward, configs.score, prompts),
        "leco": lambda: leco.build(workbench, configs.leco, configs.regression),
        "image_pairs": lambda: image_pairs.build(workbench, configs.image_pairs, configs.regression),
        "images": lambda: images.build(workbench, configs.images, configs.regression),
    }
    names = list(dict.fromkeys(config.objective or _default_objective(workbench, configs, reward)))
    if "score" in names and not reward.goals:
        raise UserError("scorer is not set; give the .safetensors file that train_latent_scorer.py wrote")
    if "score" not in names and reward.goals:
        raise UserError(f"a scorer is given, but objective is {', '.join(names)}; add score to it, or leave the scorer out")
    if "score" in names and not prompts and configs.score.score_pictures is None:
        raise UserError("prompts_file is not set; give a .txt, .toml or .tsv file of prompts")
    terms = [builders[name]() for name in names]
    if configs.anchors.anchor_prompts_file:
        terms.append(anchors.build(workbench, configs.anchors, configs.regression))
    return terms


def _default_objective(workbench: Workbench, configs: TermConfigs, reward: Reward) -> list[str]:
    file = configs.leco.leco_prompts_file or workbench.rollout.prompts_file
    return ["score"] if reward.goals or not (file and is_leco_file(file)) else ["leco"]
