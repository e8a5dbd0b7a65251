"""From the tensors of one .safetensors or .ckpt file in the original layout to diffusers modules, offline.

The configs of the published models are bundled beside the families. What tensors' shapes say (widths, depths, vocabulary) is taken from
the shapes, so that checkpoints of another size load too; the bundled config answers the rest.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from library.atomic_files import NoTensors, load_tensors
from library.errors import UserError
from library.models.family import Family
from library.models.flow_model import FlowFamily
from library.models.registry import FAMILIES
from library.models.unet_model import TextEncoderSlot, UNetFamily
from library.models.vae import Autoencoder

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel
    from transformers import PreTrainedModel

UNET_PREFIX = "model.diffusion_model."
GIVE_VAE = "give a checkpoint with one, a VAE file or the folder of a VAE"
VAE_PREFIXES = ("first_stage_model.", "vae.")
HEAD_WIDTH = 64  # of SD2's and SDXL's U-Net and of every CLIP text encoder here

StateDict = Mapping[str, Tensor]


def bundled_config(family: str) -> dict[str, Any]:
    """The published configs of a family by component."""
    return FAMILIES[family].config


def read_tensors(path: Path, *, shapes_only: bool = False) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors of a checkpoint file by name, and its metadata (safetensors only). ComfyUI's scaled fp8 is multiplied out.

    Args:
        shapes_only: read no values; the tensors are on the device "meta".

    Raises:
        UserError: the file cannot be read; it holds no tensors; another ending.
    """
    if path.suffix.lower() not in (".safetensors", ".sft", ".ckpt", ".pt", ".pth", ".bin"):
        raise UserError(f"{path} does not end in .safetensors or .ckpt; give a checkpoint file or the folder of a diffusers model.")
    try:
        content, metadata = load_tensors(path, shapes_only=shapes_only)
    except NoTensors as error:
        raise UserError(f"{path} cannot be read ({error}); download or copy it again, or convert it to safetensors.") from error
    tensors = {name: value for name, value in content.items() if isinstance(value, Tensor)}
    if not tensors:
        raise UserError(f"{path} holds no tensors by name; give a Stable Diffusion checkpoint.")
    return _unscaled(tensors), metadata


