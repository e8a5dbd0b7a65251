"""Batches out of the latent cache: of one bucket, in random order, in variants, as pairs, and without what is damaged."""

import copy
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from library.errors import UserError
from library.models.vae import VaeFingerprint
from library.scorer_data import batches
from library.scorer_data.batches import Epochs, LatentBatch, LatentDataset
from library.scorer_data.buckets import BucketConfig
from library.scorer_data.latent_cache import LatentCache, open_cache
from library.scorer_data.records import FilePicture

VAE = VaeFingerprint(scaling_factor=0.18215, probe=(0.1, -0.4, 0.9))
VARIANTS = ("", "flip")


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def latent(number: int, bucket: tuple[int, int], variant: str = "") -> Tensor:
    """A latent [4, h, w] that says which picture it is of."""
    return torch.full((4, bucket[1] // 8, bucket[0] // 8), number + (0.5 if variant else 0.0))


def bucket_of(number: int) -> tuple[int, int]:
    return (48, 32) if number % 3 == 0 else (32, 32)


Make = Callable[[int], tuple[LatentCache, list[FilePicture]]]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """A cache of N pictures in two variants, in shards of 4 latents."""

    def run(count: int) -> tuple[LatentCache, list[FilePicture]]:
        cache = open_cache(tmp_path / "cache", VAE, BucketConfig(resolution="48,32", enable_bucket=False))
        pictures = []
        for number in range(count):
            (tmp_path / f"{number}.png").write_bytes(b"x")
            pictures.append(FilePicture(tmp_path / f"{number}.png"))
        for bucket in {bucket_of(number) for number in range(count)}:
            entries = [(number, variant) for number in range(count) if bucket_of(number) == bucket for variant in VARIANTS]
            for start in range(0, len(entries), 4):
                part = entries[start : start + 4]
                names = [(pictures[number], variant) for number, variant in part]
                cache.write(bucket, names, torch.stack([latent(number, bucket, variant) for number, variant in part]))
        return cache, pictures

    return run


def epoch(data: LatentDataset, batch_size: int, generator: torch.Generator) -> Iterator[LatentBatch]:
    epochs = Epochs(data, batch_size, generator)
    epochs.begin()
    while (batch := epochs.next_of_epoch()) is not None:
        yield batch


def dataset(cache: LatentCache, pictures: list[FilePicture], *, flips: bool = False) -> LatentDataset:
    rows = cache.find_all(pictures, VARIANTS)
    numbers = torch.arange(len(pictures)).float()
    prompts = [f"number {number}" for number in range(len(pictures))]
    return LatentDataset(cache, rows[:, None] if flips else rows[:, None, :1], numbers, numbers + 1, prompts)


def numbers(batch: LatentBatch) -> Tensor:
    return batch.latents[:, 0, 0, 0]


def test_an_epoch_holds_every_picture_once_in_batches_of_one_bucket(make: Make) -> None:
    data = dataset(*make(9))
    found = list(epoch(data, 4, rng()))
    assert sorted(len(batch) for batch in found) == [2, 3, 4] and len(data) == 9
    assert sorted(torch.cat([batch.indices for batch in found]).tolist()) == list(range(9))
    for batch in found:
        assert batch.latents.shape[2:] == ((4, 6) if batch.indices[0] % 3 == 0 else (4, 4)) and batch.latents.dtype == torch.float32
        assert torch.equal(numbers(batch), batch.indices.float())
        assert torch.equal(batch.targets, batch.indices.float()) and torch.equal(batch.weights, batch.targets + 1)
        assert batch.prompts == tuple(f"number {index}" for index in batch.indices.tolist()) and batch.second is None
    assert {bucket: indices.tolist() for bucket, indices in data.buckets.items()} == {(48, 32): [0, 3, 6], (32, 32): [1, 2, 4, 5, 7, 8]}


def test_validation_is_every_picture_once_as_it_is(make: Make) -> None:
    found = list(dataset(*make(9), flips=True).in_order(4))
    assert sorted(torch.cat([numbers(batch) for batch in found]).tolist()) == list(range(9))
    assert [len(batch) for batch in found] == [4, 2, 3]


def test_the_same_seed_draws_the_same_batches_and_epochs_differ(make: Make) -> None:
    data = dataset(*make(9), flips=True)
    first, second, other = (
        [numbers(batch).tolist() for _, batch in zip(range(8), Epochs(data, 2, rng(seed)), strict=False)] for seed in (3, 3, 4)
    )
    assert first == second != other
    epochs = [
        sorted(map(sorted, (batch.indices.tolist() for batch in epoch(data, 2, generator)))) for generator in [rng()] for _ in range(5)
    ]
    assert any(epoch != epochs[0] for epoch in epochs)


def test_variants_are_drawn_alike_often(make: Make) -> None:
    data, generator = dataset(*make(9), flips=True), rng()
    drawn = torch.cat([numbers(batch) for _ in range(40) for batch in epoch(data, 4, generator)])
    assert len(drawn) == 360 and 140 < (drawn % 1 == 0.5).sum() < 220
    assert set(drawn.tolist()) == {number + half for number in range(9) for half in (0.0, 0.5)}


def test_a_missing_variant_is_not_drawn(make: Make) -> None:
    cache, pictures = make(6)
    rows = cache.find_all(pictures, VARIANTS)
    rows[::2, 1] = -1
    data = LatentDataset(cache, rows[:, None], torch.arange(6), torch.ones(6))
    drawn = {value for _ in range(10) for batch in epoch(data, 4, rng(_)) for value in numbers(batch).tolist()}
    assert drawn == {0, 1, 1.5, 2, 3, 3.5, 4, 5, 5.5}


def test_pairs_are_flipped_together_and_may_be_of_two_buckets(make: Make) -> None:
    cache, pictures = make(12)
    first, second = cache.find_all(pictures[:6], VARIANTS), cache.find_all(pictures[6:][::-1], VARIANTS)
    data = LatentDataset(cache, torch.stack([first, second], 1), torch.arange(6), torch.ones(6))
    assert set(data.buckets) == {(48, 32, 32, 32), (32, 32, 48, 32), (32, 32, 32, 32)}
    seen = set()
    for seed in range(10):
        for batch in epoch(data, 3, rng(seed)):
            assert batch.second is not None
            others = batch.second[:, 0, 0, 0]
            assert torch.equal(numbers(batch).floor(), batch.indices.float()) and torch.equal(others.floor(), 11.0 - batch.indices)
            assert torch.equal(numbers(batch) % 1, others % 1)
            seen |= set((others % 1).tolist())
    assert seen == {0.0, 0.5}
    plain = torch.cat([batch.second[:, 0, 0, 0] for batch in data.in_order(3) if batch.second is not None])
    assert sorted(plain.tolist()) == list(range(6, 12))


def test_moving_a_batch_moves_all_of_it(make: Make) -> None:
    batch = next(epoch(dataset(*make(9)), 4, rng())).to("meta")
    assert all(value.device.type == "meta" for value in (batch.latents, batch.targets, batch.weights, batch.indices))
    assert len(batch) == batch.indices.shape[0]


# -- more than one block of shards -----------------------------------------------------------------------------------------


def test_blocks_hold_every_picture_once_and_batches_are_full(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, pictures = make(90)
    shard_bytes = max(path.stat().st_size for path in cache.folder.glob("00*.safetensors"))
    monkeypatch.setattr(batches, "BLOCK_BYTES", 6 * shard_bytes)
    data = dataset(cache, pictures)
    orders = []
    for seed in range(3):
        found = list(epoch(data, 8, rng(seed)))
        assert sorted(torch.cat([batch.indices for batch in found]).tolist()) == list(range(90))
        assert sorted(len(batch) for batch in found)[2:] == [8] * (len(found) - 2)  # one smaller at most of each bucket
        assert all(torch.equal(numbers(batch), batch.indices.float()) for batch in found)
        orders.append(torch.cat([batch.indices for batch in found]).tolist())
    assert len({tuple(order) for order in orders}) == 3
    blocks = data.blocks(rng())
    assert len(blocks) >= 6 and all(len(cache.shards_of(data._rows[block, 0, 0])[0].unique()) <= 7 for block in blocks)
    # and the blocks are made of other shards every time
    assert {tuple(block.tolist()) for block in blocks} != {tuple(block.tolist()) for block in data.blocks(rng(1))}


# -- damage ----------------------------------------------------------------------------------------------------------------


def forge(cache: LatentCache, value: float) -> None:
    """Change the latents that are full of this value on the disk."""
    pattern = torch.full((4, 4, 4), value).half().numpy().tobytes()
    for shard in cache.folder.glob("0032x0032*.safetensors"):
        content = shard.read_bytes()
        if pattern in content:
            shard.write_bytes(content.replace(pattern, b"\x01" + pattern[1:]))


def test_a_damaged_picture_is_left_out_and_training_goes_on(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    cache, pictures = make(9)
    data = dataset(cache, pictures)
    forge(cache, 4.0)
    for _ in range(2):
        found = torch.cat([batch.indices for batch in epoch(data, 4, rng())]).tolist()
        assert sorted(found) == [0, 1, 2, 3, 5, 6, 7, 8]
    assert 4 not in torch.cat([batch.indices for batch in data.in_order(4)])
    assert caplog.text.count("is damaged") == 1 and "4.png" in caplog.text


def test_another_variant_stands_in_for_a_damaged_one(make: Make) -> None:
    cache, pictures = make(9)
    data = dataset(cache, pictures, flips=True)
    forge(cache, 4.5)
    drawn = torch.cat([numbers(batch) for seed in range(20) for batch in epoch(data, 4, rng(seed))])
    assert 4.5 not in drawn and (drawn == 4).sum() >= 15


def test_a_pair_goes_with_either_picture(make: Make) -> None:
    cache, pictures = make(12)
    rows = cache.find_all(pictures)
    data = LatentDataset(cache, torch.stack([rows[:6], rows[6:]], 1), torch.arange(6), torch.ones(6))
    forge(cache, 1.0)
    forge(cache, 10.0)
    assert sorted(torch.cat([batch.indices for batch in epoch(data, 2, rng())]).tolist()) == [0, 2, 3, 5]


def test_training_ends_in_a_sentence_when_nothing_is_left(make: Make) -> None:
    cache, pictures = make(3)
    data = dataset(cache, pictures)
    for shard in cache.folder.glob("00*.safetensors"):
        shard.unlink()
    with pytest.raises(UserError, match="no latent of .* can be read"):
        next(Epochs(data, 2, rng()))


def test_a_state_goes_on_at_the_next_batch(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """In an epoch of several blocks, with part of a bucket carried from one to the next."""
    cache, pictures = make(90)
    monkeypatch.setattr(batches, "BLOCK_BYTES", 6 * max(path.stat().st_size for path in cache.folder.glob("00*.safetensors")))
    data, generator = dataset(cache, pictures), rng()
    epochs = Epochs(data, 8, generator)
    while not all(epochs.state_dict().values()):  # blocks, queue and carried
        next(epochs)
    state, drawn = copy.deepcopy(epochs.state_dict()), generator.get_state()
    expected = [next(epochs).indices.tolist() for _ in range(20)]
    again = Epochs(data, 8, rng(1))
    again.load_state_dict(state)
    again.generator.set_state(drawn)
    assert [next(again).indices.tolist() for _ in range(20)] == expected
