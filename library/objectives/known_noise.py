"""Learning from pictures: they are encoded once, noised anew for every batch, and the noise is known."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from library.errors import UserError
from library.models.base import DiffusionModel
from library.objectives.base import Term, TrainingContext
from library.objectives.regression import as_output, min_snr_weights, squared_errors
from library.rollouts.prompt_encoder import Size
from library.scorer_data.buckets import BucketConfig, choose_bucket, crop_share
from library.scorer_data.pictures import cover, read_picture, to_pixels
from library.scorer_data.records import Picture, Skipped
from library.training.runtime import upload
from library.types import PromptSpec

logger = logging.getLogger(__name__)

SIDE_STEP = 64  # pixels; of the sizes that pictures are brought to


class KnownNoiseTerm(Term):
    """What the terms share that learn from pictures: their prompts, encoded ahead, and a generator.

    Args:
        name: the term's own.
        prompts: what its pictures show.
    """

    def __init__(self, context: TrainingContext, name: str, prompts: Iterable[str]) -> None:
        self.context, self.generator = context, context.generator(name)
        context.encoder.encode_ahead([PromptSpec(prompt=prompt) for prompt in dict.fromkeys(prompts)], context.sampling.size)

    def errors(
        self, latents: Sequence[Tensor], prompts: Sequence[str], multipliers: Sequence[float], *, copies: int = 1
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Noise pictures, and compare the U-Net's output with what it should be given the known noise.

        DDPM's simple loss, arXiv 2006.11239, eq. 14, for a v-prediction model in v; weighted as `min_snr_weights` says.

        Args:
            latents: scaled, B of one shape [C, h, w].
            prompts, multipliers: what the pictures show, and what the LoRA is multiplied with, B of each.
            copies: so many parts of the batch, one behind the other, are under the same noise at the same timesteps.

        Returns:
            Squared errors [B], weighted, with gradient; plain ones [B]; the timesteps [B].
        """
        model, encoder = self.context.model, self.context.encoder
        clean, strengths, drawn = (
            upload(torch.stack(list(latents)), model.device),
            upload(multipliers, model.device),
            len(latents) // copies,
        )
        noise = upload(torch.randn(clean[:drawn].shape, generator=self.generator), model.device).repeat(copies, 1, 1, 1)
        timesteps = upload(torch.randint(len(model.schedule), (drawn,), generator=self.generator), model.device).repeat(copies)
        height, width = (side * model.spec.vae_scale_factor for side in clean.shape[-2:])
        cond = encoder.trained_cond([PromptSpec(prompt=prompt) for prompt in prompts], (height, width), strengths)
        noisy = model.schedule.add_noise(clean, noise, timesteps)
        self.context.network.set_multiplier(strengths)
        eps = model.predict_eps(noisy, timesteps, cond)
        errors = squared_errors(*(as_output(model, noisy, part, timesteps) for part in (eps, noise)))
        return errors * min_snr_weights(model, timesteps, self.context.min_snr_gamma), errors.detach(), timesteps

    def state_dict(self) -> dict[str, Any]:
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.generator.set_state(state["generator"])


def draw_alike(latents: Sequence[Tensor], count: int, generator: torch.Generator) -> list[int]:
    """`count` places among latents [C, h, w], all of one shape; every picture as often as every other in the long run.

    None comes twice before all of its shape came once.
    """
    shape = latents[int(torch.randint(len(latents), (1,), generator=generator))].shape
    alike = [place for place, own in enumerate(latents) if own.shape == shape]
    order = torch.randperm(len(alike), generator=generator).tolist()
    return [alike[order[number % len(alike)]] for number in range(count)]


def buckets_around(resolution: Size) -> BucketConfig:
    """Sizes of about the area of (height, width), with sides in multiples of 64 pixels: from half to twice as long."""
    height, width = (max(side // SIDE_STEP, 1) * SIDE_STEP for side in resolution)
    shortest = max(min(width, height) // 2, SIDE_STEP)
    return BucketConfig(resolution=f"{width},{height}", min_bucket_reso=shortest, bucket_reso_steps=SIDE_STEP)


@torch.no_grad()
def encode_at_one_size(model: DiffusionModel, pictures: Sequence[Picture], buckets: BucketConfig) -> list[Tensor] | Skipped:
    """Scaled latents [C, h, w] on the CPU of pictures that belong together, all brought to the size that fits the first best."""
    try:
        images = [read_picture(picture) for picture in pictures]
    except UserError as error:
        return Skipped(str(error), "picture cannot be read")
    bucket = choose_bucket(*images[0].size, buckets)
    for picture, image in zip(pictures, images, strict=True):
        if (cut := crop_share(*image.size, bucket)) > buckets.max_crop:
            width, height = image.size
            return Skipped(
                f"picture {picture.key} is {width}x{height}, of which {bucket[0]}x{bucket[1]} would cut off {cut:.0%}",
                "picture is too long",
            )
    latents = [model.encode_images(to_pixels([cover(image, bucket)]).to(model.device)).float().cpu()[0] for image in images]
    if not all(own.isfinite().all() for own in latents):
        return Skipped(
            f"picture {pictures[0].key}: the VAE makes NaN or infinity of it; try another VAE file", "the VAE makes no latents of it"
        )
    return latents


def caption_of(picture: Path, default: str) -> str:
    """The text of the .txt file beside a picture, in one line; `default` if there is none."""
    file = picture.with_suffix(".txt")
    if not file.is_file():
        return default
    try:
        return " ".join(file.read_text(encoding="utf-8-sig").split())
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"caption {file} cannot be read as UTF-8 text: {error}") from error
