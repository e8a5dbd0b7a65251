"""The latent cache: finds what it has, knows when to encode again, never uses what is damaged, and opens fast however it was left."""

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from library.errors import UserError
from library.models.vae import VaeFingerprint
from library.scorer_data import cache_index
from library.scorer_data.buckets import BucketConfig
from library.scorer_data.cache_shards import ShardReader, read_names
from library.scorer_data.latent_cache import DamagedLatentsError, LatentCache, open_cache
from library.scorer_data.records import FilePicture, FileState, Picture, SlicePicture

VAE = VaeFingerprint(scaling_factor=0.18215, probe=(0.1, -0.4, 0.9))
BUCKETS = BucketConfig(resolution="64", enable_bucket=False)
BUCKET = (64, 64)


def make_pictures(folder: Path, count: int) -> list[FilePicture]:
    """Files that only need to be there."""
    folder.mkdir(exist_ok=True)
    pictures = []
    for number in range(count):
        path = folder / f"{number} ü.png"
        path.write_bytes(bytes(number + 1))
        pictures.append(FilePicture(path))
    return pictures


def find(cache: LatentCache, picture: Picture, variant: str = "") -> int | None:
    row = int(cache.find_all([picture], [variant]).item())
    return None if row < 0 else row


def make_latents(count: int, seed: int = 0) -> torch.Tensor:
    """[N, 4, 8, 8], exact in float16."""
    return torch.randn(count, 4, 8, 8, generator=torch.Generator().manual_seed(seed)).half().float()


@pytest.fixture
def pictures(tmp_path: Path) -> list[FilePicture]:
    return make_pictures(tmp_path / "pictures", 10)


@pytest.fixture
def cache(tmp_path: Path) -> LatentCache:
    return open_cache(tmp_path / "cache", VAE, BUCKETS)


def write(cache: LatentCache, pictures: list[FilePicture], seed: int = 0, variant: str = "") -> torch.Tensor:
    latents = make_latents(len(pictures), seed)
    cache.write(BUCKET, [(picture, variant) for picture in pictures], latents)
    return latents


def reopen(cache: LatentCache) -> LatentCache:
    return LatentCache(cache.folder, cache.vae)


def shards(cache: LatentCache) -> list[Path]:
    return sorted(cache.folder.glob("*.safetensors"))


# -- finding and reading -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_reopened", [False, True])
def test_what_was_written_is_found_and_read(cache: LatentCache, pictures: list[FilePicture], is_reopened: bool) -> None:
    first, second = write(cache, pictures[:6]), write(cache, pictures[6:9], seed=1)
    flipped = write(cache, pictures[:2], seed=2, variant="flip")
    used = reopen(cache) if is_reopened else cache
    expected = torch.cat([first, second])
    rows = used.find_all(pictures)[:, 0]
    assert rows.shape == (10,) and rows[9] == -1 and len(set(rows.tolist())) == 10 and len(used) == 11
    shuffled = torch.tensor([8, 0, 5, 6, 3, 0])
    assert torch.equal(used.read(rows[shuffled]), expected[shuffled])
    assert used.read(rows[:2]).dtype == torch.float32
    row = find(used, pictures[1], "flip")
    assert row is not None and torch.equal(used.read([row])[0], flipped[1])
    assert find(used, pictures[2], "flip") is None and find(used, pictures[9]) is None
    assert used.find_all(pictures, ("", "flip"))[:, 1].ge(0).tolist() == [True] * 2 + [False] * 8
    assert used.buckets_of(rows[:9]).tolist() == [list(BUCKET)] * 9
    assert sorted(read_names(shards(cache)[0]) + read_names(shards(cache)[1]) + read_names(shards(cache)[2]))[0][0] == pictures[0].key


def test_a_changed_file_is_not_found(cache: LatentCache, pictures: list[FilePicture]) -> None:
    write(cache, pictures)
    os.utime(pictures[3].path, ns=(5, 5))
    pictures[4].path.write_bytes(bytes(99))
    pictures[5].path.unlink()
    found = reopen(cache).find_all(pictures)[:, 0] >= 0
    assert found.tolist() == [number not in (3, 4, 5) for number in range(10)]
    new = write(cache, pictures[3:5], seed=7)
    again = reopen(cache)
    assert torch.equal(again.read(again.find_all(pictures[3:5])[:, 0]), new)


