"""Does a slider do what it says? Prompts x seeds x multipliers, scored by its own scorer and by independent judges.

P prompts, S seeds, M multipliers; the statistics are those of `library.statistics`.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from library.errors import UserError
from library.models.base import DiffusionModel
from library.sampling import PromptEncoder, Size, decode, sample, size_of
from library.scorers.base import Scorer
from library.statistics import Response, nan_to_none, none_to_nan, summarise_response
from library.types import PromptSpec
from networks.lora import LoRANetwork

Judge = Callable[[Tensor, Sequence[str]], Tensor]  # pixels [B, 3, H, W] in 0..1 and prompts -> [B]


@dataclass(frozen=True, kw_only=True)
class PictureStatistics:
    """What happens to the pictures besides the score: means over samples or prompts, one a multiplier.

    Attributes:
        latent_drift, pixel_drift: RMS distance from the picture of the same seed at multiplier 0 (scaled latents; pixels in 0..1).
        clipped: share of pixel values at or beyond black or white.
        latent_diversity, pixel_diversity: mean RMS distance between two seeds of one prompt, over that of the base model.
    """

    latent_drift: tuple[float, ...]
    pixel_drift: tuple[float, ...]
    clipped: tuple[float, ...]
    latent_diversity: tuple[float, ...]
    pixel_diversity: tuple[float, ...]


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
        pictures: of the first seed of the first prompts, uint8 [M, 3, H, W] each; not part of the dictionary.
    """

    name: str
    multipliers: tuple[float, ...]
    prompts: tuple[str, ...]
    seeds: tuple[tuple[int, ...], ...]
    responses: dict[str, Response]
    statistics: PictureStatistics
    settings: dict[str, Any] = field(default_factory=dict)
    pictures: tuple[Tensor, ...] = field(default=(), repr=False)

    @property
    def num_pairs(self) -> int:
        return sum(map(len, self.seeds))

    def to_dict(self) -> dict[str, Any]:
        """As JSON values, without the pictures."""
        return {
            "name": self.name,
            "multipliers": list(self.multipliers),
            "prompts": list(self.prompts),
            "seeds": [list(row) for row in self.seeds],
            "settings": self.settings,
            "responses": {name: response.to_dict() for name, response in self.responses.items()},
            "statistics": {key: [*map(nan_to_none, values)] for key, values in asdict(self.statistics).items()},
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
            responses={name: Response.from_dict(name, response) for name, response in data["responses"].items()},
            statistics=PictureStatistics(**{key: tuple(map(none_to_nan, values)) for key, values in data["statistics"].items()}),
        )


