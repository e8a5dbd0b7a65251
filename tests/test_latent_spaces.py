"""VAEs of every kind: what they encode to, what it is called, and that scorers, caches and statistics take it."""

import copy
from typing import Any

import diffusers
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from library.errors import UserError
from library.measuring.image_statistics import vae_features
from library.models.loading import load_vae
from library.models.vae import LatentSpace, VaeFingerprint, decode_latents, encode_images
from library.models.vae_slices import for_pictures
from library.scorer_data.buckets import BucketConfig
from library.scorer_data.encoding import encode_missing, make_encoder
from library.scorer_data.latent_cache import open_cache
from library.scorer_data.records import FilePicture
from library.scorers.base import SCORER_KINDS, ModelSource, ScorerSpec, build_scorer
from library.scorers.io import check_scorer_fits
from library.scorers.pixel_decoder import PixelDecoder, decoder_config
from tests.helpers.tiny_models import tiny_vae

BLOCKS: dict[str, Any] = {
    "block_out_channels": (32,) * 4,
    "layers_per_block": 1,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
}
VIDEO: dict[str, Any] = {"base_dim": 8, "num_res_blocks": 1}
KINDS: dict[str, tuple[Any, dict[str, Any], str, int]] = {
    "FLUX.1": (diffusers.AutoencoderKL, BLOCKS | {"latent_channels": 16, "scaling_factor": 0.3611, "shift_factor": 0.1159}, "FLUX.1", 16),
    "FLUX.2": (diffusers.AutoencoderKLFlux2, BLOCKS, "FLUX.2", 32),
    "Qwen": (diffusers.AutoencoderKLQwenImage, VIDEO, "Qwen-Image and Wan", 16),
    "Wan": (diffusers.AutoencoderKLWan, VIDEO, "Qwen-Image and Wan", 16),
    "tiny": (diffusers.AutoencoderTiny, {"encoder_block_out_channels": (8,) * 4, "decoder_block_out_channels": (8,) * 4}, "4-channel", 4),
}


@pytest.fixture(params=KINDS, scope="module")
def kind(request):
    """Its name, the VAE, and the channels of its latents."""
    make, config, name, channels = KINDS[request.param]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vae = make(**config).requires_grad_(False).eval()
    if request.param == "FLUX.2":
        vae.bn.running_mean.copy_(torch.linspace(-1, 1, 128))
        vae.bn.running_var.copy_(torch.linspace(0.5, 2, 128))
    return name, vae, channels


def as_diffusers_normalises(vae: Any, pixels: torch.Tensor) -> torch.Tensor:
    """As the pipelines of Z-Image, FLUX.2, Qwen-Image and Wan do, and TAESD."""
    kind = type(vae).__name__
    if kind == "AutoencoderTiny":
        return vae.encode(pixels).latents
    if kind == "AutoencoderKL":
        return (vae.encode(pixels).latent_dist.mode() - vae.config["shift_factor"]) * vae.config["scaling_factor"]
    if kind == "AutoencoderKLFlux2":
        packed = diffusers.Flux2Pipeline._patchify_latents(vae.encode(pixels).latent_dist.mode())
        mean, var = (part.view(1, -1, 1, 1) for part in (vae.bn.running_mean, vae.bn.running_var))
        return diffusers.Flux2Pipeline._unpatchify_latents((packed - mean) / torch.sqrt(var + vae.config["batch_norm_eps"]))
    raw = vae.encode(pixels[:, :, None]).latent_dist.mode()
    mean, std = (torch.tensor(vae.config[name]).view(1, -1, 1, 1, 1) for name in ("latents_mean", "latents_std"))
    return ((raw - mean) / std)[:, :, 0]


def test_latents_are_normalised_as_pipelines_do_and_back(kind):
    name, vae, channels = kind
    pixels = torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(0)) * 2 - 1
    latents, space = encode_images(vae, pixels), LatentSpace.of(vae)
    assert latents.shape == (2, channels, 8, 12) and space.downsampling == 8 and space.name.startswith(name)
    torch.testing.assert_close(latents, as_diffusers_normalises(vae, pixels))
    raw = space.denormalise(latents)
    torch.testing.assert_close(space.normalise(raw), latents)
    decoded = decode_latents(vae, latents)
    expected = vae.decode(raw, return_dict=False)[0]
    torch.testing.assert_close(decoded, expected[:, :, 0] if expected.ndim == 5 else expected)


