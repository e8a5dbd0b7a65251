"""The LoRA network on tiny real U-Nets: strength per sample, gradients under checkpointing, precision, files, merging."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from library.errors import UserError
from library.models.base import DiffusionModel
from networks.lora import LoRANetwork, create_network, create_network_from_weights
from networks.lora_keys import unet_aliases
from tests.helpers.tiny_models import FAMILY_NAMES, tiny_model


def _call(model: DiffusionModel, rows: int = 4) -> Callable[[], Tensor]:
    """The same U-Net call every time: `rows` samples, each its own."""
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(rows, 4, 8, 8, generator=generator)
    text = torch.randn(rows, 7, model.unet.config["cross_attention_dim"], generator=generator)
    added = {}
    if model.spec.family == "sdxl":
        added = {"text_embeds": torch.randn(rows, 64, generator=generator), "time_ids": torch.full((rows, 6), 64.0)}
    timesteps = torch.linspace(100, 900, rows).long()

    def call() -> Tensor:
        dtype = model.unet.dtype
        extra = {key: value.to(dtype) for key, value in added.items()}
        return model.unet(latents.to(dtype), timesteps, text.to(dtype), added_cond_kwargs=extra).sample

    return call


def _network(
    model: DiffusionModel, multiplier: float | Tensor = 1.0, text_encoder: bool = False, apply: bool = True, **options: Any
) -> LoRANetwork:
    """A network that is no longer neutral: both of its matrices are random, the same at every call."""
    text_encoders = model.text_encoders if text_encoder else None
    generator = torch.Generator().manual_seed(1)
    network = create_network(multiplier, 4, 2.0, None, text_encoders, model.unet, generator=generator, **options)
    for lora in network.loras:
        nn.init.normal_(lora.lora_up.weight, std=0.2, generator=generator)
    if apply:
        network.apply_to(text_encoders, model.unet, apply_text_encoder=text_encoder)
    return network


def _same_rows(first: Tensor, second: Tensor) -> list[bool]:
    return [torch.equal(a, b) for a, b in zip(first, second, strict=True)]


# --- Strength ---


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_new_network_changes_nothing_and_zero_is_the_plain_model(family: str) -> None:
    model = tiny_model(family)
    call = _call(model)
    plain = call()
    network = create_network(1.0, 4, 1.0, None, None, model.unet)
    network.apply_to(None, model.unet)
    assert torch.equal(call(), plain)
    for lora in network.loras:
        nn.init.normal_(lora.lora_up.weight, std=0.2)
    assert not any(_same_rows(call(), plain))
    network.set_multiplier(0.0)
    assert torch.equal(call(), plain)
    network.set_multiplier(torch.tensor([0.0, 1.0, 0.0, -1.0]))
    assert _same_rows(call(), plain) == [True, False, True, False]


def test_off_branches_are_not_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    network = _network(model)
    call = _call(model)
    for lora in network.loras:
        monkeypatch.setattr(lora.lora_down, "forward", lambda x: pytest.fail("a branch was computed"))
    network.set_multiplier(0.0)
    call()
    network.set_multiplier(1.0)
    with network.disabled():
        call()


def test_disabled_nests_and_ends_with_an_error() -> None:
    model = tiny_model()
    call = _call(model)
    plain = call()
    network = _network(model)
    on = call()
    with pytest.raises(ZeroDivisionError), network.disabled():
        with network.disabled():
            pass
        assert torch.equal(call(), plain)
        network.set_multiplier(1.0)  # does not switch it on
        assert torch.equal(call(), plain)
        raise ZeroDivisionError
    assert torch.equal(call(), on)


@pytest.mark.parametrize("options", [{}, {"conv_dim": "2"}])
def test_each_sample_has_its_own_multiplier_in_both_halves(options: dict[str, str]) -> None:
    """Rows of a mixed batch equal a batch at that one multiplier, to float32 rounding; rows are uncond, uncond, cond, cond."""
    model = tiny_model()
    call = _call(model)
    network = _network(model, **options)
    single = {}
    for multiplier in (0.7, -1.3):
        network.set_multiplier(multiplier)
        single[multiplier] = call()
    network.set_multiplier(torch.tensor([0.7, -1.3]))
    mixed = call()
    for row, multiplier in enumerate([0.7, -1.3, 0.7, -1.3]):
        torch.testing.assert_close(mixed[row], single[multiplier][row], atol=1e-5, rtol=0)
    assert (single[0.7] - single[-1.3]).abs().amax((1, 2, 3)).min() > 1e-3


def test_rows_that_do_not_fit_the_multipliers_are_our_bug() -> None:
    model = tiny_model()
    _network(model, torch.ones(3))
    with pytest.raises(AssertionError, match="4 rows for 3 multipliers"):
        _call(model)()


def test_multiplier_is_a_copy() -> None:
    model = tiny_model()
    call = _call(model)
    multipliers = torch.ones(4)
    _network(model, multipliers)
    before = call()
    multipliers.zero_()
    assert torch.equal(call(), before)


# --- Gradients ---


def _gradients(network: LoRANetwork, loss: Callable[[], Tensor], around_backward: Callable[[Tensor], None] | None = None) -> Tensor:
    network.zero_grad()
    value = loss()
    if around_backward is None:
        value.backward()
    else:
        around_backward(value)
    return torch.cat([parameter.grad.flatten() for parameter in network.parameters() if parameter.grad is not None])


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_checkpointing_gives_the_same_gradient_whatever_happens_before_backward(family: str) -> None:
    model = tiny_model(family)
    call = _call(model)
    multipliers = torch.tensor([1.0, -0.5])
    network = _network(model, multipliers, conv_dim="2")

    def loss() -> Tensor:
        # The graph has calls at three strengths: mixed, one, and off.
        network.set_multiplier(multipliers)
        mixed = call()
        network.set_multiplier(0.3)
        return (mixed + call()).square().mean()

    def strength_changes(value: Tensor) -> None:
        network.set_multiplier(2.0)
        with network.disabled():
            value.backward()

    expected = _gradients(network, loss)
    model.unet.train()
    model.unet.enable_gradient_checkpointing()
    network.enable_gradient_checkpointing()
    torch.testing.assert_close(_gradients(network, loss), expected, atol=0, rtol=0)
    torch.testing.assert_close(_gradients(network, loss, strength_changes), expected, atol=0, rtol=0)
    assert network.multiplier == 2.0
    assert expected.abs().max() > 1e-4


def test_dropout_is_the_same_when_recomputed() -> None:
    model = tiny_model()
    call = _call(model)
    network = _network(model, neuron_dropout=0.2, rank_dropout="0.3", module_dropout="0.2")

    def loss() -> Tensor:
        torch.manual_seed(5)
        return call().square().mean()

    model.unet.train()
    expected = _gradients(network, loss)
    model.unet.enable_gradient_checkpointing()
    network.enable_gradient_checkpointing()
    torch.testing.assert_close(_gradients(network, loss), expected, atol=0, rtol=0)


def test_uncaptured_recomputation_is_refused() -> None:
    model = tiny_model()
    _network(model)
    model.unet.train()
    model.unet.enable_gradient_checkpointing()
    loss = _call(model)().square().mean()
    with pytest.raises(AssertionError, match="enable_gradient_checkpointing"):
        loss.backward()


def test_own_checkpoint_keeps_multiplier_and_inner_switches() -> None:
    model = tiny_model()
    call = _call(model)
    network = _network(model, torch.tensor([1.0, -1.0]))

    def drift() -> Tensor:
        with network.disabled():
            frozen = call()
        return (call() - frozen).square().mean()

    def later(value: Tensor) -> None:
        network.set_multiplier(0.0)
        value.backward()
        network.set_multiplier(torch.tensor([1.0, -1.0]))

    expected = _gradients(network, drift)
    torch.testing.assert_close(_gradients(network, lambda: network.checkpoint(drift), later), expected, atol=0, rtol=0)
    assert expected.abs().max() > 1e-4


def test_text_encoder_checkpointing_gives_the_same_gradient() -> None:
    model = tiny_model()
    network = _network(model, 0.5, text_encoder=True)
    text_encoder = model.text_encoders[0].train()
    tokens = torch.arange(14).reshape(2, 7)

    def loss() -> Tensor:
        network.set_multiplier(0.5)
        return text_encoder(tokens).last_hidden_state.square().mean()

    def strength_changes(value: Tensor) -> None:
        network.set_multiplier(0.0)
        value.backward()

    expected = _gradients(network, loss)
    text_encoder.gradient_checkpointing_enable({"use_reentrant": False})
    network.enable_gradient_checkpointing()
    torch.testing.assert_close(_gradients(network, loss, strength_changes), expected, atol=0, rtol=0)
    assert expected.abs().max() > 0


# --- Precision ---


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_base_keeps_float32_lora(dtype: torch.dtype, autocast: bool) -> None:
    model = tiny_model()
    reference_network = _network(model, torch.tensor([1.0, -1.0]), conv_dim="2")
    reference = _call(model)()
    reference_network.remove()
    model.unet.to(dtype)
    network = _network(model, torch.tensor([1.0, -1.0]), conv_dim="2")
    assert {parameter.dtype for parameter in network.parameters()} == {torch.float32}
    with torch.autocast("cpu", dtype, enabled=autocast):
        output = _call(model)()
    assert output.dtype == dtype
    output.float().square().mean().backward()
    assert all(lora.lora_up.weight.grad is not None and lora.lora_up.weight.grad.dtype == torch.float32 for lora in network.loras)
    # Half precision differs by rounding; a branch that is missing or doubled differs by more (see below).
    with network.disabled():
        plain = _call(model)().float()
    error = (output.float() - reference).abs().mean()
    assert error < 0.15 * (plain - reference).abs().mean()


# --- Attaching ---


def test_remove_restores_the_model() -> None:
    model = tiny_model()
    call = _call(model)
    plain = call()
    network = _network(model, text_encoder=True)
    model.unet.enable_gradient_checkpointing()
    function = model.unet.mid_block._gradient_checkpointing_func  # type: ignore[union-attr]
    network.enable_gradient_checkpointing()
    network.remove()
    assert torch.equal(call(), plain)
    for part in (model.unet, *model.text_encoders):
        assert not any("forward" in module.__dict__ for module in part.modules())
    assert model.unet.mid_block._gradient_checkpointing_func is function  # type: ignore[union-attr]


def test_unapplied_parts_are_dropped() -> None:
    model = tiny_model("sdxl")
    network = create_network(1.0, 4, 1.0, None, model.text_encoders, model.unet)
    assert {lora.part for lora in network.text_encoder_loras} == {"text_encoder", "text_encoder_2"}
    network.apply_to(model.text_encoders, model.unet, apply_text_encoder=False, apply_unet=True)
    assert network.text_encoder_loras == []
    assert all(key.startswith("lora_unet_") for key in network.state_dict())
    assert not any("forward" in module.__dict__ for module in model.text_encoders[0].modules())


def test_text_encoder_branches_work() -> None:
    model = tiny_model("sdxl")
    tokens = torch.arange(7)[None]
    plain = [text_encoder(tokens).last_hidden_state for text_encoder in model.text_encoders]
    network = _network(model, text_encoder=True)
    changed = [text_encoder(tokens).last_hidden_state for text_encoder in model.text_encoders]
    assert not any(torch.equal(before, after) for before, after in zip(plain, changed, strict=True))
    network.set_multiplier(0.0)
    assert all(
        torch.equal(before, text_encoder(tokens).last_hidden_state) for before, text_encoder in zip(plain, model.text_encoders, strict=True)
    )


def test_ranks_alphas_and_initial_values() -> None:
    model = tiny_model()

    def create(text_encoders: list | None) -> LoRANetwork:
        generator = torch.Generator().manual_seed(3)
        return create_network(1.0, 4, 2.0, None, text_encoders, model.unet, generator=generator, conv_dim="3", conv_alpha="1.5")

    network = create(None)
    torch.manual_seed(99)  # neither the global generator nor the text encoders have a say
    again = {lora.name: lora for lora in create(model.text_encoders).unet_loras}
    for lora in network.unet_loras:
        is_large = lora.lora_down.weight.ndim == 4 and lora.lora_down.weight.shape[-1] == 3
        assert (lora.rank, lora.alpha.item()) == ((3, 1.5) if is_large else (4, 2.0))
        assert lora.alpha.shape == ()
        assert not lora.lora_up.weight.any()
        assert torch.equal(lora.lora_down.weight, again[lora.name].lora_down.weight)
        fan_in = lora.lora_down.weight[0].numel()
        assert fan_in**-0.5 * 0.5 < lora.lora_down.weight.abs().max() <= fan_in**-0.5  # uniform in +-1/sqrt(fan_in): a = sqrt(5)
    assert create_network(1.0, 4, 0, None, None, model.unet).loras[0].alpha == 4
    default = create_network(1.0, None, None, None, None, model.unet).loras[0]
    assert (default.rank, default.alpha.item()) == (4, 1.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"conv_dimm": "4"}, "conv_dimm is not an option of networks.lora; did you mean conv_dim?"),
        ({"block_dims": "4,4"}, "block_dims has 2 values; this model takes 25"),
        ({"down_lr_weight": "steep"}, "down_lr_weight=steep is not a number"),
        ({"network_reg_dims": "[=4"}, "unterminated character set"),
        ({"network_reg_lrs": "attn1"}, "write pattern=number, for example network_reg_lrs=attn1=8,ff_net=4"),
        ({"algo": "loha"}, "algo is not an option of networks.lora; it is LyCORIS'"),
        ({"exclude_patterns": "['(']"}, "is no list of regular expressions"),
        ({"exclude_patterns": ".*"}, "leave no module to train"),
        ({"conv_dim": "four"}, "conv_dim=four is not a number"),
        ({"conv_dim": "1.5"}, "conv_dim is 1.5"),
        ({"conv_alpha": "1"}, "conv_alpha is given without conv_dim"),
        ({"rank_dropout": "1"}, "rank_dropout is 1.0"),
        ({"dropout": "-0.1"}, "neuron_dropout is -0.1"),
    ],
)
def test_bad_network_args_are_user_errors(options: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message.replace("?", r"\?")):
        create_network(1.0, 4, 1.0, None, None, tiny_model(full=True).unet, **options)  # type: ignore[arg-type]


def test_dropouts_act_in_training_only_and_keep_the_mean() -> None:
    model = tiny_model()
    call = _call(model)
    for options in ({"neuron_dropout": 0.5}, {"rank_dropout": "0.5"}, {"module_dropout": "0.5"}):
        network = _network(model, **options)
        assert not torch.equal(call(), call()), options
        network.eval()
        assert torch.equal(call(), call()), options
        network.remove()
    lora = _network(model, rank_dropout="0.5").unet_loras[0].train()
    torch.manual_seed(0)
    dropped = lora._drop(torch.ones(20000, lora.rank, 2, 2))
    assert set(dropped.unique().tolist()) == {0.0, 2.0}
    assert torch.equal(dropped[..., 0, 0], dropped[..., 1, 1])  # the rank is dropped, for all places of a row
    assert dropped.mean().item() == pytest.approx(1.0, abs=0.02)


# --- The optimizer ---


def test_parameter_groups() -> None:
    model = tiny_model("sdxl")
    network = _network(model, text_encoder=True)
    groups, names = network.prepare_optimizer_params([1e-5, 2e-5], None, 1e-4)
    assert [(name, group["lr"]) for name, group in zip(names, groups, strict=True)] == [
        ("unet", 1e-4),
        ("textencoder", 1e-5),
        ("textencoder 2", 2e-5),
    ]
    assert sum(len(group["params"]) for group in groups) == len(list(network.parameters())) == 2 * len(network.loras)
    groups, names = network.prepare_optimizer_params(0.0, 1e-3, 1e-4)
    network.prepare_grad_etc(model.text_encoders, model.unet)
    assert names == ["unet"]
    # Frozen, so that no gradient that nobody zeroes enters the clipped norm.
    assert {id(p) for p in network.get_trainable_params()} == {id(p) for p in groups[0]["params"]}
    with pytest.raises(UserError, match="nothing is left to train"):
        network.prepare_optimizer_params(0.0, 0.0, 1e-4)


def test_max_norm_shrinks_only_what_is_too_long() -> None:
    model = tiny_model()
    network = _network(model, apply=False, conv_dim="2")
    before = {lora.name: lora.delta().detach() for lora in network.loras}
    limit = 1.001 * torch.stack([delta.norm() for delta in before.values()]).median().item()  # so that rounding decides about none
    count, mean, largest = network.apply_max_norm_regularization(limit, "cpu")
    assert count == sum(delta.norm().item() > limit for delta in before.values())
    assert 0 < count < len(before)
    for lora in network.loras:
        old = before[lora.name]
        torch.testing.assert_close(lora.delta(), old * min(1.0, limit / old.norm().item()), atol=1e-6, rtol=1e-4)
    norms = [lora.delta().norm().item() for lora in network.loras]
    assert mean == pytest.approx(sum(norms) / len(norms), rel=1e-4)
    assert largest == pytest.approx(limit, rel=1e-4)


# --- Files ---


@pytest.mark.parametrize(
    ("family", "options"), [("sd1", {}), ("sd2", {"conv_dim": "2", "conv_alpha": "3"}), ("sdxl", {"conv_dim": "2", "conv_alpha": "3"})]
)
def test_saved_reloaded_and_merged_it_is_the_applied_network(family: str, options: dict[str, str], tmp_path: Path) -> None:
    """The LoRA changes the output by 0.1 and more. Reloaded it gives the same to 1e-4: a network without gradients may run other Linear
    kernels (oneDNN; up to 4e-5 was seen). Merged, to 5e-4: float32 sums in another order."""
    model = tiny_model(family)
    call = _call(model)
    plain = call()
    network = _network(model, 0.8, text_encoder=True, **options)
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
    call = _call(model)
    network = _network(model)
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
    network = _network(tiny_model("sdxl"), text_encoder=True, conv_dim="2")
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
    call = _call(model)
    network = _network(model, factor)
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
    network = _network(model, apply=False, conv_dim="2")
    names = {lora.name: unet_aliases(lora.path, model.unet.config)[0] for lora in network.loras}
    assert all(old != new for old, new in names.items())
    weights = {f"{names[key.partition('.')[0]]}.{key.partition('.')[2]}": value for key, value in network.state_dict().items()}
    save_file(weights, tmp_path / "a.safetensors")
    loaded, renamed = create_network_from_weights(1.0, tmp_path / "a.safetensors", None, None, model.unet)
    assert renamed.keys() == network.state_dict().keys()
    other = _network(tiny_model("sdxl"), apply=False, conv_dim="2")
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
    _network(model, text_encoder=True, apply=False).save_weights(tmp_path / "a.safetensors")
    network, weights = create_network_from_weights(1.0, tmp_path / "a.safetensors", None, None, model.unet)
    assert network.text_encoder_loras == []
    assert all(key.startswith("lora_unet_") for key in weights)


def test_wrong_files_are_user_errors(tmp_path: Path) -> None:
    model, other = tiny_model("sd1"), tiny_model("sdxl")
    network = _network(model, apply=False)
    _network(other, apply=False).save_weights(tmp_path / "sdxl.safetensors")
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
    network = _network(model)
    with pytest.raises(AssertionError, match="count twice"):
        network.merge_to(None, model.unet)
