"""Scores of picture files: by a latent scorer, or by a function of pixels.

A rater is given pictures and gives back a rating for each, in their order, or says why not: a picture that cannot be scored ends nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from PIL import Image
from torch import Tensor

from library.diffusion.noise_schedule import add_noise, sigma_to_abar
from library.errors import UserError
from library.models.vae import Autoencoder, encode_images
from library.scorer_data.buckets import BucketConfig, check_crop, choose_bucket
from library.scorer_data.pictures import cover, read_picture, to_pixels
from library.scorer_data.records import RatedImage, Skipped
from library.scorers.base import Scorer
from library.scorers.judges import Judge
from library.training.runtime import generator
from library.types import Conditioning

UNREADABLE, NO_SCORE = "picture cannot be read", "picture got no score"


@dataclass(frozen=True, slots=True)
class RaterScore:
    """A score, and the standard deviation that the rater itself gives it, in the score's units; None if it gives none."""

    score: float
    uncertainty: float | None = None


RaterResult = RaterScore | Skipped
ReportProgress = Callable[[int], object]  # is called with how many more pictures are done
Prepare = Callable[[Image.Image, RatedImage], Image.Image]  # may raise UserError to leave a picture out


class Rater(Protocol):
    """Something that scores pictures.

    Attributes:
        name: for columns and titles.
    """

    name: str

    def rate(self, images: Sequence[RatedImage], progress: ReportProgress = ...) -> list[RaterResult]:
        """A rating of each picture, or why it has none, in their order. Raises UserError if no picture at all can be rated this way."""
        ...


class LatentRater:
    """A latent scorer, which looks at pictures through a VAE at the size of their bucket: resized to cover it, never squashed.

    Args:
        scorer, vae: on one device; whether they belong together is the caller's to check.
        sigma: noise level at which the pictures are scored; 0 is clean. A picture's noise depends on `seed` and its name alone.
        encode_prompts: needed by a scorer that uses the prompt.

    Raises:
        UserError: sigma is above 0 and the scorer was trained on clean latents only.
    """

    def __init__(
        self,
        scorer: Scorer,
        vae: Autoencoder,
        buckets: BucketConfig,
        *,
        sigma: float = 0.0,
        seed: int = 0,
        batch_size: int = 8,
        encode_prompts: Callable[[Sequence[str]], Conditioning] | None = None,
    ) -> None:
        if sigma and not scorer.spec.noise_aware:
            raise UserError(f"sigma is {sigma:g}, but scorer {scorer.name} was trained on clean pictures only; leave sigma at 0")
        self.name, self.scorer, self.vae, self.buckets = scorer.name, scorer, vae, buckets
        self.sigma, self.seed, self.batch_size, self.encode_prompts = sigma, seed, batch_size, encode_prompts

    def rate(self, images: Sequence[RatedImage], progress: ReportProgress = lambda count: None) -> list[RaterResult]:
        _check_prompts(images, self.scorer.spec.uses_prompt, self.name)
        return _rate_batches(images, self._fit, self._score, self.batch_size, progress)

    def _fit(self, picture: Image.Image, image: RatedImage) -> Image.Image:
        bucket = choose_bucket(*picture.size, self.buckets)
        check_crop(image.name, picture.size, bucket, self.buckets)
        return cover(picture, bucket)

    @torch.no_grad()
    def _score(self, pixels: Tensor, images: Sequence[RatedImage]) -> list[RaterResult]:
        latents = encode_images(self.vae, pixels.to(self.vae.device))  # [B, C, h, w]
        sigmas = latents.new_full((len(latents),), self.sigma)
        if self.sigma:
            rows = [torch.randn(latents.shape[1:], generator=generator(self.seed, image.name)) for image in images]
            latents = add_noise(latents, torch.stack(rows).to(latents.device), sigma_to_abar(sigmas))
        prompts = [image.prompt for image in images] if self.scorer.spec.uses_prompt else None
        cond = self.encode_prompts(prompts) if prompts is not None and self.encode_prompts is not None else None
        scores, spreads = self.scorer.score_and_uncertainty(latents, sigmas, cond, prompts)
        return [
            outcome_of(score, image, self.name, spread or None)
            for score, spread, image in zip(scores.tolist(), spreads.tolist(), images, strict=True)
        ]


class JudgeRater:
    """A function of pixels, which sees every picture whole and at its own size.

    A picture that it raises an error for, or finds no finite number for, is left out.
    """

    def __init__(self, judge: Judge, name: str, *, batch_size: int = 8, device: torch.device | str = "cpu") -> None:
        self.judge, self.name, self.batch_size, self.device = judge, name, batch_size, device

    def rate(self, images: Sequence[RatedImage], progress: ReportProgress = lambda count: None) -> list[RaterResult]:
        _check_prompts(images, self.judge.takes_prompts, self.name)
        return _rate_batches(images, lambda picture, _: picture, self._score, self.batch_size, progress)

    def _score(self, pixels: Tensor, images: Sequence[RatedImage]) -> list[RaterResult]:
        try:
            scores = self.judge((pixels.to(self.device) + 1) / 2, [image.prompt for image in images])
        except UserError as error:  # it is the user's code that fails, and one picture may be what it cannot take
            if len(images) > 1:
                return [outcome for row, image in enumerate(images) for outcome in self._score(pixels[row : row + 1], [image])]
            return [Skipped(f"picture {images[0].name}: {' '.join(str(error).split())}", NO_SCORE)]
        return [outcome_of(score, image, self.name) for score, image in zip(scores.tolist(), images, strict=True)]


def _check_prompts(images: Sequence[RatedImage], needed: bool, name: str) -> None:
    if needed and not any(image.prompt for image in images):
        raise UserError(f"{name} reads prompts and these pictures have none; give a table with the columns path and prompt")


def _rate_batches(
    images: Sequence[RatedImage],
    prepare: Prepare,
    score: Callable[[Tensor, Sequence[RatedImage]], list[RaterResult]],
    batch_size: int,
    progress: ReportProgress,
) -> list[RaterResult]:
    """Score pictures [-1..1] in batches of one size; few wait for theirs to fill. `prepare` may raise UserError to leave a picture out."""
    outcomes: list[RaterResult | None] = [None] * len(images)
    waiting: dict[tuple[int, int], list[tuple[int, Image.Image]]] = {}

    def score_those_of(size: tuple[int, int]) -> None:
        rows, pictures = zip(*waiting.pop(size), strict=True)
        for row, outcome in zip(rows, score(to_pixels(pictures), [images[row] for row in rows]), strict=True):
            outcomes[row] = outcome
        progress(len(rows))

    for row, image in enumerate(images):
        try:
            picture = prepare(read_picture(image.picture), image)
        except UserError as error:
            outcomes[row] = Skipped(str(error), UNREADABLE)
            progress(1)
            continue
        waiting.setdefault(picture.size, []).append((row, picture))
        fullest = max(waiting, key=lambda size: len(waiting[size]))
        if len(waiting[fullest]) >= batch_size or sum(map(len, waiting.values())) >= 4 * batch_size:
            score_those_of(fullest)
    for size in list(waiting):
        score_those_of(size)
    return [outcome for outcome in outcomes if outcome is not None]


def outcome_of(score: float, image: RatedImage, name: str, uncertainty: float | None = None) -> RaterResult:
    """A rating; a score that is not finite is none."""
    if not math.isfinite(score):
        return Skipped(f"picture {image.name}: {name} found {score:g}, which is no finite number", NO_SCORE)
    return RaterScore(score, uncertainty)
