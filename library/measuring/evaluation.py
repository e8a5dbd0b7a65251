"""Does a slider do what it says? Prompts x seeds x multipliers, scored by its own scorer and by independent judges.

P prompts, S seeds, M multipliers; the statistics are those of `library.measuring.statistics` and `library.measuring.image_statistics`.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from library.errors import UserError
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
from library.measuring.slider_evaluation import PictureStatistics, SliderEvaluation
from library.measuring.statistics import summarise_response
from library.models.base import DiffusionModel
from library.models.prompt_syntax import plain_text
from library.rollouts.prompt_encoder import PromptEncoder, Size
from library.rollouts.sample import SamplingConfig, decode, sample
from library.scorers.base import Scorer
from library.types import PromptSpec
from networks.lora import LoRANetwork

Judge = Callable[[Tensor, Sequence[str]], Tensor]  # pixels [B, 3, H, W] in 0..1 and prompts -> [B]


RELATIVE = ("latent_diversity", "pixel_diversity", "saturation", "edges", "nyquist")  # told over the base model's own


def sample_base(
    model: DiffusionModel,
    prompts: Sequence[PromptSpec],
    seeds: Sequence[int] | Sequence[Sequence[int]],
    sampling: SamplingConfig,
    *,
    encoder: PromptEncoder | None = None,
    progress: Callable[[int], object] | None = None,
) -> list[Tensor]:
    """Latents of the model without any slider, on the CPU, [S, C, h, w] for each prompt: `evaluate` takes them for every slider of a
    comparison. Arguments as there; no network may be switched on."""
    table = _seed_table(prompts, seeds)
    encoder = encoder or PromptEncoder(model)
    latents: list[Tensor] = []
    for chunk in _chunks(prompts, sampling, sampling.batch_size // table.shape[1]):
        own = sample(
            model,
            None,
            [prompts[row] for row in chunk for _ in table[row]],
            table[chunk].flatten().tolist(),
            sampling=sampling,
            encoder=encoder,
            progress=progress,
        )
        latents += own.cpu().unflatten(0, (len(chunk), -1)).unbind()
    return latents


@torch.no_grad()
def evaluate(
    model: DiffusionModel,
    network: LoRANetwork,
    prompts: Sequence[PromptSpec],
    seeds: Sequence[int] | Sequence[Sequence[int]],
    multipliers: Sequence[float],
    scorers: Mapping[str, Scorer],
    judges: Mapping[str, Judge | Scorer],
    sampling: SamplingConfig,
    *,
    name: str = "slider",
    encoder: PromptEncoder | None = None,
    base: Sequence[Tensor] | None = None,
    num_pictures: int = 6,
    bootstrap_seed: int = 0,
    progress: Callable[[int], object] | None = None,
) -> SliderEvaluation:
    """Sample every prompt, seed and multiplier, and score what comes out.

    Args:
        seeds: S seeds for all prompts, or S of its own for each prompt [P][S] (pairs that share no noise); S at least 2.
        multipliers: of the network; 0, the base model, is added where it is missing.
        scorers: what training follows; given clean latents at sigma 0.
        judges: functions of pixels [B, 3, H, W] in 0..1 and the prompts, or scorers that training does not follow.
        base: what `sample_base` made of the same prompts, seeds and settings; None makes it here.
        num_pictures: of how many prompts the pictures are kept.
        progress: as in `sample`.

    Raises:
        UserError: with fewer than 2 seeds per prompt, no multiplier besides 0, or a scorer and a judge of one name.
    """
    strengths = tuple(sorted({float(value) for value in multipliers} | {0.0}))
    table, zero = _seed_table(prompts, seeds), strengths.index(0.0)
    num_seeds, others = table.shape[1], [strength for strength in strengths if strength != 0]
    if not others:
        raise UserError("the only multiplier is 0, the base model; give at least one other, for example -1 0 1")
    if num_seeds < 2:
        raise UserError(f"{num_seeds} seed per prompt cannot tell a slider from chance; give at least 2 seeds per prompt")
    if both := scorers.keys() & judges.keys():
        raise UserError(f"a scorer and a judge are both called {', '.join(sorted(both))}; give each a name of its own")

    encoder = encoder or PromptEncoder(model, network)
    if base is None:
        with network.disabled():
            base = sample_base(
                model,
                prompts,
                table.tolist(),
                sampling,
                progress=progress,
            )
    raters = {**scorers, **judges}
    scores: dict[str, list[np.ndarray]] = {key: [] for key in raters}
    measured: list[dict[str, np.ndarray]] = []
    pictures: list[Tensor] = []
    for chunk in _chunks(prompts, sampling, sampling.batch_size // (num_seeds * len(others))):
        moved = sample(
            model,
            network,
            [prompts[row] for row in chunk for _ in range(num_seeds * len(others))],
            table[chunk].flatten().repeat(len(others)).tolist(),
            others * (len(chunk) * num_seeds),
            sampling=sampling,
            encoder=encoder,
            progress=progress,
        )
        shape = (len(chunk), num_seeds, len(strengths))
        moved = moved.cpu().unflatten(0, (*shape[:2], len(others)))
        unmoved = torch.stack([base[row] for row in chunk]).unsqueeze(2)
        latents = torch.cat([moved[:, :, :zero], unmoved, moved[:, :, zero:]], dim=2).flatten(0, 2)
        decoded = decode(model, latents, sampling.batch_size)
        samples = [prompts[row] for row in chunk for _ in range(num_seeds * len(strengths))]
        for rows in _slices(len(samples), sampling.batch_size):
            for key, rater in raters.items():
                rated = _rate(rater, latents[rows].to(model.device), decoded[rows].clamp(0, 1), samples[rows], encoder, sampling)
                scores[key].append(rated.cpu().double().numpy())
        for own_latents, own_decoded in zip(latents.unflatten(0, shape), decoded.unflatten(0, shape), strict=True):
            measured.append(_measure(model, own_latents, own_decoded, zero))
            if len(pictures) < num_pictures:
                pictures.append((own_decoded[0].clamp(0, 1) * 255).round().byte())

    values = {key: np.concatenate(rows).reshape(len(prompts), num_seeds, len(strengths)) for key, rows in scores.items()}
    rng, directions = np.random.default_rng(bootstrap_seed), np.array([prompt.direction for prompt in prompts])
    return SliderEvaluation(
        name=name,
        multipliers=strengths,
        prompts=tuple(prompt.prompt for prompt in prompts),
        seeds=tuple(tuple(map(int, row)) for row in table),
        responses={
            key: summarise_response(key, "scorer" if key in scorers else "judge", values[key], strengths, rng, directions) for key in values
        },
        statistics=_pool(measured, zero),
        settings={
            "num_steps": sampling.num_steps,
            "guidance_scale": sampling.guidance_scale,
            "solver": sampling.sampler,
            "timesteps": sampling.spacing or "the model's own",
            "guidance_rescale": sampling.guidance_rescale,
            "resolution": f"{sampling.size[1]}x{sampling.size[0]}",
            "bootstrap_seed": bootstrap_seed,
        },
        pictures=tuple(pictures),
    )


def _rate(
    rater: Judge | Scorer, latents: Tensor, pixels: Tensor, prompts: Sequence[PromptSpec], encoder: PromptEncoder, sampling: SamplingConfig
) -> Tensor:
    """Scores [B] of pictures of one size."""
    texts = [plain_text(prompt.prompt) for prompt in prompts]
    if not isinstance(rater, Scorer):
        return rater(pixels, texts)
    # What was asked for, in the base model's words: a LoRA of the text encoder must not talk to its own judge.
    cond = encoder.cond(prompts, sampling.of(prompts[0]).size, [0.0] * len(texts)) if rater.spec.uses_prompt else None
    return rater(latents, latents.new_zeros(len(latents)), cond, texts)


def _seed_table(prompts: Sequence[PromptSpec], seeds: Sequence[int] | Sequence[Sequence[int]]) -> np.ndarray:
    table = np.asarray(seeds, dtype=np.int64)
    return np.broadcast_to(table, (len(prompts), table.shape[-1]))  # [P, S]


def _chunks(prompts: Sequence[PromptSpec], sampling: SamplingConfig, length: int) -> Iterator[list[int]]:
    """Runs of neighbouring prompts of one size and number of steps, `length` (at least 1) at most."""

    def kind(prompt: PromptSpec) -> tuple[Size, int]:
        return sampling.of(prompt).size, sampling.of(prompt).num_steps

    chunk: list[int] = []
    for row, prompt in enumerate(prompts):
        if chunk and (len(chunk) >= length or kind(prompt) != kind(prompts[chunk[0]])):
            yield chunk
            chunk = []
        chunk.append(row)
    if chunk:
        yield chunk


def _slices(count: int, length: int) -> list[slice]:
    return [slice(start, start + length) for start in range(0, count, length)]


def _measure(model: DiffusionModel, latents: Tensor, decoded: Tensor, zero: int) -> dict[str, np.ndarray]:
    """The fields of `PictureStatistics` for one prompt, [M] each, still in their own units.

    Args:
        latents: [S, M, C, h, w]. decoded: pixels, not clamped [S, M, 3, H, W].
        zero: where the base model's stand among the M.
    """
    columns: dict[str, list[float]] = {}
    pixels = decoded.clamp(0, 1)
    base_features = vae_features(model.vae, pixels[:, zero])
    for place in range(latents.shape[1]):
        now, shown = latents[:, place], pixels[:, place]
        means = {
            "latent_drift": rms_distance(now, latents[:, zero]),
            "pixel_drift": rms_distance(shown, pixels[:, zero]),
            "latent_statistics": channel_statistics_distance(now, latents[:, zero]),
            "perceptual_distance": perceptual_distance(vae_features(model.vae, shown), base_features),
            "clipped": clipped_share(decoded[:, place]),
            "saturation": chroma(shown),
            "edges": edge_energy(shown),
            "nyquist": nyquist_share(shown),
        }
        own = {key: part.mean().item() for key, part in means.items()}
        own |= {"latent_diversity": rms_diversity(now), "pixel_diversity": rms_diversity(shown)}
        for key, value in own.items():
            columns.setdefault(key, []).append(value)
    return {key: np.array(column) for key, column in columns.items()}


def _pool(measured: Sequence[Mapping[str, np.ndarray]], zero: int) -> PictureStatistics:
    """Means over prompts; those in `RELATIVE` over the base model's (NaN where it has none, such as pictures that are all the same)."""
    means = {key: np.mean([own[key] for own in measured], axis=0) for key in measured[0]}
    for key in RELATIVE:
        means[key] = means[key] / means[key][zero] if means[key][zero] > 0 else np.full_like(means[key], np.nan)
    return PictureStatistics(**{key: tuple(map(float, column)) for key, column in means.items()})
