"""Filling a latent cache: pictures are read by threads, encoded in batches of one bucket, and written shard by shard."""

from __future__ import annotations

import copy
import hashlib
import logging
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, nullcontext, suppress
from dataclasses import dataclass, field
from threading import Lock

import torch
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from library.errors import UserError
from library.models.vae import Autoencoder, encode_images, move, probe_picture
from library.scorer_data.buckets import BucketConfig, check_crop, choose_bucket
from library.scorer_data.latent_cache import LatentCache
from library.scorer_data.npz_cache import NpzCache
from library.scorer_data.pictures import read_picture, to_pixels
from library.scorer_data.pixel_augmentation import PLAIN, render
from library.scorer_data.records import FilePicture, FileState, Picture, Skipped, SlicePicture
from library.training.runtime import free_cores

logger = logging.getLogger(__name__)

Encode = Callable[[Tensor], Tensor]
Bucket = tuple[int, int]

UNREADABLE = "picture cannot be read"  # the kind of Skipped
IN_ANY_ORDER = (FilePicture, SlicePicture)  # what can be read in any order at the same cost
HALF_TOLERANCE = 0.005
SHARD_ROWS = 1024
SHARD_BYTES = 2**25  # 1024 latents of 4 x 64 x 64, or 256 of 4 x 128 x 128
PENDING_BYTES = 2**28  # of all buckets' shards in the making
WRITE_SECONDS = 300.0  # the longest that an encoded latent waits to be written, which is what a kill can cost
FOUND_AT_A_TIME = 10_000


