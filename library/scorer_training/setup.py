"""What a scorer's training starts from: the VAE, a backbone, the text encoders."""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from library.errors import UserError
from library.models.base import DiffusionModel
from library.models.loading import load_model, load_vae
from library.models.vae import LatentSpace
from library.scorer_training.config import ScorerConfig, VaeConfig
from library.scorers.base import SCORER_KINDS, Backbone, ModelSource
from library.types import Conditioning

if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.getLogger(__name__)


def make_source(config: VaeConfig, accelerator: Accelerator) -> ModelSource:
    """The run's VAE on its device, and for those who ask for it the whole model on the CPU: mostly, only parts of it are needed."""
    vae = load_vae(config.path, family=config.model_family).to(accelerator.device)

    @functools.cache
    def model() -> DiffusionModel:
        if not config.pretrained_model_name_or_path:
            raise UserError("this scorer needs the whole diffusion model; give it by pretrained_model_name_or_path, not only a vae")
        return load_model(config.pretrained_model_name_or_path, family=config.model_family, vae=config.vae)

    return ModelSource(model, vae)


def default_size(kind: type[Backbone], latent_area: float) -> str:
    """The size that suits latents of `latent_area` cells: a large network on few cells is slow, and overfits."""
    size = "tiny" if latent_area <= 16**2 else "small" if latent_area <= 32**2 else "base"
    return size if size in kind.presets or not kind.presets else "base"


def make_backbone(
    config: ScorerConfig, source: ModelSource, latent_area: float, *, gradient_checkpointing: bool = False
) -> tuple[Backbone, dict[str, Any]]:
    """A new backbone of the kind, size and settings asked for, and its architecture. Raises UserError where there is none of that."""
    kind = SCORER_KINDS[config.scorer_kind]
    size = config.scorer_size or default_size(kind, latent_area)
    try:
        architecture = kind.architecture_for(size, source, **config.backbone_options)
        backbone = kind(**architecture)
        backbone.initialise(source)
        if config.scorer_args and not architecture.get("use_prompt"):
            _try_out(backbone, LatentSpace.of(source.vae).channels, latent_area)
    except UserError:
        raise
    except Exception as error:  # libraries raise what they like on arguments that are not theirs
        if not config.scorer_args:
            raise
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        given = f"scorer_args is {' '.join(config.scorer_args)}, of which no {config.scorer_kind} can be built"
        raise UserError(f"{given} ({reason}); give other values, or leave them out") from error
    if gradient_checkpointing:
        backbone.enable_gradient_checkpointing()
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in backbone.parameters()]
    total, trained = sum(size for size, _ in sizes), sum(size for size, trains in sizes if trains)
    logger.info("scorer %s %s: %.2f M parameters, %.2f M of them trained", config.scorer_kind, size, total / 1e6, trained / 1e6)
    return backbone, architecture


@torch.no_grad()
def _try_out(backbone: Backbone, channels: int, latent_area: float) -> None:
    """Show it a picture: some arguments build a backbone that sees none. Draws nothing at random, and is small where pictures are large."""
    side = min(32, 8 * math.ceil(math.sqrt(latent_area) / 8))
    backbone.eval()(torch.zeros(1, channels, side, side), torch.zeros(1), prompts=[""])
    backbone.train()


def make_prompt_encoder(source: ModelSource, accelerator: Accelerator) -> Callable[[Sequence[str]], Conditioning]:
    """Prompts to conditioning, by the model's text encoders on the run's device."""
    model = source.model()
    for text_encoder in model.text_encoders:
        text_encoder.to(accelerator.device)
    return model.encode_prompts
