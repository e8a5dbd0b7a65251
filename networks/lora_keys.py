"""Module path <-> name in a LoRA file, per model family, and the weights that a file has under these names.

SD1 and SD2 files use Diffusers' paths, SDXL files the paths of Stability's original code ("sgm"): the one style per family
that A1111, Forge, ComfyUI, Diffusers and sd-scripts all read whole.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from library.errors import UserError

_RESNET_PARTS = {"conv1": "in_layers.2", "conv2": "out_layers.3", "time_emb_proj": "emb_layers.1", "conv_shortcut": "skip_connection"}
_BLOCK_PATH = re.compile(r"(?:(down|up)_blocks\.(\d+)|mid_block)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)(?:\.(.+))?")


def unet_family(config: Mapping[str, Any]) -> str:
    """ "sd1", "sd2" or "sdxl", from the config of a UNet2DConditionModel."""
    if config.get("addition_embed_type") == "text_time":
        return "sdxl"
    return "sd2" if config.get("use_linear_projection") or config.get("cross_attention_dim") == 1024 else "sd1"


def unet_key(path: str, config: Mapping[str, Any]) -> str:
    """The name, in the style of the U-Net's family, of the module at `path` ("down_blocks.0.attentions.0.proj_in")."""
    return _underscored("lora_unet", sgm_path(path, config) if unet_family(config) == "sdxl" else path)


def diffusers_unet_key(path: str) -> str:
    """The name in Diffusers' style, which some SDXL files have too."""
    return _underscored("lora_unet", path)


def text_encoder_key(path: str, family: str, index: int) -> str:
    """The name of a module of the index-th text encoder, counted from 0.

    Every client wants the level `text_model`; transformers 5 has it in CLIPTextModelWithProjection only.
    """
    prefix = f"lora_te{index + 1}" if family == "sdxl" else "lora_te"
    return _underscored(prefix, path if path.startswith("text_model.") else f"text_model.{path}")


def sgm_path(path: str, config: Mapping[str, Any]) -> str:
    """Diffusers' path of a module inside a U-Net block -> its path in the original code.

    Raises UserError for a U-Net whose blocks differ in length, which the original names cannot express.
    """
    match = _BLOCK_PATH.fullmatch(path)
    assert match, f"not a module inside a U-Net block: {path}"
    side, block, kind, index, rest = match[1], int(match[2] or 0), match[3], int(match[4]), match[5]
    length = _layers_per_block(config) + 1  # slots per block: its resnets and, going down, its downsampler
    if side is None:
        place = f"middle_block.{2 * index + (kind == 'attentions')}"
    elif kind == "downsamplers":
        return f"input_blocks.{length * (block + 1)}.0.{'op' if rest == 'conv' else rest}"
    elif kind == "upsamplers":
        after_attention = "Attn" in config["up_block_types"][block]
        return f"output_blocks.{length * block + length - 1}.{2 if after_attention else 1}.{rest}"
    elif side == "down":
        place = f"input_blocks.{1 + length * block + index}.{int(kind == 'attentions')}"
    else:
        place = f"output_blocks.{length * block + index}.{int(kind == 'attentions')}"
    if kind == "resnets" and rest is not None:
        rest = _RESNET_PARTS[rest]
    return place if rest is None else f"{place}.{rest}"


def _layers_per_block(config: Mapping[str, Any]) -> int:
    layers = config["layers_per_block"]
    lengths = {layers} if isinstance(layers, int) else set(layers)
    if len(lengths) != 1:
        raise UserError(f"layers_per_block is {layers}: names of SDXL LoRA files need a U-Net whose blocks are equally long")
    return lengths.pop()


def _underscored(prefix: str, path: str) -> str:
    return f"{prefix}_{path.replace('.', '_')}"


def read_weights(file: str | Path) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load_file(file)
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"{file} could not be read as a .safetensors LoRA ({error}); check the path") from error


def rename_weights(weights: Mapping[str, Tensor], names: Mapping[str, str]) -> dict[str, Tensor]:
    """Weights under our names, with alpha = rank where the file has none, as every client reads it."""
    renamed = {}
    for key, value in weights.items():
        module, _, suffix = key.partition(".")
        renamed[f"{names.get(module, module)}.{suffix}"] = value
    for key in [key for key in renamed if key.endswith(".lora_down.weight")]:
        renamed.setdefault(key.replace(".lora_down.weight", ".alpha"), torch.tensor(float(renamed[key].shape[0])))
    return renamed


def fit_weight(value: Tensor, shape: torch.Size, key: str, file: str | Path | None) -> Tensor:
    # (r, in) and (r, in, 1, 1) are one matrix: SD2's proj_in and proj_out are found in both shapes.
    if list(value.shape) + [1] * (len(shape) - value.ndim) != list(shape) + [1] * (value.ndim - len(shape)):
        raise UserError(
            f"{file or 'weights_sd'}: {key} has shape {tuple(value.shape)}, this network {tuple(shape)}; make the network from the file"
        )
    return value.reshape(shape).float()
