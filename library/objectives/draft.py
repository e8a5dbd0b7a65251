"""DRaFT-K: the finished picture, with gradient through the sampler's last K steps."""

from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor

from library.objectives.estimators import Estimator, Foreseen, Predict, Scene, reaches


class Draft(Estimator):
    """The sample itself, scored as clean, with gradient through its last `draft_steps` steps; DRaFT-K (arXiv 2309.17400).

    For solvers that draw no noise.

    Args:
        stop_gradient: detach the U-Net's input at every step, so that the gradient flows through the sampler alone and not through
            the U-Net's Jacobians, which makes long tails stable; DRTune (arXiv 2405.00760).
    """

    rollout: ClassVar[str | None] = "last_steps"

    def __init__(self, stop_gradient: bool) -> None:
        self.stop_gradient = stop_gradient

    def foresee(self, scene: Scene, eps: Tensor, predict: Predict) -> Foreseen:
        batch, tail, solver = scene.batch, scene.batch.tail_timesteps, scene.solver
        assert tail is not None, "draft needs the rollout last_steps"
        timesteps = tail[:, None].expand(-1, len(batch.latents))  # [K + 1, B]
        latents, history = batch.latents, batch.history
        for place, (now, after) in enumerate(pairwise(timesteps)):
            if place:
                eps = predict(latents.detach() if self.stop_gradient else latents, now)
            abar, last = scene.schedule.abar(now), latents
            latents = solver.step(last, eps, abar, scene.schedule.abar(after), None, history)
            history = solver.remember(last, eps, abar)
        reach = reaches(scene, timesteps).square().sum(1).sqrt()
        return Foreseen(latents, torch.zeros_like(reach), reach, torch.full_like(reach, len(timesteps) - 1))
