"""Latents of pictures on disk, so that a picture is read and encoded once.

A cache is a folder of shards and a `cache.json` that says which VAE and which sizing its latents belong to. A shard is a
.safetensors file with one tensor `latents` [N, C, h, w], float16, of one bucket; its header lists the N pictures, each
with the size and the time of its file, so that a picture that has changed is encoded again. A shard is written whole or
not at all: a run that was killed goes on where its last shard ends. Shards are read memory-mapped, row by row.
"""

import contextlib
import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import safetensors.torch
import torch
from PIL import ImageOps
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

from library.atomic_files import atomic_save_safetensors, atomic_write_text
from library.errors import UserError
from library.models.vae import VaeFingerprint
from library.scorer_data.buckets import BucketConfig, choose_bucket
from library.scorer_data.pictures import cover, picture_size, read_picture, to_pixels

logger = logging.getLogger(__name__)

ENTRIES_KEY = "leco_score.pictures"
SHARD_ROWS = 1024  # what a kill can cost, and a file of 8 MB for 64x64 latents of 4 channels


@dataclass(frozen=True)
class CachedLatent:
    """Where a latent is: a row of a shard, and the (width, height) in pixels of its bucket."""

    shard: Path
    row: int
    bucket: tuple[int, int]


@dataclass(frozen=True)
class _FileState:
    """What tells that a file has not changed since it was encoded."""

    size: int
    mtime_ns: int

    @staticmethod
    def of(path: Path) -> "_FileState":
        status = path.stat()
        return _FileState(status.st_size, status.st_mtime_ns)


class LatentCache:
    """The latents that one VAE makes of pictures sized in one way. Found by (path, whether it is flipped)."""

    def __init__(self, folder: Path) -> None:
        """Open the cache in `folder`; see `open_cache`. Shards that cannot be read count as not there."""
        self.folder = folder
        # The state of the file is in the key: shards are read in no order of age, and an outdated latent must not hide the new one.
        self._entries: dict[tuple[str, bool, _FileState], CachedLatent] = {}
        self._tensors: dict[Path, Tensor] = {}  # memory-mapped: only the rows that are read are ever in memory
        for shard in sorted(folder.glob("*.safetensors")):
            try:
                with safe_open(shard, framework="pt") as file:
                    self._index(shard, (file.metadata() or {})[ENTRIES_KEY])
            except (SafetensorError, OSError, ValueError, KeyError) as error:
                logger.warning("latent cache: %s cannot be read (%s); its pictures are encoded again", shard, error)

    def find(self, path: Path, flipped: bool = False) -> CachedLatent | None:
        """Where the latent of a picture is, or None if it is not cached or the picture's file has changed."""
        return self._entries.get((str(path), flipped, _FileState.of(path)))

    def write(self, bucket: tuple[int, int], pictures: Sequence[tuple[Path, bool]], latents: Tensor) -> None:
        """Add a shard: latents [N, C, h, w] of N (path, flipped), all of one bucket."""
        assert len(pictures) == len(latents)
        entries = [{"path": str(path), "flipped": flipped, **asdict(_FileState.of(path))} for path, flipped in pictures]
        text = json.dumps({"bucket": bucket, "pictures": entries})
        name = f"{bucket[0]:04d}x{bucket[1]:04d}-{hashlib.sha256(text.encode()).hexdigest()[:16]}.safetensors"
        atomic_save_safetensors({"latents": latents.half()}, self.folder / name, {ENTRIES_KEY: text})
        self._index(self.folder / name, text)

    def read(self, rows: Sequence[CachedLatent]) -> Tensor:
        """Latents [N, C, h, w] of rows of one bucket, float32."""
        return torch.stack([self._shard(row.shard)[row.row] for row in rows]).float()

    def _shard(self, path: Path) -> Tensor:
        if path not in self._tensors:
            self._tensors[path] = safetensors.torch.load_file(path)["latents"]
        return self._tensors[path]

    def _index(self, shard: Path, text: str) -> None:
        header = json.loads(text)
        bucket = (int(header["bucket"][0]), int(header["bucket"][1]))
        for row, entry in enumerate(header["pictures"]):
            state = _FileState(entry["size"], entry["mtime_ns"])
            self._entries[entry["path"], entry["flipped"], state] = CachedLatent(shard, row, bucket)


