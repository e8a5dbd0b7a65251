"""The clean latents that are predicted, noised anew several times before they are scored."""

from typing import ClassVar

import torch
from torch import Tensor

from library.objectives.estimator import ESTIMATORS, PredictedLatents
from library.objectives.estimators.x0 import X0


@ESTIMATORS.register("x0_renoise")
class X0Renoise(X0):
    """r = mean over n of score(sqrt(a) x0 + sqrt(1 - a) n, sigma(a)), n fresh noisings at one low noise level.

    Randomised smoothing of the score at the cost of the scorer alone, as DRaFT-LV's fresh noisings of the last step are
    (arXiv 2309.17400), without its U-Net calls. LRM (arXiv 2502.01051) judges best at a little noise, not at none.
    """

    noisy: ClassVar[bool] = True
    num_views: int = 4
    abar: float = 0.9  # what is left of the picture's variance

    def views(self, predicted: PredictedLatents, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        keep, add = self.abar**0.5, (1 - self.abar) ** 0.5
        latents = (keep * predicted.latents + add * noise).flatten(0, 1)  # [V * B, C, h, w]
        sigmas = torch.full_like(predicted.sigmas, add / keep).repeat(self.num_views)
        return latents, sigmas, torch.full_like(sigmas, keep)
