"""Anima (circlestone-labs): Cosmos-Predict2's transformer in Qwen-Image's latents, told by Qwen3 through an adapter with T5's tokens."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from library.models.family import Component
from library.models.flow_model import FlowFamily, FlowModel
from library.models.registry import FAMILIES
from library.models.single_file import count_groups
from library.types import Conditioning

ADAPTER = "llm_adapter."


class Anima(FlowModel):
    """What the adapter, the second of the text encoders, makes of Qwen3's last hidden state: 512 tokens, the last of which are 0."""

    def __init__(self, **parts: Any) -> None:
        super().__init__(**parts)
        # Its padding mask is a channel of zeros, as nothing is padded: `_velocity` gives it. diffusers would need torchvision to resize it.
        self.unet.register_to_config(concat_padding_mask=False)

    def _encode(self, prompts: list[str]) -> Conditioning:
        inputs = [part.to(self.device) for tokenizer in self.tokenizers for part in self._tokens(prompts, tokenizer)]
        text_encoder, adapter = self.text_encoders
        with self._fetched(text_encoder), self._fetched(adapter):
            return Conditioning(self._hidden_states(text_encoder, *inputs))

    def _hidden_states(self, text_encoder: Any, token_ids: Tensor, *others: Tensor) -> Any:
        mask, asked_ids, asked_mask = others
        text = text_encoder(token_ids, attention_mask=mask).last_hidden_state
        return self.text_encoders[1](text * mask[..., None].to(text), asked_ids, asked_mask, mask)

    def _velocity(self, latents: Tensor, share: Tensor, cond: Conditioning) -> Tensor:
        pictures = latents[:, :, None]
        nothing_padded = torch.zeros_like(pictures[:, :1])
        return self.unet(pictures, share, cond.text.to(self.dtype), condition_mask=nothing_padded, return_dict=False)[0][:, :, 0]


class AnimaFamily(FlowFamily):
    """Its single files hold the transformer and the adapter."""

    def is_folder(self, index: Mapping[str, Any], config: Mapping[str, Any]) -> bool:
        return super().is_folder(index, config) and "text_conditioner" in index and bool(config.get("concat_padding_mask"))

    def text_of_folder(self, path: Path, component: Component, dtype: torch.dtype) -> tuple[list[Any], list[Any]]:
        import diffusers

        text_encoders, tokenizers = super().text_of_folder(path, component, dtype)
        return [*text_encoders, component(diffusers.AnimaTextConditioner, path / "text_conditioner", dtype)], tokenizers

    def denoiser_of_file(self, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        from diffusers.loaders.single_file_utils import convert_cosmos_transformer_checkpoint_to_diffusers

        own = {name: tensor for name, tensor in tensors.items() if not name.startswith(ADAPTER)}
        own = convert_cosmos_transformer_checkpoint_to_diffusers(own)
        width, patch = own["patch_embed.proj.weight"].shape
        head = own["transformer_blocks.0.attn1.norm_q.weight"].shape[0]
        config = self.config[self.denoiser] | {
            "in_channels": patch // 4 - 1,
            "out_channels": own["proj_out.weight"].shape[0] // 4,
            "num_attention_heads": width // head,
            "attention_head_dim": head,
            "num_layers": count_groups(own, r"transformer_blocks\.(\d+)\."),
            "mlp_ratio": own["transformer_blocks.0.ff.net.0.proj.weight"].shape[0] / width,
            "text_embed_dim": own["transformer_blocks.0.attn2.to_k.weight"].shape[1],
            "adaln_lora_dim": own["transformer_blocks.0.norm1.linear_1.weight"].shape[0],
        }
        return config, own

    def other_parts_of_file(self, tensors: Mapping[str, Tensor]) -> list[tuple[Any, dict[str, Any], dict[str, Tensor]]]:
        import diffusers

        own = {name.removeprefix(ADAPTER): tensor for name, tensor in tensors.items() if name.startswith(ADAPTER)}
        width = own["out_proj.weight"].shape[1]
        config = {
            "source_dim": own["blocks.0.cross_attn.k_proj.weight"].shape[1],
            "target_dim": own["embed.weight"].shape[1],
            "model_dim": width,
            "num_layers": count_groups(own, r"blocks\.(\d+)\."),
            "num_attention_heads": width // own["blocks.0.cross_attn.q_norm.weight"].shape[0],
            "mlp_ratio": own["blocks.0.mlp.0.weight"].shape[0] / width,
            "target_vocab_size": own["embed.weight"].shape[0],
        }
        return [(diffusers.AnimaTextConditioner, config, own)]


ANIMA = AnimaFamily(
    name="anima",
    title="Anima",
    model_class=Anima,
    config_file=Path(__file__).with_name("anima.json"),
    pipeline_class="AnimaModularPipeline",
    denoiser_class="CosmosTransformer3DModel",
    tokenizers=("tokenizer", "t5_tokenizer"),
    mark=f"{ADAPTER}out_proj.weight",
    text_prefix="text_encoders.qwen3_06b.transformer.",
    versions={"flow": ("anima", "anima-unknown/lora")},  # as sd-scripts writes of one that is not its preview
    implementation="https://huggingface.co/circlestone-labs/Anima",
)
FAMILIES.register(ANIMA.name)(ANIMA)