def open_cache(cache_dir: Path, vae: VaeFingerprint, buckets: BucketConfig) -> LatentCache:
    """The cache for this VAE and this sizing within `cache_dir`, new if there is none yet. Raises UserError if it cannot be written."""
    sizing = asdict(buckets)
    for description in sorted(cache_dir.glob("*/cache.json")):
        try:
            stored = json.loads(description.read_text(encoding="utf-8"))
            if stored["buckets"] == sizing and VaeFingerprint.from_dict(stored["vae"]).matches(vae):
                return LatentCache(description.parent)
        except (OSError, ValueError, KeyError, TypeError) as error:
            logger.warning("latent cache: %s cannot be read (%s) and is left alone", description, error)
    text = json.dumps({"vae": vae.to_dict(), "buckets": sizing}, indent=1)
    folder = cache_dir / f"{buckets.width}x{buckets.height}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"
    atomic_write_text(folder / "cache.json", text)
    return LatentCache(folder)


def encode_missing(
    cache: LatentCache,
    paths: Sequence[Path],
    encode: Callable[[Tensor], Tensor],
    buckets: BucketConfig,
    *,
    flips: bool,
    batch_size: int,
    skip_bad_images: bool = False,
) -> list[str]:
    """Fill the cache with what is not in it yet, with a progress bar.

    Args:
        encode: pixels [B, 3, H, W] in -1..1 to scaled latents [B, C, h, w].
        flips: also encode each picture mirrored: a mirrored latent is not the latent of the mirrored picture.
        skip_bad_images: leave out pictures that cannot be read.

    Returns:
        One sentence for each picture left out.

    Raises:
        UserError: naming the picture that cannot be read.
    """
    skipped: list[str] = []
    todo: dict[tuple[int, int], list[tuple[Path, tuple[bool, ...]]]] = {}
    for path in tqdm(paths, desc="Looking through pictures", unit="picture", leave=False):
        missing = tuple(flipped for flipped in ((False, True) if flips else (False,)) if cache.find(path, flipped) is None)
        if missing:
            with _skipping(skipped, skip_bad_images):
                todo.setdefault(choose_bucket(*picture_size(path), buckets), []).append((path, missing))

    with tqdm(total=sum(map(len, todo.values())), desc="Encoding pictures", unit="picture", disable=not todo) as progress:
        for bucket in sorted(todo):
            pending: list[tuple[Path, bool]] = []
            latents: list[Tensor] = []
            for batch in _chunks(todo[bucket], batch_size):
                rows, pictures = [], []
                for path, missing in batch:
                    with _skipping(skipped, skip_bad_images):
                        picture = cover(read_picture(path), bucket)
                        rows += [(path, flipped) for flipped in missing]
                        pictures += [ImageOps.mirror(picture) if flipped else picture for flipped in missing]
                if pictures:
                    latents.append(_encode(encode, to_pixels(pictures), rows))
                    pending += rows
                if len(pending) >= SHARD_ROWS:
                    cache.write(bucket, pending, torch.cat(latents))
                    pending, latents = [], []
                progress.update(len(batch))
            if pending:
                cache.write(bucket, pending, torch.cat(latents))
    return skipped


@torch.no_grad()
def _encode(encode: Callable[[Tensor], Tensor], pixels: Tensor, rows: Sequence[tuple[Path, bool]]) -> Tensor:
    latents = encode(pixels).cpu()
    bad = ~latents.isfinite().flatten(1).all(1)
    if bad.any():
        path = rows[int(bad.nonzero()[0])][0]
        raise UserError(f"the VAE made NaN or infinity of picture {path}; try another VAE file")
    return latents


@contextlib.contextmanager
def _skipping(skipped: list[str], wanted: bool) -> Iterator[None]:
    """Turn a picture's UserError into a line of the report, if that is wanted."""
    try:
        yield
    except UserError as error:
        if not wanted:
            raise
        skipped.append(str(error))


def _chunks(items: Sequence[tuple[Path, tuple[bool, ...]]], size: int) -> Iterator[Sequence[tuple[Path, tuple[bool, ...]]]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
