"""Filling the latent cache: once, in variants, by several processes, through kills and with pictures of every kind of badness."""

import multiprocessing
import os
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from library.errors import UserError
from library.models.vae import VaeFingerprint
from library.scorer_data import encoding
from library.scorer_data.buckets import BucketConfig
from library.scorer_data.cache_shards import read_names
from library.scorer_data.encoding import encode_missing
from library.scorer_data.latent_cache import LatentCache, open_cache
from library.scorer_data.pixel_augmentation import PixelAugmentation, render
from library.scorer_data.records import FilePicture, Picture, Skipped

VAE = VaeFingerprint(scaling_factor=0.18215, probe=(0.1, -0.4, 0.9))
BUCKETS = BucketConfig(resolution="48,32", bucket_no_upscale=True, bucket_reso_steps=8)
needs_fork = pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="starts processes by fork")


@dataclass
class Encoder:
    """Stands in for a VAE: latents are pixels, pooled by 8 and with a fourth channel; counts what it is given."""

    batches: list[int] = field(default_factory=list)

    @property
    def pictures(self) -> int:
        return sum(self.batches)

    def __call__(self, pixels: Tensor) -> Tensor:
        self.batches.append(len(pixels))
        pooled = torch.nn.functional.avg_pool2d(pixels, 8)
        return torch.cat([pooled, pooled[:, :1] - pooled[:, 1:2]], dim=1)


