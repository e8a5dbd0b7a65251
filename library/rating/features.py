"""What a diffusion model sees in pictures: the numbers that the running scorer learns from."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from library.models.base import DiffusionModel
from library.models.unet_model import check_unet
from library.rating.space import LATENT_FEATURES
from library.rollouts.sample import model_autocast
from library.scorers.unet_taps import outputs_of, tap_names
from library.types import Conditioning

MOST_FEATURES = 1024  # of the U-Net; more are mixed down by random signs, which keeps distances (Achlioptas 2003)


class PictureFeatures:
    """Mean and standard deviation of each channel of the latents, and of the outputs of the U-Net's first half on them without noise.

    Args:
        model: whose latents and U-Net; its text encoders are needed once.
    """

    def __init__(self, model: DiffusionModel) -> None:
        check_unet(model, "the running scorer of the page")
        self._model = model
        self._taps = [model.unet.get_submodule(name) for name in tap_names("all", model.unet.config)]
        self._null = model.encode_prompts([""])
        self._signs: Tensor | None = None

    @torch.no_grad()
    def __call__(self, pixels: Tensor) -> np.ndarray:
        """Pixels [B, 3, H, W] in -1..1, sides in multiples of 64, to features [B, D] float32; D is the model's own."""
        model, count = self._model, len(pixels)
        latents = model.encode_images(pixels.to(model.device, model.vae.dtype)).float()
        with outputs_of(self._taps) as taps, model_autocast(model):
            model.predict_eps(latents, torch.zeros(count, dtype=torch.int64), Conditioning.cat([self._null] * count))
        seen = torch.cat([_moments(tap) for tap in taps], dim=1)
        own = _moments(latents)
        assert own.shape[1] == LATENT_FEATURES
        return torch.cat([own, self._fewer(seen)], dim=1).cpu().numpy()

    def _fewer(self, seen: Tensor) -> Tensor:
        if seen.shape[1] <= MOST_FEATURES:
            return seen
        signs = self._signs
        if signs is None:
            draw = torch.randint(2, (seen.shape[1], MOST_FEATURES), generator=torch.Generator().manual_seed(0))
            self._signs = signs = ((2.0 * draw - 1) / MOST_FEATURES**0.5).to(seen.device)
        return seen @ signs


def _moments(maps: Tensor) -> Tensor:
    """Mean and standard deviation of each channel over the positions: [B, C, h, w] to [B, 2 C], float32."""
    maps = maps.float()
    return torch.cat([maps.mean((2, 3)), maps.std((2, 3), correction=0)], dim=1)
