"""LoRA files of other programs: the same weights in every style of naming, what is refused, and what is said of the rest."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from library.errors import UserError
from networks.lora import LoRANetwork, create_network, create_network_from_weights
from networks.lora_files import parse_lora, read_lora
from tests.helpers.tiny_models import tiny_model

QUERY = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
Tensors = dict[str, Tensor]


def network_of(model, *, alpha: float = 4.0, text: bool = True, **options: Any) -> LoRANetwork:
    """Rank 4, all weights random."""
    generator = torch.Generator().manual_seed(0)
    network = create_network(1.0, 4, alpha, None, model.text_encoders if text else None, model.unet, generator=generator, **options)
    for lora in network.loras:
        torch.nn.init.normal_(lora.lora_up.weight, std=0.2, generator=generator)
    return network


def dotted(network: LoRANetwork, pattern: str, *, down: str, up: str, text: bool = True) -> Tensors:
    """The network's weights, without alphas, with keys such as "unet.PATH.lora_A.weight"."""
    return {
        pattern.format(part=lora.part, path=lora.path, factor=factor): weight.detach()
        for lora in network.loras
        for factor, weight in ((down, lora.lora_down.weight), (up, lora.lora_up.weight))
        if text or lora.part == "unet"
    }


def peft(network: LoRANetwork) -> Tensors:
    return dotted(network, "{part}.{path}.{factor}.weight", down="lora_A", up="lora_B")


def renamed(network: LoRANetwork, alias: int) -> Tensors:
    names = {lora.name: lora.aliases[alias] for lora in network.loras}
    return {f"{names[key.partition('.')[0]]}.{key.partition('.')[2]}": value for key, value in network.state_dict().items()}


STYLES: dict[str, Callable[[LoRANetwork], Tensors]] = {
    "kohya": lambda network: dict(network.state_dict()),
    "PEFT": peft,
    "PEFT, an adapter": lambda network: dotted(network, "{part}.{path}.{factor}.default.weight", down="lora_A", up="lora_B"),
    "PEFT's own": lambda network: dotted(network, "base_model.model.{path}.{factor}.weight", down="lora_A", up="lora_B", text=False),
    "Diffusers": lambda network: dotted(network, "{part}.{path}.lora.{factor}.weight", down="down", up="up"),
    "Diffusers' paths": lambda network: renamed(network, 0),
    "original paths": lambda network: renamed(network, 1),
}


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("ending", [".safetensors", ".pt"])
def test_every_style_gives_the_same_network(style: str, ending: str, tmp_path: Path) -> None:
    """Linear layers, convolutions and text encoders; alpha is the rank, as files without alphas mean it."""
    model = tiny_model()
    network = network_of(model, conv_dim="4", conv_alpha="4")
    path = tmp_path / f"a{ending}"
    save = save_file if ending == ".safetensors" else torch.save
    save(STYLES[style](network), path)  # type: ignore[operator]
    read, weights = create_network_from_weights(1.0, path, None, model.text_encoders, model.unet)
    expected = {key: value for key, value in network.state_dict().items() if style != "PEFT's own" or key.startswith("lora_unet_")}
    assert read.state_dict().keys() == weights.keys() == expected.keys()
    assert all(torch.equal(value, expected[key]) for key, value in read.state_dict().items())


def test_attention_processors_of_old_diffusers() -> None:
    path = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.processor"
    file = parse_lora({f"{path}.to_out_lora.{part}.weight": torch.ones(2, 2) for part in ("down", "up")})
    assert list(file.branches) == [QUERY.replace("to_q", "to_out_0")]


def test_a_file_continued_from_is_the_file_merged_by_hand(tmp_path: Path) -> None:
    """load_weights of PEFT's style gives the U-Net output of W + alpha / rank * up @ down: float32 sums in another order."""
    model, merged = tiny_model(), tiny_model()
    start = network_of(model, alpha=1.0, text=False)
    metadata = {"lora_adapter_metadata": json.dumps({"unet.lora_alpha": 1.0, "unet.r": 4})}
    save_file(peft(start), tmp_path / "a.safetensors", metadata)
    network = create_network(1.0, 4, 8.0, None, None, model.unet)
    network.load_weights(tmp_path / "a.safetensors")
    network.apply_to(None, model.unet, apply_text_encoder=False)
    with torch.no_grad():
        for lora in start.loras:
            base = merged.unet.get_submodule(lora.path).weight
            assert isinstance(base, Tensor)
            base += (lora.lora_up.weight.flatten(1) @ lora.lora_down.weight.flatten(1)).reshape(base.shape) * 1.0 / 4
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    plain, ours, theirs = (
        whole.predict_eps(latents, torch.tensor([100, 700]), whole.encode_prompts(["a", "b"])) for whole in (tiny_model(), model, merged)
    )
    assert (theirs - plain).abs().max() > 0.05
    torch.testing.assert_close(ours, theirs, atol=5e-4, rtol=0)


