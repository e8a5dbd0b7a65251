"""ReFL's estimator: the clean latents that the prediction foresees."""

import torch
from torch import Tensor

from library.diffusion.noise_schedule import abar_to_sigma, eps_to_x0
from library.objectives.estimators import Estimator, Foreseen, Predict, Scene


class X0(Estimator):
    """x0 = (x_t - sqrt(1 - abar) eps) / sqrt(abar), scored as clean; ReFL (arXiv 2304.05977).

    Any scorer can judge it. It is sharp at low noise and a blur at high noise, where a scorer of sharp pictures errs: choose
    the steps with max_timestep.
    """

    def foresee(self, scene: Scene, eps: Tensor, predict: Predict) -> Foreseen:
        sigma, next_sigma = abar_to_sigma(scene.abar), abar_to_sigma(scene.next_abar)
        latents = eps_to_x0(scene.batch.latents, eps, scene.abar)
        # a schedule may end with a step that moves nothing
        return Foreseen(latents, torch.zeros_like(sigma), -sigma, sigma / (sigma - next_sigma).clamp_min(1e-6))
