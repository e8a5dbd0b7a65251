"""DRaFT-K: the finished picture, with gradient through the sampler's last K steps."""

from typing import ClassVar

import torch
from torch import Tensor

from library.noise_schedule import eps_to_x0
from library.objectives.estimators import Estimator, Foreseen, Predict, Scene
from library.types import History


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
        batch, tail = scene.batch, scene.batch.tail_timesteps
        assert tail is not None, "draft needs the rollout last_steps"
        latents, history = batch.latents, batch.history
        rows, reaches = len(latents), []
        for place, (now, after) in enumerate(zip(tail[:-1].tolist(), tail[1:].tolist(), strict=True)):
            times = (torch.full_like(batch.timesteps, now), torch.full_like(batch.timesteps, after))
            abar, next_abar = (scene.schedule.abar(time) for time in times)
            if place:
                eps = predict(latents.detach() if self.stop_gradient else latents, times[0])
            moved = scene.solver.step(latents, eps, abar, next_abar, None, history)
            history = None if history is None else History(eps_to_x0(latents, eps, abar), abar)
            reaches.append(self._reach(scene, times, tail[-1]))
            latents = moved
        reach = torch.stack(reaches).square().sum(0).sqrt()
        return Foreseen(latents, torch.zeros_like(reach), reach, torch.full((rows,), float(len(reaches)), device=latents.device))

    @staticmethod
    def _reach(scene: Scene, times: tuple[Tensor, Tensor], end: Tensor) -> Tensor:
        """d final latents / d eps of one step of the tail [B], where every later step leaves x0 alone: the move of x / sqrt(abar)."""
        sigma, next_sigma = (scene.schedule.sigmas(time) for time in times)
        return (next_sigma - sigma) * scene.schedule.abar(end.expand_as(times[0])).sqrt()
