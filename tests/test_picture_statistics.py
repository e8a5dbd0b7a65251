"""Statistics of pictures, on pictures whose answer is known."""

import math

import pytest
import torch
from torch import Tensor

from library.measuring.image_statistics import (
    channel_statistics_distance,
    chroma,
    clipped_share,
    edge_energy,
    nyquist_share,
    perceptual_distance,
    rms_distance,
    rms_diversity,
    vae_features,
)
from tests.helpers.tiny_models import tiny_vae


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def wave(periods: float, size: int = 64) -> Tensor:
    """Stripes [1, 1, size, size] that go up and down `periods` times."""
    return torch.sin(2 * math.pi * periods * (torch.arange(size) + 0.25) / size).expand(1, 1, size, size)


def checkerboard(size: int = 64) -> Tensor:
    return ((torch.arange(size)[:, None] + torch.arange(size)) % 2).float()[None, None]


def test_rms_distance() -> None:
    base = noise(2, 4, 8, 8)
    shift = torch.tensor([0.0, -0.3]).view(2, 1, 1, 1)
    torch.testing.assert_close(rms_distance(base + shift, base), torch.tensor([0.0, 0.3]))


def test_channel_statistics_heed_contrast_and_shift_and_nothing_else() -> None:
    base = noise(1, 4, 16, 16)
    mean, std = base.mean((2, 3), keepdim=True), base.std((2, 3), keepdim=True, unbiased=False)
    assert channel_statistics_distance(base, base).item() == 0
    assert channel_statistics_distance(base.roll((3, 5), (2, 3)), base).item() == pytest.approx(
        0, abs=1e-5
    )  # another picture, same channels
    assert channel_statistics_distance(mean + 1.2 * (base - mean), base).item() == pytest.approx(math.log(1.2), rel=1e-4)
    assert channel_statistics_distance(base + 0.5 * std, base).item() == pytest.approx(0.5, rel=1e-4)
    one = base.clone()
    one[:, 0] += 0.5 * std[:, 0]
    assert channel_statistics_distance(one, base).item() == pytest.approx(0.5 / 2, rel=1e-4)  # one of four channels


def test_features_are_of_unit_length_after_each_block() -> None:
    vae = tiny_vae()
    pixels = torch.rand(2, 3, 64, 32, generator=torch.Generator().manual_seed(0))
    features = vae_features(vae, pixels)
    assert [tuple(layer.shape[2:]) for layer in features] == [(32, 16), (16, 8), (8, 4), (8, 4)]
    for layer in features:
        torch.testing.assert_close(layer.norm(dim=1), torch.ones(2, *layer.shape[2:]))
    seen = []
    hooks = [block.register_forward_hook(lambda _module, _args, output: seen.append(output)) for block in vae.encoder.down_blocks]
    vae.encode(pixels * 2 - 1)
    for hook in hooks:
        hook.remove()
    for layer, activation in zip(features, seen, strict=True):
        torch.testing.assert_close(layer, activation / activation.norm(dim=1, keepdim=True))


def test_large_pictures_are_shrunk_before_they_are_compared() -> None:
    features = vae_features(tiny_vae(), torch.rand(1, 3, 1024, 64))
    assert features[0].shape[2:] == (256, 16)


def test_perceptual_distance_is_lpips_formula() -> None:
    """Orthogonal features are 2 apart, opposite ones 4; layers and positions are averaged."""
    along, across = torch.zeros(1, 2, 2, 2), torch.zeros(1, 2, 2, 2)
    along[:, 0], across[:, 1] = 1, 1
    half = torch.cat([along[..., :1], across[..., 1:]], dim=-1)
    assert perceptual_distance([along], [along]).item() == 0
    assert perceptual_distance([along], [across]).item() == 2
    assert perceptual_distance([along], [-along]).item() == 4
    assert perceptual_distance([along, along], [half, along]).item() == 0.5


def test_perceptual_distance_grows_with_the_change() -> None:
    vae = tiny_vae()
    base = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    distances = [perceptual_distance(vae_features(vae, base + amount), vae_features(vae, base)).item() for amount in (0.0, 0.1, 0.4)]
    assert distances[0] == 0 < distances[1] < distances[2]


def test_diversity() -> None:
    pictures = torch.stack([torch.zeros(3, 4, 4), torch.ones(3, 4, 4), torch.ones(3, 4, 4)])
    assert rms_diversity(pictures) == pytest.approx(2 / 3)  # of three pairs, one is alike
    assert rms_diversity(pictures[1:]) == 0


def test_chroma_is_0_for_grey_and_1_for_pure_colour() -> None:
    grey, red = torch.full((1, 3, 2, 2), 0.4), torch.zeros(1, 3, 2, 2)
    red[:, 0] = 1
    torch.testing.assert_close(chroma(torch.cat([grey, red, grey * 0.5 + red * 0.5])), torch.tensor([0.0, 1.0, 0.5]))


def test_saturating_raises_chroma_and_clipping() -> None:
    base = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 0.6 + 0.2
    loud = 0.5 + 3 * (base - 0.5)
    assert chroma(loud).item() > 1.5 * chroma(base).item()
    assert clipped_share(base).item() == 0
    assert clipped_share(loud).item() == pytest.approx(((base - 0.5).abs() >= 0.5 / 3).float().mean().item())


def test_edge_energy() -> None:
    ramp = (torch.arange(8.0) * 0.1).expand(1, 3, 8, 8)
    assert edge_energy(torch.full((1, 3, 8, 8), 0.3)).item() == 0
    assert edge_energy(ramp).item() == pytest.approx(0.1)
    assert edge_energy(ramp + ramp.mT).item() == pytest.approx(0.1 * math.sqrt(2))


@pytest.mark.parametrize(("periods", "share"), [(4, 0.0), (20, 0.0), (28, 1.0)])  # of 32, where Nyquist is
def test_nyquist_share_of_a_wave(periods: int, share: float) -> None:
    assert nyquist_share(wave(periods)).item() == pytest.approx(share, abs=0.01)


def test_a_checkerboard_raises_the_nyquist_share() -> None:
    smooth = 0.5 + 0.3 * wave(3) + 0.02 * noise(1, 1, 64, 64)
    base, marked = nyquist_share(smooth).item(), nyquist_share(smooth + 0.05 * (checkerboard() - 0.5)).item()
    assert nyquist_share(checkerboard()).item() == pytest.approx(1, abs=1e-6)
    assert marked > 1.3 * base
    assert nyquist_share(torch.full((1, 3, 64, 64), 0.7)).item() == 0


def test_white_noise_has_the_bands_share_of_the_plane() -> None:
    """The corners and the rim outside a circle of 0.75 Nyquist: 1 - pi 0.75^2 / 4."""
    assert nyquist_share(noise(4, 3, 64, 64)).mean().item() == pytest.approx(1 - math.pi * 0.75**2 / 4, abs=0.02)
