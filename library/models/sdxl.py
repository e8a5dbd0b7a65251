"""Stable Diffusion XL: two text encoders, and a U-Net that is told the pooled prompt and the picture's size and crop."""

from collections.abc import Sequence

import torch
from torch import Tensor

from library.errors import UserError
from library.models.base import DiffusionModel, Family, TextEncoderSlot
from library.types import Conditioning

PENULTIMATE = 2


class SDXL(DiffusionModel):
    """Both text encoders give their last hidden state but one, without layer norm, side by side; arXiv 2307.01952, section 2.1."""

    def encode_prompts(self, prompts: Sequence[str], size: tuple[int, int] | None = None) -> Conditioning:
        """See the base class; the picture is told to be `size` large and not cropped."""
        assert self.text_encoders, "the text encoders were freed"
        outputs = [
            text_encoder(self._token_ids(prompts, tokenizer, text_encoder), output_hidden_states=True)
            for text_encoder, tokenizer in zip(self.text_encoders, self.tokenizers, strict=True)
        ]
        text = torch.cat([output.hidden_states[-PENULTIMATE] for output in outputs], dim=-1)
        height, width = size or (self.spec.resolution, self.spec.resolution)
        time_ids = torch.tensor([[height, width, 0, 0, height, width]], dtype=torch.float32, device=text.device)
        return Conditioning(text, outputs[-1].text_embeds, time_ids.repeat(len(prompts), 1))

    def set_clip_skip(self, clip_skip: int) -> None:
        if clip_skip != PENULTIMATE:
            raise UserError(f"clip_skip {clip_skip} was given, but SDXL always takes the last hidden state but one; leave clip_skip out.")

    def _added_cond(self, cond: Conditioning) -> dict[str, Tensor] | None:
        assert cond.pooled is not None and cond.time_ids is not None, "conditioning of another family"
        # sinusoids of the sizes are taken in float32
        return {"text_embeds": cond.pooled.to(self.dtype), "time_ids": cond.time_ids.float()}


_VERSION = ("sdxl_base_v1-0", "stable-diffusion-xl-v1-base/lora")

FAMILY = Family(
    name="sdxl",
    title="Stable Diffusion XL",
    model_class=SDXL,
    pipeline_class="StableDiffusionXLPipeline",
    linear_projection=True,
    heads_per_level=None,
    text_encoders=(
        TextEncoderSlot(
            folder="text_encoder",
            tokenizer_folder="tokenizer",
            class_name="CLIPTextModel",
            prefix="conditioner.embedders.0.transformer.",
            open_clip=False,
            pad_token="<|endoftext|>",
        ),
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