def test_a_file_that_changes_while_it_is_encoded_is_encoded_again(cache: LatentCache, pictures: list[FilePicture]) -> None:
    before = pictures[0].state()
    pictures[0].path.write_bytes(bytes(50))
    cache.write(BUCKET, [(pictures[0], "")], make_latents(1), [before])
    assert cache.find_all([pictures[0]]).item() == -1


def test_parts_of_a_file_are_pictures_of_their_own(cache: LatentCache, tmp_path: Path) -> None:
    tar = tmp_path / "pictures.tar"
    tar.write_bytes(bytes(100))
    first, second = SlicePicture(tar, 0, 50, "a.png"), SlicePicture(tar, 50, 50, "b.png")
    cache.write(BUCKET, [(first, "")], make_latents(1))
    assert cache.find_all([first, second]).flatten().tolist() == [0, -1]


def test_the_newer_of_two_equal_entries_is_used_until_it_is_damaged(cache: LatentCache, pictures: list[FilePicture]) -> None:
    write(cache, pictures[:3])
    newer = write(cache, pictures[:2], seed=3)
    assert torch.equal(cache.read(cache.find_all(pictures[:2])[:, 0]), newer)


def test_another_vae_and_another_sizing_have_caches_of_their_own(tmp_path: Path, cache: LatentCache, pictures: list[FilePicture]) -> None:
    write(cache, pictures)
    others = {
        "scale": open_cache(tmp_path / "cache", VaeFingerprint(scaling_factor=0.13025, probe=VAE.probe), BUCKETS),
        "probe": open_cache(tmp_path / "cache", VaeFingerprint(scaling_factor=0.18215, probe=(0.7, 0.2, -0.3)), BUCKETS),
        "size": open_cache(tmp_path / "cache", VAE, BucketConfig(resolution="72", enable_bucket=False)),
    }
    assert len({other.folder for other in others.values()} | {cache.folder}) == 4
    assert all(len(other) == 0 for other in others.values())
    same_vae_elsewhere = VaeFingerprint(scaling_factor=0.18215, probe=(0.1001, -0.4, 0.9))
    for buckets in (BUCKETS, BucketConfig(resolution="64", enable_bucket=False, max_crop=0.1)):
        assert open_cache(tmp_path / "cache", same_vae_elsewhere, buckets).folder == cache.folder


def test_a_broken_description_does_not_stand_in_the_way(
    tmp_path: Path, cache: LatentCache, pictures: list[FilePicture], caplog: pytest.LogCaptureFixture
) -> None:
    (cache.folder / "cache.json").write_text("{")
    other = open_cache(tmp_path / "cache", VAE, BUCKETS)
    assert other.folder != cache.folder and "cannot be read" in caplog.text
    write(other, pictures)
    assert len(open_cache(tmp_path / "cache", VAE, BUCKETS)) == 10


def test_a_cache_of_the_first_version_is_left_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    old = tmp_path / "cache" / "64x64-0123456789ab"
    old.mkdir(parents=True)
    (old / "cache.json").write_text(json.dumps({"vae": VAE.to_dict(), "buckets": {}}))
    assert open_cache(tmp_path / "cache", VAE, BUCKETS).folder != old and "64x64-0123456789ab is of an earlier version" in caplog.text


def test_what_another_process_makes_or_takes_away_meanwhile_is_not_read(
    tmp_path: Path, cache: LatentCache, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two processes of one launcher open a cache at once: each makes a hidden folder, and the slower one's is taken away again."""
    caplog.set_level("INFO")
    (hidden := tmp_path / "cache" / f".{cache.folder.name}.{os.getppid()}.tmp").mkdir()
    (hidden / "cache.json").write_text("{}")
    (going := tmp_path / "cache" / "64x64-0123456789ab").mkdir()
    (going / "cache.json").write_text("{}")
    read_bytes = Path.read_bytes

    def read_too_late(path: Path) -> bytes:
        if path.parent == going:
            path.unlink()
        assert path.parent != hidden
        return read_bytes(path)

    monkeypatch.setattr(Path, "read_bytes", read_too_late)
    assert open_cache(tmp_path / "cache", VAE, BUCKETS).folder == cache.folder
    assert not (going / "cache.json").exists() and "earlier version" not in caplog.text


def test_a_cache_that_cannot_be_made_is_refused_in_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=f"^{re.escape(str(tmp_path / 'file'))} could not be written"):
        open_cache(tmp_path / "file", VAE, BUCKETS)


