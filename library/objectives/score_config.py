"""The settings of the score's term, and the estimators to choose from."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from library.errors import UserError
from library.objectives.direct_align import DirectAlign
from library.objectives.draft import Draft
from library.objectives.draft_lv import DraftLV
from library.objectives.estimators import Estimator
from library.objectives.guidance import Guidance
from library.objectives.prev import Prev
from library.objectives.reward_shapes import SHAPES
from library.objectives.x0 import X0
from library.objectives.x0_renoise import X0Renoise
from library.settings.options import check_above, check_at_least, option


@dataclass(frozen=True, kw_only=True)
class ScoreConfig:
    """What is scored, how the score becomes a loss, and what holds the model in place."""

    score_estimator: str = option(
        "x0_renoise",
        choices=("prev", "x0", "x0_renoise", "draft", "draft_lv", "direct_align", "guidance"),  # the keys of ESTIMATORS, below
        help="Latents to score: prev, the next step's; x0, the clean latents foreseen; x0_renoise, those noised anew; draft, the "
        "finished picture through the last draft_steps; draft_lv, finished pictures' last step; direct_align, noised finished pictures; "
        "guidance, a regression along the score's gradient.",
    )
    reward_loss: str = option(
        "hinge",
        choices=tuple(SHAPES),
        help="hinge stops pushing a sample that is hinge_margin above the frozen model, softplus fades out there; target pushes back "
        "beyond reward_target; linear never stops.",
    )
    hinge_margin: float = option(
        5.0,
        help="Gain over the frozen model at which hinge and softplus stop, over a whole trajectory, in the score's standard deviations.",
        expert=True,
        only_with={"reward_loss": ("hinge", "softplus")},
    )
    reward_target: float = option(
        3.0,
        help="With reward_loss target: the gain at multiplier 1, in the same unit, if every step's gain lasted; a third of it does.",
        expert=True,
        only_with={"reward_loss": ("target",)},
    )
    reward_weight: float = option(1.0, help="Weight of the score in the loss; 0 trains the other terms alone.", expert=True)
    reward_smoothing: float = option(
        0.0,
        help="Take the score's gradient this far to the worse side, relative to the latents' size (try 0.02): against sharp peaks.",
        expert=True,
    )
    num_views: int = option(
        4,
        help="With score_estimator x0_renoise: fresh noisings of each sample.",
        expert=True,
        only_with={"score_estimator": ("x0_renoise",)},
    )
    view_abar: float = option(
        0.9,
        help="With score_estimator x0_renoise: what is left of the picture's variance, 0 to 1.",
        expert=True,
        only_with={"score_estimator": ("x0_renoise",)},
    )
    score_pictures: Path | None = option(
        None,
        help="With score_estimator direct_align: folder of pictures (NAME.txt is a picture's prompt) to train on; none are sampled.",
        expert=True,
    )
    draft_stop_gradient: bool = option(
        True,
        help="With score_estimator draft: no gradient through the U-Net's input (DRTune).",
        expert=True,
        only_with={"score_estimator": ("draft",)},
    )
    preserve_weight: float = option(
        3.0, help="Weight of staying near the frozen model's prediction; with w, the prediction moves by about reward_weight / 2w."
    )
    stat_guard: float = option(
        0.0,
        help="Weight of keeping each latent channel's mean and log standard deviation, against saturation and contrast hacks.",
        expert=True,
    )
    paired_signs: bool = option(False, help="Train both signs of every sample in one batch: twice the U-Net's work in a step.", expert=True)
    odd_weight: float = option(0.0, help="With paired_signs: weight of both signs moving the prediction by opposite amounts.", expert=True)
    normalize_gradient: bool = option(
        True, help="Scale the score's gradient to RMS 1 per sample, so that all noise levels count alike.", expert=True
    )
    min_timestep: int = option(0, help="Train only on steps at or above this timestep (0 to 1000).", expert=True)
    max_timestep: int = option(1000, help="Train only on steps below this timestep (0 to 1000).", expert=True)

    def __post_init__(self) -> None:
        check_at_least(self, 0, "hinge_margin", "reward_weight", "preserve_weight", "min_timestep", "stat_guard", "odd_weight")
        check_at_least(self, 0, "reward_smoothing")
        check_at_least(self, 1, "num_views")
        check_above(self, 0, "reward_target")
        if not 0 < self.view_abar < 1:
            raise UserError(f"view_abar is {self.view_abar}; it must be between 0 (pure noise) and 1 (clean), for example 0.9")
        if not self.min_timestep < self.max_timestep <= 1000:
            raise UserError(
                f"min_timestep {self.min_timestep} and max_timestep {self.max_timestep} leave no step to train; use 0 <= min < max <= 1000"
            )
        if self.odd_weight and not self.paired_signs:
            raise UserError("odd_weight compares both signs of one sample; set paired_signs too, or leave odd_weight at 0")
        if self.paired_signs and self.score_estimator in ("draft", "draft_lv"):
            raise UserError(f"paired_signs cannot be had with score_estimator {self.score_estimator}; choose prev, x0 or x0_renoise")
        if self.score_pictures is not None and self.score_estimator != "direct_align":
            raise UserError(
                f"score_pictures needs score_estimator direct_align, not {self.score_estimator}; the others sample their pictures"
            )
        if self.score_estimator == "guidance" and not (self.preserve_weight and self.normalize_gradient):
            raise UserError("score_estimator guidance is a regression; it needs preserve_weight above 0 and normalize_gradient")


ESTIMATORS: dict[str, Callable[[ScoreConfig], Estimator]] = {
    "prev": lambda config: Prev(),
    "x0": lambda config: X0(),
    "x0_renoise": lambda config: X0Renoise(config.num_views, config.view_abar),
    "draft": lambda config: Draft(config.draft_stop_gradient),
    "draft_lv": lambda config: DraftLV(),
    "direct_align": lambda config: DirectAlign(),
    "guidance": lambda config: Guidance(),
}
