"""From a list of rated pictures to a training and a validation set of cached latents."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from library.config import check_at_least, option
from library.errors import UserError
from library.scorer_data.batches import LatentDataset
from library.scorer_data.buckets import BucketConfig
from library.scorer_data.latent_cache import LatentCache, encode_missing
from library.scorer_data.manifest import RatedImage, read_manifest, split_images

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The rated pictures."""

    train_data_file: Path | None = option(None, help="Rated pictures: .csv, .tsv or .jsonl with path, score[, prompt, weight, split].")
    image_dir: Path | None = option(None, help="What the paths in the file are relative to; not set: the file's own folder.")
    validation_split: float = option(0.1, help="Share of the pictures kept for validation, chosen by a hash of their path.")
    skip_bad_images: bool = option(False, help="Leave out and report pictures that are missing, listed twice or unreadable; else stop.")
    flip_aug: bool = option(False, help="Train on mirrored pictures too; only if mirroring does not change the score.")
    cache_dir: Path | None = option(None, help="Folder of the latent cache; not set: output_dir/latent_cache.")
    vae_batch_size: int = option(8, help="Pictures encoded at a time.")

    def __post_init__(self) -> None:
        if self.train_data_file is None:
            raise UserError("train_data_file is not set; give a .csv, .tsv or .jsonl file with the columns path and score")
        if not 0 < self.validation_split < 1:
            raise UserError(f"validation_split is {self.validation_split}, but it must be above 0 and below 1, such as 0.1")
        check_at_least(self, 1, "vae_batch_size")


@dataclass(frozen=True)
class RatedData:
    """Training and validation pictures, which share none; `classes` are the labels in the order of their numbers, if labels are learned."""

    train: LatentDataset
    validation: LatentDataset
    classes: tuple[str, ...] = ()


def load_rated_data(
    data_file: Path,
    target: str,
    *,
    config: DataConfig,
    buckets: BucketConfig,
    cache: LatentCache,
    encode: Callable[[Tensor], Tensor],
) -> RatedData:
    """Read a manifest, encode the pictures that the cache lacks, and part them.

    Args:
        target: the column to learn: "score", or "label", whose classes are numbered in alphabetical order.
        encode: pixels [B, 3, H, W] in -1..1 to scaled latents [B, C, h, w].

    Raises:
        UserError: bad rows or pictures; too few of them; labels that are all the same.
    """
    manifest = read_manifest(data_file, config.image_dir, target=target, skip_bad_images=config.skip_bad_images)
    paths = [image.path for image in manifest.images if image.split != "test"]
    skipped = encode_missing(
        cache,
        paths,
        encode,
        buckets,
        flips=config.flip_aug,
        batch_size=config.vae_batch_size,
        skip_bad_images=config.skip_bad_images,
    )
    _report([*manifest.skipped, *skipped], data_file)
    usable = [image for image in manifest.images if image.split != "test" and cache.find(image.path) is not None]
    train, validation = split_images(usable, config.validation_split)
    for name, images in (("training", train), ("validation", validation)):
        if len(images) < 2:
            raise UserError(
                f"{data_file} leaves {len(images)} pictures for {name}; rate more pictures, or change validation_split or split"
            )
    classes: tuple[str, ...] = ()
    if target == "label":
        classes = tuple(sorted({image.label for image in usable if image.label is not None}))
        if len(classes) < 2:
            raise UserError(f"all labels in {data_file} are {', '.join(classes)}, so there is nothing to learn; label pictures that differ")
    logger.info("%s: %d pictures to train on, %d to validate with", data_file.name, len(train), len(validation))
    return RatedData(
        train=_dataset(train, classes, cache, flips=config.flip_aug),
        validation=_dataset(validation, classes, cache, flips=False),
        classes=classes,
    )


def _dataset(images: Sequence[RatedImage], classes: Sequence[str], cache: LatentCache, *, flips: bool) -> LatentDataset:
    if classes:
        numbers = {label: number for number, label in enumerate(classes)}
        targets = torch.tensor([numbers[image.label] for image in images if image.label is not None])
    else:
        targets = torch.tensor([image.score for image in images if image.score is not None], dtype=torch.float32)

    def rows(flipped: bool):
        found = [cache.find(image.path, flipped) for image in images]
        return [row for row in found if row is not None]

    return LatentDataset(cache, rows(False), targets, torch.tensor([image.weight for image in images]), rows(True) if flips else None)


def _report(skipped: Sequence[str], data_file: Path) -> None:
    if skipped:
        logger.warning("%d pictures of %s were left out:", len(skipped), data_file)
        for complaint in skipped[:10]:
            logger.warning("  %s", complaint)
        if len(skipped) > 10:
            logger.warning("  ... and %d more", len(skipped) - 10)
