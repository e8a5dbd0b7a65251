"""A VAE in slices is the VAE, to rounding, and takes less memory."""

import pytest
import torch

from library.models import vae_slices
from library.models.vae import decode_latents, encode_images
from library.models.vae_slices import in_slices
from tests.helpers.tiny_models import tiny_model, tiny_vae


@pytest.fixture(autouse=True)
def small_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that strips of a tiny VAE's small pictures are several, the last shorter than the rest."""
    monkeypatch.setattr(vae_slices, "LARGE", 2**11)
    monkeypatch.setattr(vae_slices, "STRIP", 5 * 32 * 2 * 96)


@torch.no_grad()
@pytest.mark.parametrize("channels", [(32, 32, 32, 32), (32, 64, 64, 96)])
def test_slices_equal_the_whole(channels: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """In float64, where what is left of a difference is not rounding; in float32 it is some 1e-6 of pixels from -1 to 1."""
    vae = tiny_vae(channels=channels)
    latents = torch.randn(2, 4, 8, 12, generator=torch.Generator().manual_seed(0))
    with in_slices(vae):
        in_float32 = decode_latents(vae, latents)
    vae.double()
    pictures = decode_latents(vae, latents)
    assert (in_float32 - pictures).square().mean().sqrt() < 1e-6
    encoded = encode_images(vae, pictures)
    resnets = []
    monkeypatch.setattr(vae_slices, "_resnet", lambda block, x, own=vae_slices._resnet: resnets.append(block) or own(block, x))
    with in_slices(vae):
        assert torch.allclose(decode_latents(vae, latents), pictures, rtol=0, atol=1e-6)
        assert torch.allclose(encode_images(vae, pictures), encoded, rtol=0, atol=1e-6)
    assert len(set(resnets)) >= 10
    assert torch.equal(decode_latents(vae, latents), pictures)  # as it was


def test_a_gradient_goes_through_whole_layers() -> None:
    vae = tiny_vae()
    latents = torch.randn(1, 4, 8, 8, requires_grad=True)
    (wanted,) = torch.autograd.grad(decode_latents(vae, latents).square().sum(), latents)
    with in_slices(vae):
        (gradient,) = torch.autograd.grad(decode_latents(vae, latents).square().sum(), latents)
    assert torch.equal(gradient, wanted)


def test_the_vae_is_where_it_was_after_its_work() -> None:
    model = tiny_model()
    model.vae.to("meta")
    model.unet.to("meta")
    with model.vae_at_work(), model.vae_at_work():
        assert model.vae.device.type == "meta"
    assert not any("forward" in vars(module) for module in model.vae.modules())
