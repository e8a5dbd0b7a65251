"""Tiny image models with random weights, saved as the public ones are."""

from pathlib import Path

import torch
from diffusers import AutoencoderTiny
from torch import nn
from transformers import (
    CLIPConfig,
    CLIPModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    ViTConfig,
    ViTForImageClassification,
)

SIDE = 32  # of the pictures that they take
PROJECTION = 24


def seeded(make, seed: int = 0):  # noqa: ANN001, ANN201 - whatever `make` makes
    """What `make` makes with this seed, weights large enough that pictures and prompts matter; the global generator is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = make()
        for parameter in model.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.3)
    return model.eval()


def tiny_clip() -> CLIPModel:
    tower = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "projection_dim": PROJECTION}
    config = CLIPConfig(
        text_config={**tower, "vocab_size": 49408, "bos_token_id": 49406, "eos_token_id": 49407, "pad_token_id": 49407},
        vision_config={**tower, "image_size": SIDE, "patch_size": 8},
        projection_dim=PROJECTION,
    )
    return seeded(lambda: CLIPModel(config))


def tiny_siglip() -> SiglipVisionModel:
    config = SiglipVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, image_size=SIDE, patch_size=8
    )
    return seeded(lambda: SiglipVisionModel(config))


def tiny_classifier(labels: tuple[str, ...] = ("normal", "nsfw"), problem_type: str | None = None) -> ViTForImageClassification:
    config = ViTConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=SIDE,
        patch_size=8,
        id2label=dict(enumerate(labels)),
        label2id={label: index for index, label in enumerate(labels)},
        problem_type=problem_type,
    )
    return seeded(lambda: ViTForImageClassification(config))


def tiny_taesd(latent_channels: int = 4) -> AutoencoderTiny:
    """With TAESD's 8 pixels to a latent, and fewer channels."""
    widths = (8, 8, 8, 8)

    def make() -> AutoencoderTiny:
        return AutoencoderTiny(
            encoder_block_out_channels=widths,
            decoder_block_out_channels=widths,
            latent_channels=latent_channels,
            num_decoder_blocks=(1, 1, 1, 1),
            num_encoder_blocks=(1, 1, 1, 1),
        )

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make().eval()


def save_head(path: Path, widths: tuple[int, ...], name: str, places: tuple[int, ...], seed: int = 3) -> dict[str, torch.Tensor]:
    """A head of linear layers as torch.save writes it, its layers called `name.format(place)`."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for place, given, wanted in zip(places, widths, widths[1:], strict=False):
        tensors[name.format(place) + "weight"] = torch.randn(wanted, given, generator=generator) / given**0.5
        tensors[name.format(place) + "bias"] = torch.randn(wanted, generator=generator)
    torch.save(tensors, path)
    return tensors
