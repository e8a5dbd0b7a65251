"""Latents of pictures on disk, so that a picture is read and encoded once.

A cache is a folder of shards (see `library.scorer_data.cache_shards`) and a `cache.json` that says which VAE and which sizing its
latents belong to. Any number of processes may write to it at once. Shards are whole or not there: a run that was killed goes on where
its last shard ends. Latents are read memory-mapped and compared with their checksums; one that is damaged is never used.
"""

import contextlib
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from itertools import count, islice
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor

from library.atomic_files import atomic_write_text, refused, remove_unfinished, unfinished_name
from library.errors import UserError
from library.models.vae import VaeFingerprint
from library.scorer_data.buckets import BucketConfig
from library.scorer_data.cache_index import CacheIndex, latent_key
from library.scorer_data.cache_shards import KEY_DTYPE, ShardReader, read_names, write_shard
from library.scorer_data.records import FileState, Picture

logger = logging.getLogger(__name__)

FORMAT = 2  # of the shards
DESCRIPTION_NAME = "cache.json"
DAMAGED_NAME = "damaged.txt"  # lines "shard row"
MAX_MAPPED_BYTES = 3 * 2**28  # a block of `library.scorer_data.batches`, and half as much for pairs and late variants
LOOKED_UP_AT_A_TIME = 2**14
OTHER_MACHINES = 600.0  # seconds after which what no process here is writing is taken to be left over: writing a shard takes a few


class DamagedLatentsError(Exception):
    """Some of the latents to be read are not what was written. The cache has forgotten them: the next run encodes them again.

    Attributes:
        rows: of the damaged ones.
    """

    def __init__(self, rows: np.ndarray) -> None:
        super().__init__(f"{len(rows)} latents are damaged")
        self.rows = rows


