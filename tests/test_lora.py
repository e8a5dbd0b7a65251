"""The LoRA network on tiny real U-Nets: strength per sample, precision, attaching, dropouts, norms."""

import pytest
import torch
from torch import Tensor, nn

from library.errors import UserError
from networks.lora import LoRANetwork, create_network
from tests.helpers.tiny_models import FAMILY_NAMES, tiny_model
from tests.helpers.tiny_networks import full_lora, unet_call


def _same_rows(first: Tensor, second: Tensor) -> list[bool]:
    return [torch.equal(a, b) for a, b in zip(first, second, strict=True)]


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_new_network_changes_nothing_and_zero_is_the_plain_model(family: str) -> None:
    model = tiny_model(family)
    call = unet_call(model)
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
    network = full_lora(model)
    call = unet_call(model)
    for lora in network.loras:
        monkeypatch.setattr(lora.lora_down, "forward", lambda x: pytest.fail("a branch was computed"))
    network.set_multiplier(0.0)
    call()
    network.set_multiplier(1.0)
    with network.disabled():
        call()


def test_disabled_nests_and_ends_with_an_error() -> None:
    model = tiny_model()
    call = unet_call(model)
    plain = call()
    network = full_lora(model)
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
    call = unet_call(model)
    network = full_lora(model, **options)
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
    full_lora(model, torch.ones(3))
    with pytest.raises(AssertionError, match="4 rows for 3 multipliers"):
        unet_call(model)()


def test_multiplier_is_a_copy() -> None:
    model = tiny_model()
    call = unet_call(model)
    multipliers = torch.ones(4)
    full_lora(model, multipliers)
    before = call()
    multipliers.zero_()
    assert torch.equal(call(), before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_base_keeps_float32_lora(dtype: torch.dtype, autocast: bool) -> None:
    model = tiny_model()
    reference_network = full_lora(model, torch.tensor([1.0, -1.0]), conv_dim="2")
    reference = unet_call(model)()
    reference_network.remove()
    model.unet.to(dtype)
    network = full_lora(model, torch.tensor([1.0, -1.0]), conv_dim="2")
    assert {parameter.dtype for parameter in network.parameters()} == {torch.float32}
    with torch.autocast("cpu", dtype, enabled=autocast):
        output = unet_call(model)()
    assert output.dtype == dtype
    output.float().square().mean().backward()
    assert all(lora.lora_up.weight.grad is not None and lora.lora_up.weight.grad.dtype == torch.float32 for lora in network.loras)
    # Half precision differs by rounding; a branch that is missing or doubled differs by more (see below).
    with network.disabled():
        plain = unet_call(model)().float()
    error = (output.float() - reference).abs().mean()
    assert error < 0.15 * (plain - reference).abs().mean()


def test_remove_restores_the_model() -> None:
    model = tiny_model()
    call = unet_call(model)
    plain = call()
    network = full_lora(model, text_encoder=True)
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
    network = full_lora(model, text_encoder=True)
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
    call = unet_call(model)
    for options in ({"neuron_dropout": 0.5}, {"rank_dropout": "0.5"}, {"module_dropout": "0.5"}):
        network = full_lora(model, **options)
        assert not torch.equal(call(), call()), options
        network.eval()
        assert torch.equal(call(), call()), options
        network.remove()
    loras = full_lora(model, rank_dropout="0.5").train().unet_loras
    convolution, linear = (next(lora for lora in loras if isinstance(lora.lora_down, kind)) for kind in (nn.Conv2d, nn.Linear))
    torch.manual_seed(0)
    places_last = convolution._drop(torch.ones(20000, convolution.rank, 2, 2)).flatten(2)
    for dropped in (places_last, linear._drop(torch.ones(20000, 4, linear.rank)).transpose(1, 2)):  # [rows, rank, places]
        assert set(dropped.unique().tolist()) == {0.0, 2.0}
        assert torch.equal(dropped[..., 0], dropped[..., 3])  # the rank is dropped, for all places of a row
        assert 0.3 < (dropped[:, 0, 0] != dropped[:, 1, 0]).float().mean() < 0.7  # each by itself
        assert dropped.mean().item() == pytest.approx(1.0, abs=0.02)


def test_max_norm_shrinks_only_what_is_too_long() -> None:
    model = tiny_model()
    network = full_lora(model, apply=False, conv_dim="2")
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
