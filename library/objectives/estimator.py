"""What an estimator is: it says which latents a prediction leads to, and at which noise the score is given them.

A step of the sampler moves latents by (next_sigma - sigma) eps in units of x / sqrt(abar); that is the unit in which
estimators are compared (`PredictedLatents.num_steps`), so that a margin means the same gain over a trajectory whatever is scored.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from library.diffusion.noise_schedule import NoiseSchedule
from library.diffusion.solvers import Solver
from library.settings.registry import Registry
from library.types import History, RolloutBatch


@dataclass(frozen=True, kw_only=True)
class StepState:
    """Where a batch stands and how it moves."""

    batch: RolloutBatch
    schedule: NoiseSchedule
    solver: Solver

    @property
    def abar(self) -> Tensor:  # [B]
        return self.schedule.abar(self.batch.timesteps)

    @property
    def next_abar(self) -> Tensor:  # [B]
        return self.schedule.abar(self.batch.next_timesteps)


@dataclass(frozen=True)
class PredictedLatents:
    """Where a prediction leads.

    Attributes:
        latents: what is scored [B, C, h, w], with gradient to the prediction.
        sigmas: their noise level [B].
        sensitivity: how far the latents move when the prediction moves by 1: d latents / d eps of a guided prediction [B], signed.
        num_steps: how many of the sampler's steps' own moves that is [B]; 1 for the next step's latents.
    """

    latents: Tensor
    sigmas: Tensor
    sensitivity: Tensor
    num_steps: Tensor


class Estimator(ABC):
    """A choice of latents to score. A subclass in a file of its own implements `predict_latents`.

    Attributes:
        config_class: its settings, a dataclass of options; None if it has none.
        rollout: the rollout that it needs (a name in `library.rollouts.base.ROLLOUTS`); None works with any.
        noisy: whether the score is given noisy latents, which only a noise-aware scorer understands.
        num_views: how many draws of noise `views` takes for each sample.

    Args:
        settings: of `config_class`; None if there is none.
    """

    config_class: ClassVar[type | None] = None
    rollout: ClassVar[str | None] = None
    noisy: ClassVar[bool] = False
    num_views: int = 0

    def __init__(self, settings: Any = None) -> None:
        self.settings = settings

    @abstractmethod
    def predict_latents(self, state: StepState, eps: Tensor) -> PredictedLatents:
        """Where the guided prediction eps [B, C, h, w] leads; differentiable in it."""

    def views(self, predicted: PredictedLatents, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The latents as the score is given them, V views of each.

        Args:
            noise: standard normal [num_views, B, C, h, w], the same for the LoRA and the frozen model.

        Returns:
            Latents [V * B, C, h, w], sigmas [V * B], and d view / d latents [V * B].
        """
        return predicted.latents, predicted.sigmas, torch.ones_like(predicted.sigmas)


ESTIMATORS: Registry[type[Estimator]] = Registry("score_estimator", "library.objectives.estimators", noun="estimator")


def step_sensitivity(state: StepState) -> Tensor:
    """d next latents / d eps of the batch's own step [B]. Exact for any solver, all being linear in latents, eps and history."""
    remembered = state.batch.history
    zero = state.batch.latents.new_zeros(len(state.batch.latents), 1, 1, 1)
    noise = torch.zeros_like(zero) if state.solver.needs_noise else None
    history = None if remembered is None else History(torch.zeros_like(zero), remembered.abar)
    return state.solver.step(zero, torch.ones_like(zero), state.abar, state.next_abar, noise, history).flatten()
