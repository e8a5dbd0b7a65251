"""The record of a measured slider: scores, statistics of the pictures, and how it was sampled. P prompts, S seeds, M multipliers."""

from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from library.measuring.statistics import Response, nan_to_none, none_to_nan


@dataclass(frozen=True, kw_only=True)
class PictureStatistics:
    """What happens to the pictures besides the score: means over samples or prompts, one a multiplier.

    Attributes:
        latent_drift, pixel_drift: RMS distance from the picture of the same seed at multiplier 0 (scaled latents; pixels in 0..1).
        clipped: share of pixel values at or beyond black or white.
        latent_diversity, pixel_diversity: mean RMS distance between two seeds of one prompt, over that of the base model.
        latent_statistics: how far the latents' channel means and spreads are from those at multiplier 0.
        perceptual_distance: of the VAE encoder's features from those of the picture at multiplier 0.
        saturation, edges, nyquist: strength of colours, of edges, and share of the finest detail, over the base model's.
    """

    latent_drift: tuple[float, ...]
    pixel_drift: tuple[float, ...]
    clipped: tuple[float, ...]
    latent_diversity: tuple[float, ...]
    pixel_diversity: tuple[float, ...]
    latent_statistics: tuple[float, ...] = ()
    perceptual_distance: tuple[float, ...] = ()
    saturation: tuple[float, ...] = ()
    edges: tuple[float, ...] = ()
    nyquist: tuple[float, ...] = ()


@dataclass(frozen=True, kw_only=True)
class SliderEvaluation:
    """All that was measured on one slider.

    Attributes:
        name: the slider's.
        multipliers: ascending, 0 among them.
        prompts: the P prompts.
        seeds: [P][S].
        responses: by name, the scorers first.
        statistics: drift, clipping and diversity.
        settings: how it was sampled.
        origin: what the slider's file says of how it was made.
        pictures: of the first seed of the first prompts, uint8 [M, 3, H, W] each; not part of the dictionary.
    """

    name: str
    multipliers: tuple[float, ...]
    prompts: tuple[str, ...]
    seeds: tuple[tuple[int, ...], ...]
    responses: dict[str, Response]
    statistics: PictureStatistics
    settings: dict[str, Any] = field(default_factory=dict)
    origin: dict[str, str] = field(default_factory=dict)
    pictures: tuple[Tensor, ...] = field(default=(), repr=False)

    @property
    def num_pairs(self) -> int:
        return sum(map(len, self.seeds))

    def prompt_gains(self, name: str) -> np.ndarray:
        """Mean gain of a score on each prompt, in within-prompt standard deviations [P, M]; NaN where there is no such unit."""
        response = self.responses[name]
        changes = response.values - response.values[:, :, self.multipliers.index(0), None]
        gains = changes.mean(1) * response.signs[:, None]
        return gains / response.std if response.std > 0 else np.full_like(gains, np.nan)

    def to_dict(self) -> dict[str, Any]:
        """As JSON values, without the pictures."""
        prompt_gains = {name: self.prompt_gains(name) for name in self.responses}
        return {
            "name": self.name,
            "multipliers": list(self.multipliers),
            "prompts": list(self.prompts),
            "seeds": [list(row) for row in self.seeds],
            "settings": self.settings,
            "origin": self.origin,
            "responses": {name: response.to_dict() for name, response in self.responses.items()},
            "statistics": {key: [*map(nan_to_none, values)] for key, values in asdict(self.statistics).items()},
            "per_prompt": [
                {"prompt": prompt, "gains_std": {name: [*map(nan_to_none, gains[row].tolist())] for name, gains in prompt_gains.items()}}
                for row, prompt in enumerate(self.prompts)
            ],
        }

    @staticmethod
    def from_dict(data: dict[str, Any]) -> "SliderEvaluation":
        """What `to_dict` gave, without the pictures."""
        return SliderEvaluation(
            name=data["name"],
            multipliers=tuple(data["multipliers"]),
            prompts=tuple(data["prompts"]),
            seeds=tuple(tuple(row) for row in data["seeds"]),
            settings=data["settings"],
            origin=data.get("origin", {}),
            responses={name: Response.from_dict(name, response) for name, response in data["responses"].items()},
            statistics=PictureStatistics(**{key: tuple(map(none_to_nan, values)) for key, values in data["statistics"].items()}),
        )
