"""Stable Diffusion XL: two text encoders, and a U-Net that is given the pooled prompt and the picture's size and crop."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from library.errors import UserError
from library.models.base import TimeIds
from library.models.registry import FAMILIES
from library.models.unet_model import TextEncoderSlot, UNetFamily, UNetModel
from library.types import Conditioning

PENULTIMATE = 2


class SDXL(UNetModel):
    """Both text encoders give their last hidden state but one, without layer norm, side by side; arXiv 2307.01952, section 2.1."""

    told_size = True

    def time_ids(
        self,
        count: int,
        size: tuple[int, int] | None = None,
        own: Sequence[TimeIds] | None = None,
        device: torch.device | str | None = None,
    ) -> Tensor | None:
        height, width = size or (self.spec.resolution, self.spec.resolution)
        rows = [(height, width, 0, 0, height, width)] * count if own is None else own
        assert len(rows) == count, "one row a prompt"
        return torch.tensor(rows, dtype=torch.float32, device=device)

    def _hidden_states(self, text_encoder: Any, token_ids: Tensor, *others: Tensor) -> tuple[Tensor, Tensor | None]:
        output = text_encoder(token_ids, output_hidden_states=True)
        return output.hidden_states[-PENULTIMATE], getattr(output, "text_embeds", None)

    def set_clip_skip(self, clip_skip: int) -> None:
        if clip_skip not in (1, PENULTIMATE):  # 1 is what configurations and UIs hold that leave it at its default
            raise UserError(f"clip_skip {clip_skip} was given, but SDXL always takes the last hidden state but one; leave clip_skip out.")

    def _added_cond(self, cond: Conditioning) -> dict[str, Tensor] | None:
        assert cond.pooled is not None and cond.time_ids is not None, "conditioning of another family"
        # sinusoids of the sizes are taken in float32
        return {"text_embeds": cond.pooled.to(self.dtype), "time_ids": cond.time_ids.float()}


_VERSION = ("sdxl_base_v1-0", "stable-diffusion-xl-v1-base/lora")

SDXL_BASE = UNetFamily(
    name="sdxl",
    title="Stable Diffusion XL",
    model_class=SDXL,
    config_file=Path(__file__).with_name("sdxl.json"),
    pipeline_class="StableDiffusionXLPipeline",
    linear_projection=True,
    has_turbo=True,
    heads_per_level=None,
    text_encoders=(
        TextEncoderSlot.of_clip("conditioner.embedders.0.transformer."),
        TextEncoderSlot(
            folder="text_encoder_2",
            tokenizer_folder="tokenizer_2",
            class_name="CLIPTextModelWithProjection",
            prefix="conditioner.embedders.1.model.",
            open_clip=True,
            pad_token="!",
        ),
    ),
    versions={"epsilon": _VERSION, "v_prediction": _VERSION},
    implementation="https://github.com/Stability-AI/generative-models",
)
FAMILIES.register(SDXL_BASE.name)(SDXL_BASE)
