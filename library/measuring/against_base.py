"""The pictures of one prompt in numbers: what they are like alone, and how far they are from the base model's of the same seeds."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from library.measuring.image_statistics import (
    channel_statistics_distance,
    chroma,
    clipped_share,
    edge_energy,
    features_at_once,
    nyquist_share,
    perceptual_distance,
    rms_distance,
    rms_diversity,
    vae_features,
)
from library.models.base import DiffusionModel

NOTICEABLE = 10 / 255  # of the pixels' range: so much brighter, a picture is told from itself (docs/experiments.md)
SHARES = ("clipped",)  # kept as they are; the other statistics of pictures alone are divided by the base model's


def beside_base(
    model: DiffusionModel, latents: Tensor, decoded: Tensor | None, base_latents: Tensor, base_shown: Tensor | None
) -> tuple[dict[str, Tensor], Tensor | None]:
    """S pictures of a prompt at each of K multipliers beside the base model's. Features of a few pictures are held at a time: those of one
    take up to 350 MB.

    Args:
        latents: [S, K, C, h, w].
        decoded: pixels as decoded [S, K, 3, H, W], or None.
        base_latents: [S, C, h, w].
        base_shown: pixels as a picture file holds them, uint8 [S, 3, H, W]; looked at where `decoded` is given.

    Returns:
        Distances [S, K] by name, and how plainly the difference is seen [S, K] or None: the square root of the perceptual distance, 1 where
        it is that of the base picture from itself, brighter or darker by `NOTICEABLE`.
    """

    def each(function: Callable[[Tensor, Any], Tensor], pictures: Tensor, base: Any) -> Tensor:
        return torch.stack([function(own, base).cpu() for own in pictures.unbind(1)], dim=1)

    distances = {
        "latent_drift": each(rms_distance, latents, base_latents),
        "latent_statistics": each(channel_statistics_distance, latents, base_latents),
    }
    if decoded is None or base_shown is None:
        return distances, None
    distances["pixel_drift"] = each(lambda own, base: rms_distance(as_shown(own) / 255, base), decoded, base_shown / 255)
    perceptual, noticeable = [], []
    count = features_at_once(*base_shown.shape[-2:])
    with model.vae_at_work():
        for own, shown in zip(decoded.split(count), base_shown.split(count), strict=True):
            base = shown / 255
            away = torch.where(base.mean((1, 2, 3), keepdim=True) > 0.5, -NOTICEABLE, NOTICEABLE)  # not into black or white
            features = vae_features(model.vae, base)
            shifted = vae_features(model.vae, (base + away).clamp(0, 1))
            noticeable.append(perceptual_distance(shifted, features).cpu().clamp_min(1e-12))
            del shifted
            perceptual.append(each(lambda one, two: perceptual_distance(vae_features(model.vae, as_shown(one) / 255), two), own, features))
    distances["perceptual_distance"] = torch.cat(perceptual)
    return distances, (distances["perceptual_distance"] / torch.cat(noticeable)[:, None]).sqrt()


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
