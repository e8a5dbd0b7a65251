"""Which modules of a U-Net and its text encoders get a LoRA branch."""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from networks.lora_keys import dotted_path, is_transformer, text_encoder_aliases, text_encoder_key, unet_aliases, unet_family, unet_key

UNET_BLOCKS = ("Transformer2DModel",)
UNET_CONV_BLOCKS = ("ResnetBlock2D", "Downsample2D", "Upsample2D")
TRANSFORMER_BLOCKS = ("ZImageTransformerBlock", "CosmosTransformerBlock")
# Attention and MLP of the main layers: what trainers of these families take, and not what modulates them, nor Z-Image's refiners.
_TRANSFORMER_PATH = re.compile(r"(layers|transformer_blocks)\.\d+\.(attention|feed_forward|attn[12]|ff)\.")
TEXT_ENCODER_BLOCKS = ("CLIPAttention", "CLIPMLP")

TextEncoders = nn.Module | Sequence[nn.Module] | None


class TargetModule(NamedTuple):
    """A module that can have a branch.

    Attributes:
        name: what the file calls it, or what kohya's would where that has dots.
        dotted: what the file calls it, with dots (transformers), or None.
        aliases: what files of other programs call it.
        part: "unet", "text_encoder" or "text_encoder_2".
        path: of the base module within that part.
        base: the Linear or Conv2d.
    """

    name: str
    aliases: tuple[str, ...]
    part: str
    path: str
    base: nn.Module
    dotted: str | None = None

    @property
    def weight_shape(self) -> torch.Size:
        assert isinstance(self.base.weight, torch.Tensor)
        return self.base.weight.shape

    @property
    def is_large_conv(self) -> bool:
        return isinstance(self.base, nn.Conv2d) and self.base.kernel_size != (1, 1)


def find_targets(text_encoder: TextEncoders, unet: nn.Module, with_convs: bool) -> Iterator[TargetModule]:
    """sd-scripts' choice of modules; `with_convs` adds those of a U-Net's convolutional blocks."""
    config: Mapping[str, Any] = unet.config  # type: ignore[assignment]
    for part, model in parts_of(text_encoder, unet).items():
        if part == "unet" and is_transformer(config):
            for path, base in layers_inside(model, TRANSFORMER_BLOCKS):
                if _TRANSFORMER_PATH.match(path):
                    yield TargetModule(unet_key(path, config), unet_aliases(path, config), part, path, base, dotted_path(path, config))
        elif part == "unet":
            blocks = UNET_BLOCKS + (UNET_CONV_BLOCKS if with_convs else ())
            for path, base in layers_inside(model, blocks):
                yield TargetModule(unet_key(path, config), unet_aliases(path, config), part, path, base)
        else:
            for path, base in layers_inside(model, TEXT_ENCODER_BLOCKS):
                key = text_encoder_key(path, unet_family(config), int(part == "text_encoder_2"))
                yield TargetModule(key, text_encoder_aliases(key), part, path, base)


def layers_inside(model: nn.Module, class_names: Sequence[str]) -> Iterator[tuple[str, nn.Module]]:
    """Every Linear and Conv2d inside a module of these classes, once, with its path."""
    inside = tuple(f"{path}." for path, module in model.named_modules() if type(module).__name__ in class_names)
    for path, module in model.named_modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)) and path.startswith(inside):
            yield path, module


def parts_of(text_encoder: TextEncoders, unet: nn.Module) -> dict[str, nn.Module]:
    """The models by Diffusers' names, the U-Net first: with one seed its initial values do not depend on the text encoders."""
    text_encoders = [text_encoder] if isinstance(text_encoder, nn.Module) else text_encoder or ()
    return {"unet": unet, **dict(zip(("text_encoder", "text_encoder_2"), text_encoders, strict=False))}
