"""The settings that say which diffusion model is taken, and how it is loaded."""

from dataclasses import dataclass
from pathlib import Path

import torch

from library.errors import UserError
from library.models.base import DiffusionModel
from library.models.loading import load_model
from library.models.registry import FAMILIES
from library.models.textual_inversion import load_embeddings
from library.settings.options import check_at_least, option


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which model is trained on."""

    pretrained_model_name_or_path: str = option("", help="Checkpoint file (.safetensors, .ckpt), diffusers folder, or its hub id.")
    model_family: str = option("auto", choices=("auto", *FAMILIES), help="Kind of model; auto reads it from the weights.", expert=True)
    v_parameterization: bool | None = option(
        None, help="The U-Net predicts v (true) or eps (false); not set: read from the model.", expert=True
    )
    vae: Path | None = option(None, help="VAE file, folder or hub id to use in place of the model's own, or where it has none.")
    text_encoder: Path | None = option(
        None, help="Language model (file, folder or hub id) of a Z-Image or Anima checkpoint without one.", expert=True
    )
    tokenizer: tuple[Path, ...] = option(
        (), help="Folders of its tokenizers, where they are not beside it (Anima: Qwen3's, T5's).", expert=True
    )
    clip_skip: int | None = option(
        None, help="Take the text encoder's output this many layers before its end (1 = the last layer).", expert=True
    )
    textual_inversion_embeddings: tuple[Path, ...] = option(
        (), help="Embeddings (.safetensors, .pt, .bin) or folders of them; prompts name them by the files' names.", expert=True
    )

    def __post_init__(self) -> None:
        if not self.pretrained_model_name_or_path:
            raise UserError("pretrained_model_name_or_path is not set; give a checkpoint file, a diffusers folder or a hub id")
        check_at_least(self, 1, "clip_skip")

    def load(self, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> DiffusionModel:
        """The model, frozen and in eval mode; see `library.models.loading.load_model`."""
        model = load_model(
            self.pretrained_model_name_or_path,
            family=self.model_family,
            v_parameterization=self.v_parameterization,
            vae=self.vae,
            text_encoder=self.text_encoder,
            tokenizer=self.tokenizer,
            clip_skip=self.clip_skip,
            dtype=dtype,
            device=device,
        )
        load_embeddings(model, self.textual_inversion_embeddings)
        return model