def make_encoder(vae: Autoencoder, half: torch.dtype | None = None) -> Encode:
    """Pixels [B, 3, H, W] in -1..1 to scaled latents, on the VAE's device.

    On a GPU in half precision (or in `half`), if latents then are the same within HALF_TOLERANCE (relative RMS; the cache rounds
    to 0.0005 by itself). A picture that has no finite latents there is encoded once more in the VAE's own precision.
    """

    def whole(pixels: Tensor) -> Tensor:
        return encode_images(vae, pixels.to(vae.device))

    half = torch.float16 if half is None and vae.device.type == "cuda" else half
    if half is None:
        return whole
    small = copy.deepcopy(vae)
    move(small, dtype=half)
    nn.Module.to(small, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    with torch.no_grad():
        picture = probe_picture(256)
        expected, found = whole(picture), encode_images(small, picture.to(vae.device))
    difference = ((found - expected).square().mean() / expected.square().mean()).sqrt().item()
    if not difference <= HALF_TOLERANCE:
        logger.info("the VAE encodes in float32: in half precision its latents are off by %.2g", difference)
        return whole

    def encode(pixels: Tensor) -> Tensor:
        latents = encode_images(small, pixels.to(vae.device))
        overflown = ~latents.isfinite().flatten(1).all(1)
        if overflown.any():
            latents[overflown] = whole(pixels[overflown.cpu()])
        return latents

    return encode


@dataclass(frozen=True)
class _Job:
    """A picture, the state of its file, and the variants of it that are missing."""

    picture: Picture
    state: FileState
    variants: tuple[str, ...]


@dataclass(frozen=True)
class _Prepared:
    """A picture read: what is to be encoded of it, and what another program has encoded."""

    job: _Job
    bucket: Bucket
    images: dict[str, Image.Image]
    npz: dict[str, Tensor] = field(default_factory=dict)


def encode_missing(
    cache: LatentCache,
    pictures: Iterable[Picture],
    encode: Encode,
    buckets: BucketConfig,
    *,
    variants: Sequence[str] = (PLAIN,),
    batch_size: int,
    process_index: int = 0,
    num_processes: int = 1,
    read_npz: bool = True,
) -> list[Skipped]:
    """Fill the cache with what is not in it yet, with a progress bar.

    Of several processes each takes its share of the pictures, by their keys. Files are taken in a random order that is always the
    same, so that each shard is a fair sample of the pictures however they were sorted; parts of other files come in the order given.

    Args:
        encode: pixels [B, 3, H, W] in -1..1 to scaled latents [B, C, h, w].
        variants: what to encode of each picture; see `PixelAugmentation.names`.
        read_npz: take over what sd-scripts cached beside the pictures, where it is of the same VAE.

    Returns:
        One sentence for each picture that was left out.

    Raises:
        UserError: the cache cannot be written to.
    """
    skipped: list[Skipped] = []
    share = [picture for picture in dict.fromkeys(pictures) if share_of(picture.key, num_processes) == process_index]
    jobs = _missing(cache, share, tuple(variants), skipped)
    jobs.sort(key=lambda job: _order(job.picture.key) if isinstance(job.picture, IN_ANY_ORDER) else 0)
    if not jobs:
        return skipped

    npz = NpzCache(cache.vae.scaling_factor) if read_npz else None
    filler = _Filler(cache, encode, batch_size, npz, skipped)
    progress = tqdm(total=len(jobs), desc="Encoding pictures", unit="picture", disable=process_index != 0)
    threads = max(1, free_cores() // num_processes)
    try:
        with progress, closing(_prepare_all(jobs, buckets, npz, threads)) as everything:
            for prepared in everything:
                if isinstance(prepared, Skipped):
                    skipped.append(prepared)
                else:
                    filler.take(prepared)
                progress.update()
        filler.finish()
    except BaseException:
        with suppress(UserError):  # a full disk is what ended it
            filler.write_all()  # so that what is encoded is not lost
        raise
    return skipped


def _missing(cache: LatentCache, pictures: Sequence[Picture], variants: tuple[str, ...], skipped: list[Skipped]) -> list[_Job]:
    jobs = []
    for start in range(0, len(pictures), FOUND_AT_A_TIME):
        chunk = pictures[start : start + FOUND_AT_A_TIME]
        absent = cache.find_all(chunk, variants) < 0
        for number in absent.any(1).nonzero().flatten().tolist():
            try:
                state = chunk[number].state()  # as it is before it is read: if it changes meanwhile, the latent is outdated, not wrong
            except OSError as error:
                skipped.append(Skipped(f"picture {chunk[number].key} cannot be read: {error.strerror or error}", UNREADABLE))
            else:
                wanted = tuple(variant for variant, is_absent in zip(variants, absent[number].tolist(), strict=True) if is_absent)
                jobs.append(_Job(chunk[number], state, wanted))
    return jobs


def share_of(key: str, num_processes: int) -> int:
    """Which process encodes the picture of that key. It does not depend on what is cached, which processes see at different times."""
    return _order(key) % num_processes


def _order(key: str) -> int:
    """A random number that a key always has."""
    return int.from_bytes(hashlib.blake2b(key.encode("utf-8", "surrogateescape"), digest_size=8).digest(), "big")


def _prepare_all(
    jobs: Sequence[_Job], buckets: BucketConfig, npz: NpzCache | None, threads: int
) -> Generator[_Prepared | Skipped, None, None]:
    """Pictures in order, read by threads: Pillow decodes and resizes without Python's lock."""
    opening_parts = Lock()
    with ThreadPoolExecutor(threads, thread_name_prefix="read_picture") as pool:
        reading: deque[Future[_Prepared | Skipped]] = deque()
        try:
            for job in jobs:
                reading.append(pool.submit(_prepare, job, buckets, npz, opening_parts))
                if len(reading) > 4 * threads:
                    yield reading.popleft().result()
            while reading:
                yield reading.popleft().result()
        finally:
            for future in reading:
                future.cancel()


def _prepare(job: _Job, buckets: BucketConfig, npz: NpzCache | None, opening_parts: Lock) -> _Prepared | Skipped:
    # a cell of a parquet file costs its whole row group, which its reader keeps: once, and not once for each thread
    opening = nullcontext() if isinstance(job.picture, IN_ANY_ORDER) else opening_parts
    try:
        picture = read_picture(job.picture, opening)
    except UserError as error:
        return Skipped(str(error), UNREADABLE)
    bucket = choose_bucket(*picture.size, buckets)
    try:
        check_crop(job.picture.key, picture.size, bucket, buckets)
    except UserError as error:
        return Skipped(str(error), "picture is longer than max_crop allows")
    cached = {} if npz is None else npz.find(job.picture, job.state, bucket, job.variants)
    to_encode = [variant for variant in job.variants if variant not in cached or npz is None or not npz.trusted]
    images = {variant: render(picture, bucket, variant, job.picture.key) for variant in to_encode}
    return _Prepared(job, bucket, images, cached)


class _Filler:
    """Batches of pictures and shards of latents in the making, for each bucket."""

    def __init__(self, cache: LatentCache, encode: Encode, batch_size: int, npz: NpzCache | None, skipped: list[Skipped]) -> None:
        self.cache, self.encode, self.batch_size, self.npz, self.skipped = cache, encode, batch_size, npz, skipped
        self._batches: dict[Bucket, list[tuple[_Job, str, Image.Image]]] = {}
        self._pending: dict[Bucket, list[tuple[_Job, str, Tensor]]] = {}
        self._last_write = time.monotonic()

    def take(self, prepared: _Prepared) -> None:
        """Encode a picture, soon."""
        job, bucket = prepared.job, prepared.bucket
        images = dict(prepared.images)
        if self.npz is not None and prepared.npz:
            if self.npz.trusted is None:
                variant = next(iter(prepared.npz))
                self.npz.compare(prepared.npz[variant], self._encode([images[variant]])[0], job.picture)
            if self.npz.trusted:
                for variant, latents in prepared.npz.items():
                    images.pop(variant, None)
                    self._keep(bucket, job, variant, latents)
        batch = self._batches.setdefault(bucket, [])
        batch += [(job, variant, image) for variant, image in images.items()]
        while len(batch) >= self.batch_size:
            self._encode_batch(bucket, batch[: self.batch_size])
            del batch[: self.batch_size]

    def finish(self) -> None:
        """Encode and write all that was taken."""
        for bucket, batch in self._batches.items():
            if batch:
                self._encode_batch(bucket, batch)
        self.write_all()

    def write_all(self) -> None:
        """Write all that was encoded."""
        for bucket in list(self._pending):
            self._write(bucket)
        self._last_write = time.monotonic()

    def _encode_batch(self, bucket: Bucket, batch: Sequence[tuple[_Job, str, Image.Image]]) -> None:
        latents = self._encode([image for _, _, image in batch])
        finite = latents.isfinite().flatten(1).all(1).tolist()
        for (job, variant, _), row, is_finite in zip(batch, latents, finite, strict=True):
            if is_finite:
                self._keep(bucket, job, variant, row)
            else:
                reason = f"picture {job.picture.key}: the VAE makes NaN or infinity of it; try another VAE file"
                self.skipped.append(Skipped(reason, "the VAE makes NaN or infinity of the picture"))

    @torch.no_grad()
    def _encode(self, images: Sequence[Image.Image]) -> Tensor:
        return self.encode(to_pixels(images)).float().cpu()

    def _keep(self, bucket: Bucket, job: _Job, variant: str, latents: Tensor) -> None:
        rows = self._pending.setdefault(bucket, [])
        rows.append((job, variant, latents))
        if len(rows) >= SHARD_ROWS or len(rows) * latents.numel() * 2 >= SHARD_BYTES:
            self._write(bucket)
        elif sum(len(rows) * rows[0][2].nbytes for rows in self._pending.values()) >= PENDING_BYTES:
            self._write(max(self._pending, key=lambda bucket: len(self._pending[bucket])))
        elif time.monotonic() - self._last_write >= WRITE_SECONDS:
            self.write_all()

    def _write(self, bucket: Bucket) -> None:
        rows = self._pending.pop(bucket)
        pictures = [(job.picture, variant) for job, variant, _ in rows]
        self.cache.write(bucket, pictures, torch.stack([latents for _, _, latents in rows]), [job.state for job, _, _ in rows])
