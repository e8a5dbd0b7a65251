"""The pictures of one prompt in numbers: what they are like alone, and how far they are from the base model's of the same seeds."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from library.measuring.image_statistics import (
    channel_statistics_distance,
    chroma,
    clipped_share,
    edge_energy,
    nyquist_share,
    perceptual_distance,
    rms_distance,
    rms_diversity,
    vae_features,
)
from library.models.base import DiffusionModel

NOTICEABLE = 10 / 255  # of the pixels' range: so much brighter, a picture is told from itself (docs/experiments.md)
SHARES = ("clipped",)  # kept as they are; the other statistics of pictures alone are divided by the base model's


class Comparison:
    """The pictures of a prompt beside the base model's [S], latents and pixels as shown (or None).

    Attributes:
        noticeable: perceptual distance [S] between each base picture and itself, brighter or darker by `NOTICEABLE`.
    """

    def __init__(self, model: DiffusionModel, latents: Tensor, shown: Tensor | None) -> None:
        self.model, self.latents = model, latents
        if shown is not None:
            self.pixels = shown / 255
            away = torch.where(self.pixels.mean((1, 2, 3), keepdim=True) > 0.5, -NOTICEABLE, NOTICEABLE)  # not into black or white
            with model.vae_at_work():
                self.features = vae_features(model.vae, self.pixels)
                shifted = vae_features(model.vae, (self.pixels + away).clamp(0, 1))
            self.noticeable = perceptual_distance(shifted, self.features).cpu().clamp_min(1e-12)

    def __call__(self, latents: Tensor, decoded: Tensor | None) -> dict[str, Tensor]:
        """Distances [S] by name."""
        distances = {
            "latent_drift": rms_distance(latents, self.latents),
            "latent_statistics": channel_statistics_distance(latents, self.latents),
        }
        if decoded is not None:
            pixels = as_shown(decoded) / 255
            distances["pixel_drift"] = rms_distance(pixels, self.pixels)
            with self.model.vae_at_work():
                features = vae_features(self.model.vae, pixels)
            distances["perceptual_distance"] = perceptual_distance(features, self.features).cpu()
        return distances


def picture_statistics(latents: Tensor, decoded: Tensor | None) -> dict[str, float]:
    """Statistics of the S pictures of one prompt alone, in their own units."""
    found = {"latent_diversity": rms_diversity(latents), "latent_nyquist": nyquist_share(latents).mean().item()}
    if decoded is not None:
        pixels = decoded.clamp(0, 1)
        found["pixel_diversity"] = rms_diversity(pixels)
        found["clipped"] = clipped_share(decoded).mean().item()
        functions = {"saturation": chroma, "edges": edge_energy, "nyquist": nyquist_share}
        found |= {name: function(pixels).mean().item() for name, function in functions.items()}
    return found


def statistics_of(
    base: Mapping[str, float], alone: Sequence[Mapping[str, float]], distances: Sequence[Mapping[str, float]], zero: int
) -> dict[str, tuple[float, ...]]:
    """Those of the K multipliers and, at place `zero`, of the base model [M]; NaN where the base model has nothing to be divided by."""
    columns = {name: [*(own[name] for own in distances[:zero]), 0.0, *(own[name] for own in distances[zero:])] for name in distances[0]}
    for name, own in base.items():
        column = [*(part[name] for part in alone[:zero]), own, *(part[name] for part in alone[zero:])]
        columns[name] = column if name in SHARES else [value / own if own > 0 else float("nan") for value in column]
    return {name: tuple(map(float, column)) for name, column in columns.items()}


def as_shown(decoded: Tensor) -> Tensor:
    """Pixels as a picture file holds them, uint8."""
    return (decoded.clamp(0, 1) * 255).round().byte()


def mean_of(statistics: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: float(np.mean([own[name] for own in statistics])) for name in statistics[0]}
