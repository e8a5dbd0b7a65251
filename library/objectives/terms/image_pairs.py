"""Sliders from pairs of pictures that differ in one thing (Concept Sliders, arXiv 2311.12092, section 4.2)."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from torch import Tensor

from library.errors import UserError
from library.objectives.base import TERMS, TrainingContext
from library.objectives.known_noise import KnownNoiseTerm, buckets_around, caption_of, draw_alike, encode_at_one_size, logger
from library.scorer_data.readers.files import PICTURE_SUFFIXES, PictureFiles, source_files
from library.scorer_data.readers.rows import Row, read_rows, records_of
from library.scorer_data.records import FilePicture, Skipped, SkipReport
from library.settings.options import option
from library.types import LossOutput


@dataclass(frozen=True, kw_only=True)
class ImagePairsConfig:
    """Learning from pairs of pictures."""

    image_pairs: Path | None = option(
        None,
        help="Folder with positive/ and negative/ pictures of the same names (prompts in positive/NAME.txt), or a table (.csv, ...) with "
        "columns positive, negative and prompt, paths relative to it.",
        only_with={"objective": ("image_pairs",)},
    )


@dataclass(frozen=True)
class PicturePair:
    """Two pictures of one thing, and what both show."""

    positive: FilePicture
    negative: FilePicture
    prompt: str


@dataclass(frozen=True)
class EncodedPair:
    """The pictures' latents [C, h, w] on the CPU, what they show, and what the positive one is called."""

    positive: Tensor
    negative: Tensor
    prompt: str
    name: str


@TERMS.register("image_pairs")
class ImagePairsTerm(KnownNoiseTerm):
    """Both pictures of a pair under the same noise at the same timestep: the LoRA at +1 is to know the one, at -1 the other.

    What the pictures share pulls the LoRA the same way at both signs, which cancels; what they differ in is left for the slider. A batch
    is half as many pairs as train_batch_size; 3 U-Net evaluations a picture.
    """

    config_class: ClassVar[type | None] = ImagePairsConfig

    @classmethod
    def build(cls, context: TrainingContext, settings: ImagePairsConfig) -> "ImagePairsTerm":
        """The term, its pictures encoded by the model's VAE. Raises UserError if there is no pair that can be used."""
        if settings.image_pairs is None:
            raise UserError("image_pairs has no pictures: set image_pairs to a folder with positive/ and negative/, or to a table of pairs")
        skipped, buckets, pairs = SkipReport(), buckets_around(context.sampling.size), []
        for found in find_pairs(settings.image_pairs, context.settings["images"].images_prompt):
            encoded = found if isinstance(found, Skipped) else encode_at_one_size(context.model, [found.positive, found.negative], buckets)
            if isinstance(encoded, Skipped):
                skipped.add(encoded)
            elif isinstance(found, PicturePair):
                positive, negative = encoded
                pairs.append(EncodedPair(positive, negative, found.prompt, found.positive.path.name))
        skipped.log(logger)
        if not pairs:
            raise UserError(f"image_pairs {settings.image_pairs}: no pair can be used; {skipped.first() or 'it holds none'}")
        return cls(context, pairs)

    def __init__(self, context: TrainingContext, pairs: list[EncodedPair]) -> None:
        super().__init__(context, "image_pairs", [pair.prompt for pair in pairs])
        self.pairs = pairs

    def __call__(self) -> LossOutput:
        count = max(self.context.rollout.batch_size // 2, 1)
        chosen = [self.pairs[place] for place in draw_alike([pair.positive for pair in self.pairs], count, self.generator)]
        latents = [pair.positive for pair in chosen] + [pair.negative for pair in chosen]
        multipliers = [1.0] * count + [-1.0] * count
        losses, errors, timesteps = self.errors(latents, [pair.prompt for pair in chosen] * 2, multipliers, copies=2)
        names = [f"positive picture {pair.name}" for pair in chosen] + [f"negative picture of {pair.name}" for pair in chosen]
        return LossOutput(
            loss=losses.mean(),
            sample_losses=losses.detach(),
            samples=[f"{name} at timestep {int(timestep)}" for name, timestep in zip(names, timesteps, strict=True)],
            metrics={"mse_positive": errors[:count].mean(), "mse_negative": errors[count:].mean()},
        )


def find_pairs(source: Path, default_prompt: str) -> Iterator[PicturePair | Skipped]:
    """The pairs of a folder or a table, and what of it has no partner. Raises UserError if it is neither."""
    return _pairs_in_folders(source, default_prompt) if source.is_dir() else _pairs_in_table(source, default_prompt)


def _pairs_in_folders(folder: Path, default_prompt: str) -> Iterator[PicturePair | Skipped]:
    """positive/NAME.x and negative/NAME.y; the endings may differ."""
    for side in ("positive", "negative"):
        if not (folder / side).is_dir():
            raise UserError(f"image_pairs {folder} has no folder {side}; it needs positive/ and negative/ with pictures of the same names")
    positive, negative = ({file.stem: file for file in source_files(folder / side, PICTURE_SUFFIXES)} for side in ("positive", "negative"))
    for name in sorted(positive.keys() | negative.keys()):
        if name in positive and name in negative:
            yield PicturePair(FilePicture(positive[name]), FilePicture(negative[name]), caption_of(positive[name], default_prompt))
        else:
            there, lacking = ("positive", "negative") if name in positive else ("negative", "positive")
            yield Skipped(f"{folder / there} has a picture {name}, {folder / lacking} has none", "picture has no partner")


def _pairs_in_table(table: Path, default_prompt: str) -> Iterator[PicturePair | Skipped]:
    files = PictureFiles(table.parent, once=False)

    def pair(row: Row) -> PicturePair:
        positive, negative = (files.find(str(row.get(side) or "")) for side in ("positive", "negative"))
        return PicturePair(positive, negative, str(row.get("prompt") or "").strip() or default_prompt)

    return records_of(read_rows(table, needed=(("positive",), ("negative",))), pair)
