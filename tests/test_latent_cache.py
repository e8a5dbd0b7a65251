"""The latent cache: encodes once, knows when to encode again, survives a kill, and hands out batches of one bucket."""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from library.errors import UserError
from library.models.vae import VaeFingerprint
from library.scorer_data import latent_cache
from library.scorer_data.batches import LatentDataset
from library.scorer_data.buckets import BucketConfig
from library.scorer_data.datasets import DataConfig, RatedData, load_rated_data
from library.scorer_data.latent_cache import LatentCache, encode_missing, open_cache

VAE = VaeFingerprint(scaling_factor=0.18215, probe=(0.1, -0.4, 0.9))
BUCKETS = BucketConfig(resolution="48,32", bucket_no_upscale=True, bucket_reso_steps=8)


@dataclass
class Encoder:
    """Stands in for a VAE: latents are pixels, pooled by 8 and with a fourth channel; counts what it is given."""

    pictures: int = 0
    batches: list[int] = field(default_factory=list)

    def __call__(self, pixels: Tensor) -> Tensor:
        self.pictures += len(pixels)
        self.batches.append(len(pixels))
        pooled = torch.nn.functional.avg_pool2d(pixels, 8)
        return torch.cat([pooled, pooled[:, :1] - pooled[:, 1:2]], dim=1)


