"""Which latents a cache has, in 24 bytes each.

A latent's key is a hash of the picture's own key, the variant and the state of its file, so a picture that has changed is simply not
found. Keys stand sorted in one numpy array, and beside each the latent's row: its number when all shards are laid end to end. Rows keep
their number while the index is open.
"""

import hashlib
import logging
from pathlib import Path

import numpy as np
from safetensors import SafetensorError

from library.scorer_data.cache_shards import KEY_DTYPE, Shard, read_shard
from library.scorer_data.records import FileState

logger = logging.getLogger(__name__)


def latent_key(picture_key: str, variant: str, state: FileState) -> bytes:
    """128 bits that stand for a latent: among a billion of them, two are the same with a chance of 1e-21."""
    text = "\0".join((picture_key, variant, str(state.size), str(state.mtime_ns)))
    return hashlib.blake2b(text.encode("utf-8", "surrogateescape"), digest_size=16).digest()


class CacheIndex:
    """Shards and the rows of their latents."""

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

    def read_new_shards(self, folder: Path) -> None:
        """Append the shards of the folder that are not in the index yet, the newest last. Bad ones are left out with a warning."""
        known, found = {shard.name for shard in self.shards}, []
        for path in sorted(folder.glob("*x*-*.safetensors")):
            if path.name not in known:
                try:
                    found.append(read_shard(path))
                except FileNotFoundError:  # deleted just now
                    continue
                except (SafetensorError, OSError, ValueError, KeyError) as error:
                    logger.warning("latent cache: %s cannot be read (%s); delete it; its pictures are encoded again", path, error)
        for shard, keys in sorted(found, key=lambda entry: entry[0].file.mtime_ns):  # of two latents with one key, the newer is taken
            self.add(shard, keys)

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
