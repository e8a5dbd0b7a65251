"""The score's objective and its rollout on a tiny model, for the tests of what it computes."""

from dataclasses import dataclass
from typing import Any

import torch

from library.models.base import DiffusionModel
from library.objectives.estimator import StepState
from library.objectives.rewards import Goal, Reward
from library.objectives.score import ScoreObjective
from library.objectives.terms.score import score_rollout
from library.rollouts.base import Rollout
from library.rollouts.trajectories import Trajectories
from library.scorers.base import Scorer
from library.types import LossOutput, PromptSpec, RolloutBatch
from networks.lora import LoRANetwork
from tests.helpers.context import make_context, part_settings
from tests.helpers.scorers import WavyScorer, scorer_for
from tests.helpers.tiny_models import tiny_model

PROMPTS = [PromptSpec(prompt="a red circle"), PromptSpec(prompt="a blue square")]


@dataclass
class Stage:
    """All that one step of the objective needs."""

    model: DiffusionModel
    network: LoRANetwork
    rollout: Rollout
    objective: ScoreObjective

    @property
    def trajectories(self) -> Trajectories:
        return self.rollout.trajectories

    def state(self, batch: RolloutBatch) -> StepState:
        return StepState(batch=batch, schedule=self.objective.schedule, solver=self.objective.solver)

    def loss(self, batch: RolloutBatch | None = None, views_seed: int = 0) -> LossOutput:
        """The objective's loss on a batch, or on the rollout's next one."""
        return self.objective(batch or self.rollout.next_batch(), torch.Generator().manual_seed(views_seed))[0]

    def gradient(self, batch: RolloutBatch | None = None, views_seed: int = 0) -> torch.Tensor:
        """The gradient of `loss` in the LoRA's weights, as one vector."""
        self.network.zero_grad()
        self.loss(batch, views_seed).loss.backward()
        return gradients(self.network)


def make_stage(
    kind: str = "sd1",
    scorer: type[Scorer] = WavyScorer,
    *,
    guidance: float = 5.0,
    batch_size: int = 3,
    strength: float = 0.05,
    resolution: int = 64,
    num_steps: int = 6,
    sampler: str = "ddim",
    std: float = 1.0,
    seed: int = 0,
    network: LoRANetwork | None = None,
    model: DiffusionModel | None = None,
    reward: Reward | None = None,
    prompts: list[PromptSpec] = PROMPTS,
    **settings: Any,
) -> Stage:
    """Pictures of 64 pixels.

    Args:
        strength: standard deviation of the LoRA's up weights; at 0 it does nothing yet.
        std: of the scorer; its score in standard deviations stays what it is.
        reward: in place of `scorer`.
        settings: options of the score, the estimators and the rollouts. The estimator is prev, whose gain is that of one step.
    """
    model = model or tiny_model(kind)
    context = make_context(
        model=model,
        network=network,
        strength=strength,
        seed=seed,
        reward=reward or Reward([Goal(scorer=scorer_for(model, scorer, std=std))]),
        prompts=prompts,
        settings=part_settings(**{"score_estimator": "prev", **settings}),
        train_batch_size=batch_size,
        max_denoising_steps=num_steps,
        leco_denoise_guidance_scale=guidance,
        resolution=(resolution,),
        sampler=sampler,
    )
    config = context.settings["score"]
    rollout = score_rollout(context, config)
    return Stage(model, context.network, rollout, ScoreObjective(context, config))


def gradients(network: LoRANetwork) -> torch.Tensor:
    """The gradients of all weights that have one, as one vector."""
    return torch.cat([parameter.grad.flatten() for parameter in network.parameters() if parameter.grad is not None])
