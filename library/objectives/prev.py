"""The seed's estimator: the latents that the sampler's next step leads to."""

from typing import ClassVar

import torch
from torch import Tensor

from library.diffusion.noise_schedule import abar_to_sigma
from library.objectives.estimators import Estimator, Foreseen, Predict, Scene, step_reach


class Prev(Estimator):
    """x_prev = solver(x_t, eps), scored at its own noise by a noise-aware scorer.

    One-step process reward: PRFL (arXiv 2511.21541); that a latent reward must know the noise level: LRM (arXiv 2502.01051).
    The move per unit of eps is nearly the same at every noise level, so composition and texture are trained alike.
    """

    noisy: ClassVar[bool] = True

    def foresee(self, scene: Scene, eps: Tensor, predict: Predict) -> Foreseen:
        batch = scene.batch
        latents = scene.solver.step(batch.latents, eps, scene.abar, scene.next_abar, batch.noise, batch.history)
        reach = step_reach(scene)
        return Foreseen(latents, abar_to_sigma(scene.next_abar), reach, torch.ones_like(reach))