# -- damage --------------------------------------------------------------------------------------------------------------


def damage(shard: Path, row: int) -> None:
    """Turn one bit of a latent."""
    content = bytearray(shard.read_bytes())
    stored = load_file(shard)["latents"][row].numpy().tobytes()
    content[content.index(stored) + 5] ^= 4
    status = shard.stat()
    shard.write_bytes(content)
    os.utime(shard, ns=(status.st_atime_ns, status.st_mtime_ns))  # as a disk does it: unseen


def test_a_damaged_latent_is_reported_dropped_and_encoded_again(
    cache: LatentCache, pictures: list[FilePicture], caplog: pytest.LogCaptureFixture
) -> None:
    latents = write(cache, pictures)
    damage(shards(cache)[0], 4)
    used = reopen(cache)
    rows = used.find_all(pictures)[:, 0]
    assert torch.equal(used.read(rows[5:]), latents[5:])  # the others are as they were
    with pytest.raises(DamagedLatentsError) as caught:
        used.read(rows)
    assert caught.value.rows.tolist() == [rows[4]]
    assert pictures[4].key in caplog.text and "damaged" in caplog.text
    for later in (used, reopen(cache), reopen(cache)):
        assert find(later, pictures[4]) is None and find(later, pictures[3]) is not None
    new = write(cache, pictures[4:5], seed=9)
    row = find(reopen(cache), pictures[4])
    assert row is not None and torch.equal(reopen(cache).read([row]), new)


def test_verifying_reads_everything(cache: LatentCache, pictures: list[FilePicture]) -> None:
    write(cache, pictures[:5])
    write(cache, pictures[5:], seed=1)
    assert cache.verify() == 0
    damage(shards(cache)[0], 1)
    damage(shards(cache)[1], 3)
    damage(shards(cache)[1], 4)
    assert reopen(cache).verify() == 3 and (reopen(cache).find_all(pictures) < 0).sum() == 3
    assert reopen(cache).verify() == 0  # what is damaged is forgotten


@pytest.mark.parametrize("harm", ["cut", "emptied", "foreign", "no keys", "deleted"])
def test_a_shard_that_is_not_whole_is_left_out(
    cache: LatentCache, pictures: list[FilePicture], harm: str, caplog: pytest.LogCaptureFixture
) -> None:
    write(cache, pictures[:5])
    latents = write(cache, pictures[5:], seed=1)
    shard = next(path for path in shards(cache) if read_names(path)[0][0] == pictures[0].key)
    reopen(cache)  # writes the index, which then is outdated
    if harm == "cut":
        shard.write_bytes(shard.read_bytes()[:-10])
    elif harm == "emptied":
        shard.write_bytes(b"")
    elif harm == "foreign":
        save_file({"weight": torch.zeros(3)}, shard)
    elif harm == "no keys":
        save_file({name: value for name, value in load_file(shard).items() if name != "keys"}, shard, {"leco_score.bucket": "64,64"})
    else:
        shard.unlink()
    again = reopen(cache)
    rows = again.find_all(pictures)[:, 0]
    assert (rows[:5] == -1).all() and torch.equal(again.read(rows[5:]), latents)
    assert (shard.name in caplog.text) == (harm != "deleted")


def test_a_shard_that_vanishes_in_a_running_training_is_damage(cache: LatentCache, pictures: list[FilePicture]) -> None:
    write(cache, pictures[:5])
    write(cache, pictures[5:], seed=1)
    used = reopen(cache)
    rows = used.find_all(pictures)[:, 0]
    gone = next(path for path in shards(cache) if read_names(path)[0][0] == pictures[0].key)
    gone.unlink()
    with pytest.raises(DamagedLatentsError) as caught:
        used.read(rows)
    assert caught.value.rows.tolist() == sorted(rows[:5].tolist())
    used.read(rows[5:])


