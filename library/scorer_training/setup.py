"""What a scorer's training starts from: the VAE, the pictures as latents, a backbone."""

import functools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from library.errors import UserError
from library.models.base import DiffusionModel
from library.models.loading import load_model, load_vae
from library.models.vae import VaeFingerprint, encode_images
from library.scorer_data.buckets import BucketConfig
from library.scorer_data.latent_cache import open_cache
from library.scorer_data.pixel_augmentation import PixelAugmentation
from library.scorer_training.config import DataConfig, PretrainingConfig, ScorerConfig, ScorerTrainingConfig, VaeConfig
from library.scorer_training.tasks import Task, load_tasks
from library.scorers.base import Backbone, ModelSource
from library.scorers.registry import get_backbone
from library.types import Conditioning

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ScorerData:
    """What is learned, and what is learned before it; the first task's head is the score."""

    tasks: list[Task]
    pretraining_tasks: list[Task]


def make_source(config: VaeConfig, accelerator: Accelerator) -> ModelSource:
    """The run's VAE on its device, and for those who ask for it the whole model on the CPU: mostly, only parts of it are needed."""
    vae = load_vae(config.path, family=config.model_family).to(accelerator.device)

    @functools.cache
    def model() -> DiffusionModel:
        if not config.pretrained_model_name_or_path:
            raise UserError("this scorer needs the whole diffusion model; give it by pretrained_model_name_or_path, not only a vae")
        return load_model(config.pretrained_model_name_or_path, family=config.model_family, vae=config.vae)

    return ModelSource(model, vae)


def load_data(
    source: ModelSource,
    accelerator: Accelerator,
    *,
    data: DataConfig,
    pretraining: PretrainingConfig,
    training: ScorerTrainingConfig,
    buckets: BucketConfig,
    variants: PixelAugmentation,
    scorer: ScorerConfig,
    output_dir: Path,
) -> ScorerData:
    """Read the datasets, encode their pictures where the cache lacks them, and make their heads. Raises UserError for bad input."""
    tasks, pretraining_tasks = load_tasks(
        [data.datasets(), pretraining.datasets()],
        cache=open_cache(data.cache_dir or output_dir / "latent_cache", VaeFingerprint.of(source.vae), buckets),
        encode=lambda pixels: encode_images(source.vae, pixels.to(accelerator.device)),
        data=data,
        buckets=buckets,
        variants=variants.names,
        head_options={"members": scorer.head_members, "hidden": scorer.head_hidden},
        max_validation_pictures=training.max_validation_pictures,
        accelerator=accelerator,
    )
    return ScorerData(tasks, pretraining_tasks)


def make_backbone(config: ScorerConfig, source: ModelSource, *, gradient_checkpointing: bool = False) -> tuple[Backbone, dict[str, Any]]:
    """A new backbone of the kind, size and settings asked for, and its architecture."""
    kind = get_backbone(config.scorer_kind)
    architecture = kind.architecture_for(config.scorer_size, source, **config.backbone_options)
    backbone = kind(**architecture)
    backbone.initialise(source)
    if gradient_checkpointing:
        backbone.enable_gradient_checkpointing()
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in backbone.parameters()]
    total, trained = sum(size for size, _ in sizes), sum(size for size, trains in sizes if trains)
    logger.info("scorer %s: %.2f M parameters, %.2f M of them trained", config.scorer_kind, total / 1e6, trained / 1e6)
    return backbone, architecture


def make_prompt_encoder(source: ModelSource, accelerator: Accelerator) -> Callable[[Sequence[str]], Conditioning]:
    """Prompts to conditioning, by the model's text encoders on the run's device."""
    model = source.model()
    for text_encoder in model.text_encoders:
        text_encoder.to(accelerator.device)
    return model.encode_prompts
