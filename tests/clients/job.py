"""Files of every family, rank, precision and part for other programs to load, and what those should make of them."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from library.models.base import DiffusionModel
from networks.lora import LoRANetwork, create_network, create_network_from_weights
from tests.helpers.tiny_models import FAMILY_NAMES, save_folder, single_file_tensors, tiny_model

PARTS = {"unet": (False, False), "unet_convs": (False, True), "text": (True, False), "text_convs": (True, True)}
"""Whether text encoders and convolutions are in the file."""
KINDS = {"fp16_rank4": (torch.float16, 4, 4.0), "bf16_rank16": (torch.bfloat16, 16, 8.0), "float_rank1": (torch.float32, 1, 0.7)}


def make_job(folder: Path) -> list[str]:
    """Families with their LoRA files and expected changes in `folder` -> "FAMILY/NAME" of each file."""
    files = []
    for family in FAMILY_NAMES:
        model, place = tiny_model(family, full=True), folder / "families" / family
        (place / "loras").mkdir(parents=True)
        (place / "expected").mkdir()
        save_folder(model, place / "model")
        with torch.no_grad():
            for module in (model.unet, *model.text_encoders):
                for tensor in module.state_dict().values():
                    tensor.zero_()
        about = {
            "unet_config": _comfy_config(model),
            "original": {name: list(tensor.shape) for name, tensor in single_file_tensors(model).items()},
            "text_encoders": {part: {name: list(shape) for name, shape in _shapes(encoder)} for part, encoder in _encoders(model).items()},
        }
        (place / "family.json").write_text(json.dumps(about), encoding="utf-8")
        for part, (with_text, with_convs) in PARTS.items():
            for kind, (dtype, rank, alpha) in KINDS.items():
                name = f"{part}_{kind}.safetensors"
                network = _network(model, with_text=with_text, with_convs=with_convs, rank=rank, alpha=alpha)
                network.save_weights(place / "loras" / name, dtype)
                save_file(_expected(model, place / "loras" / name), place / "expected" / name)
                files.append(f"{family}/{name}")
    return files


def _network(model: DiffusionModel, *, with_text: bool, with_convs: bool, rank: int, alpha: float) -> LoRANetwork:
    generator = torch.Generator().manual_seed(rank)
    convs = {"conv_dim": str(max(1, rank // 2)), "conv_alpha": "1"} if with_convs else {}
    network = create_network(1.0, rank, alpha, None, model.text_encoders if with_text else None, model.unet, generator=generator, **convs)
    for lora in network.loras:
        nn.init.normal_(lora.lora_up.weight, std=0.2, generator=generator)
    return network


def _expected(model: DiffusionModel, file: Path) -> dict[str, Tensor]:
    """What a file adds, twice: by a checkpoint's names and by Diffusers'. The model is of zeros, and is so again afterwards."""
    network, _ = create_network_from_weights(1.0, file, None, model.text_encoders, model.unet, for_inference=True)
    network.merge_to(model.text_encoders, model.unet)
    found = {f"original:{name}": tensor.clone() for name, tensor in single_file_tensors(model).items() if tensor.any()}
    for part, module in {"unet": model.unet, **_encoders(model)}.items():
        for name, tensor in module.state_dict().items():
            if tensor.any():
                found[f"diffusers:{part}.{_level(part, name)}"] = tensor.clone()
                tensor.zero_()
    return {name: tensor.contiguous() for name, tensor in found.items() if not name.startswith("original:first_stage_model")}


def _encoders(model: DiffusionModel) -> dict[str, nn.Module]:
    return dict(zip(("text_encoder", "text_encoder_2"), model.text_encoders, strict=False))


def _shapes(encoder: nn.Module) -> list[tuple[str, torch.Size]]:
    return [(_level("text_encoder", name), tensor.shape) for name, tensor in encoder.state_dict().items()]


def _level(part: str, name: str) -> str:
    """With the level that transformers 5 has no more in one of its classes, and that every program's names have."""
    return name if part == "unet" or name.startswith("text_") else f"text_model.{name}"


def _comfy_config(model: DiffusionModel) -> dict[str, object]:
    config = model.unet.config
    depths = config["transformer_layers_per_block"]
    depths = [depths] * len(config["down_block_types"]) if isinstance(depths, int) else list(depths)
    depths = [depth if "Attn" in kind else 0 for depth, kind in zip(depths, config["down_block_types"], strict=True)]
    layers = config["layers_per_block"]
    return {
        "num_res_blocks": [layers] * len(depths),
        "channel_mult": [width // config["block_out_channels"][0] for width in config["block_out_channels"]],
        "transformer_depth": [depth for depth in depths for _ in range(layers)],
        "transformer_depth_output": [depth for depth in depths for _ in range(layers + 1)],
        "transformer_depth_middle": max(depths[-1], 1) if model.spec.family != "sdxl" else depths[-1],
    }
