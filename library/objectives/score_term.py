"""The score as a term of training: a rollout, and the objective on what it hands out."""

from collections.abc import Mapping, Sequence
from typing import Any

from library.objectives.base import Workbench
from library.objectives.images import encode_folder
from library.objectives.rewards import Reward
from library.objectives.score import ScoreObjective
from library.objectives.score_config import ESTIMATORS, ScoreConfig
from library.rollouts.belt import ROLLOUTS, Belt
from library.rollouts.noised import LastStepNoisedRollout, NoisedRollout, PictureRollout
from library.types import LossOutput, PromptSpec

SCORE_ROLLOUTS: dict[str, type[Belt]] = {**ROLLOUTS, "noised": NoisedRollout, "noised_last": LastStepNoisedRollout}


class ScoreTerm:
    """The score as a term of training: its rollout, its objective.

    Args:
        prompts: what to train on.
    """

    name = "score"
    weight = 1.0  # reward_weight and preserve_weight are the objective's own

    def __init__(self, workbench: Workbench, reward: Reward, config: ScoreConfig, prompts: Sequence[PromptSpec]) -> None:
        rollout = ESTIMATORS[config.score_estimator](config).rollout or workbench.rollout.rollout
        self.generator = workbench.generator("views")
        size = workbench.rollout.size(workbench.model.spec.resolution)
        parts = (workbench.encoder, workbench.rollout, workbench.generator("rollout"))
        if config.score_pictures is None:
            workbench.encoder.encode_ahead(prompts, size)
            self.rollout = SCORE_ROLLOUTS[rollout](workbench.model, workbench.network, prompts, *parts)
        else:
            pictures = [
                (picture.latents, PromptSpec(prompt=picture.prompt)) for picture in encode_folder(workbench, config.score_pictures, "")
            ]
            workbench.encoder.encode_ahead([prompt for _, prompt in pictures], size)
            self.rollout = PictureRollout(workbench.model, workbench.network, pictures, *parts)
        self._counted = 0  # of the rollout's evaluations, those that a loss has reported
        self.objective = ScoreObjective(
            workbench.model,
            workbench.network,
            reward,
            config,
            self.rollout.solver,
            workbench.rollout.max_denoising_steps,
            workbench.rollout.guidance_rescale,
        )

    def __call__(self) -> LossOutput:
        batch = self.rollout.batch()
        out, eps = self.objective(batch, self.generator)
        self.rollout.advance(eps)
        evaluations = out.num_unet_evaluations + self.rollout.num_unet_evaluations - self._counted
        self._counted = self.rollout.num_unet_evaluations
        return LossOutput(out.loss, out.sample_losses, out.samples, out.metrics, evaluations)

    def state_dict(self) -> dict[str, Any]:
        return {"rollout": self.rollout.state_dict(), "views": self.generator.get_state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.rollout.load_state_dict(state["rollout"])
        self.generator.set_state(state["views"])
        self._counted = self.rollout.num_unet_evaluations  # of the beginning that the state replaces
