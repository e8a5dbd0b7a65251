"""Direct-Align: a finished picture at any noise, recovered sharply because its noise is known."""

from typing import ClassVar

import torch
from torch import Tensor

from library.diffusion.noise_schedule import abar_to_sigma, per_sample
from library.objectives.estimator import ESTIMATORS, Estimator, PredictedLatents, StepState


@ESTIMATORS.register("direct_align")
class DirectAlign(Estimator):
    """x0 = x_t / sqrt(abar) - (sigma - next_sigma) eps - next_sigma n, with n the noise that was added; SRPO (arXiv 2509.06942, eq. 7).

    The prediction answers for one step's move, the known noise for the rest, so the picture is sharp at every noise level and
    any scorer can judge it. Pictures are the run's own, each noised several times, or come from images_dir, and
    then no trajectory is sampled at all.
    """

    rollout: ClassVar[str | None] = "noised"

    def predict_latents(self, state: StepState, eps: Tensor) -> PredictedLatents:
        batch = state.batch
        assert batch.added_noise is not None, "direct_align needs a rollout of noised pictures"
        sigma, next_sigma = abar_to_sigma(state.abar), abar_to_sigma(state.next_abar)
        known = batch.latents / per_sample(state.abar.sqrt(), eps) - per_sample(next_sigma, eps) * batch.added_noise
        sensitivity = next_sigma - sigma
        latents = known + per_sample(sensitivity, eps) * eps
        return PredictedLatents(latents, torch.zeros_like(sigma), sensitivity, torch.ones_like(sigma))
