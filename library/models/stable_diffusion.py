"""Stable Diffusion 1.x and 2.x: one text encoder, nothing added to the U-Net's inputs."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from library.models.base import DiffusionModel, Family, TextEncoderSlot
from library.types import Conditioning


class StableDiffusion(DiffusionModel):
    """The last hidden state of the text encoder, after the final layer norm; SD2's encoder comes without its last layer."""

    def encode_prompts(self, prompts: Sequence[str], size: tuple[int, int] | None = None) -> Conditioning:
        """See the base class; `size` makes no difference."""
        assert self.text_encoders, "the text encoders were freed"
        text_encoder: Any = self.text_encoders[0]
        output = text_encoder(self._token_ids(prompts, self.tokenizers[0], text_encoder), output_hidden_states=True)
        if self.clip_skip is None:
            return Conditioning(output.last_hidden_state)
        core = getattr(text_encoder, "text_model", text_encoder)  # transformers 5.6 took the inner module away
        return Conditioning(core.final_layer_norm(output.hidden_states[-self.clip_skip]))

    def _added_cond(self, cond: Conditioning) -> dict[str, Tensor] | None:
        return None


SD1 = Family(
    name="sd1",
    title="Stable Diffusion 1.x",
    model_class=StableDiffusion,
    pipeline_class="StableDiffusionPipeline",
    linear_projection=False,
    heads_per_level=8,
    text_encoders=(
        TextEncoderSlot(
            folder="text_encoder",
            tokenizer_folder="tokenizer",
            class_name="CLIPTextModel",
            prefix="cond_stage_model.transformer.",
            open_clip=False,
            pad_token="<|endoftext|>",
        ),
    ),
    versions={
        "epsilon": ("sd_v1", "stable-diffusion-v1/lora"),
        "v_prediction": ("sd_v1_v", "stable-diffusion-v1/lora"),
    },
    implementation="diffusers",
)

SD2 = Family(
    name="sd2",
    title="Stable Diffusion 2.x",
    model_class=StableDiffusion,
    pipeline_class="StableDiffusionPipeline",
    linear_projection=True,
    heads_per_level=None,
    text_encoders=(
        TextEncoderSlot(
            folder="text_encoder",
            tokenizer_folder="tokenizer",
            class_name="CLIPTextModel",
            prefix="cond_stage_model.model.",
            open_clip=True,
            pad_token="!",
        ),
    ),
    versions={
        "epsilon": ("sd_v2", "stable-diffusion-v2-512/lora"),
        "v_prediction": ("sd_v2_v", "stable-diffusion-v2-768-v/lora"),
    },
    implementation="diffusers",
)
