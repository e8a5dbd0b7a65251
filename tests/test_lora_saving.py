"""The LoRA network's own files: saved, reloaded, merged, and refused where they do not fit."""

from pathlib import Path

import pytest
import safetensors
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from library.errors import UserError
from networks.lora import create_network, create_network_from_weights
from networks.lora_keys import unet_aliases
from tests.helpers.tiny_models import tiny_model
from tests.helpers.tiny_networks import full_lora, unet_call


@pytest.mark.parametrize(
    ("family", "options"), [("sd1", {}), ("sd2", {"conv_dim": "2", "conv_alpha": "3"}), ("sdxl", {"conv_dim": "2", "conv_alpha": "3"})]
)
def test_saved_reloaded_and_merged_it_is_the_applied_network(family: str, options: dict[str, str], tmp_path: Path) -> None:
    """The LoRA changes the output by 0.1 and more. Reloaded it gives the same to 1e-4: a network without gradients may run other Linear
    kernels (oneDNN; up to 4e-5 was seen). Merged, to 5e-4: float32 sums in another order."""
    model = tiny_model(family)
    call = unet_call(model)
    plain = call()
    network = full_lora(model, 0.8, text_encoder=True, **options)
    applied = call()
    tokens = torch.arange(7)[None]
    applied_text = model.text_encoders[-1](tokens).last_hidden_state
    network.save_weights(tmp_path / "a.safetensors")
    network.remove()

    loaded, weights = create_network_from_weights(
        0.8, tmp_path / "a.safetensors", None, model.text_encoders, model.unet, for_inference=True
    )
    saved = network.state_dict()
    assert loaded.state_dict().keys() == saved.keys()
    assert all(torch.equal(value, saved[key]) for key, value in loaded.state_dict().items())
    assert loaded.get_trainable_params() == []
    loaded.apply_to(model.text_encoders, model.unet)
    torch.testing.assert_close(call(), applied, atol=1e-4, rtol=0)
    loaded.remove()

    merging, _ = create_network_from_weights(0.8, None, None, model.text_encoders, model.unet, weights_sd=weights)
    assert merging.is_mergeable()
    merging.merge_to(model.text_encoders, model.unet, weights, torch.float32, "cpu")
    torch.testing.assert_close(call(), applied, atol=5e-4, rtol=0)
    torch.testing.assert_close(model.text_encoders[-1](tokens).last_hidden_state, applied_text, atol=5e-4, rtol=0)
    assert (applied - plain).abs().max() > 0.1


def test_load_weights_restores_a_running_network(tmp_path: Path) -> None:
    model = tiny_model()
    call = unet_call(model)
    network = full_lora(model)
    saved = call()
    network.save_weights(tmp_path / "a.safetensors", torch.float32, {"ss_output_name": "a"})
    for lora in network.loras:
        nn.init.zeros_(lora.lora_up.weight)
        lora.alpha.fill_(17.0)  # the scale follows the file's alpha
    info = network.load_weights(tmp_path / "a.safetensors")
    assert (info.missing_keys, info.unexpected_keys) == ([], [])
    assert torch.equal(call(), saved)
    with safetensors.safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert file.metadata().keys() == {"ss_output_name", "sshs_model_hash", "sshs_legacy_hash"}


def test_file_has_three_tensors_per_module_in_one_dtype(tmp_path: Path) -> None:
    network = full_lora(tiny_model("sdxl"), text_encoder=True, conv_dim="2")
    network.save_weights(tmp_path / "a.safetensors", torch.float16, None)
    file = load_file(tmp_path / "a.safetensors")
    assert {key.partition(".")[2] for key in file} == {"lora_down.weight", "lora_up.weight", "alpha"}
    assert len(file) == 3 * len(network.loras)
    assert {value.dtype for value in file.values()} == {torch.float16}
    assert {value.shape for key, value in file.items() if key.endswith("alpha")} == {torch.Size([])}
    with pytest.raises(UserError, match="written as .safetensors"):
        network.save_weights(tmp_path / "a.ckpt", None, None)


@pytest.mark.parametrize("factor", [0.7, -2.0])
def test_scale_alpha_folds_the_multiplier(factor: float, tmp_path: Path) -> None:
    """Exact for powers of two; otherwise alpha is rounded once more than the multiplier was."""
    model = tiny_model()
    call = unet_call(model)
    network = full_lora(model, factor)
    expected = call()
    network.scale_alpha(factor)
    network.set_multiplier(1.0)
    torch.testing.assert_close(call(), expected, atol=0 if factor != 0.7 else 1e-5, rtol=0)
    network.save_weights(tmp_path / "a.safetensors")
    assert {value.item() for key, value in load_file(tmp_path / "a.safetensors").items() if key.endswith("alpha")} == {
        torch.tensor(2.0 * factor).item()
    }


