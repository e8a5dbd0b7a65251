"""Batches of cached latents with what is to be learned about them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from library.scorer_data.latent_cache import CachedLatent, LatentCache


@dataclass(frozen=True)
class LatentBatch:
    """Clean latents [B, C, h, w], targets [B] (float scores, or int64 classes) and weights [B]."""

    latents: Tensor
    targets: Tensor
    weights: Tensor

    def __len__(self) -> int:
        return len(self.latents)

    def to(self, device: torch.device | str) -> "LatentBatch":
        return LatentBatch(self.latents.to(device), self.targets.to(device), self.weights.to(device))


class LatentDataset:
    """Pictures of one split: where their latents are, their targets and their weights.

    Args:
        cache: holds the latents.
        rows: one a picture.
        flipped_rows: the mirrored ones, in the same order, or None to do without.
        targets: [N]. weights: [N].
    """

    def __init__(
        self,
        cache: LatentCache,
        rows: Sequence[CachedLatent],
        targets: Tensor,
        weights: Tensor,
        flipped_rows: Sequence[CachedLatent] | None = None,
    ) -> None:
        assert len(rows) == len(targets) == len(weights) and (flipped_rows is None or len(flipped_rows) == len(rows))
        self.cache, self.rows, self.targets, self.weights, self.flipped_rows = cache, rows, targets, weights, flipped_rows
        groups: dict[tuple[int, int], list[int]] = {}
        for index, row in enumerate(rows):
            groups.setdefault(row.bucket, []).append(index)
        self.buckets = {bucket: torch.tensor(groups[bucket]) for bucket in sorted(groups)}  # indices [n] of each (width, height)

    def __len__(self) -> int:
        return len(self.rows)

    def epoch(self, batch_size: int, generator: torch.Generator) -> Iterator[LatentBatch]:
        """Every picture once, in random order; a batch holds pictures of one bucket, so the last of each bucket may be smaller."""
        batches: list[Tensor] = []
        for indices in self.buckets.values():
            batches += indices[torch.randperm(len(indices), generator=generator)].split(batch_size)
        for position in torch.randperm(len(batches), generator=generator).tolist():
            indices = batches[position]
            mirrored = torch.rand(len(indices), generator=generator) < 0.5
            yield self._batch(indices, mirrored.tolist())

    def endless(self, batch_size: int, generator: torch.Generator) -> Iterator[LatentBatch]:
        """One epoch after another."""
        while True:
            yield from self.epoch(batch_size, generator)

    def in_order(self, batch_size: int) -> Iterator[LatentBatch]:
        """Every picture once, unmirrored, bucket by bucket: for validation."""
        for indices in self.buckets.values():
            for batch in indices.split(batch_size):
                yield self._batch(batch, [False] * len(batch))

    def _batch(self, indices: Tensor, mirrored: Sequence[bool]) -> LatentBatch:
        rows = [
            self.flipped_rows[index] if flip and self.flipped_rows is not None else self.rows[index]
            for index, flip in zip(indices.tolist(), mirrored, strict=True)
        ]
        return LatentBatch(self.cache.read(rows), self.targets[indices], self.weights[indices])
