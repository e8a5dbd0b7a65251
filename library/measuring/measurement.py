"""Fixed prompts and seeds, sampled at any multiplier of the slider and compared with the base model's pictures, which are made once.

P prompts, S seeds of each. All statistics of a measurement come from the same pictures; they are decoded only where somebody looks at
pixels.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from library.measuring.image_statistics import (
    channel_statistics_distance,
    chroma,
    clipped_share,
    edge_energy,
    eps_distance,
    nyquist_share,
    perceptual_distance,
    perceptual_diversity,
    relative,
    rms_distance,
    rms_diversity,
    vae_features,
)
from library.measuring.judges import Judges
from library.models.base import DiffusionModel
from library.models.prompt_syntax import plain_text
from library.objectives.rewards import Reward
from library.rollouts.prompt_encoder import PromptEncoder, Size
from library.rollouts.sample import SamplingConfig, decode, initial_noise, model_autocast, sample
from library.types import PromptSpec
from networks.lora import LoRANetwork

REWARD = "reward"  # what the weighted sum of the training scores is called among the scores
EPS_LEVELS = (0.2, 0.5, 0.8)  # of the model's timesteps: where predictions are compared
SHARES = ("clipped",)  # told as they are; the other statistics of pictures alone are told relative to the base model's


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What was measured at one multiplier.

    Attributes:
        scores: by name [P, S], in their own units: "reward", the training scores (both missing where training follows none), the judges.
        statistics: means over the pictures. Distances from the base model: drift (RMS of latents), latent_statistics, eps_distance,
            perceptual_distance. Relative to the base model: latent_diversity, diversity, latent_nyquist, nyquist, saturation, edges.
            clipped is a share. Those that need pixels are missing where none were decoded.
    """

    scores: Mapping[str, np.ndarray]
    statistics: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class BasePictures:
    """What the base model makes of the prompts, on the CPU, one entry a prompt in every list.

    Attributes:
        scores: as in `Measured`.
        statistics: of the pictures alone, in their own units.
        latents: clean, [S, C, h, w].
        shown: pixels, uint8 [S, 3, H, W]; None where nobody looks at pixels.
        eps: predictions for the first picture, noised to `EPS_LEVELS` [levels, C, h, w].
    """

    scores: Mapping[str, np.ndarray]
    statistics: Mapping[str, float]
    latents: Sequence[Tensor]
    shown: Sequence[Tensor | None]
    eps: Sequence[Tensor]


@dataclass(frozen=True, kw_only=True)
class PromptPictures:
    """The S pictures of one prompt: clean latents on the model's device, pixels as decoded (not clamped) or None, scores [S] by name."""

    row: int
    latents: Tensor
    decoded: Tensor | None
    scores: Mapping[str, Tensor]

    @property
    def shown(self) -> Tensor | None:
        """The pixels as a picture file holds them, uint8 [S, 3, H, W] on the CPU."""
        return None if self.decoded is None else (self.decoded.clamp(0, 1) * 255).round().byte().cpu()


