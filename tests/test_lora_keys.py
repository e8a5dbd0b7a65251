"""Names in LoRA files: those of the real models, and Diffusers as the judge that every one of them is understood."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from library.errors import UserError
from library.models.base import DiffusionModel
from library.models.single_file import bundled_config
from networks.lora import LoRANetwork, create_network
from networks.lora_keys import sgm_path, text_encoder_key, unet_family, unet_key
from networks.lora_targets import find_targets, layers_inside
from tests.helpers.tiny_models import FAMILY_NAMES, pipeline_of, tiny_model, unet_to_ldm


def _full_size(family: str) -> tuple[UNet2DConditionModel, list[nn.Module]]:
    """The real models without weights."""
    config = bundled_config(family)
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(config["unet"])
        text_encoders: list[nn.Module] = [CLIPTextModel(CLIPTextConfig(**config["text_encoder"]))]
        if family == "sdxl":
            text_encoders.append(CLIPTextModelWithProjection(CLIPTextConfig(**config["text_encoder_2"])))
    assert isinstance(unet, UNet2DConditionModel)
    return unet, text_encoders


# Counted with sd-scripts' own create_network.
@pytest.mark.parametrize(
    ("family", "plain", "with_convs", "text"), [("sd1", 192, 278, 72), ("sd2", 192, 278, 138), ("sdxl", 722, 788, 264)]
)
def test_full_size_models_have_the_modules_of_sd_scripts(family: str, plain: int, with_convs: int, text: int) -> None:
    unet, text_encoders = _full_size(family)
    assert unet_family(unet.config) == family
    # Twice: in sd-scripts a network with conv_dim changes every later one of the process.
    for convs, count in ((False, plain), (True, with_convs), (False, plain)):
        names = [target.name for target in find_targets(text_encoders, unet, with_convs=convs)]
        assert len(set(names)) == len(names)
        assert sum(name.startswith("lora_unet_") for name in names) == count
        assert sum(name.startswith("lora_te") for name in names) == text


@pytest.mark.parametrize("family", ["sd1", "sd2"])
def test_full_size_names_of_sd1_and_sd2(family: str) -> None:
    unet, text_encoders = _full_size(family)
    names = {target.name: target.base for target in find_targets(text_encoders, unet, with_convs=True)}
    assert isinstance(names["lora_unet_down_blocks_0_attentions_0_proj_in"], nn.Conv2d if family == "sd1" else nn.Linear)
    for name in (
        "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_out_0",
        "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_ff_net_0_proj",
        "lora_unet_mid_block_attentions_0_proj_out",
        "lora_unet_up_blocks_1_attentions_2_transformer_blocks_0_attn2_to_k",
        "lora_unet_down_blocks_0_resnets_0_time_emb_proj",
        "lora_unet_down_blocks_0_downsamplers_0_conv",
        "lora_unet_up_blocks_0_upsamplers_0_conv",
        "lora_te_text_model_encoder_layers_0_self_attn_q_proj",
        "lora_te_text_model_encoder_layers_11_mlp_fc2",
    ):
        assert name in names


def test_full_size_names_of_sdxl() -> None:
    unet, text_encoders = _full_size("sdxl")
    names = {target.name for target in find_targets(text_encoders, unet, with_convs=True)}
    for name in (
        "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q",
        "lora_unet_middle_block_1_proj_in",
        "lora_unet_output_blocks_0_1_transformer_blocks_9_ff_net_0_proj",
        "lora_unet_input_blocks_1_0_in_layers_2",
        "lora_unet_input_blocks_1_0_out_layers_3",
        "lora_unet_input_blocks_1_0_emb_layers_1",
        "lora_unet_output_blocks_0_0_skip_connection",
        "lora_unet_input_blocks_3_0_op",
        "lora_unet_output_blocks_2_2_conv",
        "lora_te1_text_model_encoder_layers_11_mlp_fc1",
        "lora_te2_text_model_encoder_layers_31_mlp_fc1",
    ):
        assert name in names


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_original_paths_agree_with_the_single_file_layout(family: str) -> None:
    """Every layer inside a block, against the table by which the tests write checkpoints in the original layout."""
    unet = tiny_model(family, full=True).unet
    by_tensor = dict(zip(unet.state_dict(), unet_to_ldm(unet), strict=True))
    paths = [path for path, _ in layers_inside(unet, ("Transformer2DModel", "ResnetBlock2D", "Downsample2D", "Upsample2D"))]
    assert len(paths) > 100
    for path in paths:
        assert sgm_path(path, unet.config) == by_tensor[f"{path}.weight"].removesuffix(".weight")


def test_slots_follow_layers_per_block() -> None:
    config = {"layers_per_block": 1, "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"], "addition_embed_type": "text_time"}
    assert sgm_path("down_blocks.1.resnets.0.conv1", config) == "input_blocks.3.0.in_layers.2"
    assert sgm_path("down_blocks.1.downsamplers.0.conv", config) == "input_blocks.4.0.op"
    assert sgm_path("up_blocks.1.attentions.0.proj_in", config) == "output_blocks.2.1.proj_in"
    assert sgm_path("up_blocks.0.upsamplers.0.conv", config) == "output_blocks.1.1.conv"
    assert unet_key("up_blocks.1.upsamplers.0.conv", config) == "lora_unet_output_blocks_3_2_conv"
    with pytest.raises(UserError, match="equally long"):
        sgm_path("down_blocks.0.resnets.0.conv1", config | {"layers_per_block": [1, 2]})


@pytest.mark.parametrize("path", ["encoder.layers.0.mlp.fc1", "text_model.encoder.layers.0.mlp.fc1"])
def test_text_model_is_always_there_once(path: str) -> None:
    assert text_encoder_key(path, "sd1", 0) == "lora_te_text_model_encoder_layers_0_mlp_fc1"
    assert text_encoder_key(path, "sdxl", 0) == "lora_te1_text_model_encoder_layers_0_mlp_fc1"
    assert text_encoder_key(path, "sdxl", 1) == "lora_te2_text_model_encoder_layers_0_mlp_fc1"


def _random_network(model: DiffusionModel, **network_args: Any) -> LoRANetwork:
    network = create_network(1.0, 4, 2.0, None, model.text_encoders, model.unet, **network_args)
    generator = torch.Generator().manual_seed(1)
    for lora in network.loras:
        nn.init.normal_(lora.lora_down.weight, std=0.1, generator=generator)
        nn.init.normal_(lora.lora_up.weight, std=0.1, generator=generator)
    return network


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_diffusers_applies_every_module_as_we_mean_it(family: str, tmp_path: Path) -> None:
    """Fused by Diffusers, each weight moves by up @ down * alpha / rank, and no other weight moves: float32 rounding of sums near 1."""
    pytest.importorskip("peft")
    model = tiny_model(family, full=True)
    network = _random_network(model, conv_dim="3", conv_alpha="0.5")
    network.save_weights(tmp_path / "lora.safetensors")
    file = load_file(tmp_path / "lora.safetensors")
    pipeline = pipeline_of(model)
    components = {"unet": pipeline.unet, "text_encoder": pipeline.text_encoder, "text_encoder_2": getattr(pipeline, "text_encoder_2", None)}
    components = {part: component for part, component in components.items() if component is not None}
    before = {part: {name: value.clone() for name, value in component.state_dict().items()} for part, component in components.items()}

    pipeline.load_lora_weights(str(tmp_path), weight_name="lora.safetensors")
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()

    names = {(lora.part, f"{lora.path}.weight"): lora.name for lora in network.loras}
    moved = 0
    for part, component in components.items():
        for key, after in component.state_dict().items():
            key = key.replace(".base_layer", "")
            change = after - before[part][key]
            if (part, key) in names:
                name = names[part, key]
                down, up, alpha = file[f"{name}.lora_down.weight"], file[f"{name}.lora_up.weight"], file[f"{name}.alpha"]
                expected = (up.flatten(1) @ down.flatten(1)).reshape(change.shape) * alpha.item() / down.shape[0]
                torch.testing.assert_close(change, expected, atol=1e-6, rtol=0)
                assert expected.abs().max() > 1e-4
                moved += 1
            else:
                assert torch.equal(after, before[part][key]), f"{part} {key} moved"
    assert moved == len(network.loras) == len(file) / 3