def test_wan_2_2_has_sixteen_pixels_a_cell():
    sizes: dict[str, Any] = {"z_dim": 48, "in_channels": 12, "out_channels": 12, "patch_size": 2, "is_residual": True}
    statistics: dict[str, Any] = {"latents_mean": [0.0] * 48, "latents_std": [1.0] * 48}
    vae = diffusers.AutoencoderKLWan(**VIDEO, decoder_base_dim=8, **sizes, **statistics).requires_grad_(False).eval()
    space = LatentSpace.of(vae)
    assert (space.downsampling, space.name) == (16, "48-channel video latents")
    assert encode_images(vae, torch.zeros(1, 3, 64, 96)).shape == (1, 48, 4, 6)


def test_single_frames_need_no_films(kind):
    """What loading does to VAEs of films: the same numbers, to rounding, and a copy has its own weights."""
    _, vae, channels = kind
    changed = copy.deepcopy(vae)
    for_pictures(changed)
    changed = copy.deepcopy(changed)
    pixels = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    latents = torch.randn(1, channels, 8, 8, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(encode_images(changed, pixels), encode_images(vae, pixels), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(decode_latents(changed, latents), decode_latents(vae, latents), atol=1e-4, rtol=1e-4)
    with torch.no_grad():
        for parameter in changed.parameters():
            parameter.zero_()
    assert not encode_images(changed, pixels).equal(encode_images(vae, pixels))


def test_the_pixel_decoder_decodes_as_the_vae_and_its_config_is_json(kind):
    _, vae, channels = kind
    decoder = PixelDecoder(decoder_config(vae), batch=1)
    decoder.take_weights(vae)
    latents = torch.randn(2, channels, 4, 4, generator=torch.Generator().manual_seed(1)).requires_grad_()
    pixels = decoder(latents)
    # the weights are stored in half precision; Qwen's and Wan's clamp
    torch.testing.assert_close(pixels.clamp(0, 1), (decode_latents(vae, latents) / 2 + 0.5).clamp(0, 1), atol=5e-3, rtol=0)
    pixels.sum().backward()
    assert latents.grad is not None and latents.grad.any()


def test_scorers_caches_and_statistics_take_them(kind, tmp_path):
    name, vae, channels = kind
    vae.save_pretrained(tmp_path / "vae")
    assert VaeFingerprint.of(load_vae(tmp_path / "vae")).matches(fingerprint := VaeFingerprint.of(vae))
    Image.effect_noise((64, 64), 80).convert("RGB").save(tmp_path / "a.png")
    picture, buckets = FilePicture(tmp_path / "a.png"), BucketConfig(resolution="64,64")
    cache = open_cache(tmp_path / "cache", fingerprint, buckets)
    assert encode_missing(cache, [picture], make_encoder(vae), buckets, batch_size=1) == []
    row = cache.find_all([picture]).item()
    assert row >= 0 and cache.read([row])[0].shape == (channels, 8, 8)

    def no_model():
        raise AssertionError

    architecture = SCORER_KINDS["latent_resnet"].architecture_for("small", ModelSource(no_model, vae))
    scorer = build_scorer(ScorerSpec(kind="latent_resnet", architecture=architecture, vae=fingerprint))
    assert scorer(torch.randn(2, channels, 8, 8), torch.zeros(2)).shape == (2,)
    check_scorer_fits(scorer, fingerprint)
    with pytest.raises(UserError, match=f"reads {name}.* this model makes SDXL latents"):
        check_scorer_fits(scorer, VaeFingerprint.of(tiny_vae(0.13025)))
    features = vae_features(vae, torch.rand(2, 3, 64, 64))
    assert [part.shape[-1] for part in features] == [32, 16, 8, 8]
    torch.testing.assert_close(features[-1].norm(dim=1), torch.ones(2, 8, 8))


def test_fingerprints_of_earlier_versions_are_read_and_named():
    own = VaeFingerprint.of(tiny_vae(0.18215))
    old = VaeFingerprint.from_dict({key: value for key, value in own.to_dict().items() if key != "space"})
    assert old.matches(own) and old.name == own.name == "SD1 and SD2 latents"
    assert F.mse_loss(torch.tensor(old.probe), torch.tensor(own.probe)) == 0