def draw(path: Path, seed: int, size: tuple[int, int] = (32, 32)) -> FilePicture:
    noise = torch.randint(0, 256, (size[1], size[0], 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    Image.fromarray(noise.numpy()).save(path)
    return FilePicture(path)


@pytest.fixture
def pictures(tmp_path: Path) -> list[FilePicture]:
    folder = tmp_path / "pictures"
    folder.mkdir()
    return [draw(folder / f"{index} ü.png", index, (48, 32) if index % 3 == 0 else (32, 32)) for index in range(9)]


@pytest.fixture
def cache(tmp_path: Path) -> LatentCache:
    return open_cache(tmp_path / "cache", VAE, BUCKETS)


def fill(
    cache: LatentCache, pictures: Sequence[Picture], variants: Sequence[str] = ("",), buckets: BucketConfig = BUCKETS, **options: Any
) -> tuple[LatentCache, Encoder, list[Skipped]]:
    """Fill a cache, opened anew: (cache, the encoder it used, what was left out)."""
    cache, encoder = LatentCache(cache.folder, cache.vae), Encoder()
    skipped = encode_missing(cache, pictures, encoder, buckets, variants=variants, batch_size=4, **options)
    return cache, encoder, skipped


def read(cache: LatentCache, picture: Picture, variant: str = "") -> Tensor:
    row = cache.find_all([picture], [variant]).item()
    assert row >= 0
    return cache.read([row])[0]


def latents_of(picture: FilePicture, *, mirror: bool = False) -> Tensor:
    pixels = torch.from_numpy(np.array(Image.open(picture.path).convert("RGB"))).permute(2, 0, 1)[None].float() / 127.5 - 1
    return Encoder()(pixels.flip(3) if mirror else pixels)[0]


def assert_close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=1e-3, rtol=1e-3)


def test_latents_come_back_and_are_encoded_once(cache: LatentCache, pictures: list[FilePicture]) -> None:
    filled, encoder, skipped = fill(cache, [*pictures, pictures[0]])  # one is listed twice
    assert encoder.pictures == 9 and max(encoder.batches) <= 4 and skipped == []
    for picture in pictures:
        assert_close(read(filled, picture), latents_of(picture))
    assert fill(cache, pictures)[1].pictures == 0


def test_a_flip_is_the_encoding_of_the_flipped_picture(cache: LatentCache, pictures: list[FilePicture]) -> None:
    fill(cache, pictures)
    filled, encoder, _ = fill(cache, pictures, ("", "flip"))
    assert encoder.pictures == 9  # only the flipped ones were missing
    for picture in pictures:
        assert_close(read(filled, picture, "flip"), latents_of(picture, mirror=True))


def test_a_changed_file_is_encoded_again_and_only_once(cache: LatentCache, pictures: list[FilePicture]) -> None:
    fill(cache, pictures)
    for age in range(1, 4):  # whichever way the names of the old and the new shards sort
        draw(pictures[4].path, seed=99 + age)
        os.utime(pictures[4].path, ns=(age, age))
        os.utime(pictures[5].path, ns=(age, age))
        assert fill(cache, pictures)[1].pictures == 2
        filled, encoder, _ = fill(cache, pictures)
        assert encoder.pictures == 0
        assert_close(read(filled, pictures[4]), latents_of(pictures[4]))


def test_what_was_found_damaged_is_encoded_again(cache: LatentCache, pictures: list[FilePicture]) -> None:
    filled, _, _ = fill(cache, pictures)
    shard = next(path for path in filled.folder.glob("0048x0032*.safetensors"))
    content = bytearray(shard.read_bytes())
    content[-8] ^= 1
    shard.write_bytes(content)
    damaged = LatentCache(cache.folder, cache.vae)
    shard_rows = damaged.find_all(pictures)[::3, 0]
    assert damaged.verify() <= 1 and len(shard_rows) == 3
    filled, encoder, _ = fill(cache, pictures)
    assert encoder.pictures == (damaged.find_all(pictures) < 0).sum()
    for picture in pictures:
        assert_close(read(filled, picture), latents_of(picture))


# -- variants ------------------------------------------------------------------------------------------------------------


def test_crops_are_parts_of_the_picture_and_the_same_every_time(cache: LatentCache, pictures: list[FilePicture]) -> None:
    augmentation = PixelAugmentation(flip_aug=True, crop_variants=2)
    assert augmentation.names == ("", "flip", "crop:1@0.8", "crop:2@0.8+flip")
    filled, encoder, _ = fill(cache, pictures, augmentation.names)
    assert encoder.pictures == 36 and fill(cache, pictures, augmentation.names)[1].pictures == 0
    crops, plain = ([read(filled, picture, variant) for picture in pictures] for variant in ("crop:1@0.8", ""))
    assert sum(not torch.allclose(crop, whole, atol=0.05) for crop, whole in zip(crops, plain, strict=True)) >= 6
    # more variants cost no more than themselves
    assert fill(cache, pictures, PixelAugmentation(flip_aug=True, crop_variants=3).names)[1].pictures == 9


def test_a_crop_keeps_area_and_proportions() -> None:
    ramp = np.stack(np.meshgrid(np.arange(240), np.arange(120)), -1).astype(np.uint8)  # red is x, green is y
    picture = Image.fromarray(np.concatenate([ramp, ramp[..., :1]], -1))
    boxes = []
    for seed in range(200):
        cut = np.asarray(render(picture, (240, 120), "crop:1@0.8", str(seed))).astype(float)
        width, height = cut[60, 230, 0] - cut[60, 10, 0], cut[110, 120, 1] - cut[10, 120, 1]
        boxes.append((width / 220, height / 100, cut[60, 10, 0]))
        mirrored = np.asarray(render(picture, (240, 120), "crop:1@0.8+flip", str(seed)))
        assert (mirrored[:, ::-1] == cut).all()
    widths, heights, lefts = np.array(boxes).T
    assert np.abs(widths - heights).max() < 0.03  # the proportions
    assert widths.min() > 0.8**0.5 - 0.02 and widths.max() <= 1.01 and widths.std() > 0.02
    assert lefts.std() > 3  # and not always in the middle
    plain = render(picture, (240, 120), "", "x")
    assert np.array_equal(np.asarray(plain), np.asarray(picture))


# -- bad pictures --------------------------------------------------------------------------------------------------------


def test_bad_pictures_are_one_sentence_each_and_end_nothing(cache: LatentCache, pictures: list[FilePicture], tmp_path: Path) -> None:
    pictures[1].path.write_bytes(b"")
    pictures[2].path.write_bytes(pictures[2].path.read_bytes()[:-200])  # its size can be read and its pixels cannot
    pictures[4].path.unlink()
    long = draw(tmp_path / "long line.png", 0, (400, 2))
    filled, encoder, skipped = fill(cache, [*pictures, long, FilePicture(tmp_path)], ("", "flip"))
    reasons = sorted(entry.reason for entry in skipped)
    assert len(reasons) == 5 and encoder.pictures == 12
    for name in ("1 ü.png", "2 ü.png", "4 ü.png", "long line.png", str(tmp_path)):
        assert sum(name in reason for reason in reasons) >= 1
    assert all("\n" not in reason for reason in reasons)
    assert (filled.find_all(pictures)[:, 0] >= 0).tolist() == [index not in (1, 2, 4) for index in range(9)]


def test_long_pictures_are_left_out_beyond_max_crop_only(cache: LatentCache, tmp_path: Path) -> None:
    long = draw(tmp_path / "long.png", 0, (240, 48))
    buckets = BucketConfig(resolution="64", min_bucket_reso=32, max_bucket_reso=128, bucket_reso_steps=32)  # up to 4 : 1
    _, encoder, skipped = fill(cache, [long], buckets=buckets)
    assert encoder.pictures == 1 and not skipped
    strict = BucketConfig(resolution="64", min_bucket_reso=32, max_bucket_reso=128, bucket_reso_steps=32, max_crop=0.1)
    _, _, skipped = fill(open_cache(tmp_path / "other", VAE, strict), [long], buckets=strict)
    assert "240x48, of which its bucket of 128x32 would cut off 20%: max_crop is 0.1" in skipped[0].reason


def test_latents_that_are_not_finite_name_the_picture(cache: LatentCache, pictures: list[FilePicture]) -> None:
    bad = latents_of(pictures[2])

    def broken(pixels: Tensor) -> Tensor:
        latents = Encoder()(pixels)
        for row in latents:
            if row.shape == bad.shape and torch.allclose(row, bad, atol=1e-4):
                row[0, 0, 0] = torch.nan
        return latents

    skipped = encode_missing(cache, pictures, broken, BUCKETS, batch_size=4)
    assert len(skipped) == 1 and "2 ü.png: the VAE makes NaN or infinity" in skipped[0].reason
    assert (cache.find_all(pictures)[:, 0] < 0).sum() == 1


# -- kills, and several processes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("reason", [KeyboardInterrupt, torch.OutOfMemoryError])
def test_a_run_that_ends_early_loses_nothing_that_was_encoded(
    cache: LatentCache, pictures: list[FilePicture], reason: type[BaseException]
) -> None:
    class Interrupted(Encoder):
        def __call__(self, pixels: Tensor) -> Tensor:
            if self.pictures >= 4:
                raise reason
            return super().__call__(pixels)

    with pytest.raises(reason):
        encode_missing(cache, pictures, Interrupted(), BUCKETS, batch_size=2)
    filled, encoder, _ = fill(cache, pictures)
    assert encoder.pictures == 5
    for picture in pictures:
        assert_close(read(filled, picture), latents_of(picture))


def test_a_full_disk_ends_in_its_own_sentence(cache: LatentCache, pictures: list[FilePicture], monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="No space left on device"):
        fill(cache, pictures)
    monkeypatch.undo()
    assert fill(cache, pictures)[1].pictures == 9


def test_what_is_encoded_is_written_after_a_while(cache: LatentCache, pictures: list[FilePicture], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoding, "WRITE_SECONDS", 0.0)
    seen: list[int] = []

    class Watching(Encoder):
        def __call__(self, pixels: Tensor) -> Tensor:
            seen.append(len(LatentCache(cache.folder, cache.vae)))
            return super().__call__(pixels)

    encode_missing(cache, pictures, Watching(), BUCKETS, batch_size=1)
    assert seen == list(range(9))


@pytest.mark.parametrize("limit", ["SHARD_ROWS", "SHARD_BYTES", "PENDING_BYTES"])
def test_shards_are_bounded(cache: LatentCache, pictures: list[FilePicture], monkeypatch: pytest.MonkeyPatch, limit: str) -> None:
    size = 4 * 4 * 4
    monkeypatch.setattr(encoding, limit, {"SHARD_ROWS": 2, "SHARD_BYTES": 2 * size * 2, "PENDING_BYTES": 2 * size * 4}[limit])
    filled, encoder, _ = fill(cache, pictures)
    assert encoder.pictures == 9 and len(list(filled.folder.glob("00*.safetensors"))) >= 5
    for picture in pictures:
        assert_close(read(filled, picture), latents_of(picture))


def fill_in_a_process(folder: Path, pictures: list[FilePicture], index: int, processes: int, pause: float, encoded: Any) -> None:
    """What a process of its own does: the whole way from opening the cache on; counts in `encoded`."""
    torch.set_num_threads(1)
    encoding.SHARD_ROWS = 2
    encoder = Encoder()

    def encode(pixels: Tensor) -> Tensor:
        time.sleep(pause)
        encoded.value += len(pixels)
        return encoder(pixels)

    cache = open_cache(folder, VAE, BUCKETS)
    encode_missing(cache, pictures, encode, BUCKETS, batch_size=2, process_index=index, num_processes=processes)


@needs_fork
def test_two_processes_fill_one_cache(tmp_path: Path, pictures: list[FilePicture]) -> None:
    context = multiprocessing.get_context("fork")
    counts = [context.Value("i", 0) for _ in range(2)]
    processes = [
        context.Process(target=fill_in_a_process, args=(tmp_path / "cache", pictures, index, 2, 0.02, counts[index])) for index in range(2)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    assert sum(count.value for count in counts) == 9 and min(count.value for count in counts) >= 1  # each its own, none twice
    assert len(list((tmp_path / "cache").iterdir())) == 1
    filled, encoder, _ = fill(open_cache(tmp_path / "cache", VAE, BUCKETS), pictures)
    assert encoder.pictures == 0
    for picture in pictures:
        assert_close(read(filled, picture), latents_of(picture))


@needs_fork
def test_a_killed_process_leaves_whole_shards_and_the_next_one_goes_on(tmp_path: Path, pictures: list[FilePicture]) -> None:
    context = multiprocessing.get_context("fork")
    count, folder = context.Value("i", 0), tmp_path / "cache"
    process = context.Process(target=fill_in_a_process, args=(folder, pictures, 0, 1, 0.2, count))
    process.start()
    deadline = time.monotonic() + 60
    while not list(folder.glob("*/00*.safetensors")) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()  # as kill -9 does
    process.join(60)
    assert process.exitcode == -signal.SIGKILL and 2 <= count.value < 9
    left = open_cache(folder, VAE, BUCKETS)
    assert 2 <= len(left) <= count.value
    filled, encoder, _ = fill(left, pictures)
    assert encoder.pictures == 9 - len(left)
    for picture in pictures:
        assert_close(read(filled, picture), latents_of(picture))


def test_shares_are_disjoint_whatever_is_in_the_cache(cache: LatentCache, pictures: list[FilePicture]) -> None:
    everything = Encoder()
    for index in (2, 0, 1):  # one after another: the later ones find the earlier ones' latents
        again = LatentCache(cache.folder, cache.vae)
        encode_missing(again, pictures, everything, BUCKETS, batch_size=4, process_index=index, num_processes=3)
    assert everything.pictures == 9


def test_shards_are_samples_of_the_pictures_however_they_are_sorted(cache: LatentCache, tmp_path: Path) -> None:
    folders = [tmp_path / name for name in "ab"]
    pictures = []
    for folder in folders:
        folder.mkdir()
        pictures += [draw(folder / f"{index}.png", index) for index in range(40)]
    encoding_cache, _, _ = fill(cache, pictures)
    [shard] = encoding_cache.folder.glob("00*.safetensors")
    first_half = [Path(key).parent.name for key, _ in read_names(shard)[:40]]
    assert 10 < first_half.count("a") < 30


class Overflowing(torch.nn.Module):
    """Stands in for a VAE whose activations reach `largest`; half precision ends at 65504."""

    def __init__(self, largest: float) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(largest))
        self.config = {"scaling_factor": 1.0, "latent_channels": 3, "block_out_channels": [1]}
        self.device = torch.device("cpu")

    @property
    def dtype(self) -> torch.dtype:
        return self.weight.dtype

    def encode(self, pixels: torch.Tensor, return_dict: bool) -> list:
        large = torch.nn.functional.avg_pool2d(pixels, 8) * self.weight
        return [SimpleNamespace(mode=lambda: large / self.weight)]


@pytest.mark.parametrize(("largest", "is_half"), [(10.0, True), (1e5, False)])
def test_a_vae_encodes_in_half_precision_where_that_is_the_same(largest: float, is_half: bool) -> None:
    vae, pixels = Overflowing(largest), torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    encode = encoding.make_encoder(vae, torch.float16)  # type: ignore[arg-type]
    whole = encoding.make_encoder(vae)(pixels)  # type: ignore[arg-type]
    assert torch.equal(encode(pixels), whole) is not is_half
    torch.testing.assert_close(encode(pixels), whole, rtol=2e-3, atol=1e-3)
    pixels[1] *= 1e4  # too large for half precision alone
    assert encode(pixels).isfinite().all()
