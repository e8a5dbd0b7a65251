"""The LoRA's gradients under checkpointing, and the groups that its optimizer is given."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from library.errors import UserError
from networks.lora import LoRANetwork
from tests.helpers.tiny_models import FAMILY_NAMES, tiny_model
from tests.helpers.tiny_networks import full_lora, unet_call


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
    call = unet_call(model)
    multipliers = torch.tensor([1.0, -0.5])
    network = full_lora(model, multipliers, conv_dim="2")

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
    call = unet_call(model)
    network = full_lora(model, neuron_dropout=0.2, rank_dropout="0.3", module_dropout="0.2")

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
    full_lora(model)
    model.unet.train()
    model.unet.enable_gradient_checkpointing()
    loss = unet_call(model)().square().mean()
    with pytest.raises(AssertionError, match="enable_gradient_checkpointing"):
        loss.backward()


def test_own_checkpoint_keeps_multiplier_and_inner_switches() -> None:
    model = tiny_model()
    call = unet_call(model)
    network = full_lora(model, torch.tensor([1.0, -1.0]))

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
    network = full_lora(model, 0.5, text_encoder=True)
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


def test_parameter_groups() -> None:
    model = tiny_model("sdxl")
    network = full_lora(model, text_encoder=True)
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
