"""--network_args: ranks, alphas and learning rates by block, as sd-scripts counts blocks."""

import math
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel

from library.models.single_file import bundled_config
from networks.lora import LoRANetwork, create_network
from networks.lora_keys import block_index
from networks.lora_targets import layers_inside
from tests.helpers.tiny_models import tiny_model


def network_of(family: str = "sd1", text: bool = False, **options: Any) -> LoRANetwork:
    model = tiny_model(family, full=True)
    return create_network(1.0, 4, 2.0, None, model.text_encoders if text else None, model.unet, **options)


# sd-scripts' get_block_index of the same modules.
@pytest.mark.parametrize(
    ("family", "blocks"),
    [
        (
            "sd1",
            {
                "down_blocks.0.attentions.0.proj_in": 1,
                "down_blocks.2.resnets.1.conv1": 8,
                "down_blocks.0.downsamplers.0.conv": 3,
                "mid_block.resnets.1.conv1": 12,
                "up_blocks.0.upsamplers.0.conv": 15,
                "up_blocks.3.attentions.2.proj_out": 24,
            },
        ),
        (
            "sdxl",
            {
                "down_blocks.1.attentions.0.proj_in": 5,
                "down_blocks.0.downsamplers.0.conv": 4,
                "mid_block.resnets.0.conv1": 10,
                "mid_block.attentions.0.proj_in": 11,
                "up_blocks.0.attentions.0.proj_in": 13,
                "up_blocks.2.resnets.2.conv1": 21,
            },
        ),
    ],
)
def test_blocks_are_numbered_as_in_sd_scripts(family: str, blocks: dict[str, int]) -> None:
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(bundled_config(family)["unet"])
    assert isinstance(unet, UNet2DConditionModel)
    paths = {path for path, _ in layers_inside(unet, ("Transformer2DModel", "ResnetBlock2D", "Downsample2D", "Upsample2D"))}
    for path, block in blocks.items():
        assert path in paths
        assert block_index(path, unet.config) == block


def test_block_dims_and_alphas() -> None:
    """Block 12 is SD1's middle; a rank of 0 leaves the block out; text encoders keep network_dim."""
    dims, alphas = ["3"] * 25, ["1"] * 25
    dims[12], alphas[12], dims[1] = "5", "0.5", "0"
    convs = ["2"] * 25
    options = {"block_dims": ",".join(dims), "block_alphas": ",".join(alphas), "conv_block_dims": ",".join(convs)}
    network = network_of(text=True, **options)
    for lora in network.loras:
        large = lora.lora_down.weight.shape[2:].numel() > 1
        expected = (4, 2.0) if lora.part != "unet" else (2, 1.0) if large else (5, 0.5) if "mid_block" in lora.name else (3, 1.0)
        assert (lora.rank, lora.alpha.item()) == expected
    paths = {lora.path for lora in network.loras}
    assert "down_blocks.0.attentions.1.proj_in" in paths and "down_blocks.0.attentions.0.proj_in" not in paths


def test_learning_rates_of_blocks_and_lora_plus() -> None:
    """Zero leaves the block out, and the rest of the groups have unet_lr times the block's weight, up the ratio more."""
    down = ",".join(["0.5"] * 6 + ["0.1"] * 6)
    options = {"down_lr_weight": down, "mid_lr_weight": "2", "block_lr_zero_threshold": "0.1", "loraplus_unet_lr_ratio": "16"}
    network = network_of(text=True, loraplus_lr_ratio="4", **options)
    groups, names = network.prepare_optimizer_params(1e-5, 1e-3, 1e-4)
    assert names == ["unet x0.5", "unet x8", "unet", "unet x16", "unet x2", "unet x32", "textencoder", "textencoder x4"]
    assert [group["lr"] for group in groups] == pytest.approx([5e-4, 8e-3, 1e-3, 16e-3, 2e-3, 32e-3, 1e-5, 4e-5])
    assert sum(len(group["params"]) for group in groups) == len(list(network.parameters()))
    ups = {id(lora.lora_up.weight) for lora in network.loras}
    assert [all(id(parameter) in ups for parameter in group["params"]) for group in groups] == [False, True] * 4
    assert not any("down_blocks.2" in lora.path for lora in network.loras)