def draw(path: Path, seed: int, size: tuple[int, int] = (32, 32)) -> Path:
    noise = torch.randint(0, 256, (size[1], size[0], 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    Image.fromarray(noise.numpy()).save(path)
    return path


@pytest.fixture
def pictures(tmp_path: Path) -> list[Path]:
    folder = tmp_path / "pictures"
    folder.mkdir()
    return [draw(folder / f"{index} ü.png", index, (48, 32) if index % 3 == 0 else (32, 32)) for index in range(9)]


Fill = Callable[..., tuple[LatentCache, Encoder]]


@pytest.fixture
def fill(tmp_path: Path, pictures: list[Path]) -> Fill:
    """Open the cache anew and fill it: (cache, the encoder it used)."""

    def run(
        vae: VaeFingerprint = VAE, buckets: BucketConfig = BUCKETS, flips: bool = False, **options: bool
    ) -> tuple[LatentCache, Encoder]:
        cache, encoder = open_cache(tmp_path / "cache", vae, buckets), Encoder()
        encode_missing(cache, pictures, encoder, buckets, flips=flips, batch_size=4, **options)
        return cache, encoder

    return run


def read(cache: LatentCache, path: Path, flipped: bool = False) -> Tensor:
    row = cache.find(path, flipped)
    assert row is not None
    return cache.read([row])[0]


def latents_of(path: Path, mirror: bool = False) -> Tensor:
    picture = torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1)[None].float() / 127.5 - 1
    return Encoder()(picture.flip(3) if mirror else picture)[0]


def test_latents_come_back_and_are_encoded_once(fill: Fill, pictures: list[Path]) -> None:
    cache, encoder = fill()
    assert encoder.pictures == 9 and max(encoder.batches) <= 4
    for path in pictures:
        torch.testing.assert_close(read(cache, path), latents_of(path), atol=1e-3, rtol=1e-3)
    assert fill()[1].pictures == 0


def test_a_flip_is_the_encoding_of_the_flipped_picture(fill: Fill, pictures: list[Path]) -> None:
    fill()
    cache, encoder = fill(flips=True)
    assert encoder.pictures == 9  # only the flipped ones were missing
    for path in pictures:
        torch.testing.assert_close(read(cache, path, flipped=True), latents_of(path, mirror=True), atol=1e-3, rtol=1e-3)


def test_a_changed_file_is_encoded_again_and_only_once(fill: Fill, pictures: list[Path]) -> None:
    fill()
    for age in range(1, 7):  # whichever way the names of the old and the new shards sort
        draw(pictures[4], seed=99 + age)
        os.utime(pictures[4], ns=(age, age))
        os.utime(pictures[5], ns=(age, age))
        cache, encoder = fill()
        assert encoder.pictures == 2
        torch.testing.assert_close(read(cache, pictures[4]), latents_of(pictures[4]), atol=1e-3, rtol=1e-3)
        again, encoder = fill()
        assert encoder.pictures == 0
        torch.testing.assert_close(read(again, pictures[4]), latents_of(pictures[4]), atol=1e-3, rtol=1e-3)


def test_another_vae_and_another_sizing_have_caches_of_their_own(fill: Fill) -> None:
    fill()
    assert fill(vae=VaeFingerprint(scaling_factor=0.13025, probe=(0.7, 0.2, -0.3)))[1].pictures == 9
    assert fill(buckets=BucketConfig(resolution="32", enable_bucket=False))[1].pictures == 9
    nearly_the_same = VaeFingerprint(scaling_factor=0.18215, probe=(0.1001, -0.4, 0.9))  # the same VAE on another device
    assert fill(vae=nearly_the_same)[1].pictures == 0


def test_a_killed_run_goes_on_where_its_last_shard_ends(
    tmp_path: Path, fill: Fill, pictures: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(latent_cache, "SHARD_ROWS", 2)

    class Killed(Encoder):
        def __call__(self, pixels: Tensor) -> Tensor:
            if self.pictures >= 4:
                raise KeyboardInterrupt
            return super().__call__(pixels)

    with pytest.raises(KeyboardInterrupt):
        encode_missing(open_cache(tmp_path / "cache", VAE, BUCKETS), pictures, Killed(), BUCKETS, flips=False, batch_size=2)
    cache, encoder = fill()
    assert encoder.pictures == 5
    for path in pictures:
        torch.testing.assert_close(read(cache, path), latents_of(path), atol=1e-3, rtol=1e-3)


def test_a_damaged_shard_is_encoded_again(fill: Fill, pictures: list[Path]) -> None:
    cache, _ = fill()
    shard = next(cache.folder.glob("0048x0032*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-10])
    again, encoder = fill()
    assert encoder.pictures == 3
    torch.testing.assert_close(read(again, pictures[0]), latents_of(pictures[0]), atol=1e-3, rtol=1e-3)


def test_an_unreadable_picture_stops_the_run_or_is_reported(tmp_path: Path, fill: Fill, pictures: list[Path]) -> None:
    pictures[1].write_bytes(b"")
    pictures[2].write_bytes(pictures[2].read_bytes()[:-200])  # its size can be read and its pixels cannot
    with pytest.raises(UserError, match=r"1 ü\.png cannot be read"):
        fill()
    cache, encoder = open_cache(tmp_path / "cache", VAE, BUCKETS), Encoder()
    skipped = encode_missing(cache, pictures, encoder, BUCKETS, flips=True, batch_size=4, skip_bad_images=True)
    assert len(skipped) == 2 and encoder.pictures == 14
    assert cache.find(pictures[1]) is None and cache.find(pictures[2]) is None and cache.find(pictures[3]) is not None


def test_latents_that_are_not_finite_name_the_picture(tmp_path: Path, pictures: list[Path]) -> None:
    def broken(pixels: Tensor) -> Tensor:
        latents = Encoder()(pixels)
        latents[1] = torch.nan
        return latents

    cache = open_cache(tmp_path / "cache", VAE, BUCKETS)
    with pytest.raises(UserError, match=r"NaN or infinity of picture .*2 ü\.png"):  # the second of the 32x32 ones
        encode_missing(cache, pictures, broken, BUCKETS, flips=False, batch_size=4)


# -- batches -------------------------------------------------------------------------------------------------------------


def dataset(fill: Fill, pictures: list[Path], flips: bool = False) -> LatentDataset:
    cache, _ = fill(flips=flips)
    found = [[cache.find(path, flipped) for path in pictures] for flipped in ((False, True) if flips else (False,))]
    rows = [[row for row in variant if row is not None] for variant in found]
    targets = torch.arange(len(pictures)).float()
    return LatentDataset(cache, rows[0], targets, targets + 1, rows[1] if flips else None)


def test_an_epoch_holds_every_picture_once_in_batches_of_one_bucket(fill: Fill, pictures: list[Path]) -> None:
    data = dataset(fill, pictures)
    batches = list(data.epoch(4, torch.Generator().manual_seed(0)))
    assert sorted(len(batch) for batch in batches) == [2, 3, 4]
    assert sorted(torch.cat([batch.targets for batch in batches]).tolist()) == list(range(9))
    for batch in batches:
        assert batch.latents.shape[1:] == ((4, 4, 6) if batch.targets[0] % 3 == 0 else (4, 4, 4))
        assert batch.latents.dtype == torch.float32 and torch.equal(batch.weights, batch.targets + 1)
        for latents, target in zip(batch.latents, batch.targets.int().tolist(), strict=True):
            torch.testing.assert_close(latents, latents_of(pictures[target]), atol=1e-3, rtol=1e-3)


def test_the_same_seed_draws_the_same_batches(fill: Fill, pictures: list[Path]) -> None:
    data = dataset(fill, pictures)
    first, second, other = ([batch.targets.tolist() for batch in data.epoch(2, torch.Generator().manual_seed(seed))] for seed in (3, 3, 4))
    assert first == second != other


def test_half_of_the_pictures_are_mirrored(fill: Fill, pictures: list[Path]) -> None:
    data, generator = dataset(fill, pictures, flips=True), torch.Generator().manual_seed(0)
    mirrored = plain = 0
    for _ in range(20):
        for batch in data.epoch(4, generator):
            for latents, target in zip(batch.latents, batch.targets.int().tolist(), strict=True):
                mirrored += torch.allclose(latents, latents_of(pictures[target], mirror=True), atol=1e-3)
                plain += torch.allclose(latents, latents_of(pictures[target]), atol=1e-3)
    assert mirrored + plain == 180 and 60 < mirrored < 120
    assert all(torch.allclose(batch.latents[0], latents_of(pictures[int(batch.targets[0])]), atol=1e-3) for batch in data.in_order(1))


def load(tmp_path: Path, rows: str, target: str = "score", **values: object) -> RatedData:
    path = tmp_path / "pictures" / "list.csv"
    path.write_text(rows, encoding="utf-8")
    config = DataConfig(train_data_file=path, **values)  # type: ignore[arg-type]
    cache = open_cache(tmp_path / "cache", VAE, BUCKETS)
    return load_rated_data(path, target, config=config, buckets=BUCKETS, cache=cache, encode=Encoder())


def test_rated_data_from_a_manifest(tmp_path: Path, pictures: list[Path]) -> None:
    rows = [f"{path.name},{index},{'val' if index < 3 else 'train' if index < 8 else 'test'}" for index, path in enumerate(pictures)]
    data = load(tmp_path, "\n".join(["path,score,split", *rows]), flip_aug=True)
    assert data.train.targets.tolist() == [3, 4, 5, 6, 7] and data.validation.targets.tolist() == [0, 1, 2]
    assert data.train.flipped_rows is not None and data.validation.flipped_rows is None


def test_labels_are_numbered_in_alphabetical_order(tmp_path: Path, pictures: list[Path]) -> None:
    rows = [f"{path.name},{'cb'[index % 2]},{'val' if index < 3 else 'train'}" for index, path in enumerate(pictures)]
    data = load(tmp_path, "\n".join(["path,label,split", *rows]), "label")
    assert data.classes == ("b", "c") and data.validation.targets.tolist() == [1, 0, 1]
    assert data.train.targets.dtype == torch.int64


@pytest.mark.parametrize(
    ("rows", "target", "complaint"),
    [
        ("path,score,split\n0 ü.png,1,val\n1 ü.png,2,val\n2 ü.png,3,train\n", "score", "leaves 1 pictures for training"),
        ("path,score,split\n0 ü.png,1,val\n1 ü.png,2,train\n2 ü.png,3,train\n", "score", "leaves 1 pictures for validation"),
        ("path,label,split\n0 ü.png,a,val\n1 ü.png,a,val\n2 ü.png,a,train\n3 ü.png,a,train\n", "label", "all labels in .* are a,"),
    ],
)
def test_too_little_to_learn_from(tmp_path: Path, pictures: list[Path], rows: str, target: str, complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        load(tmp_path, rows, target)
