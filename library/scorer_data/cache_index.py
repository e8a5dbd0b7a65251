"""Which latents a cache has, in 24 bytes each.

A latent's key is a hash of the picture's own key, the variant and the state of its file, so a picture that has changed is simply not
found. Keys stand sorted in one numpy array, and beside each the latent's row: its number when all shards are laid end to end. Rows keep
their number while the index is open.

The index is saved as one file, which is only a copy of what the shards say: it is believed for shards that still have the size and the
time that it recorded, and without it the shards are read one by one.
"""

import contextlib
import hashlib
import json
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import safetensors.numpy
from safetensors import SafetensorError, safe_open

from library.atomic_files import atomic_write_bytes
from library.errors import UserError
from library.scorer_data.cache_shards import KEY_DTYPE, Shard, read_shard
from library.scorer_data.records import FileState

logger = logging.getLogger(__name__)

INDEX_NAME = "index.safetensors"


def latent_key(picture_key: str, variant: str, state: FileState) -> bytes:
    """128 bits that stand for a latent: among a billion of them, two are the same with a chance of 1e-21."""
    text = "\0".join((picture_key, variant, str(state.size), str(state.mtime_ns)))
    return hashlib.blake2b(text.encode("utf-8", "surrogateescape"), digest_size=16).digest()


def list_shards(folder: Path) -> dict[str, FileState]:
    """The shards in a folder, by file name."""
    files = {}
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.endswith(".safetensors") and entry.name != INDEX_NAME:
                with contextlib.suppress(FileNotFoundError):  # deleted just now
                    files[entry.name] = FileState.of(Path(entry.path))
    return files


class CacheIndex:
    """Shards and the rows of their latents. Made by `open_index`."""

    def __init__(self) -> None:
        self.shards: list[Shard] = []
        self.first_rows = np.zeros(1, dtype=np.int64)  # [S + 1]: of each shard, and the number of rows
        self._keys = np.zeros(0, dtype=KEY_DTYPE)  # sorted
        self._rows = np.zeros(0, dtype=np.int64)
        self._added: list[tuple[np.ndarray, np.ndarray]] = []  # not sorted in yet

    def __len__(self) -> int:
        self._sort_in()
        return len(self._keys)

    def add(self, shard: Shard, keys: np.ndarray) -> None:
        """Append a shard of these keys [N]."""
        first = self.first_rows[-1]
        self.shards.append(shard)
        self.first_rows = np.append(self.first_rows, first + shard.rows)
        self._added.append((keys, np.arange(first, first + shard.rows)))

    def look_up(self, keys: np.ndarray) -> np.ndarray:
        """Rows [N] int64 of keys [N], -1 where there is none."""
        self._sort_in()
        if not len(self._keys):
            return np.full(len(keys), -1)
        places = np.searchsorted(self._keys, keys).clip(max=len(self._keys) - 1)
        return np.where(self._keys[places] == keys, self._rows[places], -1)

    def rows(self) -> np.ndarray:
        """The rows of all latents that can be found, in order."""
        self._sort_in()
        return np.sort(self._rows)

    def forget(self, rows: np.ndarray) -> None:
        """Do not find these rows any more."""
        self._sort_in()
        known = ~np.isin(self._rows, rows)
        self._keys, self._rows = self._keys[known], self._rows[known]

    def shards_of(self, rows: np.ndarray) -> np.ndarray:
        """Numbers of the shards [N] that rows [N] are in."""
        return np.searchsorted(self.first_rows, rows, side="right") - 1

    def read_new_shards(self, folder: Path) -> int:
        """Append the shards of the folder that are not in the index yet, and return their number. Bad ones are left out with a warning."""
        known = {shard.name for shard in self.shards}
        count = 0
        for name in sorted(list_shards(folder).keys() - known):
            try:
                self.add(*read_shard(folder / name))
                count += 1
            except (SafetensorError, OSError, ValueError, KeyError) as error:
                logger.warning("latent cache: %s cannot be read (%s); delete it; its pictures are encoded again", folder / name, error)
        return count

    def save(self, folder: Path) -> None:
        """Write the copy that makes opening quick. A folder that cannot be written to does without."""
        self._sort_in()
        tensors = {
            "keys": self._keys.view(np.uint8).reshape(-1, KEY_DTYPE.itemsize),
            "rows": self._rows,
            "files": np.array([(shard.file.size, shard.file.mtime_ns) for shard in self.shards], dtype=np.int64).reshape(-1, 2),
            "buckets": np.array([shard.bucket for shard in self.shards], dtype=np.int64).reshape(-1, 2),
            "counts": np.array([shard.rows for shard in self.shards], dtype=np.int64),
        }
        names = json.dumps([shard.name for shard in self.shards])
        with contextlib.suppress(UserError):
            written = safetensors.numpy.save(tensors, {"names": names, "checksum": _checksum(names, tensors)})
            atomic_write_bytes(folder / INDEX_NAME, written)

    def _sort_in(self) -> None:
        if not self._added:
            return
        keys = np.concatenate([self._keys, *(keys for keys, _ in self._added)])
        rows = np.concatenate([self._rows, *(rows for _, rows in self._added)])
        self._added.clear()
        order = np.argsort(keys, kind="stable")
        keys, rows = keys[order], rows[order]
        newest = np.append(keys[1:] != keys[:-1], True)  # two processes may have encoded the same picture
        self._keys, self._rows = keys[newest], rows[newest]


