"""Stable Diffusion 1.x and 2.x: one text encoder, nothing added to the U-Net's inputs."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from library.models.registry import FAMILIES
from library.models.unet_model import TextEncoderSlot, UNetFamily, UNetModel
from library.types import Conditioning


class StableDiffusion(UNetModel):
    """The last hidden state of the text encoder, after the final layer norm; SD2's encoder comes without its last layer."""

    def _hidden_states(self, text_encoder: Any, token_ids: Tensor, *others: Tensor) -> tuple[Tensor, Tensor | None]:
        output = text_encoder(token_ids, output_hidden_states=True)
        if self.clip_skip is None:
            return output.last_hidden_state, None
        core = getattr(text_encoder, "text_model", text_encoder)  # transformers 5.6 took the inner module away
        return core.final_layer_norm(output.hidden_states[-self.clip_skip]), None

    def _added_cond(self, cond: Conditioning) -> dict[str, Tensor] | None:
        return None


SD1 = UNetFamily(
    name="sd1",
    title="Stable Diffusion 1.x",
    model_class=StableDiffusion,
    config_file=Path(__file__).with_name("sd1.json"),
    pipeline_class="StableDiffusionPipeline",
    linear_projection=False,
    has_turbo=False,
    heads_per_level=8,
    text_encoders=(TextEncoderSlot.of_clip("cond_stage_model.transformer."),),
    versions={
        "epsilon": ("sd_v1", "stable-diffusion-v1/lora"),
        "v_prediction": ("sd_v1_v", "stable-diffusion-v1/lora"),
    },
    implementation="diffusers",
)
FAMILIES.register(SD1.name)(SD1)

SD2 = replace(
    SD1,
    name="sd2",
    title="Stable Diffusion 2.x",
    config_file=Path(__file__).with_name("sd2.json"),
    linear_projection=True,
    has_turbo=True,
    heads_per_level=None,
    text_encoders=(replace(SD1.text_encoders[0], prefix="cond_stage_model.model.", open_clip=True, pad_token="!"),),
    versions={
        "epsilon": ("sd_v2", "stable-diffusion-v2-512/lora"),
        "v_prediction": ("sd_v2_v", "stable-diffusion-v2-768-v/lora"),
    },
)
FAMILIES.register(SD2.name)(SD2)
