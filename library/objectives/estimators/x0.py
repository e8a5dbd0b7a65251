"""ReFL's estimator: the clean latents that are predicted."""

import torch
from torch import Tensor

from library.diffusion.noise_schedule import abar_to_sigma, eps_to_x0
from library.objectives.estimator import ESTIMATORS, Estimator, PredictedLatents, StepState


@ESTIMATORS.register("x0")
class X0(Estimator):
    """x0 = (x_t - sqrt(1 - abar) eps) / sqrt(abar), scored as clean; ReFL (arXiv 2304.05977).

    Any scorer can judge it. It is sharp at low noise and a blur at high noise, where a scorer of sharp pictures errs: choose
    the steps with max_timestep.
    """

    def predict_latents(self, state: StepState, eps: Tensor) -> PredictedLatents:
        sigma, next_sigma = abar_to_sigma(state.abar), abar_to_sigma(state.next_abar)
        latents = eps_to_x0(state.batch.latents, eps, state.abar)
        # a schedule may end with a step that moves nothing
        return PredictedLatents(latents, torch.zeros_like(sigma), -sigma, sigma / (sigma - next_sigma).clamp_min(1e-6))
