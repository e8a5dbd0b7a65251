"""LoRAs of tiny models that already do something, and the call that shows what."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from library.models.base import DiffusionModel
from networks.lora import LoRANetwork, create_network


def lora_for(model: DiffusionModel, strength: float = 0.05, *, rank: int = 2, text_encoders: bool = False) -> LoRANetwork:
    """A LoRA in the U-Net, and in the text encoders if wanted; `strength` is the standard deviation of its up weights."""
    encoders = model.text_encoders if text_encoders else []
    network = create_network(1.0, rank, rank, model.vae, encoders, model.unet, generator=torch.Generator().manual_seed(0))
    for lora in network.loras:
        torch.nn.init.normal_(lora.lora_up.weight, std=strength, generator=torch.Generator().manual_seed(1))
    network.apply_to(encoders, model.unet, apply_text_encoder=text_encoders)
    model.freeze()
    return network


def unet_call(model: DiffusionModel, rows: int = 4) -> Callable[[], Tensor]:
    """The same U-Net call every time: `rows` samples, each its own."""
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(rows, 4, 8, 8, generator=generator)
    text = torch.randn(rows, 7, model.unet.config["cross_attention_dim"], generator=generator)
    added = {}
    if model.spec.family == "sdxl":
        added = {"text_embeds": torch.randn(rows, 64, generator=generator), "time_ids": torch.full((rows, 6), 64.0)}
    timesteps = torch.linspace(100, 900, rows).long()

    def call() -> Tensor:
        dtype = model.unet.dtype
        extra = {key: value.to(dtype) for key, value in added.items()}
        return model.unet(latents.to(dtype), timesteps, text.to(dtype), added_cond_kwargs=extra).sample

    return call


def full_lora(
    model: DiffusionModel, multiplier: float | Tensor = 1.0, text_encoder: bool = False, apply: bool = True, **options: Any
) -> LoRANetwork:
    """A network that is no longer neutral: both of its matrices are random, the same at every call."""
    text_encoders = model.text_encoders if text_encoder else None
    generator = torch.Generator().manual_seed(1)
    network = create_network(multiplier, 4, 2.0, None, text_encoders, model.unet, generator=generator, **options)
    for lora in network.loras:
        nn.init.normal_(lora.lora_up.weight, std=0.2, generator=generator)
    if apply:
        network.apply_to(text_encoders, model.unet, apply_text_encoder=text_encoder)
    return network
