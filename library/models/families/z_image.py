"""Z-Image and Z-Image-Turbo (arXiv 2511.22699): text and picture in one stream of tokens, prompts by Qwen3, FLUX.1's latents."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from library.models.flow_model import FlowFamily, FlowModel
from library.models.registry import FAMILIES
from library.models.single_file import count_groups
from library.types import Conditioning

CHAT = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"  # what Qwen3's own template makes of a single request
AXES = (1 / 4, 3 / 8, 3 / 8)  # of a head's width, for a token's place in text or time, height and width


class ZImage(FlowModel):
    """The last hidden state but one of Qwen3, of the prompt as a user's request; a row is as many tokens as its prompt has."""

    def _encode(self, prompts: list[str]) -> Conditioning:
        ids, mask = (part.to(self.device) for part in self._tokens([self._request(prompt) for prompt in prompts], self.tokenizers[0]))
        with self._fetched(self.text_encoders[0]):
            text = self._hidden_states(self.text_encoders[0], ids, mask)
        return Conditioning(text * mask[..., None].to(text), lengths=tuple(mask.sum(1).tolist()))

    def _hidden_states(self, text_encoder: Any, token_ids: Tensor, *others: Tensor) -> Any:
        return text_encoder(token_ids, attention_mask=others[0], output_hidden_states=True).hidden_states[-2]

    def _request(self, prompt: str) -> str:
        if self.tokenizers[0].chat_template is None:
            return CHAT.format(prompt)
        messages = [{"role": "user", "content": prompt}]
        options = {"tokenize": False, "add_generation_prompt": True, "enable_thinking": True}  # as diffusers' pipeline asks
        return self.tokenizers[0].apply_chat_template(messages, **options)

    def _velocity(self, latents: Tensor, share: Tensor, cond: Conditioning) -> Tensor:
        assert cond.lengths is not None, "conditioning of another family"
        text = cond.text.to(self.dtype)
        pictures = list(latents[:, :, None].unbind())
        texts = [row[:length] for row, length in zip(text, cond.lengths, strict=True)]
        output = self.unet(pictures, 1 - share, texts, return_dict=False)[0]  # its time runs from noise to picture
        return -torch.stack(output)[:, :, 0]


class ZImageFamily(FlowFamily):
    """Its single files have q, k and v in one matrix."""

    def denoiser_of_file(self, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        from diffusers.loaders.single_file_utils import convert_z_image_transformer_checkpoint_to_diffusers

        own = dict(tensors)
        if "x_embedder.weight" in own:  # else the names are diffusers' already
            own = convert_z_image_transformer_checkpoint_to_diffusers(own)
        patches = own["all_x_embedder.2-1.weight"]
        head = own["layers.0.attention.norm_q.weight"].shape[0]
        config = self.config[self.denoiser] | {
            "in_channels": patches.shape[1] // 4,
            "dim": patches.shape[0],
            "n_layers": count_groups(own, r"layers\.(\d+)\."),
            "n_refiner_layers": count_groups(own, r"noise_refiner\.(\d+)\."),
            "n_heads": patches.shape[0] // head,
            "n_kv_heads": patches.shape[0] // head,
            "cap_feat_dim": own["cap_embedder.1.weight"].shape[1],
            "axes_dims": [round(head * share) for share in AXES],
        }
        return config, own


Z_IMAGE = ZImageFamily(
    name="z_image",
    title="Z-Image",
    model_class=ZImage,
    config_file=Path(__file__).with_name("z_image.json"),
    pipeline_class="ZImagePipeline",
    denoiser_class="ZImageTransformer2DModel",
    mark="cap_pad_token",
    text_prefix="text_encoders.qwen3_4b.transformer.",
    versions={"flow": ("z_image", "z-image/lora")},
    implementation="https://github.com/Tongyi-MAI/Z-Image",
)
FAMILIES.register(Z_IMAGE.name)(Z_IMAGE)