def _unscaled(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """ComfyUI's scaled fp8 as float32: weights times their scale. Others as they are."""
    scales = {name.rpartition(".")[0]: scale for name, scale in tensors.items() if name.endswith((".scale_weight", ".weight_scale"))}
    if not scales:
        return tensors
    result = {}
    for name, tensor in tensors.items():
        layer, _, kind = name.rpartition(".")
        if kind == "weight" and layer in scales:
            scale = scales[layer].float()
            tensor = tensor.float() * scale.reshape(scale.shape + (1,) * (tensor.ndim - scale.ndim) if scale.numel() > 1 else ())
        if kind not in ("scale_weight", "weight_scale", "scale_input", "input_scale", "comfy_quant", "scaled_fp8"):
            result[name] = tensor
    return result


def is_lora(tensors: StateDict) -> bool:
    return any(".lora_" in name or name.startswith(("lora_", "lycoris_")) for name in tensors)


def detect_family(tensors: StateDict, path: Path) -> Family:
    """Which family a checkpoint belongs to, from its tensors' names.

    Raises:
        UserError: it is no text-to-image model that is known; the message says what it looks like.
    """
    if is_lora(tensors):
        raise UserError(f"{path} is a LoRA, not a model; give the checkpoint that the LoRA is to be trained for.")
    for name, what in (("edm_mean", "Playground v2.5"), ("edm_vpred.sigma_max", "a CosXL model")):
        if name in tensors:
            raise UserError(f"{path} is {what}, whose noise schedule (EDM) is another than Stable Diffusion's; give another model.")
    for family in FAMILIES.values():
        if isinstance(family, FlowFamily) and family.prefix_in(tensors) is not None:
            return family
    conv_in = tensors.get(UNET_PREFIX + "input_blocks.0.0.weight")
    if conv_in is None:
        if any(name.startswith("down_blocks.") for name in tensors):
            raise UserError(f"{path} is the U-Net of a diffusers model alone; give the folder of the whole model.")
        titles = ", ".join(family.title for family in FAMILIES.values())
        raise UserError(f"{path} has no network that is known here ({UNET_PREFIX}...); give a checkpoint of {titles}.")
    if conv_in.shape[1] != 4:
        raise UserError(
            f"The U-Net of {path} takes {conv_in.shape[1]} channels: an inpainting or editing model; give a text-to-image checkpoint."
        )
    # the family with the most text encoders first: what an SD1 file has, another may have besides
    families = [family for family in FAMILIES.values() if isinstance(family, UNetFamily)]
    for family in sorted(families, key=lambda family: -len(family.text_encoders)):
        if all(any(name.startswith(slot.prefix) for name in tensors) for slot in family.text_encoders):
            if UNET_PREFIX + "label_emb.0.0.weight" in tensors and len(family.text_encoders) == 1:
                raise UserError(f"The U-Net of {path} takes an embedding of a picture (unCLIP); give a text-to-image checkpoint.")
            return family
    if any(name.startswith("conditioner.embedders.0.model.") for name in tensors):
        raise UserError(f"{path} is the refiner of SDXL, which goes on from pictures of the base; give the base model.")
    raise UserError(f"{path} has a U-Net but not the text encoders of SD1, SD2 or SDXL; give a whole checkpoint.")


def count_groups(names: StateDict, pattern: str) -> int:
    """How many different numbers the group in `pattern` takes among the names that begin with it."""
    return len({match.group(1) for name in names if (match := re.match(pattern, name))})


def unet_config(tensors: StateDict, family: UNetFamily) -> dict[str, Any]:
    """The config of the U-Net whose tensors these are."""
    names = {name.removeprefix(UNET_PREFIX): tensor for name, tensor in tensors.items() if name.startswith(UNET_PREFIX)}
    if "middle_block.1.proj_in.weight" not in names:
        raise UserError(
            "The U-Net has no attention in its middle: a cut-down model (SSD-1B and the like), which is loaded from a diffusers folder."
        )
    num_downsamplers = count_groups(names, r"input_blocks\.(\d+)\.0\.op\.weight")
    layers = (count_groups(names, r"input_blocks\.(\d+)\.") - 1 - num_downsamplers) // (num_downsamplers + 1)
    first_of_level = [(layers + 1) * level + 1 for level in range(num_downsamplers + 1)]
    widths = [names[f"input_blocks.{index}.0.out_layers.3.weight"].shape[0] for index in first_of_level]
    depths = [count_groups(names, rf"input_blocks\.{index}\.1\.transformer_blocks\.(\d+)\.") for index in first_of_level]
    config = family.config["unet"] | {
        "in_channels": names["input_blocks.0.0.weight"].shape[1],
        "out_channels": names["out.2.weight"].shape[0],
        "layers_per_block": layers,
        "block_out_channels": widths,
        "down_block_types": ["CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in depths],
        "up_block_types": ["CrossAttnUpBlock2D" if depth else "UpBlock2D" for depth in reversed(depths)],
        "cross_attention_dim": names["middle_block.1.transformer_blocks.0.attn2.to_k.weight"].shape[1],
        "use_linear_projection": names["middle_block.1.proj_in.weight"].ndim == 2,
    }
    if family.heads_per_level is None:
        config["attention_head_dim"] = [max(1, width // HEAD_WIDTH) for width in widths]  # diffusers' name for the number of heads
    if "label_emb.0.0.weight" in names:
        config["transformer_layers_per_block"] = [max(1, depth) for depth in depths]
        pooled = tensors[family.text_encoders[-1].prefix + "text_projection"].shape[1]
        config["projection_class_embeddings_input_dim"] = names["label_emb.0.0.weight"].shape[1]
        config["addition_time_embed_dim"] = (config["projection_class_embeddings_input_dim"] - pooled) // 6
    return config


def vae_config(tensors: StateDict, family: Family) -> dict[str, Any]:
    """The config of the AutoencoderKL whose tensors these are, under LDM's names or diffusers', without a prefix."""
    down, block = ("down_blocks", "resnets") if "encoder.down_blocks.0.resnets.0.conv1.weight" in tensors else ("down", "block")
    levels = count_groups(tensors, rf"encoder\.{down}\.(\d+)\.")
    return family.config["vae"] | {
        "block_out_channels": [tensors[f"encoder.{down}.{level}.{block}.0.conv2.weight"].shape[0] for level in range(levels)],
        "layers_per_block": count_groups(tensors, rf"encoder\.{down}\.0\.{block}\.(\d+)\."),
        "latent_channels": tensors["decoder.conv_in.weight"].shape[1],
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
    }


def openclip_to_transformers(tensors: StateDict) -> dict[str, Tensor]:
    """OpenCLIP's names of a text tower (no prefix) -> those of CLIPTextModel without "text_model."; packed q, k, v are split."""
    renamed = {
        "token_embedding.": "embeddings.token_embedding.",
        "ln_final.": "final_layer_norm.",
        "transformer.resblocks.": "encoder.layers.",
        ".ln_1.": ".layer_norm1.",
        ".ln_2.": ".layer_norm2.",
        ".mlp.c_fc.": ".mlp.fc1.",
        ".mlp.c_proj.": ".mlp.fc2.",
        ".attn.": ".self_attn.",
    }
    result = {}
    for name, tensor in tensors.items():
        if name == "positional_embedding":
            result["embeddings.position_embedding.weight"] = tensor
        elif name == "text_projection":
            result["text_projection.weight"] = tensor.T.contiguous()
        elif name != "logit_scale":
            for old, new in renamed.items():
                name = name.replace(old, new)
            if ".in_proj_" in name:
                for letter, part in zip("qkv", tensor.chunk(3), strict=True):
                    result[name.replace(".in_proj_", f".{letter}_proj.")] = part
            else:
                result[name] = tensor
    return result


def text_encoder_tensors(tensors: StateDict, slot: TextEncoderSlot) -> dict[str, Tensor]:
    """One text encoder's tensors under CLIPTextModel's names without "text_model."."""
    own = {name.removeprefix(slot.prefix): tensor for name, tensor in tensors.items() if name.startswith(slot.prefix)}
    if slot.open_clip:
        own = openclip_to_transformers(own)
    own = {name.removeprefix("text_model."): tensor for name, tensor in own.items() if not name.endswith("position_ids")}
    if slot.class_name == "CLIPTextModel":
        own.pop("text_projection.weight", None)
    return own


def text_encoder_config(own: StateDict, bundled: Mapping[str, Any]) -> dict[str, Any]:
    """The config of the text encoder whose tensors these are (from `text_encoder_tensors`)."""
    vocab_size, width = own["embeddings.token_embedding.weight"].shape
    layers = count_groups(own, r"encoder\.layers\.(\d+)\.")
    # SD2's files hold OpenCLIP's whole tower, of which the last layer is not used; diffusers leaves it out
    unused = int(bundled["num_hidden_layers"] == 23 and layers == 24)
    projection = own.get("text_projection.weight")
    return dict(bundled) | {
        "vocab_size": vocab_size,
        "hidden_size": width,
        "intermediate_size": own["encoder.layers.0.mlp.fc1.weight"].shape[0],
        "num_hidden_layers": layers - unused,
        "num_attention_heads": max(1, width // HEAD_WIDTH),
        "max_position_embeddings": own["embeddings.position_embedding.weight"].shape[0],
        "projection_dim": bundled["projection_dim"] if projection is None else projection.shape[0],
    }


def fill(module: nn.Module, tensors: StateDict, dtype: torch.dtype, path: Path, part: str) -> None:
    """Give a module built without memory its weights; every tensor must be there, and none beside them."""
    try:
        module.load_state_dict({name: tensor.to(dtype) for name, tensor in tensors.items()}, strict=True, assign=True)
    except RuntimeError as error:
        raise UserError(
            f"The {part} in {path} is not complete or not of the expected layout: {' '.join(str(error).split())[:300]}"
        ) from error


def build_part(cls: Any, config: Mapping[str, Any], tensors: StateDict, dtype: torch.dtype, path: Path, part: str) -> Any:
    """A module of diffusers from its config and all of its tensors."""
    from accelerate import init_empty_weights

    with init_empty_weights():
        module = cls.from_config(dict(config))
    fill(module, tensors, dtype, path, part)
    return module


def build_unet(tensors: StateDict, config: dict[str, Any], dtype: torch.dtype, path: Path) -> UNet2DConditionModel:
    from diffusers import UNet2DConditionModel
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    return build_part(UNet2DConditionModel, config, convert_ldm_unet_checkpoint(dict(tensors), config), dtype, path, "U-Net")


def build_vae(tensors: StateDict, family: Family, path: Path) -> Autoencoder:
    """A VAE in float32 from tensors under the original names, with or without a prefix, or under diffusers'."""
    from diffusers import AutoencoderKL, AutoencoderKLWan
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint, convert_wan_vae_to_diffusers

    prefix = next((prefix for prefix in VAE_PREFIXES if any(name.startswith(prefix) for name in tensors)), "")
    own = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    if "encoder.downsamples.0.residual.0.gamma" in own:  # Wan's and Qwen-Image's, which is the same
        wan = family.config["vae"] | {"base_dim": own["encoder.conv1.weight"].shape[0], "z_dim": own["conv2.weight"].shape[0]}
        if "latent_channels" in wan:
            raise UserError(f"{path} is a VAE of Qwen-Image or Wan, and {family.title} has another; give one made for it.")
        return build_part(AutoencoderKLWan, wan, convert_wan_vae_to_diffusers(dict(own)), torch.float32, path, "VAE")
    own = {name: tensor for name, tensor in own.items() if name.startswith(("encoder.", "decoder.", "quant_conv.", "post_quant_conv."))}
    if "encoder.conv_in.weight" not in own or "decoder.conv_in.weight" not in own:
        raise UserError(f"{path} has no VAE; {GIVE_VAE}.")
    if "latent_channels" not in family.config["vae"]:
        raise UserError(f"{path} is a VAE of Stable Diffusion's or FLUX's kind, and {family.title} has another; give one made for it.")
    config = vae_config(own, family)
    if "encoder.down_blocks.0.resnets.0.conv1.weight" not in own:
        own = convert_ldm_vae_checkpoint(own, config)
    return build_part(AutoencoderKL, config, own, torch.float32, path, "VAE")


def build_text_encoder(
    tensors: StateDict, slot: TextEncoderSlot, bundled: Mapping[str, Any], dtype: torch.dtype, path: Path
) -> PreTrainedModel:
    import transformers
    from accelerate import init_empty_weights

    own = text_encoder_tensors(tensors, slot)
    config = text_encoder_config(own, bundled)
    own = {name: tensor for name, tensor in own.items() if not name.startswith(f"encoder.layers.{config['num_hidden_layers']}.")}
    with init_empty_weights():
        text_encoder = getattr(transformers, slot.class_name)(transformers.CLIPTextConfig(**config))
    if hasattr(text_encoder, "text_model"):  # transformers 5.6 took the inner module out of CLIPTextModel only
        own = {name if name.startswith("text_projection.") else f"text_model.{name}": tensor for name, tensor in own.items()}
    fill(text_encoder, own, dtype, path, "text encoder")
    return text_encoder
