"""The clean latents that are predicted, noised anew several times before they are scored."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from library.errors import UserError
from library.objectives.estimator import ESTIMATORS, PredictedLatents
from library.objectives.estimators.x0 import X0
from library.settings.options import check_at_least, option


@dataclass(frozen=True, kw_only=True)
class X0RenoiseConfig:
    """The views of score_estimator x0_renoise."""

    num_views: int = option(
        4,
        help="With score_estimator x0_renoise: fresh noisings of each sample.",
        expert=True,
        only_with={"score_estimator": ("x0_renoise",)},
    )
    view_abar: float = option(
        0.9,
        help="With score_estimator x0_renoise: what is left of the picture's variance, 0 to 1.",
        expert=True,
        only_with={"score_estimator": ("x0_renoise",)},
    )

    def __post_init__(self) -> None:
        check_at_least(self, 1, "num_views")
        if not 0 < self.view_abar < 1:
            raise UserError(f"view_abar is {self.view_abar}; it must be between 0 (pure noise) and 1 (clean), for example 0.9")


@ESTIMATORS.register("x0_renoise")
class X0Renoise(X0):
    """r = mean over n of score(sqrt(a) x0 + sqrt(1 - a) n, sigma(a)), n fresh noisings at one low noise level.

    Randomised smoothing of the score at the cost of the scorer alone, as DRaFT-LV's fresh noisings of the last step are
    (arXiv 2309.17400), without its U-Net calls. LRM (arXiv 2502.01051) judges best at a little noise, not at none.
    """

    config_class: ClassVar[type | None] = X0RenoiseConfig
    noisy: ClassVar[bool] = True

    def __init__(self, settings: X0RenoiseConfig) -> None:
        super().__init__(settings)
        self.num_views, self.abar = settings.num_views, settings.view_abar

    def views(self, predicted: PredictedLatents, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        keep, add = self.abar**0.5, (1 - self.abar) ** 0.5
        latents = (keep * predicted.latents + add * noise).flatten(0, 1)  # [V * B, C, h, w]
        sigmas = torch.full_like(predicted.sigmas, add / keep).repeat(self.num_views)
        return latents, sigmas, torch.full_like(sigmas, keep)