@torch.no_grad()
def evaluate(
    model: DiffusionModel,
    network: LoRANetwork,
    prompts: Sequence[PromptSpec],
    seeds: Sequence[int] | Sequence[Sequence[int]],
    multipliers: Sequence[float],
    scorers: Mapping[str, Scorer],
    judges: Mapping[str, Judge],
    *,
    num_steps: int,
    guidance_scale: float,
    resolution: Size,
    batch_size: int,
    solver: str = "ddim",
    name: str = "slider",
    encoder: PromptEncoder | None = None,
    num_pictures: int = 6,
    bootstrap_seed: int = 0,
    progress: Callable[[int], object] | None = None,
) -> SliderEvaluation:
    """Sample every prompt, seed and multiplier, and score what comes out.

    Args:
        seeds: S seeds for all prompts, or S of its own for each prompt [P][S] (pairs that share no noise); S at least 2.
        multipliers: of the network; 0, the base model, is added where it is missing.
        scorers: given clean latents at sigma 0. judges: given pixels [B, 3, H, W] in 0..1 and the prompts.
        num_pictures: of how many prompts the pictures are kept.
        progress: as in `sample`: P * S * M * num_steps in all.

    Raises:
        UserError: with fewer than 2 seeds per prompt, no multiplier besides 0, or a scorer and a judge of one name.
    """
    strengths = tuple(sorted({float(value) for value in multipliers} | {0.0}))
    seed_table = np.broadcast_to(np.asarray(seeds, dtype=np.int64), (len(prompts), np.asarray(seeds).shape[-1]))  # [P, S]
    num_seeds, base = seed_table.shape[1], strengths.index(0.0)
    if len(strengths) < 2:
        raise UserError("the only multiplier is 0, the base model; give at least one other, for example -1 0 1")
    if num_seeds < 2:
        raise UserError(f"{num_seeds} seed per prompt cannot tell a slider from chance; give at least 2 seeds per prompt")
    if both := scorers.keys() & judges.keys():
        raise UserError(f"a scorer and a judge are both called {', '.join(sorted(both))}; give each a name of its own")

    encoder = encoder or PromptEncoder(model, network)
    scores: dict[str, list[np.ndarray]] = {key: [] for key in [*scorers, *judges]}
    measured: list[np.ndarray] = []  # [5, M] a prompt
    pictures: list[Tensor] = []
    for chunk in _chunks(prompts, resolution, batch_size // (num_seeds * len(strengths))):
        shape = (len(chunk), num_seeds, len(strengths))
        samples = [prompts[row] for row in chunk for _ in range(num_seeds * len(strengths))]
        latents = sample(
            model,
            network,
            samples,
            [int(seed) for row in chunk for seed in seed_table[row] for _ in strengths],
            strengths * (len(chunk) * num_seeds),
            num_steps=num_steps,
            guidance_scale=guidance_scale,
            resolution=resolution,
            batch_size=batch_size,
            solver=solver,
            encoder=encoder,
            progress=progress,
        )
        decoded = decode(model, latents, batch_size)
        pixels = decoded.clamp(0, 1)
        texts = [prompt.prompt for prompt in samples]
        size = size_of(samples[0], resolution)
        for rows in _slices(len(samples), batch_size):
            sigmas = latents.new_zeros(len(texts[rows]))
            for key, scorer in scorers.items():
                cond = encoder.encode(texts[rows], size, [0.0] * len(texts[rows])) if scorer.spec.uses_prompt else None
                scores[key].append(scorer(latents[rows], sigmas, cond, texts[rows]).cpu().double().numpy())
            for key, judge in judges.items():
                scores[key].append(judge(pixels[rows], texts[rows]).cpu().double().numpy())
        for row in range(len(chunk)):
            mine = [part.cpu().unflatten(0, shape)[row] for part in (latents, pixels, decoded)]  # [S, M, ...]
            measured.append(_measure(mine[0], mine[1], mine[2], base))
            if len(pictures) < num_pictures:
                pictures.append((mine[1][0] * 255).round().byte())

    values = {key: np.concatenate(rows).reshape(len(prompts), num_seeds, len(strengths)) for key, rows in scores.items()}
    rng, directions = np.random.default_rng(bootstrap_seed), np.array([prompt.direction for prompt in prompts])
    return SliderEvaluation(
        name=name,
        multipliers=strengths,
        prompts=tuple(prompt.prompt for prompt in prompts),
        seeds=tuple(tuple(map(int, row)) for row in seed_table),
        responses={
            key: summarise_response(key, "scorer" if key in scorers else "judge", values[key], strengths, rng, directions) for key in values
        },
        statistics=_pool(np.array(measured), base),
        settings={
            "num_steps": num_steps,
            "guidance_scale": guidance_scale,
            "solver": solver,
            "resolution": f"{resolution[1]}x{resolution[0]}",
            "bootstrap_seed": bootstrap_seed,
        },
        pictures=tuple(pictures),
    )


def _chunks(prompts: Sequence[PromptSpec], resolution: Size, length: int) -> Iterator[list[int]]:
    """Runs of neighbouring prompts of one size, `length` (at least 1) at most."""
    chunk: list[int] = []
    for row, prompt in enumerate(prompts):
        if chunk and (len(chunk) >= length or size_of(prompt, resolution) != size_of(prompts[chunk[0]], resolution)):
            yield chunk
            chunk = []
        chunk.append(row)
    if chunk:
        yield chunk


def _slices(count: int, length: int) -> list[slice]:
    return [slice(start, start + length) for start in range(0, count, length)]


def _measure(latents: Tensor, pixels: Tensor, decoded: Tensor, base: int) -> np.ndarray:
    """The fields of `PictureStatistics` for one prompt [5, M], diversities still in their own units; parts are [S, M, ...]."""
    clipped = ((decoded <= 0) | (decoded >= 1)).double().mean((0, 2, 3, 4))
    drifts = [(part - part[:, base : base + 1]).square().mean((2, 3, 4)).sqrt().mean(0).double() for part in (latents, pixels)]
    diversities = [torch.stack([_mean_pair_distance(column) for column in part.unbind(1)]) for part in (latents, pixels)]
    return torch.stack([*drifts, clipped, *diversities]).numpy()


def _mean_pair_distance(samples: Tensor) -> Tensor:
    """Mean RMS distance between two of S samples [S, ...]."""
    flat = samples.flatten(1).double()
    return torch.pdist(flat).mean() / flat.shape[1] ** 0.5


def _pool(measured: np.ndarray, base: int) -> PictureStatistics:
    """Means over prompts of [P, 5, M], diversities over the base model's (NaN where all its pictures are the same)."""
    latent_drift, pixel_drift, clipped, *diversities = measured.mean(0)
    ratios = [diversity / diversity[base] if diversity[base] > 0 else np.full_like(diversity, np.nan) for diversity in diversities]
    columns = [tuple(map(float, column)) for column in (latent_drift, pixel_drift, clipped, *ratios)]
    return PictureStatistics(
        latent_drift=columns[0], pixel_drift=columns[1], clipped=columns[2], latent_diversity=columns[3], pixel_diversity=columns[4]
    )
