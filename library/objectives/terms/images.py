"""A plain LoRA on pictures: alone, or beside a score to hold the slider to them."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from torch import Tensor

from library.errors import UserError
from library.objectives.base import TERMS, TrainingContext
from library.objectives.known_noise import KnownNoiseTerm, buckets_around, caption_of, draw_alike, encode_at_one_size, logger
from library.scorer_data.readers.files import PICTURE_SUFFIXES, source_files
from library.scorer_data.records import FilePicture, Skipped, SkipReport
from library.settings.options import option
from library.types import LossOutput


@dataclass(frozen=True, kw_only=True)
class ImagesConfig:
    """Learning from pictures as they are."""

    images_dir: Path | None = option(
        None,
        help="Folder of pictures to learn from; NAME.txt beside a picture is its prompt. With score_estimator direct_align the score is "
        "trained on them, too, and none are sampled.",
        only_with=({"objective": ("images",)}, {"score_estimator": ("direct_align",)}),
    )
    images_prompt: str = option(
        "",
        help="Prompt of the pictures, or of the pairs of image_pairs, that have none of their own.",
        expert=True,
        only_with=({"objective": ("images", "image_pairs")}, {"score_estimator": ("direct_align",)}),
    )


@dataclass(frozen=True)
class EncodedPicture:
    """A picture's latents [C, h, w] on the CPU, what it shows, and what it is called."""

    latents: Tensor
    prompt: str
    name: str


@TERMS.register("images")
class ImagesTerm(KnownNoiseTerm):
    """The noise in noised pictures, predicted at multiplier 1: 3 U-Net evaluations a sample."""

    config_class: ClassVar[type | None] = ImagesConfig

    @classmethod
    def build(cls, context: TrainingContext, settings: ImagesConfig) -> "ImagesTerm":
        """The term, its pictures encoded by the model's VAE. Raises UserError if there are none that can be used."""
        if settings.images_dir is None:
            raise UserError("images has no pictures: set images_dir to a folder of pictures, with their prompts in .txt files beside them")
        return cls(context, encode_folder(context, settings.images_dir, settings.images_prompt))

    def __init__(self, context: TrainingContext, pictures: list[EncodedPicture]) -> None:
        super().__init__(context, "images", [picture.prompt for picture in pictures])
        self.pictures = pictures

    def __call__(self) -> LossOutput:
        places = draw_alike([picture.latents for picture in self.pictures], self.context.rollout.batch_size, self.generator)
        chosen = [self.pictures[place] for place in places]
        latents, prompts = [picture.latents for picture in chosen], [picture.prompt for picture in chosen]
        losses, errors, timesteps = self.errors(latents, prompts, [1.0] * len(chosen))
        return LossOutput(
            loss=losses.mean(),
            sample_losses=losses.detach(),
            samples=[f"picture {own.name} at timestep {int(timestep)}" for own, timestep in zip(chosen, timesteps, strict=True)],
            metrics={"mse": errors.mean()},
        )


def encode_folder(context: TrainingContext, folder: Path, prompt: str) -> list[EncodedPicture]:
    """The pictures of a folder, encoded by the model's VAE.

    Args:
        prompt: of the pictures that have no .txt beside them.

    Raises:
        UserError: there are none that can be used.
    """
    model, skipped, buckets = context.model, SkipReport(), buckets_around(context.sampling.size)
    pictures = []
    for file in source_files(folder, PICTURE_SUFFIXES):
        encoded = encode_at_one_size(model, [FilePicture(file)], buckets)
        if isinstance(encoded, Skipped):
            skipped.add(encoded)
        else:
            pictures.append(EncodedPicture(encoded[0], caption_of(file, prompt), file.name))
    skipped.log(logger)
    if not pictures:
        raise UserError(f"{folder}: no picture can be used; {skipped.first()}")
    return pictures