class LatentCache:
    """The latents that one VAE makes of pictures sized in one way. Found by picture and variant, then known by their row number."""

    def __init__(self, folder: Path, vae: VaeFingerprint) -> None:
        """Open the cache in `folder`; see `open_cache`. Shards that cannot be read count as not there."""
        self.folder, self.vae = folder, vae
        remove_unfinished(folder, r".+\.safetensors", older_than=OTHER_MACHINES)
        self._index = CacheIndex()
        self.refresh()
        self._reader = ShardReader(folder, MAX_MAPPED_BYTES)
        self._forget_damaged()

    def __len__(self) -> int:
        return len(self._index)

    def find_all(self, pictures: Iterable[Picture], variants: Sequence[str] = ("",)) -> Tensor:
        """Rows [N, V] int64 of N pictures in V variants, -1 where one is not cached, or its file has changed or is gone."""
        remaining, parts = iter(pictures), [np.zeros(0, dtype=np.int64)]
        while chunk := list(islice(remaining, LOOKED_UP_AT_A_TIME)):
            keys = [key for picture in chunk for key in _keys_of(picture, variants)]
            parts.append(self._index.look_up(np.array(keys, dtype=KEY_DTYPE)))
        return torch.from_numpy(np.concatenate(parts)).reshape(-1, len(variants))

    def buckets_of(self, rows: Tensor) -> Tensor:
        """(width, height) in pixels of the buckets [N, 2] of rows [N]."""
        buckets = np.array([shard.bucket for shard in self._index.shards], dtype=np.int64).reshape(-1, 2)
        return torch.from_numpy(buckets[self._index.shards_of(rows.numpy())])

    def shards_of(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Numbers of the shards [N] that rows [N] are in, and the size in bytes of every shard [S]."""
        sizes = torch.tensor([shard.file.size for shard in self._index.shards], dtype=torch.int64)
        return torch.from_numpy(self._index.shards_of(rows.numpy())), sizes

    def refresh(self) -> None:
        """See what other processes have written meanwhile. Rows keep their numbers."""
        self._index.read_new_shards(self.folder)

    def write(
        self,
        bucket: tuple[int, int],
        pictures: Sequence[tuple[Picture, str]],
        latents: Tensor,
        states: Sequence[FileState] | None = None,
    ) -> None:
        """Add a shard: latents [N, C, h, w] of N (picture, variant), all of one bucket.

        Args:
            states: of the pictures' files when they were read; now, if not given.

        Raises:
            UserError: it cannot be written; nothing is left of it then.
        """
        assert len(pictures) == len(latents) > 0
        states = [picture.state() for picture, _ in pictures] if states is None else states
        keys = [latent_key(picture.key, variant, state) for (picture, variant), state in zip(pictures, states, strict=True)]
        key_array = np.array(keys, dtype=KEY_DTYPE)
        names = [(picture.key, variant) for picture, variant in pictures]
        self._index.add(write_shard(self.folder, bucket, key_array, names, latents), key_array)

    def read(self, rows: Sequence[int] | np.ndarray | Tensor) -> Tensor:
        """Latents [N, C, h, w] of rows of one bucket, float32.

        Raises:
            DamagedLatentsError: naming the rows whose latents are damaged or gone. Read the others by a second call.
        """
        wanted = np.asarray(rows, dtype=np.int64)
        shard_numbers = self._index.shards_of(wanted)
        latents, damaged = None, []
        for number in np.unique(shard_numbers):
            places = np.flatnonzero(shard_numbers == number)
            own_rows = wanted[places] - self._index.first_rows[number]
            try:
                copies, whole = self._reader.read(self._index.shards[number], own_rows)
            except (SafetensorError, OSError, KeyError) as error:
                logger.warning("latent cache: %s cannot be read: %s", self.folder / self._index.shards[number].name, error)
                damaged.append(wanted[places])
                continue
            damaged.append(wanted[places][~whole])
            if latents is None:
                latents = torch.empty((len(wanted), *copies.shape[1:]))
            latents[torch.from_numpy(places)] = copies.float()
        bad = np.unique(np.concatenate(damaged))
        if len(bad):
            self._report_damaged(bad)
            raise DamagedLatentsError(bad)
        assert latents is not None
        return latents

    def name_of(self, row: int) -> str:
        """What is known of the picture of a row, for messages."""
        number = int(self._index.shards_of(np.array(row)))
        with contextlib.suppress(SafetensorError, OSError, KeyError, ValueError, IndexError):
            return f"picture {read_names(self.folder / self._index.shards[number].name)[row - int(self._index.first_rows[number])][0]}"
        return "a picture without a name"

    def verify(self) -> int:
        """Read everything that can be found, report and forget what is damaged, and return how much that is."""
        rows, damaged = self._index.rows(), 0
        for part in np.split(rows, np.flatnonzero(np.diff(self._index.shards_of(rows))) + 1):  # shard by shard
            try:
                if len(part):
                    self.read(part)
            except DamagedLatentsError as error:
                damaged += len(error.rows)
        return damaged

    def _report_damaged(self, rows: np.ndarray) -> None:
        """Say so, and remember it for the next run."""
        lines = []
        for row, number in zip(rows, self._index.shards_of(rows), strict=True):
            shard, own_row = self._index.shards[number], int(row - self._index.first_rows[number])
            logger.warning(
                "latent cache: row %d of %s (%s) is damaged; it is left out, and encoded again by the next run",
                own_row,
                shard.name,
                self.name_of(int(row)),
            )
            lines.append(f"{shard.name} {own_row}\n")
        with contextlib.suppress(OSError), (self.folder / DAMAGED_NAME).open("a", encoding="utf-8") as file:
            file.write("".join(lines))
        self._index.forget(rows)

    def _forget_damaged(self) -> None:
        """Do not find what an earlier run found damaged."""
        with contextlib.suppress(FileNotFoundError):
            first_rows = dict(zip((shard.name for shard in self._index.shards), self._index.first_rows.tolist(), strict=False))
            rows = []
            for line in (self.folder / DAMAGED_NAME).read_text(encoding="utf-8").splitlines():
                name, _, row = line.partition(" ")
                if name in first_rows and row.isdecimal():
                    rows.append(first_rows[name] + int(row))
            self._index.forget(np.array(rows, dtype=np.int64))


def _keys_of(picture: Picture, variants: Sequence[str]) -> list[bytes]:
    """A key for each variant; of a picture that is gone, keys that nothing has."""
    try:
        state = picture.state()
    except OSError:
        return [b""] * len(variants)
    return [latent_key(picture.key, variant, state) for variant in variants]


def open_cache(cache_dir: Path, vae: VaeFingerprint, buckets: BucketConfig) -> LatentCache:
    """The cache for this VAE and this sizing within `cache_dir`, new if there is none yet. Several processes may call it at once.

    Raises:
        UserError: it cannot be written to.
    """
    sizing = {**asdict(buckets), "min_bucket_reso": buckets.shortest, "max_bucket_reso": buckets.longest}
    del sizing["max_crop"]  # which pictures, not how they are sized
    text = json.dumps({"format": FORMAT, "vae": vae.to_dict(), "buckets": sizing}, indent=1)
    remove_unfinished(cache_dir, r"\d+x\d+-[0-9a-f]{8}-\d+", older_than=OTHER_MACHINES)
    for description in cache_dir.glob(f"[!.]*/{DESCRIPTION_NAME}"):  # hidden ones are another process's, who takes them away again
        with contextlib.suppress(FileNotFoundError):
            if b'"format"' not in description.read_bytes():
                logger.info("latent cache: %s is of an earlier version and is not used; it can be deleted", description.parent)
    identity = hashlib.sha256(json.dumps([FORMAT, vae.scaling_factor, sizing]).encode()).hexdigest()[:8]
    for number in count(1):  # VAEs whose latents have one scale are distinguished by their probes alone
        folder = cache_dir / f"{buckets.width}x{buckets.height}-{identity}-{number}"
        if not (folder / DESCRIPTION_NAME).is_file():
            _make_folder(folder, text)
        try:
            if VaeFingerprint.from_dict(json.loads((folder / DESCRIPTION_NAME).read_text(encoding="utf-8"))["vae"]).matches(vae):
                return LatentCache(folder, vae)
        except (OSError, ValueError, KeyError, TypeError) as error:
            logger.warning("latent cache: %s cannot be read (%s); delete its folder", folder / DESCRIPTION_NAME, error)
    raise AssertionError("unreachable")


def _make_folder(folder: Path, description: str) -> None:
    """Make a cache's folder with its description, both at once, unless another process was quicker."""
    unfinished = unfinished_name(folder)
    with refused(folder.parent):
        atomic_write_text(unfinished / DESCRIPTION_NAME, description)
    try:
        os.rename(unfinished, folder)
    except OSError as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        if not (folder / DESCRIPTION_NAME).is_file():
            raise UserError(
                f"the latent cache {folder} cannot be made ({error.strerror}); delete it or choose another cache_dir"
            ) from error
