"""The files of a latent cache: a shard holds latents of one bucket, what they are of, and a checksum of each.

A shard is a .safetensors file with the tensors

    latents  [N, C, h, w]  float16; float32 where float16 would overflow
    keys     [N, 16]       uint8: see `library.scorer_data.cache_index.latent_key`
    crc32    [N]           int64: of each latent's bytes
    names    [bytes]       uint8: JSON, for people: [[key of the picture, variant], ...]

It is written whole or not at all, and never changed.
"""

import hashlib
import json
import logging
import zlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from library.atomic_files import atomic_save_safetensors
from library.scorer_data.records import FileState

logger = logging.getLogger(__name__)

KEY_DTYPE = np.dtype("S16")
BUCKET_KEY = "leco_score.bucket"


@dataclass(frozen=True, kw_only=True)
class Shard:
    """A shard's file name and its state, the (width, height) in pixels of its bucket, and its number of latents."""

    name: str
    file: FileState
    bucket: tuple[int, int]
    rows: int


def write_shard(folder: Path, bucket: tuple[int, int], keys: np.ndarray, names: Sequence[tuple[str, str]], latents: Tensor) -> Shard:
    """Write latents [N, C, h, w] of one bucket.

    Args:
        keys: [N] of KEY_DTYPE. names: (key of the picture, variant) of each.

    Raises:
        UserError: the disk is full, or the folder cannot be written to. Nothing is left of the shard then.
    """
    stored = latents.detach().cpu().half()
    if not stored.isfinite().all():
        logger.warning("latents of bucket %dx%d exceed what float16 holds (65504); their shard is float32", *bucket)
        stored = latents.detach().cpu().float()
    tensors = {
        "latents": stored.contiguous(),
        "keys": torch.from_numpy(keys.view(np.uint8).reshape(-1, KEY_DTYPE.itemsize).copy()),
        "crc32": torch.tensor(_checksums(stored.contiguous()), dtype=torch.int64),
        "names": torch.from_numpy(np.frombuffer(json.dumps(list(names)).encode(), dtype=np.uint8).copy()),
    }
    # named by what it holds: a process that does the same work again writes the same file
    name = f"{bucket[0]:04d}x{bucket[1]:04d}-{hashlib.sha256(keys.tobytes()).hexdigest()[:16]}.safetensors"
    atomic_save_safetensors(tensors, folder / name, {BUCKET_KEY: f"{bucket[0]},{bucket[1]}"})
    return Shard(name=name, file=FileState.of(folder / name), bucket=bucket, rows=len(stored))


def read_shard(path: Path) -> tuple[Shard, np.ndarray]:
    """A shard's description and its keys [N]. Raises SafetensorError, OSError, KeyError or ValueError if it is none or not whole."""
    state = FileState.of(path)
    with safe_open(path, framework="pt") as file:
        width, height = (file.metadata() or {})[BUCKET_KEY].split(",")
        keys = file.get_tensor("keys").numpy().copy().view(KEY_DTYPE).reshape(-1)
        rows, checksums = (file.get_slice(name).get_shape()[0] for name in ("latents", "crc32"))
    if not len(keys) == rows == checksums:
        raise ValueError(f"it has {rows} latents, {len(keys)} keys and {checksums} checksums")
    return Shard(name=path.name, file=state, bucket=(int(width), int(height)), rows=rows), keys


def read_names(path: Path) -> list[tuple[str, str]]:
    """(Key of the picture, variant) of each latent of a shard."""
    with safe_open(path, framework="pt") as file:
        return [(key, variant) for key, variant in json.loads(file.get_tensor("names").numpy().tobytes())]


def _checksums(latents: Tensor) -> list[int]:
    return [zlib.crc32(row) for row in latents.numpy()]


class ShardReader:
    """Reads rows of memory-mapped shards, of which it keeps the last used ones mapped. They must not be shortened meanwhile.

    Args:
        max_mapped_bytes: bounds what the process holds of the cache. It is clean file memory, which the system takes back when it
            needs it.
    """

    def __init__(self, folder: Path, max_mapped_bytes: int) -> None:
        self.folder, self.max_mapped_bytes = folder, max_mapped_bytes
        self._mapped: OrderedDict[str, tuple[Tensor, Tensor]] = OrderedDict()  # latents (mapped) and checksums by name
        self._mapped_bytes = 0

    def read(self, shard: Shard, rows: np.ndarray) -> tuple[Tensor, np.ndarray]:
        """Copies of rows of a shard [n, C, h, w], and which of them are as they were written [n] bool.

        Raises:
            SafetensorError, OSError, KeyError: the shard is gone or not whole.
        """
        latents, checksums = self._map(shard)
        chosen = torch.from_numpy(rows)
        copies = latents[chosen]  # checked is the copy, which is what will be used
        return copies, np.array(_checksums(copies)) == checksums[chosen].numpy()

    def _map(self, shard: Shard) -> tuple[Tensor, Tensor]:
        if shard.name in self._mapped:
            self._mapped.move_to_end(shard.name)
            return self._mapped[shard.name]
        with safe_open(self.folder / shard.name, framework="pt") as file:
            mapped = file.get_tensor("latents"), file.get_tensor("crc32").clone()
        if len(mapped[0]) != shard.rows or len(mapped[1]) != shard.rows:
            raise SafetensorError(f"it has {len(mapped[0])} latents where it had {shard.rows}")
        self._mapped[shard.name] = mapped
        self._mapped_bytes += mapped[0].nbytes
        while self._mapped_bytes > self.max_mapped_bytes and len(self._mapped) > 1:
            _, (oldest, _) = self._mapped.popitem(last=False)
            self._mapped_bytes -= oldest.nbytes
        return mapped