def open_index(folder: Path) -> CacheIndex:
    """The index of a folder of shards, from its saved copy as far as that still holds, and from the shards for the rest."""
    index, present = CacheIndex(), list_shards(folder)
    if (folder / INDEX_NAME).exists():
        try:
            index = _saved(folder, present)
        except (SafetensorError, OSError, ValueError, KeyError) as error:
            logger.warning("latent cache: %s cannot be read (%s) and is made again", folder / INDEX_NAME, error)
    if index.read_new_shards(folder):
        index.save(folder)
    return index


def _saved(folder: Path, present: Mapping[str, FileState]) -> CacheIndex:
    """What the saved index says of the shards that are as it knew them."""
    with safe_open(folder / INDEX_NAME, framework="numpy") as file:
        metadata, tensors = file.metadata() or {}, {name: file.get_tensor(name) for name in ("keys", "rows", "files", "buckets", "counts")}
    if metadata["checksum"] != _checksum(metadata["names"], tensors):
        raise ValueError("its checksum is another")
    names: Sequence[str] = json.loads(metadata["names"])
    keys = tensors.pop("keys").view(KEY_DTYPE).reshape(-1)
    rows, files, buckets, counts = tensors.values()
    shards = [
        Shard(name=name, file=FileState(int(size), int(mtime)), bucket=(int(width), int(height)), rows=int(count))
        for name, (size, mtime), (width, height), count in zip(names, files, buckets, counts, strict=True)
    ]
    valid = np.array([present.get(shard.name) == shard.file for shard in shards], dtype=bool)
    old_first = np.append(0, np.cumsum(counts))
    new_first = np.append(0, np.cumsum(counts * valid))
    shard_of_row = np.searchsorted(old_first, rows, side="right") - 1
    kept = valid[shard_of_row]

    index = CacheIndex()
    index.shards = [shard for shard, is_valid in zip(shards, valid, strict=True) if is_valid]
    index.first_rows = np.append(0, np.cumsum(counts[valid])).astype(np.int64)
    index._keys = keys[kept]
    index._rows = (rows - old_first[shard_of_row] + new_first[shard_of_row])[kept]
    return index


def _checksum(names: str, tensors: Mapping[str, np.ndarray]) -> str:
    digest = hashlib.sha256(names.encode())
    for name in sorted(tensors):
        digest.update(tensors[name].tobytes())
    return digest.hexdigest()
