"""What an estimator is: it says which latents a prediction leads to, and at which noise the score looks at them.

A step of the sampler moves latents by (next_sigma - sigma) eps in units of x / sqrt(abar); that is the unit in which
estimators are compared (`Foreseen.share`), so that a margin means the same gain over a trajectory whatever is scored.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor

from library.diffusion.noise_schedule import NoiseSchedule
from library.diffusion.solvers import Solver
from library.types import History, RolloutBatch

Predict = Callable[[Tensor, Tensor], Tensor]
"""predict(latents [B, C, h, w], timesteps [B]) -> guided eps [B, C, h, w] at the batch's conditioning; the LoRA's or the frozen model's."""


@dataclass(frozen=True, kw_only=True)
class Scene:
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
class Foreseen:
    """Where a prediction leads.

    Attributes:
        latents: what is scored [B, C, h, w], with gradient to the prediction.
        sigmas: their noise level [B].
        reach: how far the latents move when the prediction moves by 1: d latents / d eps of a guided prediction [B], signed; of
            several steps, the root of the sum of squares.
        share: how many of the sampler's steps' own moves that is [B]; 1 for the next step's latents.
    """

    latents: Tensor
    sigmas: Tensor
    reach: Tensor
    share: Tensor


class Estimator:
    """A choice of latents to score. A subclass in a file of its own implements `foresee`.

    Attributes:
        rollout: the rollout that brings trajectories to where it works (a key of `library.objectives.score.ROLLOUTS`); None is the user's.
        noisy: whether the score sees noisy latents, which only a noise-aware scorer understands.
        at_frozen: whether the score's gradient is taken where the frozen model's prediction leads, not the LoRA's.
    """

    rollout: ClassVar[str | None] = None
    noisy: ClassVar[bool] = False
    at_frozen: ClassVar[bool] = False

    def foresee(self, scene: Scene, eps: Tensor, predict: Predict) -> Foreseen:
        """Where the guided prediction eps [B, C, h, w] leads; differentiable in it. `predict` is for estimators that take further steps."""
        raise NotImplementedError

    def look(self, foreseen: Foreseen, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The latents as the score sees them, V views of each.

        Args:
            noise: standard normal [V, B, C, h, w], the same for the LoRA and the frozen model; V is `num_views`.

        Returns:
            Latents [V * B, C, h, w], sigmas [V * B], and d view / d latents [V * B].
        """
        return foreseen.latents, foreseen.sigmas, torch.ones_like(foreseen.sigmas)

    num_views: int = 1


def reaches(scene: Scene, timesteps: Tensor) -> Tensor:
    """d last latents / d eps of each of K steps of the solver [B, K]. Exact for any solver, all being linear in latents, eps and history.

    Args:
        timesteps: where each sample stands before each step, and after the last [K + 1, B].
    """
    solver, remembered = scene.solver, scene.batch.history
    moved = scene.batch.latents.new_zeros(len(timesteps[0]), len(timesteps) - 1, 1, 1)  # each step has a channel of its own
    noise = torch.zeros_like(moved) if solver.needs_noise else None
    history = None if remembered is None else History(torch.zeros_like(moved), remembered.abar)
    for place, (now, after) in enumerate(pairwise(timesteps)):
        abar, eps = scene.schedule.abar(now), torch.zeros_like(moved)
        eps[:, place] = 1
        last = moved
        moved = solver.step(last, eps, abar, scene.schedule.abar(after), noise, history)
        history = solver.remember(last, eps, abar)
    return moved.flatten(1)


def step_reach(scene: Scene) -> Tensor:
    """d next latents / d eps of the batch's own step [B]."""
    return reaches(scene, torch.stack([scene.batch.timesteps, scene.batch.next_timesteps])).flatten()