def test_latents_beyond_float16_are_kept_in_float32(
    cache: LatentCache, pictures: list[FilePicture], caplog: pytest.LogCaptureFixture
) -> None:
    latents = make_latents(3)
    latents[1, 0, 0, 0] = 1e5
    cache.write(BUCKET, [(picture, "") for picture in pictures[:3]], latents)
    used = reopen(cache)
    assert torch.equal(used.read(used.find_all(pictures[:3])[:, 0]), latents) and "65504" in caplog.text


def test_a_full_disk_leaves_no_half_shard(cache: LatentCache, pictures: list[FilePicture], monkeypatch: pytest.MonkeyPatch) -> None:
    write(cache, pictures[:2])

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="No space left on device"):
        write(cache, pictures[2:], seed=1)
    monkeypatch.undo()
    assert len(list(cache.folder.iterdir())) == 2  # the description and the shard from before
    assert (reopen(cache).find_all(pictures)[:, 0] >= 0).sum() == 2 == (cache.find_all(pictures)[:, 0] >= 0).sum()


# -- the index -----------------------------------------------------------------------------------------------------------


def test_the_index_follows_when_shards_go(cache: LatentCache, pictures: list[FilePicture]) -> None:
    written = {number: write(cache, pictures[number : number + 2], seed=number) for number in range(0, 10, 2)}
    reopen(cache)
    for path in shards(cache)[1:4:2]:
        path.unlink()
    again = reopen(cache)
    rows = again.find_all(pictures)[:, 0]
    assert (rows >= 0).sum() == 6 == len(again)
    for number, latents in written.items():
        if rows[number] >= 0:
            assert torch.equal(again.read(rows[number : number + 2]), latents)


def test_a_cache_sees_what_others_wrote_and_its_rows_keep_their_numbers(cache: LatentCache, pictures: list[FilePicture]) -> None:
    write(cache, pictures[:3])
    other = reopen(cache)
    before = other.find_all(pictures)[:, 0]
    latents = write(cache, pictures[3:], seed=1)
    assert find(other, pictures[5]) is None
    other.refresh()
    rows = other.find_all(pictures)[:, 0]
    assert torch.equal(rows[:3], before[:3]) and torch.equal(other.read(rows[3:]), latents)


def test_keys_are_told_apart() -> None:
    state = FileState(1, 2)
    keys = [
        cache_index.latent_key("a", "", state),
        cache_index.latent_key("a", "flip", state),
        cache_index.latent_key("aflip", "", state),
        cache_index.latent_key("a", "", FileState(12, 2)),
        cache_index.latent_key("a", "", FileState(1, 22)),
        cache_index.latent_key("\udcff", "", state),  # a file name that is not UTF-8
    ]
    assert len(set(keys)) == 6 and all(len(key) == 16 for key in keys)


def test_looking_up_a_hundred_thousand_keys(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    index = cache_index.CacheIndex()
    keys = generator.integers(0, 256, (100_000, 16), dtype=np.uint8).view("S16").reshape(-1)
    for part in np.split(keys, 10):
        index.add(cache_index.Shard(name=f"{len(index.shards)}", file=FileState(0, 0), bucket=BUCKET, rows=len(part)), part)
    order = generator.permutation(100_000)
    assert (index.look_up(keys[order]) == order).all()
    absent = generator.integers(0, 256, (1000, 16), dtype=np.uint8).view("S16").reshape(-1)
    assert (index.look_up(absent) == -1).all()
    index.forget(np.arange(500))
    assert (index.look_up(keys[:1000]) == np.where(np.arange(1000) < 500, -1, np.arange(1000))).all()


# -- memory --------------------------------------------------------------------------------------------------------------


def test_only_the_last_used_shards_stay_mapped(cache: LatentCache, pictures: list[FilePicture]) -> None:
    for number, picture in enumerate(pictures):
        write(cache, [picture], seed=number)
    index = cache_index.CacheIndex()
    index.read_new_shards(cache.folder)
    reader = ShardReader(cache.folder, 3 * 512)
    maps = lambda: sum(cache.folder.name in line for line in Path("/proc/self/maps").read_text().splitlines())  # noqa: E731
    before = maps() if Path("/proc/self/maps").exists() else None
    for shard in index.shards * 2:
        latents, whole = reader.read(shard, np.array([0]))
        assert latents.shape == (1, 4, 8, 8) and whole.all()
    if before is not None:
        assert maps() - before == 3