def test_peft_settings_give_alpha() -> None:
    tensors = {f"unet.mid.{name}.lora_{factor}.weight": torch.ones(4, 4) for name in ("to_q", "to_k") for factor in "AB"}

    def alphas(**settings: object) -> list[float]:
        file = parse_lora(tensors, "a", {f"unet.{key}": value for key, value in settings.items()})
        return [branch.alpha for branch in file.branches.values()]

    assert alphas() == [4, 4]
    assert alphas(lora_alpha=2, alpha_pattern={"to_k": 8}) == [2, 8]
    assert alphas(lora_alpha=2, alpha_pattern={r"^mid\.to_k$": 8, r"mid_\d+.to_q": 4}) == [2, 8]
    assert alphas(lora_alpha=2, use_rslora=True) == [4, 4]  # alpha / sqrt(rank)
    with pytest.raises(UserError, match="DoRA"):
        alphas(lora_alpha=2, use_dora=True)
    for bad in (
        {"lora_alpha": "x"},
        {"lora_alpha": None},
        {"alpha_pattern": [1]},
        {"lora_alpha": 2, "alpha_pattern": {"(": 1}},
        {"alpha_pattern": {"([a-z_.]+)+X": 1}},
    ):
        with pytest.raises(UserError, match="give no alpha"):
            alphas(**bad)


def test_adapter_config_beside_pefts_own_file(tmp_path: Path) -> None:
    tensors = {f"base_model.model.mid.to_q.lora_{factor}.weight": torch.ones(4, 4) for factor in "AB"}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text('{"lora_alpha": 2}')
    assert read_lora(tmp_path / "adapter_model.safetensors").branches["lora_unet_mid_to_q"].alpha == 2