@dataclass(kw_only=True)
class FixedPictures:
    """Measures a network on fixed prompts and seeds.

    Attributes:
        prompts: neighbours of one size and number of steps are sampled together.
        encoder: holds their conditioning.
        sampling: how the pictures are made.
        seeds_per_prompt: S. A prompt with a seed of its own begins with it; the seeds of all others differ.
        seed_offset: added to every seed.
        look_at_pixels: decode the pictures for the statistics of pixels; judges that are functions of pixels need them in any case.
    """

    model: DiffusionModel
    network: LoRANetwork
    reward: Reward
    judges: Judges
    prompts: Sequence[PromptSpec]
    encoder: PromptEncoder
    sampling: SamplingConfig
    seeds_per_prompt: int
    seed_offset: int = 0
    look_at_pixels: bool = True
    _base: BasePictures | None = field(default=None, init=False, repr=False)

    @property
    def directions(self) -> np.ndarray:
        """+1 where a positive multiplier is to raise the score, -1 where it is to lower it [P]."""
        return np.sign([prompt.direction for prompt in self.prompts])

    def base(self) -> BasePictures:
        """The base model's pictures, made at the first call."""
        if self._base is None:
            with self.network.disabled():
                pictures = [
                    (seen.latents.cpu(), seen.shown, self._eps(seen.row, seen.latents[:1], 0.0), seen.scores, self._looks(seen))
                    for seen in self._sampled(0.0, "measuring the base model")
                ]
            latents, shown, eps, scores, looks = zip(*pictures, strict=True)
            self._base = BasePictures(scores=_stack(scores), statistics=_mean(looks), latents=latents, shown=shown, eps=eps)
        return self._base

    def measure(self, multiplier: float, label: str, *, thorough: bool = True) -> Measured:
        """Sample, score and compare. A network that does nothing yet costs nothing.

        Args:
            label: of the progress bar.
            thorough: False leaves out what needs more than the pictures' latents and pixels: eps_distance, perceptual_distance, diversity.
        """
        base = self.base()
        if multiplier == 0 or _is_null(self.network):
            distances = ["drift", "latent_statistics", "eps_distance", *(["perceptual_distance"] if base.shown[0] is not None else [])]
            return Measured(scores=base.scores, statistics=dict.fromkeys(distances, 0.0) | _compare(base.statistics, base.statistics))
        scores, looks, distances = [], [], []
        for seen in self._sampled(multiplier, label):
            scores.append(seen.scores)
            looks.append(self._looks(seen, thorough=thorough))
            distances.append(self._distances(seen, base, multiplier, thorough=thorough))
        return Measured(scores=_stack(scores), statistics=_mean(distances) | _compare(_mean(looks), base.statistics))

    def _looks(self, seen: PromptPictures, *, thorough: bool = True) -> dict[str, float]:
        """Statistics of one prompt's pictures alone, in their own units."""
        latents = seen.latents.cpu()  # float64, which not every device has
        looks = {"latent_diversity": rms_diversity(latents), "latent_nyquist": nyquist_share(latents).mean().item()}
        if seen.decoded is not None and seen.shown is not None:
            functions = {"saturation": chroma, "clipped": clipped_share, "edges": edge_energy, "nyquist": nyquist_share}
            looks |= {name: function(seen.decoded).mean().item() for name, function in functions.items()}
            if thorough:
                looks["diversity"] = perceptual_diversity(vae_features(self.model.vae, seen.shown / 255))
        return looks

    def _distances(self, seen: PromptPictures, base: BasePictures, multiplier: float, *, thorough: bool) -> dict[str, float]:
        """How far one prompt's pictures, and the predictions on its base picture, are from the base model's."""
        latents, base_latents, base_shown = seen.latents.cpu(), base.latents[seen.row], base.shown[seen.row]
        distances = {"drift": rms_distance(latents, base_latents), "latent_statistics": channel_statistics_distance(latents, base_latents)}
        if thorough:
            distances["eps_distance"] = eps_distance(self._eps(seen.row, base_latents[:1], multiplier), base.eps[seen.row])
            if seen.shown is not None and base_shown is not None:
                features, base_features = (vae_features(self.model.vae, shown / 255) for shown in (seen.shown, base_shown))
                distances["perceptual_distance"] = perceptual_distance(features, base_features)
        return {name: part.mean().item() for name, part in distances.items()}

    @torch.no_grad()
    def _sampled(self, multiplier: float, label: str) -> Iterator[PromptPictures]:
        """The pictures of one prompt after the other, scored and judged."""
        count, device = self.seeds_per_prompt, self.model.device
        rows_and_kinds = [(row, (self._size(prompt), self._num_steps(prompt))) for row, prompt in enumerate(self.prompts)]
        total = count * sum(num_steps for _, (_, num_steps) in rows_and_kinds)
        with tqdm(total=total, desc=label, leave=False, unit="step") as bar:
            for _, group in groupby(rows_and_kinds, key=lambda pair: pair[1]):
                rows = [row for row, _ in group]
                latents = sample(
                    self.model,
                    self.network,
                    [self.prompts[row] for row in rows for _ in range(count)],
                    [seed for row in rows for seed in self.seeds(row)],
                    multiplier,
                    sampling=self.sampling,
                    encoder=self.encoder,
                    progress=bar.update,
                )
                for row, own in zip(rows, latents.split(count), strict=True):
                    pixels = self.look_at_pixels or self.judges.functions
                    decoded = decode(self.model, own, self.sampling.batch_size) if pixels else None
                    yield PromptPictures(row=row, latents=own.to(device), decoded=decoded, scores=self._scores(row, own, decoded))

    def _scores(self, row: int, latents: Tensor, decoded: Tensor | None) -> dict[str, Tensor]:
        prompts = [self.prompts[row]] * len(latents)
        texts = [plain_text(prompt.prompt) for prompt in prompts]
        # What was asked for, in the base model's words: a LoRA of the text encoder must not talk to its own judge.
        cond = self.encoder.cond(prompts, self._size(prompts[0]), [0.0] * len(prompts))
        sigmas = latents.new_zeros(len(latents))
        scores = {}
        if self.reward.goals:
            reward = self.reward(latents, sigmas, cond, prompts)
            scores = {REWARD: reward.total, **reward.terms}
        scores |= {name: scorer(latents, sigmas, cond, texts) for name, scorer in self.judges.scorers.items()}
        if decoded is not None:
            scores |= {name: judge(decoded.clamp(0, 1), texts) for name, judge in self.judges.functions.items()}
        return {name: score.cpu() for name, score in scores.items()}

    @torch.no_grad()
    def _eps(self, row: int, latents: Tensor, multiplier: float) -> Tensor:
        """Predictions for clean latents [1, C, h, w] noised to each of `EPS_LEVELS`, on the CPU."""
        model, levels, prompt = self.model, len(EPS_LEVELS), self.prompts[row]
        timesteps = torch.tensor([round(level * (len(model.schedule.alphas_cumprod) - 1)) for level in EPS_LEVELS], device=model.device)
        noise, _ = initial_noise(self.seeds(row)[:1], (latents.shape[1], latents.shape[2], latents.shape[3]))
        clean, noise = (part.to(model.device).expand(levels, -1, -1, -1) for part in (latents, noise))
        cond = self.encoder.cond([prompt] * levels, self._size(prompt), [multiplier] * levels)
        before = self.network.multiplier
        self.network.set_multiplier(multiplier)
        try:
            with model_autocast(model):
                return model.predict_eps(model.schedule.add_noise(clean, noise, timesteps), timesteps, cond).cpu()
        finally:
            self.network.set_multiplier(before)

    def seeds(self, row: int) -> list[int]:
        """Of one prompt's pictures."""
        own = self.prompts[row].seed
        first = row * self.seeds_per_prompt if own is None else own
        return [self.seed_offset + first + number for number in range(self.seeds_per_prompt)]

    def _size(self, prompt: PromptSpec) -> Size:
        return self.sampling.of(prompt).size

    def _num_steps(self, prompt: PromptSpec) -> int:
        return self.sampling.of(prompt).num_steps


def _is_null(network: LoRANetwork) -> bool:
    """Whether it does nothing, as before training."""
    return not any(lora.lora_up.weight.any() for lora in network.loras)


def _stack(scores: Sequence[Mapping[str, Tensor]]) -> dict[str, np.ndarray]:
    """Scores [S] of P prompts as [P, S], by name."""
    return {name: torch.stack([own[name] for own in scores]).double().numpy() for name in scores[0]}


def _mean(statistics: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: float(np.mean([own[name] for own in statistics])) for name in statistics[0]}


def _compare(looks: Mapping[str, float], base: Mapping[str, float]) -> dict[str, float]:
    return {name: value if name in SHARES else relative(value, base[name]) for name, value in looks.items()}
