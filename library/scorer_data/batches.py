"""Batches of cached latents with what is to be learned about them."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from library.errors import UserError
from library.scorer_data.latent_cache import DamagedLatentsError, LatentCache
from library.training.runtime import upload

BLOCK_BYTES = 2**29  # of shards whose latents are shuffled together: 16384 latents of 4 x 64 x 64


@dataclass(frozen=True, kw_only=True)
class LatentBatch:
    """B pictures of one bucket, or B pairs whose first pictures are of one bucket and whose second ones are.

    Attributes:
        latents: clean latents [B, C, h, w], of the first picture of pairs.
        targets: [B, ...], as the criterion has them.
        weights: [B].
        indices: which pictures of their dataset these are [B] int64.
        second: latents of the second pictures [B, C, h2, w2], for pairs.
        prompts: what was asked for, where that is known.
    """

    latents: Tensor
    targets: Tensor
    weights: Tensor
    indices: Tensor
    second: Tensor | None = None
    prompts: tuple[str, ...] | None = None

    def __len__(self) -> int:
        return len(self.latents)

    def to(self, device: torch.device | str) -> "LatentBatch":
        return self._each(lambda tensor: upload(tensor, device))

    def __getitem__(self, rows: slice | Tensor) -> "LatentBatch":
        """These rows of it."""
        chosen = self._each(lambda tensor: tensor[rows])
        if self.prompts is None:
            return chosen
        return dataclasses.replace(chosen, prompts=tuple(self.prompts[place] for place in torch.arange(len(self))[rows].tolist()))

    def _each(self, change: Callable[[Tensor], Tensor]) -> "LatentBatch":
        return dataclasses.replace(self, **{name: change(value) for name, value in vars(self).items() if isinstance(value, Tensor)})


class PackedTags:
    """Which of K tags each of N pictures has, an eighth of a byte each; indexed like a tensor, it gives [B, K] float32 of 0 and 1."""

    def __init__(self, tags: Iterable[tuple[str, ...]], classes: Sequence[str]) -> None:
        self._width = len(classes)
        numbers = {name: number for number, name in enumerate(classes)}
        rows = []
        for own in tags:
            row = np.zeros(self._width, dtype=bool)
            row[[numbers[tag] for tag in own if tag in numbers]] = True
            rows.append(np.packbits(row))
        self._bits = np.stack(rows) if rows else np.zeros((0, (self._width + 7) // 8), dtype=np.uint8)

    def __len__(self) -> int:
        return len(self._bits)

    def take(self, indices: Tensor) -> "PackedTags":
        """The same of these pictures only, in this order."""
        taken = PackedTags((), ())
        taken._width, taken._bits = self._width, self._bits[indices.numpy()]
        return taken

    def __getitem__(self, indices: Tensor | slice) -> Tensor:
        chosen = self._bits[indices if isinstance(indices, slice) else indices.numpy()]
        return torch.from_numpy(np.unpackbits(chosen, axis=1, count=self._width)).float()


class LatentDataset:
    """Pictures, or pairs of them: where their latents are, their targets and their weights.

    Shuffling: if the shards with the pictures take at most BLOCK_BYTES, an epoch is a uniformly random order, cut into batches of one
    bucket. Beyond that, the shards are shuffled and taken in blocks of that size, and pictures are shuffled within their block: that
    bounds what is in memory, and `encode_missing` sees to it that a shard is itself a fair sample of the files.

    A picture whose latent turns out to be damaged is left out from then on; where another variant of it is whole, that stands in.

    Args:
        cache: holds the latents.
        rows: [N, P, V] int64, of each of a pair's pictures (P is 1 or 2) in each variant, -1 where there is none. The first variant is the
            picture as it is; training draws from all of them, of a pair's pictures the same.
        targets: what is to be learned, indexed by a tensor of pictures' numbers [B], which gives [B, ...].
        weights: [N].
        prompts: [N] texts.
    """

    def __init__(self, cache: LatentCache, rows: Tensor, targets: Any, weights: Tensor, prompts: Sequence[str] | None = None) -> None:
        assert len(rows) == len(targets) == len(weights) and bool((rows[..., 0] >= 0).all())
        self.cache, self.targets, self.weights, self.prompts = cache, targets, weights, prompts
        self._rows = rows.clone()
        sizes = torch.cat([cache.buckets_of(part) for part in rows[..., 0].unbind(1)], 1)  # [N, 2 P]
        kinds, self._kind_of = sizes.unique(dim=0, return_inverse=True)
        self.buckets = {tuple(kind): (self._kind_of == number).nonzero().flatten() for number, kind in enumerate(kinds.tolist())}
        """Indices [n] of the pictures of each bucket (width, height); of pairs, (width, height, width, height)."""

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def latent_area(self) -> float:
        """Cells of a latent, the mean over the pictures."""
        return sum(len(own) * kind[0] * kind[1] / 64 for kind, own in self.buckets.items()) / max(len(self), 1)

    def in_order(self, batch_size: int) -> Iterator[LatentBatch]:
        """Every picture once, as it is, bucket by bucket: for validation."""
        for indices in self.buckets.values():
            by_row = indices[self._rows[indices, 0, 0].argsort(stable=True)]  # as they lie on the disk
            for batch in by_row.split(batch_size):
                yield from self.batch(batch, self._rows[batch, :, 0])

    def by_bucket(self, indices: Tensor) -> list[Tensor]:
        """The pictures of `indices` that are of each of the dataset's buckets, in the order of `buckets`."""
        return [indices[self._kind_of[indices] == kind] for kind in range(len(self.buckets))]

    def name_of(self, index: int) -> str:
        """Of a picture, or of a pair's first one, by its number."""
        return self.cache.name_of(int(self._rows[index, 0].max()))

    def blocks(self, generator: torch.Generator) -> list[Tensor]:
        """The pictures' indices in blocks of whole shards, in random order; one block, not shuffled, if all of it is small."""
        shards, sizes = self.cache.shards_of(self._rows[:, 0, 0].clamp_min(0))
        used = shards.unique()
        if int(sizes[used].sum()) <= BLOCK_BYTES:
            return [torch.arange(len(self))]
        used = used[torch.randperm(len(used), generator=generator)]
        place = torch.zeros(len(sizes), dtype=torch.int64)
        place[used] = (sizes[used].cumsum(0) - 1) // BLOCK_BYTES  # of each shard, its block
        block_of = place[shards]
        return list(block_of.argsort(stable=True).split(block_of.bincount().tolist()))

    def draw(self, indices: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Choose a variant of each picture: indices [B] of those that have one left, and rows [B, P]."""
        possible = (self._rows[indices] >= 0).all(1)  # [B, V]
        draws = torch.rand(possible.shape, generator=generator).masked_fill(~possible, -1)
        chosen = self._rows[indices, :, draws.argmax(1)]  # [B, P]
        kept = possible.any(1)
        return indices[kept], chosen[kept]

    def batch(self, indices: Tensor, rows: Tensor) -> Iterator[LatentBatch]:
        """The batch of these pictures in these rows [B, P], without those that are damaged; none if all are."""
        while True:
            kept = (rows >= 0).all(1)
            indices, rows = indices[kept], rows[kept]
            if not len(indices):
                return
            try:
                latents = [self.cache.read(part) for part in rows.unbind(1)]
                break
            except DamagedLatentsError as error:
                damaged = torch.from_numpy(error.rows)
                self._rows[torch.isin(self._rows, damaged)] = -1
                rows = rows.masked_fill(torch.isin(rows, damaged), -1)
        prompts = None if self.prompts is None else tuple(self.prompts[int(index)] for index in indices)
        yield LatentBatch(
            latents=latents[0],
            targets=self.targets[indices],
            weights=self.weights[indices],
            indices=indices,
            second=latents[1] if len(latents) == 2 else None,
            prompts=prompts,
        )


class Epochs:
    """One epoch after another of a dataset's batches: every picture once, in random order; a batch holds pictures of one bucket, so the
    last of each bucket may be smaller. With the generator in the state that it then had, a state goes on at the next batch.

    Args:
        generator: draws the orders and the variants; others may draw from it, too.
    """

    def __init__(self, dataset: LatentDataset, batch_size: int, generator: torch.Generator) -> None:
        self.dataset, self.batch_size, self.generator = dataset, batch_size, generator
        self._blocks: list[Tensor] = []  # of the epoch, still to come
        self._queue: list[Tensor] = []  # batches of the block, still to come
        self._carried: dict[int, Tensor] = {}  # of each bucket, what filled no batch of the blocks before
        self._found = True  # a picture of the epoch that could be read

    def __iter__(self) -> Iterator[LatentBatch]:
        return self

    def __next__(self) -> LatentBatch:
        """Raises UserError when no latent is left whole."""
        while (batch := self.next_of_epoch()) is None:
            if not self._found:
                raise UserError(f"no latent of {self.dataset.cache.folder} can be read; run again to encode the pictures anew")
            self.begin()
        return batch

    def begin(self) -> None:
        """A new epoch."""
        self._blocks, self._found = self.dataset.blocks(self.generator), False

    def next_of_epoch(self) -> LatentBatch | None:
        """The next batch; None at the epoch's end."""
        while self._queue or self._blocks:
            if not self._queue:
                self._queue = self._cut(self._blocks.pop(0))
                continue
            for batch in self.dataset.batch(*self.dataset.draw(self._queue.pop(0), self.generator)):
                self._found = True
                return batch
        return None

    def state_dict(self) -> dict[str, Any]:
        return {"blocks": self._blocks, "queue": self._queue, "carried": self._carried, "found": self._found}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._blocks, self._queue, self._carried = list(state["blocks"]), list(state["queue"]), dict(state["carried"])
        self._found = state["found"]

    def _cut(self, block: Tensor) -> list[Tensor]:
        """A block's batches of one bucket each, in random order."""
        batches: list[Tensor] = []
        for kind, indices in enumerate(self.dataset.by_bucket(block)):
            shuffled = indices[torch.randperm(len(indices), generator=self.generator)]
            queue = torch.cat([self._carried.pop(kind, shuffled[:0]), shuffled]).split(self.batch_size)
            if queue and len(queue[-1]) < self.batch_size and self._blocks:
                self._carried[kind] = queue[-1]
                queue = queue[:-1]
            batches += [batch for batch in queue if len(batch)]
        return [batches[position] for position in torch.randperm(len(batches), generator=self.generator).tolist()]
