"""The clean latents foreseen, noised anew several times before they are scored."""

from typing import ClassVar

import torch
from torch import Tensor

from library.objectives.estimators import Foreseen
from library.objectives.x0 import X0


class X0Renoise(X0):
    """r = mean over n of score(sqrt(a) x0 + sqrt(1 - a) n, sigma(a)), n fresh noisings at one low noise level.

    Randomised smoothing of the score at the cost of the scorer alone: what DRaFT-LV's fresh noisings do for the last step
    (arXiv 2309.17400), without its U-Net calls. LRM (arXiv 2502.01051) judges best at a little noise, not at none.

    Args:
        num_views: how many noisings.
        abar: at which noise level, in (0, 1).
    """

    noisy: ClassVar[bool] = True

    def __init__(self, num_views: int, abar: float) -> None:
        self.num_views, self.abar = num_views, abar

    def look(self, foreseen: Foreseen, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        keep, add = self.abar**0.5, (1 - self.abar) ** 0.5
        latents = (keep * foreseen.latents + add * noise).flatten(0, 1)  # [V * B, C, h, w]
        sigmas = torch.full_like(foreseen.sigmas, add / keep).repeat(self.num_views)
        return latents, sigmas, torch.full_like(sigmas, keep)
