"""Module path <-> name in a LoRA file, per model family, and the block of the U-Net that it is in.

SD1 and SD2 files use Diffusers' paths, SDXL files the paths of Stability's original code ("sgm"): the one style per family
that A1111, Forge, ComfyUI, Diffusers and sd-scripts all read whole. Files for transformers have the original paths with their dots, after
"diffusion_model.", with lora_A and lora_B: what ComfyUI and Diffusers both read whole.
"""

import re
from collections.abc import Mapping
from typing import Any

from library.errors import UserError

_RESNET_PARTS = {"conv1": "in_layers.2", "conv2": "out_layers.3", "time_emb_proj": "emb_layers.1", "conv_shortcut": "skip_connection"}
_BLOCK_PATH = re.compile(r"(?:(down|up)_blocks\.(\d+)|mid_block)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)(?:\.(.+))?")


_COSMOS_PARTS = {
    "transformer_blocks.": "blocks.",
    "attn1.": "self_attn.",
    "attn2.": "cross_attn.",
    "to_out.0": "output_proj",
    "to_q": "q_proj",
    "to_k": "k_proj",
    "to_v": "v_proj",
    "ff.net.0.proj": "mlp.layer1",
    "ff.net.2": "mlp.layer2",
}


def unet_family(config: Mapping[str, Any]) -> str:
    """ "sd1", "sd2", "sdxl", "z_image" or "anima", from the config of a UNet2DConditionModel or a transformer."""
    if "cap_feat_dim" in config:
        return "z_image"
    if "adaln_lora_dim" in config:
        return "anima"
    if config.get("addition_embed_type") == "text_time":
        return "sdxl"
    return "sd2" if config.get("use_linear_projection") or config.get("cross_attention_dim") == 1024 else "sd1"


def unet_key(path: str, config: Mapping[str, Any]) -> str:
    """The name, in the style of the U-Net's family, of the module at `path` ("down_blocks.0.attentions.0.proj_in")."""
    return _underscored("lora_unet", path if unet_family(config) in ("sd1", "sd2") else original_path(path, config))


def unet_aliases(path: str, config: Mapping[str, Any]) -> tuple[str, ...]:
    """The names in both styles: some SDXL files have Diffusers', and some SD1 files the original ones."""
    return _underscored("lora_unet", path), _underscored("lora_unet", original_path(path, config))


def dotted_path(path: str, config: Mapping[str, Any]) -> str | None:
    """What a file calls the module at `path` of a transformer; None of a U-Net, whose names have no dots."""
    return f"diffusion_model.{original_path(path, config)}" if is_transformer(config) else None


def is_transformer(config: Mapping[str, Any]) -> bool:
    return unet_family(config) in ("z_image", "anima")


def original_path(path: str, config: Mapping[str, Any]) -> str:
    """Diffusers' path of a module -> its path in the code that the family was published with; of Z-Image, whose q, k and v are one
    matrix there, the path that ComfyUI takes for its parts."""
    if not is_transformer(config):
        return sgm_path(path, config)
    if unet_family(config) == "anima":
        for ours, theirs in _COSMOS_PARTS.items():
            path = path.replace(ours, theirs)
    return path


def text_encoder_key(path: str, family: str, index: int) -> str:
    """The name of a module of the index-th text encoder, counted from 0.

    Every client wants the level `text_model`; transformers 5 has it in CLIPTextModelWithProjection only.
    """
    prefix = f"lora_te{index + 1}" if family == "sdxl" else "lora_te"
    return _underscored(prefix, path if path.startswith("text_model.") else f"text_model.{path}")


def text_encoder_aliases(key: str) -> tuple[str, ...]:
    """A text encoder's name as others write it: the first of two where there is one, and without the level `text_model`."""
    names = {key, key.replace("lora_te_", "lora_te1_", 1)}
    return (*names, *(name.replace("_text_model_", "_", 1) for name in names))


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


def num_blocks(config: Mapping[str, Any]) -> tuple[int, int, int]:
    """sd-scripts' count of blocks (down, mid, up) in one direction of the U-Net: SD1 12, 1, 12; SDXL 9, 3, 9; a transformer has none."""
    if is_transformer(config):
        return 0, 0, 0
    slots = (_layers_per_block(config) + 1) * len(config["down_block_types"])
    return slots, 3 if unet_family(config) == "sdxl" else 1, slots


def block_index(path: str, config: Mapping[str, Any]) -> int:
    """sd-scripts' number of the U-Net's block that a module is in: SD1 0..24; SDXL 0..22, of which 0 and 22 have no LoRA."""
    side, number, *_ = sgm_path(path, config).split(".")
    down, mid, _ = num_blocks(config)
    before = 1 if unet_family(config) == "sdxl" else 0
    start = {"input_blocks": before, "middle_block": before + down, "output_blocks": before + down + mid}
    return start[side] + (0 if side == "middle_block" and mid == 1 else int(number))
