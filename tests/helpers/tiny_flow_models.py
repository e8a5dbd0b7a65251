"""Tiny random models of the families by flow matching, as objects and as folders; pictures of 64 pixels have latents of 8."""

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
from torch import nn
from transformers import Qwen3Config, Qwen3Model

from examples.shapes.tokenizer import build_chat_tokenizer
from library.models.single_file import bundled_config

WIDTH, HEADS = 64, 2
LANGUAGE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2, "num_key_value_heads": 1}


def tiny_language_model(vocab_size: int) -> Qwen3Model:
    config: dict[str, Any] = bundled_config("z_image")["text_encoder"] | LANGUAGE | {"vocab_size": vocab_size, "head_dim": 16}
    return Qwen3Model(Qwen3Config(**config))


def tiny_flux_vae() -> AutoencoderKL:
    config = bundled_config("z_image")["vae"] | {"block_out_channels": [32] * 4, "layers_per_block": 1, "sample_size": 64}
    vae = AutoencoderKL.from_config(config)
    assert isinstance(vae, AutoencoderKL)
    return vae


def z_image_pipeline(**changes: Any) -> ZImagePipeline:
    """Fresh random weights, the same ones each time, none of which is 0."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        tokenizer: Any = build_chat_tokenizer()
        sizes = {"dim": WIDTH, "n_heads": HEADS, "n_kv_heads": HEADS, "n_layers": 2, "n_refiner_layers": 1, "cap_feat_dim": 32}
        transformer = ZImageTransformer2DModel(**bundled_config("z_image")["transformer"] | sizes | {"axes_dims": [8, 12, 12]} | changes)
        for parameter in transformer.parameters():
            if not parameter.any():
                nn.init.normal_(parameter, std=0.1)
        scheduler: Any = FlowMatchEulerDiscreteScheduler.from_config(bundled_config("z_image")["scheduler"])
        pipeline = ZImagePipeline(
            transformer=transformer.eval(),
            vae=tiny_flux_vae().eval(),
            text_encoder=tiny_language_model(len(tokenizer)).eval(),
            tokenizer=tokenizer,
            scheduler=scheduler,
        )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def z_image_folder(folder: Path) -> Path:
    z_image_pipeline().save_pretrained(folder)
    return folder