@pytest.mark.parametrize("key", ["dora_scale", "lora_magnitude_vector.weight"])
def test_a_doras_lengths_may_be_a_vector_and_not_a_number(key: str, tmp_path: Path) -> None:
    factors = {f"{QUERY}.lora_down.weight": torch.ones(2, 4), f"{QUERY}.lora_up.weight": torch.ones(4, 2)}
    for lengths in (torch.ones(4), torch.ones(4, 1), torch.ones(1, 4)):
        save_file({**factors, f"{QUERY}.{key}": lengths}, tmp_path / "a.safetensors")
        assert list(read_lora(tmp_path / "a.safetensors", fixed=True).branches)
    save_file({**factors, f"{QUERY}.{key}": torch.tensor(1.0)}, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match="has shape \\(\\) and type torch.float32"):
        read_lora(tmp_path / "a.safetensors", fixed=True)


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("dora_scale", "DoRA"),
        ("lora_magnitude_vector.weight", "DoRA"),
        ("hada_w1_a", "LoHa"),
        ("lokr_w1", "LoKr"),
        ("lora_mid.weight", "CP"),
        ("oft_blocks", "OFT"),
        ("diff", "full difference"),
        ("lora_B.bias", "beside down and up"),
        ("strange", "no tensor of a LoRA"),
    ],
)
@pytest.mark.parametrize("dim_from_weights", [False, True])
def test_another_function_is_refused_by_its_name(key: str, name: str, dim_from_weights: bool, tmp_path: Path) -> None:
    model = tiny_model()
    network = network_of(model, text=False)
    save_file({**network.state_dict(), f"{QUERY}.{key}": torch.ones(4, 4)}, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=name) as caught:
        if dim_from_weights:
            create_network_from_weights(1.0, tmp_path / "a.safetensors", None, None, model.unet)
        else:
            network.load_weights(tmp_path / "a.safetensors")
    assert f"{QUERY}.{key}" in str(caught.value)


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        ({"alpha": torch.ones(2)}, "one number"),
        ({"alpha": torch.tensor(float("nan"))}, "not finite"),
        ({"lora_down.weight": torch.tensor(1.0)}, "must be a matrix"),
        ({"lora_down.weight": torch.ones(4, 64, dtype=torch.int64)}, "must be a matrix"),
        ({"lora_down.weight": torch.full((4, 64), float("inf"))}, "not finite"),
        ({"lora_down.weight": torch.ones(3, 64)}, "do not fit"),
        ({"lora_down.weight": torch.ones(0, 64), "lora_up.weight": torch.ones(64, 0)}, "do not fit"),
        ({"lora_down.weight": torch.ones(4, 65)}, "another family"),
        ({"lora.down.weight": torch.ones(4, 64)}, "twice"),
    ],
)
def test_malformed_files_are_one_sentence(tensors: Tensors, says: str, tmp_path: Path) -> None:
    model = tiny_model()
    network = network_of(model, text=False)
    weights = {key: value for key, value in network.state_dict().items() if not key.startswith(QUERY)}
    good = {"lora_down.weight": torch.ones(4, 64), "lora_up.weight": torch.ones(64, 4), "alpha": torch.tensor(1.0)}
    save_file({**weights, **{f"{QUERY}.{key}": value for key, value in (good | tensors).items()}}, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=says) as caught:
        network.load_weights(tmp_path / "a.safetensors")
    assert "\n" not in str(caught.value) and "a.safetensors" in str(caught.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    save_file({f"{QUERY}.alpha": torch.ones(1)}, tmp_path / "a.safetensors")
    torch.save({f"{QUERY}.alpha": torch.ones(1)}, tmp_path / "a.pt")
    for name in ("a.safetensors", "a.pt"):
        content = (tmp_path / name).read_bytes()
        (tmp_path / f"short_{name}").write_bytes(content[: len(content) // 2])
        (tmp_path / f"text_{name}").write_text("hello")
        for kind in ("short", "text", "missing"):
            with pytest.raises(UserError, match="could not be read as a LoRA"):
                read_lora(tmp_path / f"{kind}_{name}")
    torch.save(Path("code"), tmp_path / "object.pt")  # weights only: no class of a pickle is made
    with pytest.raises(UserError, match="could not be read as a LoRA"):
        read_lora(tmp_path / "object.pt")


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


def test_the_rest_is_counted_in_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A file with text encoders, convolutions, a stranger and a half, without two of the network's modules."""
    model = tiny_model()
    whole = network_of(model, conv_dim="4")
    own = [lora.name for lora in create_network(1.0, 4, 1.0, None, None, model.unet).loras]
    weights = {key: value for key, value in whole.state_dict().items() if key.partition(".")[0] not in own[:2]}
    del weights[f"{own[2]}.lora_up.weight"]
    weights |= {f"lora_unet_x.{name}": torch.ones(2, 2) for name in ("lora_down.weight", "lora_up.weight")}
    save_file(weights, tmp_path / "a.safetensors")
    network = create_network(1.0, 4, 1.0, None, None, model.unet)
    info = network.load_weights(tmp_path / "a.safetensors")
    assert {key.partition(".")[0] for key in info.missing_keys} == set(own[:3])
    in_conv_blocks = len(whole.unet_loras) - len(own)  # 3x3, 1x1 and linear
    [text] = warnings(caplog)
    for part in (
        f"{len(own) - 3} modules are taken",
        f"1 modules that are incomplete in the file ({own[2]}",
        f"{len(whole.text_encoder_loras)} modules of text encoders",
        f"{in_conv_blocks} modules of convolutional blocks, which dim_from_weights would take",
        "1 modules that this network does not have (lora_unet_x, ...)",
        f"3 modules of this network are not in the file and begin at zero ({own[0]}",
    ):
        assert part in text


def test_dim_from_weights_takes_convolutions_and_names_text_encoders(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_model()
    whole = network_of(model, conv_dim="3", conv_alpha="2")
    whole.save_weights(tmp_path / "a.safetensors")
    options: dict[str, Any] = {"rank_dropout": "0.5", "loraplus_lr_ratio": "4"}
    network, _ = create_network_from_weights(1.0, tmp_path / "a.safetensors", None, None, model.unet, None, False, 0.25, **options)
    assert [lora.name for lora in network.loras] == [lora.name for lora in whole.unet_loras]
    assert {(lora.dropouts.neuron, lora.dropouts.rank, lora.lr_factors) for lora in network.loras} == {(0.25, 0.5, (1, 4))}
    [text] = warnings(caplog)
    assert f"{len(whole.text_encoder_loras)} modules of text encoders, which are not trained" in text and "begin at zero" not in text


def test_a_whole_file_is_taken_without_a_word(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    network = network_of(tiny_model())
    network.save_weights(tmp_path / "a.safetensors")
    network.load_weights(tmp_path / "a.safetensors")
    assert warnings(caplog) == []


def test_the_same_module_in_two_styles_is_refused() -> None:
    model = tiny_model("sdxl")
    network = network_of(model, text=False)
    with pytest.raises(UserError, match="two styles of naming"):
        parse_lora(renamed(network, 0) | dict(network.state_dict())).place(network.loras)