def test_sdxl_files_in_diffusers_style_are_read(tmp_path: Path) -> None:
    model = tiny_model("sdxl")
    network = full_lora(model, apply=False, conv_dim="2")
    names = {lora.name: unet_aliases(lora.path, model.unet.config)[0] for lora in network.loras}
    assert all(old != new for old, new in names.items())
    weights = {f"{names[key.partition('.')[0]]}.{key.partition('.')[2]}": value for key, value in network.state_dict().items()}
    save_file(weights, tmp_path / "a.safetensors")
    loaded, renamed = create_network_from_weights(1.0, tmp_path / "a.safetensors", None, None, model.unet)
    assert renamed.keys() == network.state_dict().keys()
    other = full_lora(tiny_model("sdxl"), apply=False, conv_dim="2")
    for lora in other.loras:
        nn.init.zeros_(lora.lora_up.weight)
    info = other.load_weights(tmp_path / "a.safetensors")
    assert (info.missing_keys, info.unexpected_keys) == ([], [])
    made, read = loaded.state_dict(), other.state_dict()
    for key, value in network.state_dict().items():
        assert torch.equal(made[key], value)
        assert torch.equal(read[key], value)


def test_ranks_shapes_and_missing_alphas_come_from_the_file(tmp_path: Path) -> None:
    """SD2's projections stored as 1x1 convolutions, ranks that differ, no alpha: alpha / rank is 1, as every client reads it."""
    model = tiny_model("sd2")
    name = "lora_unet_mid_block_attentions_0_proj_in"
    width = model.unet.config["block_out_channels"][-1]
    down, up = torch.randn(3, width, 1, 1), torch.randn(width, 3, 1, 1)
    query = f"{name.removesuffix('proj_in')}transformer_blocks_0_attn1_to_q"
    weights = {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{query}.alpha": torch.tensor(1.0)}
    weights |= {f"{query}.lora_down.weight": torch.randn(2, width), f"{query}.lora_up.weight": torch.randn(width, 2)}
    network, _ = create_network_from_weights(1.0, None, None, None, model.unet, weights_sd=weights)
    loras = {lora.name: lora for lora in network.loras}
    assert {key: (lora.rank, lora.alpha.item()) for key, lora in loras.items()} == {name: (3, 3.0), query: (2, 1.0)}
    torch.testing.assert_close(loras[name].delta(), up.flatten(1) @ down.flatten(1))
    torch.testing.assert_close(loras[query].delta(), weights[f"{query}.lora_up.weight"] @ weights[f"{query}.lora_down.weight"] / 2)


def test_text_encoder_keys_are_passed_over_without_a_text_encoder(tmp_path: Path) -> None:
    model = tiny_model()
    full_lora(model, text_encoder=True, apply=False).save_weights(tmp_path / "a.safetensors")
    network, weights = create_network_from_weights(1.0, tmp_path / "a.safetensors", None, None, model.unet)
    assert network.text_encoder_loras == []
    assert all(key.startswith("lora_unet_") for key in weights)


def test_wrong_files_are_user_errors(tmp_path: Path) -> None:
    model, other = tiny_model("sd1"), tiny_model("sdxl")
    network = full_lora(model, apply=False)
    full_lora(other, apply=False).save_weights(tmp_path / "sdxl.safetensors")
    with pytest.raises(UserError, match="another family"):
        network.load_weights(tmp_path / "sdxl.safetensors")
    with pytest.raises(UserError, match="another family"):
        create_network_from_weights(1.0, tmp_path / "sdxl.safetensors", None, None, model.unet)
    create_network(1.0, 8, 1.0, None, None, model.unet).save_weights(tmp_path / "rank8.safetensors")
    with pytest.raises(UserError, match="has rank 8 where this network has 4; set dim_from_weights"):
        network.load_weights(tmp_path / "rank8.safetensors")
    weights = network.state_dict()
    weights["lora_unet_mid_block_attentions_0_proj_in.dora_scale"] = torch.ones(1)
    with pytest.raises(UserError, match="weights_sd is DoRA"):
        create_network_from_weights(1.0, None, None, None, model.unet, weights_sd=weights)
    (tmp_path / "text.safetensors").write_text("not a LoRA")
    for bad in ("text.safetensors", "missing.safetensors"):
        with pytest.raises(UserError, match="could not be read"):
            network.load_weights(tmp_path / bad)
    with pytest.raises(UserError, match="ranks come from the file"):
        create_network_from_weights(1.0, tmp_path / "rank8.safetensors", None, None, model.unet, conv_dim="4")


def test_merging_an_applied_network_is_our_bug() -> None:
    model = tiny_model()
    network = full_lora(model)
    with pytest.raises(AssertionError, match="count twice"):
        network.merge_to(None, model.unet)