def test_weights_of_sdxls_blocks_are_those_of_sd_scripts_numbers() -> None:
    """sd-scripts counts a block before the first of SDXL, so that the 9 weights of the way down are of blocks 1 to 9."""
    weights = [str(number / 10) for number in range(1, 10)]
    network = network_of("sdxl", down_lr_weight=",".join(weights), mid_lr_weight="1,2,3", conv_dim="2")
    found = {lora.path: lora.lr_factors[0] for lora in network.loras}
    config = tiny_model("sdxl", full=True).unet.config
    down = {path: factor for path, factor in found.items() if path.startswith("down_blocks")}
    assert len(set(down.values())) > 3
    assert down == {path: block_index(path, config) / 10 for path in down}
    assert found["mid_block.resnets.0.conv1"] == 1 and found["mid_block.attentions.0.proj_in"] == 2


def test_a_dropout_of_0_is_one_that_drops_nothing() -> None:
    assert network_of(rank_dropout="0", module_dropout="0").loras[0].dropouts.rank == 0


@pytest.mark.parametrize(("curve", "first"), [("sine", 0.0), ("cosine", 1.0), ("linear+0.25", 0.25), ("reverse_linear", 1.0)])
def test_curves_go_from_the_shallow_blocks_to_the_deep_ones(curve: str, first: float) -> None:
    values = {"sine": lambda share: math.sin(math.pi * share / 2), "linear+0.25": lambda share: share + 0.25}
    values |= {"cosine": lambda share: math.cos(math.pi * share / 2), "reverse_linear": lambda share: 1 - share}
    assert values[curve](0) == pytest.approx(first)
    weights = {lora.path: lora.lr_factors for lora in network_of(down_lr_weight=curve).loras}
    assert weights["down_blocks.1.attentions.0.proj_in"] == pytest.approx([values[curve](4 / 11)] * 2)
    assert weights["mid_block.attentions.0.proj_in"] == (1, 1)


def test_patterns_choose_modules_by_their_whole_path() -> None:
    everything = {lora.path for lora in network_of().loras}
    network = network_of(exclude_patterns="['.*attn2.*', 'mid_block']", include_patterns="['up_blocks.*to_k']")
    expected = {path for path in everything if "attn2" not in path or (path.startswith("up_blocks") and path.endswith("to_k"))}
    assert {lora.path for lora in network.loras} == expected < everything
    assert {lora.path for lora in network_of(exclude_patterns=".*attn1.*").loras} == {path for path in everything if "attn1" not in path}


def test_patterns_of_names_give_ranks_and_learning_rates() -> None:
    """The first that is found in a name counts; LoRA+ multiplies, block weights do not; a model that is frozen stays so."""
    options = {
        "network_reg_dims": "attn1_to_q=2,attn1=3",
        "network_reg_lrs": "attn1_to_k=1e-5",
        "loraplus_lr_ratio": "4",
        "mid_lr_weight": "0.5",
    }
    network = network_of(text=True, **options)
    for lora in network.unet_loras:
        assert (lora.rank, lora.alpha.item()) == (2 if "attn1_to_q" in lora.name else 3 if "attn1" in lora.name else 4, 2.0)
    groups, names = network.prepare_optimizer_params(0.0, None, 1e-4)
    rates = {parameter: group["lr"] for group in groups for parameter in group["params"]}
    lora = next(lora for lora in network.loras if lora.name == "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_k")
    assert [rates[parameter] for parameter in lora.parameters()] == pytest.approx([1e-5, 4e-5])
    assert "unet at 1e-05" in names and "unet at 1e-05 x4" in names and not any(name.startswith("textencoder") for name in names)
