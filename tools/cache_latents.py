"""Fill the latent cache ahead of training, on as many devices as there are.

    python tools/cache_latents.py --config_file scorer.toml
    accelerate launch --num_processes 4 tools/cache_latents.py --config_file scorer.toml
    python tools/cache_latents.py --vae sd15_vae.safetensors --model_family sd1 --picture_folder photos --cache_dir latents

The options are those of train_latent_scorer.py, so that it finds everything that it asks for: the same pictures, sizes and variants. Of a
folder of pictures nothing else needs to be known. Killed, it goes on where it was. With --verify_cache, everything that is in the
cache is compared with its checksum before, and what is damaged is encoded again.
"""

import logging
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository's root, so that the script runs from anywhere

from library.settings.start_up import before_torch

if __name__ == "__main__":
    before_torch()

from library.errors import UserError
from library.models.loading import load_vae
from library.models.vae import VaeFingerprint
from library.scorer_data.latent_cache import open_cache
from library.scorer_data.readers.files import PICTURE_SUFFIXES, pictures_below
from library.scorer_data.records import FilePicture, Picture, SkipReport
from library.scorer_training.collecting import collect, pictures_of
from library.scorer_training.config import LatentScorerConfig
from library.scorer_training.dataset_config import DataConfig
from library.scorer_training.tasks import fill_cache
from library.settings.cli import parse_config, run_main
from library.settings.options import option
from library.settings.shared import TrainingConfig
from library.training.interrupts import interruptible
from library.training.runtime import create_accelerator, set_num_threads

logger = logging.getLogger("cache_latents")


@dataclass(frozen=True, kw_only=True)
class PicturesConfig(DataConfig):
    """The pictures: those of the data that a scorer is to be trained on, and those of a folder."""

    picture_folder: Path | None = option(None, help="Folder whose pictures are all encoded, without ratings; enough by itself.")
    verify_cache: bool = option(False, help="Read all that is cached and encode again what is damaged.")

    def __post_init__(self) -> None:
        if self.train_data_file is not None or self.picture_folder is None:
            super().__post_init__()
        if self.picture_folder is not None and not self.picture_folder.is_dir():
            raise UserError(f"picture_folder {self.picture_folder} is not a folder")


@dataclass(frozen=True, kw_only=True)
class CacheLatentsConfig(LatentScorerConfig):
    data: PicturesConfig


def pictures(config: CacheLatentsConfig) -> Iterator[Picture]:
    """Every picture that training would look at, and those of picture_folder. Raises UserError if a source cannot be read, or has none."""
    data = config.data
    rated = (*(data.datasets() if data.train_data_file is not None else ()), *config.pretraining.datasets())
    yield from pictures_of(collect(dataset, data.validation_split) for dataset in rated)
    if data.picture_folder is not None:
        name = None
        for name in pictures_below(data.picture_folder, SkipReport()):
            yield FilePicture((data.picture_folder / name).absolute())
        if name is None:
            raise UserError(f"there is no picture in {data.picture_folder}; pictures end in {', '.join(PICTURE_SUFFIXES)}")


def main() -> None:
    config = parse_config(CacheLatentsConfig, description="Encode pictures by a VAE into the cache that train_latent_scorer.py reads.")
    set_num_threads(config.training.num_threads)
    accelerator = create_accelerator(TrainingConfig(mixed_precision=config.training.mixed_precision))
    vae = load_vae(config.model.path, family=config.model.model_family).to(accelerator.device)
    if config.data.verify_cache and accelerator.is_main_process:
        cache = open_cache(config.cache_dir, VaeFingerprint.of(vae), config.buckets)
        total = len(cache)
        logger.info("%d of %d latents are damaged", cache.verify(), total)
    accelerator.wait_for_everyone()

    with interruptible() as interrupts, interrupts.at_once():  # what is encoded is written then
        cache = fill_cache(config, vae, accelerator, pictures(config))
    if not len(cache):
        raise UserError(f"there is no picture that can be encoded in {config.data.picture_folder or config.data.train_data_file}")
    if accelerator.is_main_process:
        logger.info("%s holds %d latents", cache.folder, len(cache))


if __name__ == "__main__":
    run_main(main)
