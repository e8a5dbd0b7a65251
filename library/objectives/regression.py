"""What the terms that regress the U-Net's output have in common: the space of the error, and its weight at each noise level."""

from dataclasses import dataclass

import torch
from torch import Tensor

from library.diffusion import noise_schedule
from library.models.base import DiffusionModel
from library.settings.options import check_above, option


@dataclass(frozen=True, kw_only=True)
class RegressionConfig:
    """How the squared errors of leco, image_pairs, images and anchors are weighed."""

    min_snr_gamma: float | None = option(
        None,
        help="Min-SNR weighting of the squared errors of leco, image_pairs, images and anchors; try 5. Not set: none.",
        expert=True,
        only_with=({"objective": ("leco", "image_pairs", "images")}, "anchor_prompts_file", {"objective": (), "scorer": ()}),
    )

    def __post_init__(self) -> None:
        check_above(self, 0, "min_snr_gamma")


def as_output(model: DiffusionModel, latents: Tensor, eps: Tensor, timesteps: Tensor) -> Tensor:
    """eps [B, C, h, w] as the network itself puts it out: v for a v-prediction model, whose training loss is an error in v."""
    return noise_schedule.eps_to_output(latents, eps, model.schedule.abar(timesteps), model.spec.prediction_type)


def squared_errors(outputs: Tensor, targets: Tensor) -> Tensor:
    """Mean squared error of each sample [B]. outputs, targets [B, C, h, w]."""
    return (outputs - targets).square().mean((1, 2, 3))


def min_snr_weights(model: DiffusionModel, timesteps: Tensor, gamma: float | None) -> Tensor:
    """min(SNR, gamma) times an error in x0, as a weight of the error in the network's output [B]; arXiv 2303.09556, eq. 5.

    That is min(SNR, gamma) / SNR where the output is eps, min(SNR, gamma) / (SNR + 1) where it is v, and min(SNR, gamma) s^2 where it is a
    flow's velocity, s = 1 / (sqrt(SNR) + 1). All 1 if gamma is None.
    """
    if gamma is None:
        return torch.ones(len(timesteps), device=timesteps.device)
    abar = model.schedule.abar(timesteps)
    snr = abar / (1 - abar)
    of_x0 = {"epsilon": snr, "v_prediction": snr + 1, "flow": (snr.sqrt() + 1) ** 2}  # squared error in the output over that in x0
    return snr.clamp(max=gamma) / of_x0[model.spec.prediction_type]
