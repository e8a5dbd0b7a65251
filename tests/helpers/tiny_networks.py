"""LoRAs of tiny models that already do something."""

import torch

from library.models.base import DiffusionModel
from networks.lora import LoRANetwork, create_network


def lora_for(model: DiffusionModel, strength: float = 0.05, *, text_encoders: bool = False) -> LoRANetwork:
    """A LoRA of rank 2 in the U-Net, and in the text encoders if wanted; `strength` is the standard deviation of its up weights."""
    encoders = model.text_encoders if text_encoders else []
    network = create_network(1.0, 2, 2.0, model.vae, encoders, model.unet, generator=torch.Generator().manual_seed(0))
    for lora in network.loras:
        torch.nn.init.normal_(lora.lora_up.weight, std=strength, generator=torch.Generator().manual_seed(1))
    network.apply_to(encoders, model.unet, apply_text_encoder=text_encoders)
    model.freeze()
    return network
