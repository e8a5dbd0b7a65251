"""A U-Net whose weights are packed or swapped: the same answers within what its bits allow, and the same gradients."""

import pytest
import torch
from torch import Tensor

from library.models.packed import PACKERS, PackedLinear, pack_nf4, pack_unet
from tests.helpers.tiny_models import tiny_model
from tests.helpers.tiny_networks import lora_for

ERRORS = {"int8": 0.02, "fp8": 0.1, "nf4": 0.3}  # of eps, RMS over RMS; measured 0.006, 0.04 and 0.15 on this model of random weights


def eps_and_gradient(precision: str | None, swapped: int, checkpointing: bool = False) -> tuple[Tensor, Tensor]:
    """Of a LoRA whose branches lie before and behind every packed weight."""
    model = tiny_model()
    if precision or swapped:
        pack_unet(model.unet, precision, swapped, "cpu")
    network = lora_for(model)
    if checkpointing:
        model.unet.train()
        model.enable_gradient_checkpointing()
        network.enable_gradient_checkpointing()
    generator = torch.Generator().manual_seed(0)
    latents, timesteps = torch.randn(2, 4, 16, 16, generator=generator), torch.tensor([100, 800])
    eps = model.predict_eps(latents, timesteps, model.encode_prompts(["a circle", "a star"]))
    eps.square().mean().backward()
    return eps.detach(), torch.cat([parameter.grad.flatten() for parameter in network.parameters() if parameter.grad is not None])


def away(value: Tensor, wanted: Tensor) -> float:
    return ((value - wanted).square().mean() / wanted.square().mean()).sqrt().item()


@pytest.fixture(scope="module")
def whole() -> tuple[Tensor, Tensor]:
    return eps_and_gradient(None, 0)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_swapped_blocks_change_nothing(checkpointing: bool, whole: tuple[Tensor, Tensor]) -> None:
    eps, gradient = eps_and_gradient(None, 5, checkpointing)
    assert torch.allclose(eps, whole[0], atol=1e-6)
    assert torch.allclose(gradient, whole[1], atol=1e-6)


@pytest.mark.parametrize("precision", PACKERS)
def test_fewer_bits_are_as_near_as_they_can_be(precision: str, whole: tuple[Tensor, Tensor]) -> None:
    eps, gradient = eps_and_gradient(precision, 0)
    assert ERRORS[precision] / 10 < away(eps, whole[0]) < ERRORS[precision]
    assert away(gradient, whole[1]) < 1.5 * ERRORS[precision]
    swapped, checkpointed = eps_and_gradient(precision, 3), eps_and_gradient(precision, 3, checkpointing=True)
    for other in (swapped, checkpointed):
        assert torch.allclose(other[0], eps, atol=1e-6) and torch.allclose(other[1], gradient, atol=1e-6)


@pytest.mark.parametrize(("precision", "share"), [("int8", 1.0), ("fp8", 1.0), ("nf4", 0.5625)])
def test_bytes_of_a_weight(precision: str, share: float) -> None:
    weight = torch.randn(256, 1024)
    packed = PACKERS[precision](weight)
    assert sum(part.nbytes for part in packed.parts) == pytest.approx(share * weight.numel(), rel=0.01)
    assert packed.unpacked(torch.device("cpu"), torch.bfloat16).dtype == torch.bfloat16


def test_nf4_is_bitsandbytes() -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = torch.randn(33, 130, generator=torch.Generator().manual_seed(0))
    codes, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    assert torch.equal(pack_nf4(weight).unpacked(weight.device, weight.dtype), functional.dequantize_4bit(codes, state))


def test_nothing_holds_an_unpacked_weight_until_the_backward_pass() -> None:
    layer = PackedLinear(torch.nn.Linear(64, 64), PACKERS["int8"](torch.randn(64, 64)))
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        layer(torch.randn(2, 64, requires_grad=True))
    assert kept == []
