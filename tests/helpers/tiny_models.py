"""Tiny random models of the real ones' parts, or with all their blocks (so that every module has its real name), in memory and as files.

A U-Net call on one 8 x 8 latent takes milliseconds. The VAE has real 8 x downsampling: pictures of 64 pixels have latents of 8.
"""

import json
import re
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, PreTrainedModel

from library.diffusion.noise_schedule import NoiseSchedule
from library.models.base import DiffusionModel
from library.models.clip_tokenizer import build_clip_tokenizer
from library.models.registry import FAMILIES
from library.models.single_file import bundled_config

# name -> (family, prediction type)
KINDS = {
    "sd1": ("sd1", "epsilon"),
    "sd2": ("sd2", "epsilon"),
    "sd2_v": ("sd2", "v_prediction"),
    "sdxl": ("sdxl", "epsilon"),
    "sdxl_v": ("sdxl", "v_prediction"),
}
FAMILY_NAMES = ("sd1", "sd2", "sdxl")
LATENT_SIZE = 8
IMAGE_SIZE = 64
FULL_VAE = (32, 32, 32, 32)  # channels of the narrowest whose norms have 32 groups

cached_tokenizer = lru_cache(build_clip_tokenizer)


def tiny_unet_config(family: str, full: bool = False) -> dict:
    """Narrow, and unless `full` of two levels with one layer each, which take a third of the time, and with 8 groups a norm and not 32.

    A norm's few channels at a single position, as in the deepest of four levels at 64 pixels, become nearly plus and minus 1 whatever they
    are, so that the last bit of a kernel could become a hundredfold.
    """
    config = bundled_config(family)["unet"] | {"sample_size": LATENT_SIZE, "cross_attention_dim": 32}
    widths, heads, layers = [32, 32, 64, 64], [1, 1, 1, 1], 1
    if family == "sdxl":
        widths, heads, layers = [32, 32, 64], [1, 1, 1], [1, 1, 2]
        config |= {"cross_attention_dim": 32 + 64, "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 6 * 8 + 64}
    if not full:
        config |= {"layers_per_block": 1, "norm_num_groups": 8}
        config |= {name: [config[name][0], config[name][-1]] for name in ("down_block_types", "up_block_types")}
        widths, heads, layers = [32, 64], [1, 1], [1, 2] if family == "sdxl" else 1
    config |= {"block_out_channels": widths, "transformer_layers_per_block": layers}
    return config if family == "sd1" else config | {"attention_head_dim": heads}


def tiny_text_config(width: int, bundled: dict, layers: int = 3) -> CLIPTextConfig:
    config: dict[str, Any] = bundled | {
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": max(1, width // 64),
        "projection_dim": width,
    }
    return CLIPTextConfig(**config)


def tiny_vae(scaling_factor: float = 0.18215, seed: int = 0, channels: Sequence[int] = (8, 8, 8, 16)) -> AutoencoderKL:
    """With 32 groups a norm, as the published ones have and a file of the original layout takes for granted, if its channels allow."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = bundled_config("sd1")["vae"] | {
            "block_out_channels": list(channels),
            "norm_num_groups": 32 if channels[0] % 32 == 0 else 8,
            "layers_per_block": 1,
            "sample_size": IMAGE_SIZE,
            "scaling_factor": scaling_factor,
        }
        vae = AutoencoderKL.from_config(config)
    assert isinstance(vae, AutoencoderKL)
    return vae.requires_grad_(False).eval()


def tiny_model(kind: str = "sd1", seed: int = 0, full: bool = False) -> DiffusionModel:
    """A fresh frozen float32 model of a kind in `KINDS`; the same seed gives the same weights, and the global generators are left alone.

    With `full`, U-Net and VAE have as many levels and groups as the published ones, and are found again in a file of the original layout.
    """
    family_name, prediction_type = KINDS[kind]
    family, config = FAMILIES[family_name], bundled_config(family_name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet = UNet2DConditionModel.from_config(tiny_unet_config(family_name, full))
        text_encoders: list[PreTrainedModel] = [CLIPTextModel(tiny_text_config(32, config["text_encoder"]))]
        if family_name == "sdxl":
            text_encoders.append(CLIPTextModelWithProjection(tiny_text_config(64, config["text_encoder_2"])))
        vae = tiny_vae(config["vae"]["scaling_factor"], seed, *[FULL_VAE] if full else [])
    assert isinstance(unet, UNet2DConditionModel)
    schedule = NoiseSchedule.from_config(config["scheduler"] | {"prediction_type": prediction_type})
    return family.model_class(
        spec=family.spec(prediction_type=schedule.prediction_type, unet=unet, vae=vae, name=f"tiny_{kind}"),
        schedule=schedule,
        unet=unet,
        vae=vae,
        text_encoders=text_encoders,
        tokenizers=[cached_tokenizer(slot.pad_token) for slot in family.text_encoders],
    ).freeze()


def pipeline_of(model: DiffusionModel, scheduler: Any = None) -> Any:
    """Diffusers' pipeline of the same parts; without a scheduler by the family's own DDIM."""
    import diffusers

    if scheduler is None:
        config = bundled_config(model.spec.family)["scheduler"] | {"prediction_type": model.spec.prediction_type, "clip_sample": False}
        scheduler = diffusers.DDIMScheduler.from_config(config)
    parts = {"unet": model.unet, "vae": model.vae, "scheduler": scheduler}
    for slot, text_encoder, tokenizer in zip(FAMILIES[model.spec.family].text_encoders, model.text_encoders, model.tokenizers, strict=True):
        parts |= {slot.folder: text_encoder, slot.tokenizer_folder: tokenizer}
    if model.spec.family == "sdxl":
        pipeline = diffusers.StableDiffusionXLPipeline(**parts, add_watermarker=False)
    else:
        pipeline = diffusers.StableDiffusionPipeline(**parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def save_folder(model: DiffusionModel, folder: Path) -> Path:
    """Write a model as a diffusers folder."""
    family = FAMILIES[model.spec.family]
    index = {
        "_class_name": family.pipeline_class,
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "scheduler": ["diffusers", "DDIMScheduler"],
    }
    model.unet.save_pretrained(folder / "unet")
    model.vae.save_pretrained(folder / "vae")
    for slot, text_encoder, tokenizer in zip(family.text_encoders, model.text_encoders, model.tokenizers, strict=True):
        text_encoder.save_pretrained(folder / slot.folder)
        tokenizer.save_pretrained(folder / slot.tokenizer_folder)
        index |= {slot.folder: ["transformers", slot.class_name], slot.tokenizer_folder: ["transformers", "CLIPTokenizer"]}
    if model.spec.family == "sdxl":
        index["force_zeros_for_empty_prompt"] = True
    else:
        index |= {"safety_checker": [None, None], "feature_extractor": [None, None], "requires_safety_checker": False}
    scheduler = bundled_config(model.spec.family)["scheduler"] | {"prediction_type": model.spec.prediction_type}
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps({"_class_name": "DDIMScheduler"} | scheduler))
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def save_single_file(
    model: DiffusionModel, path: Path, extra: dict[str, Tensor] | None = None, metadata: dict[str, str] | None = None
) -> Path:
    """Write a model as one .safetensors or .ckpt file in the original layout."""
    tensors = single_file_tensors(model) | (extra or {})
    if path.suffix == ".ckpt":
        torch.save({"state_dict": tensors, "global_step": 0}, path)
    else:
        save_file(tensors, path, metadata)
    return path


def single_file_tensors(model: DiffusionModel) -> dict[str, Tensor]:
    tensors = {f"model.diffusion_model.{name}": tensor for name, tensor in unet_to_ldm(model.unet).items()}
    tensors |= {f"first_stage_model.{name}": tensor for name, tensor in vae_to_ldm(model.vae).items()}
    for slot, text_encoder in zip(FAMILIES[model.spec.family].text_encoders, model.text_encoders, strict=True):
        own = {name.removeprefix("text_model."): tensor for name, tensor in text_encoder.state_dict().items()}
        renamed = transformers_to_openclip(own) if slot.open_clip else {f"text_model.{name}": tensor for name, tensor in own.items()}
        tensors |= {slot.prefix + name: tensor for name, tensor in renamed.items()}
    return {name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}


RESNET_NAMES = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
UNET_ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
}


def unet_to_ldm(unet: UNet2DConditionModel) -> dict[str, Tensor]:
    """A U-Net's tensors under the original names."""
    slots = unet.config["layers_per_block"] + 1  # of each level: its layers and, going down, its downsampler

    def block(match: re.Match) -> str:
        side, level, part, index = match[1], int(match[2]), match[3], int(match[4])
        slot = {"resnets": 0, "attentions": 1}
        if side == "down":
            place = slots * level + (slots if part == "downsamplers" else index + 1)
            return f"input_blocks.{place}.0.op" if part == "downsamplers" else f"input_blocks.{place}.{slot[part]}"
        if part == "upsamplers":
            attends = getattr(unet.up_blocks[level], "has_cross_attention", False)
            return f"output_blocks.{slots * level + slots - 1}.{2 if attends else 1}.conv"
        return f"output_blocks.{slots * level + index}.{slot[part]}"

    result = {}
    for name, tensor in unet.state_dict().items():
        is_resnet = ".resnets." in name
        for old, new in UNET_ENDS.items():
            name = re.sub(rf"^{re.escape(old)}\.", f"{new}.", name)
        name = re.sub(r"^(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)(\.conv(?=\.))?", block, name)
        if is_resnet:
            name = re.sub(r"\.(" + "|".join(RESNET_NAMES) + r")\.", lambda match: f".{RESNET_NAMES[match[1]]}.", name)
        result[name] = tensor
    return result


VAE_NAMES = {
    "mid_block.resnets.0": "mid.block_1",
    "mid_block.resnets.1": "mid.block_2",
    "mid_block.attentions.0": "mid.attn_1",
    "conv_shortcut": "nin_shortcut",
    "conv_norm_out": "norm_out",
}
VAE_ATTENTION_NAMES = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def vae_to_ldm(vae: AutoencoderKL) -> dict[str, Tensor]:
    """A VAE's tensors under the original names, where attention is a 1 x 1 convolution."""
    last = len(vae.config["block_out_channels"]) - 1
    result = {}
    for name, tensor in vae.state_dict().items():
        name = re.sub(r"down_blocks\.(\d+)\.resnets", r"down.\1.block", name)
        name = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample", name)
        name = re.sub(r"up_blocks\.(\d+)\.resnets", lambda match: f"up.{last - int(match[1])}.block", name)
        name = re.sub(r"up_blocks\.(\d+)\.upsamplers\.0", lambda match: f"up.{last - int(match[1])}.upsample", name)
        for old, new in VAE_NAMES.items():
            name = name.replace(old, new)
        if ".attn_1." in name:
            for old, new in VAE_ATTENTION_NAMES.items():
                name = name.replace(f".{old}.", f".{new}.")
            tensor = tensor[:, :, None, None] if tensor.ndim == 2 else tensor
        result[name] = tensor
    return result


def transformers_to_openclip(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A text encoder's tensors (no "text_model.") under OpenCLIP's names, with q, k and v packed."""
    result = {}
    for name, tensor in tensors.items():
        if name == "embeddings.position_embedding.weight":
            result["positional_embedding"] = tensor
        elif name == "text_projection.weight":
            result["text_projection"] = tensor.T
        elif ".q_proj." in name:
            packed = torch.cat([tensors[name.replace(".q_proj.", f".{letter}_proj.")] for letter in "qkv"])
            result[_openclip_name(name.replace(".self_attn.q_proj.", ".attn.in_proj_"))] = packed
        elif ".k_proj." not in name and ".v_proj." not in name:
            result[_openclip_name(name)] = tensor
    return result


def _openclip_name(name: str) -> str:
    for old, new in (
        ("embeddings.token_embedding", "token_embedding"),
        ("final_layer_norm", "ln_final"),
        ("encoder.layers", "transformer.resblocks"),
        ("layer_norm", "ln_"),
        ("self_attn", "attn"),
        ("mlp.fc1", "mlp.c_fc"),
        ("mlp.fc2", "mlp.c_proj"),
    ):
        name = name.replace(old, new)
    return name


def assert_same_weights(first: nn.Module, second: nn.Module) -> None:
    """Both modules have the same tensors, bit by bit."""
    other = second.state_dict()
    assert first.state_dict().keys() == other.keys()
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, other[name]), name
