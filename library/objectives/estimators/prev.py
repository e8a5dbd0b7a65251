"""The latents that the sampler's next step leads to."""

from typing import ClassVar

import torch
from torch import Tensor

from library.diffusion.noise_schedule import abar_to_sigma
from library.objectives.estimator import ESTIMATORS, Estimator, PredictedLatents, StepState, step_sensitivity


@ESTIMATORS.register("prev")
class Prev(Estimator):
    """x_prev = solver(x_t, eps), scored at its own noise by a noise-aware scorer.

    One-step process reward: PRFL (arXiv 2511.21541); that a latent reward must know the noise level: LRM (arXiv 2502.01051).
    The move per unit of eps is nearly the same at every noise level, so composition and texture are trained alike.
    """

    noisy: ClassVar[bool] = True

    def predict_latents(self, state: StepState, eps: Tensor) -> PredictedLatents:
        batch = state.batch
        latents = state.solver.step(batch.latents, eps, state.abar, state.next_abar, batch.noise, batch.history)
        sensitivity = step_sensitivity(state)
        return PredictedLatents(latents, abar_to_sigma(state.next_abar), sensitivity, torch.ones_like(sensitivity))
