"""sd-scripts' caches beside pictures: read where they are of our VAE, of our bucket and of this picture, and only there."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor

from library.models.vae import VaeFingerprint, encode_images
from library.scorer_data.buckets import BucketConfig
from library.scorer_data.encoding import encode_missing
from library.scorer_data.latent_cache import LatentCache, open_cache
from library.scorer_data.pictures import to_pixels
from library.scorer_data.records import FilePicture
from tests.helpers.tiny_models import tiny_vae

BUCKETS = BucketConfig(resolution="64", enable_bucket=False)


def sharp_vae(scaling_factor: float = 0.18215, seed: int = 0) -> AutoencoderKL:
    """A tiny VAE with a narrow posterior, as trained ones have it."""
    vae = tiny_vae(scaling_factor, seed)
    assert vae.quant_conv is not None and vae.quant_conv.bias is not None
    with torch.no_grad():
        vae.quant_conv.weight[4:] = 0
        vae.quant_conv.bias[4:] = -12
    return vae


@pytest.fixture(scope="module")
def vae() -> AutoencoderKL:
    return sharp_vae()


@pytest.fixture
def pictures(tmp_path: Path) -> list[FilePicture]:
    draw = np.random.default_rng(0)
    result = []
    for number in range(4):
        coarse = Image.fromarray(draw.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        path = tmp_path / f"{number}.png"
        coarse.resize((64, 64)).save(path)
        result.append(FilePicture(path))
    return result


def sd_scripts_caches(
    vae: AutoencoderKL, picture: FilePicture, *, flipped: bool = False, suffix: str = "_0064x0064_sd.npz", **changes: Any
) -> Path:
    """Write what sd-scripts writes: draws from the unscaled posterior (library/strategy_base.py, save_latents_to_disk)."""
    pixels = to_pixels([Image.open(picture.path)])
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        draws = [vae.encode(turned).latent_dist.sample(rng)[0] for turned in (pixels, pixels.flip(3))]  # type: ignore[union-attr]
    arrays = {"latents": draws[0].numpy(), "original_size": np.array([64, 64]), "crop_ltrb": np.array([0, 0, 64, 64])}
    if flipped:
        arrays["latents_flipped"] = draws[1].numpy()
    path = picture.path.with_name(picture.path.stem + suffix)
    np.savez(path, **(arrays | changes))
    return path


Fill = Callable[..., tuple[LatentCache, int]]


@pytest.fixture
def fill(tmp_path: Path, pictures: list[FilePicture], vae: AutoencoderKL) -> Fill:
    """Fill a cache: (cache, how many pictures were encoded)."""

    def run(own: AutoencoderKL = vae, **options: Any) -> tuple[LatentCache, int]:
        cache = open_cache(tmp_path / "cache", VaeFingerprint.of(own), BUCKETS)
        counts = []

        def encode(pixels: Tensor) -> Tensor:
            counts.append(len(pixels))
            return encode_images(own, pixels)

        assert encode_missing(cache, pictures, encode, BUCKETS, batch_size=2, **options) == []
        return cache, sum(counts)

    return run


def test_caches_of_our_vae_are_used_after_one_comparison(
    fill: Fill, pictures: list[FilePicture], vae: AutoencoderKL, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    files = [sd_scripts_caches(vae, picture) for picture in pictures]
    cache, encoded = fill()
    assert encoded == 1 and "are used" in caplog.text
    for picture, file in zip(pictures, files, strict=True):
        row = cache.find_all([picture]).item()
        assert row >= 0
        expected = torch.from_numpy(np.load(file)["latents"]) * vae.config["scaling_factor"]
        torch.testing.assert_close(cache.read([row])[0], expected, atol=2e-3, rtol=1e-3)
        own = encode_images(vae, to_pixels([Image.open(picture.path)]))[0]
        assert (cache.read([row])[0] - own).norm() < 0.1 * own.norm()


def test_caches_of_another_vae_are_not_used_and_it_is_said_once(
    fill: Fill, pictures: list[FilePicture], caplog: pytest.LogCaptureFixture
) -> None:
    for picture in pictures:
        sd_scripts_caches(sharp_vae(seed=1), picture)
    _, encoded = fill()
    assert encoded == 1 + 4 and caplog.text.count("are not used") == 1 and "another VAE" in caplog.text


def test_mirrored_latents_are_used_where_there_are_any(fill: Fill, pictures: list[FilePicture], vae: AutoencoderKL) -> None:
    for picture in pictures[:2]:
        sd_scripts_caches(vae, picture, flipped=True)
    for picture in pictures[2:]:
        sd_scripts_caches(vae, picture)
    cache, encoded = fill(variants=("", "flip"))
    assert encoded == 1 + 2  # the comparison, and the two that are not there mirrored
    assert (cache.find_all(pictures, ("", "flip")) >= 0).all()
    mirrored = cache.read(cache.find_all(pictures, ("flip",))[:, 0])
    for latents, picture in zip(mirrored, pictures, strict=True):
        own = encode_images(vae, to_pixels([Image.open(picture.path)]).flip(3))[0]
        assert (latents - own).norm() < 0.1 * own.norm()


def test_the_option_turns_it_off(fill: Fill, pictures: list[FilePicture], vae: AutoencoderKL) -> None:
    for picture in pictures:
        sd_scripts_caches(vae, picture)
    assert fill(read_npz=False)[1] == 4


def test_the_name_of_older_versions_is_known(fill: Fill, pictures: list[FilePicture], vae: AutoencoderKL) -> None:
    for picture in pictures:
        sd_scripts_caches(vae, picture, suffix=".npz")
    assert fill()[1] == 1


def test_sdxls_caches_are_told_by_their_name(fill: Fill, pictures: list[FilePicture], vae: AutoencoderKL) -> None:
    own = sharp_vae(scaling_factor=0.13025)
    for picture in pictures:
        sd_scripts_caches(sharp_vae(seed=1), picture)  # a cache of SD1, which would be refused
        sd_scripts_caches(own, picture, suffix="_0064x0064_sdxl.npz")
    assert fill(own)[1] == 1


@pytest.mark.parametrize(
    "harm",
    ["bucket", "size", "older", "nan", "not an npz", "no latents", "turned", "transparent", "cut", "empty", "one array", "no size"],
    ids=lambda harm: harm.replace(" ", "_"),
)
def test_a_cache_that_does_not_fit_its_picture_is_not_used(fill: Fill, pictures: list[FilePicture], vae: AutoencoderKL, harm: str) -> None:
    good = [sd_scripts_caches(vae, picture) for picture in pictures[1:]]
    assert len(good) == 3
    path = sd_scripts_caches(vae, pictures[0])
    if harm == "bucket":
        sd_scripts_caches(vae, pictures[0], latents=np.zeros((4, 8, 9), np.float32))
    elif harm == "size":
        sd_scripts_caches(vae, pictures[0], original_size=np.array([65, 64]))
    elif harm == "older":
        os.utime(path, ns=(0, 0))
    elif harm == "nan":
        sd_scripts_caches(vae, pictures[0], latents=np.full((4, 8, 8), np.nan, np.float32))
    elif harm == "not an npz":
        path.write_bytes(b"PK nothing")
    elif harm == "no latents":
        np.savez(path, original_size=np.array([64, 64]))
    elif harm == "cut":
        path.write_bytes(path.read_bytes()[:300])
    elif harm == "empty":
        path.write_bytes(b"")  # of a program that was killed as it began to write
    elif harm == "one array":
        with path.open("wb") as file:
            np.save(file, np.zeros(4))
    elif harm == "no size":
        sd_scripts_caches(vae, pictures[0], original_size=np.array(64))
    else:
        picture = Image.open(pictures[0].path)
        exif = Image.Exif()
        exif[0x0112] = 3
        if harm == "turned":
            picture.save(pictures[0].path, exif=exif)
        else:
            picture.putalpha(128)
            picture.save(pictures[0].path)
        os.utime(path, ns=(2**61, 2**61))  # newer than the picture
    assert fill()[1] == 2  # the comparison, and the one that is not used
