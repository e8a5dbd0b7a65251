"""A latent cache of a million latents: how long it takes to open, what memory it holds, how fast it feeds a training.

    OMP_NUM_THREADS=1 python -m benchmarks.latent_cache
    OMP_NUM_THREADS=1 python -m benchmarks.latent_cache --num_latents 100000 --latent_size 64    # as of pictures of 512 pixels

Builds a cache of random latents in three buckets in a temporary folder (2 KiB each and 2 GB in all, by default), in a process of its
own; then opens it as a training does, looks up every picture and reads one epoch of shuffled batches, each latent compared with its
checksum. Beside it stands the speed of training the smallest scorer on this machine. The system's file cache is warm. Writes
results/latent_cache.json and .md, and deletes the cache.
"""

import json
import multiprocessing
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch.nn.functional import mse_loss
from tqdm import tqdm

from benchmarks.step import environment
from library.atomic_files import atomic_write_text
from library.errors import UserError
from library.models.vae import VaeFingerprint
from library.scorer_data.batches import LatentDataset
from library.scorer_data.buckets import BucketConfig
from library.scorer_data.latent_cache import LatentCache, open_cache
from library.scorer_data.records import FileState
from library.scorers.base import ScorerSpec
from library.scorers.registry import build_scorer, preset_architecture
from library.settings.cli import parse_config, run_main
from library.settings.options import check_at_least, option
from library.settings.shared import TrainingConfig
from library.training.runtime import create_accelerator, set_num_threads

VAE = VaeFingerprint(scaling_factor=0.18215, probe=(0.0, 1.0))
SHARD_ROWS = 1024
STATE = FileState(1, 1)


@dataclass(frozen=True, kw_only=True)
class BenchmarkConfig:
    """The cache and the training that are measured."""

    num_latents: int = option(1_000_000, help="Latents in the cache.")
    latent_size: int = option(16, help="Side of a square latent, a multiple of 8: 16 for pictures of 128 pixels, 64 for 512.")
    batch_size: int = option(64, help="Latents in a batch.")
    train_steps: int = option(40, help="Steps of the smallest scorer that are timed; 5 more before warm up.")
    folder: Path | None = option(None, help="Folder for the temporary cache; not set: the system's.")
    output: Path = option(Path("benchmarks/results/latent_cache"), help="Results, without their ending: .json and .md are written.")
    num_threads: int | None = option(None, help="CPU threads for torch; not set: the cores that this process may use.")

    def __post_init__(self) -> None:
        check_at_least(self, 1, "num_latents", "batch_size", "train_steps", "num_threads")
        if self.latent_size < 8 or self.latent_size % 8:
            raise UserError(f"latent_size is {self.latent_size}, but it must be a positive multiple of 8")

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """(height, width) of the latents of the three buckets: square, upright and lying."""
        side = self.latent_size
        return [(side, side), (side * 5 // 4, side * 3 // 4), (side * 3 // 4, side * 5 // 4)]


@dataclass(frozen=True, kw_only=True)
class LatentCacheBenchmarkConfig:
    benchmark: BenchmarkConfig


@dataclass(frozen=True)
class NoPicture:
    """A picture that nobody reads: its latents are there already."""

    number: int

    @property
    def key(self) -> str:
        return f"/pictures/{self.number:08d}.png"

    def state(self) -> FileState:
        return STATE

    def open(self) -> BinaryIO:
        raise OSError("there is no such picture")


@dataclass(frozen=True, kw_only=True)
class Results:
    """Seconds, MiB and latents a second. `anonymous` is memory that only the process can give back; the rest is mapped files."""

    num_latents: int
    latent_size: int
    batch_size: int
    num_shards: int
    cache_gib: float
    write_seconds: float
    open_from_shards_seconds: float
    open_seconds: float
    look_up_seconds: float
    dataset_seconds: float
    epoch_batches: int
    epoch_seconds: float
    latents_per_second: float
    train_latents_per_second: float
    memory: dict[str, dict[str, float]]
    environment: dict[str, Any]


def build(folder: Path, config: BenchmarkConfig) -> None:
    """Fill a new cache with random latents."""
    cache, rng = open_cache(folder, VAE, BucketConfig()), torch.Generator().manual_seed(0)
    for start in tqdm(range(0, config.num_latents, SHARD_ROWS), desc="writing shards"):
        height, width = config.sizes[start // SHARD_ROWS % 3]
        numbers = range(start, min(start + SHARD_ROWS, config.num_latents))
        latents = torch.randn(len(numbers), 4, height, width, generator=rng)
        cache.write((width * 8, height * 8), [(NoPicture(number), "") for number in numbers], latents, [STATE] * len(numbers))


def memory() -> dict[str, float]:
    """MiB that the process has in memory, and the part of it that is its own; Linux only, else empty."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return {}
    values = {
        name: float(rest.split()[0]) / 1024
        for name, _, rest in (line.partition(":") for line in lines)
        if name.startswith("Rss") or name == "VmRSS"
    }
    return {"resident": values["VmRSS"], "anonymous": values["RssAnon"]}


def read_epoch(dataset: LatentDataset, batch_size: int) -> Iterator[int]:
    """Every latent once, shuffled; the size of each batch."""
    for batch in tqdm(
        dataset.epoch(batch_size, torch.Generator().manual_seed(0)), desc="reading batches", total=len(dataset) // batch_size
    ):
        yield len(batch)


def train_speed(config: BenchmarkConfig) -> float:
    """Latents a second of training the smallest scorer on latents that are in memory."""
    torch.manual_seed(0)
    architecture = preset_architecture("latent_resnet", "tiny") | {"in_channels": 4}
    scorer = build_scorer(ScorerSpec(kind="latent_resnet", architecture=architecture, vae=VAE))
    optimizer = torch.optim.AdamW(scorer.parameters())
    latents = torch.randn(config.batch_size, 4, config.latent_size, config.latent_size)
    start = 0.0
    for step in range(config.train_steps + 5):
        if step == 5:
            start = time.perf_counter()
        mse_loss(scorer(latents, torch.rand(config.batch_size)), latents.mean((1, 2, 3))).backward()
        optimizer.step()
        optimizer.zero_grad()
    return config.train_steps * config.batch_size / (time.perf_counter() - start)


def measure(folder: Path, config: BenchmarkConfig, write_seconds: float) -> Results:
    """Use the cache as a training does."""
    resident: dict[str, dict[str, float]] = {"before": memory()}
    clock = Clock()
    cache = open_cache(folder, VAE, BucketConfig())
    clock.lap("open_from_shards")
    cache = open_cache(folder, VAE, BucketConfig())  # by the index that the first one saved
    clock.lap("open")
    resident["open"] = memory()
    rows = cache.find_all(map(NoPicture, range(config.num_latents)))[:, 0]
    assert int(rows.min()) >= 0
    clock.lap("look_up")
    dataset = LatentDataset(cache, rows, torch.zeros(len(rows)), torch.ones(len(rows)))
    clock.lap("dataset")
    resident["dataset"] = memory()

    seen, batches, most = 0, 0, resident["dataset"]
    for size in read_epoch(dataset, config.batch_size):
        seen, batches = seen + size, batches + 1
        if batches % 100 == 0:
            now = memory()
            most = {name: max(value, most[name]) for name, value in now.items()}
    clock.lap("epoch")
    assert seen == config.num_latents
    resident["most in an epoch"] = most
    return Results(
        num_latents=config.num_latents,
        latent_size=config.latent_size,
        batch_size=config.batch_size,
        num_shards=count_shards(cache),
        cache_gib=sum(path.stat().st_size for path in cache.folder.iterdir()) / 2**30,
        write_seconds=write_seconds,
        open_from_shards_seconds=clock.laps["open_from_shards"],
        open_seconds=clock.laps["open"],
        look_up_seconds=clock.laps["look_up"],
        dataset_seconds=clock.laps["dataset"],
        epoch_batches=batches,
        epoch_seconds=clock.laps["epoch"],
        latents_per_second=seen / clock.laps["epoch"],
        train_latents_per_second=train_speed(config),
        memory=resident,
        environment=environment(create_accelerator(TrainingConfig())),
    )


class Clock:
    """Seconds by what they were spent on."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.laps[name], self._last = now - self._last, now


def count_shards(cache: LatentCache) -> int:
    return len(list(cache.folder.glob("[0-9]*.safetensors")))


def table(results: Results) -> str:
    """Markdown."""
    size = results.latent_size
    speed, train = results.latents_per_second, results.train_latents_per_second
    rows = [
        ("latents", f"{results.num_latents:,} of about 4x{size}x{size}, float16, in 3 buckets"),
        ("on disk", f"{results.cache_gib:.2f} GiB in {results.num_shards:,} shards"),
        ("opening, from the index", f"{results.open_seconds:.2f} s"),
        ("opening without it, from the shards' own headers", f"{results.open_from_shards_seconds:.2f} s"),
        ("looking up every picture", f"{results.look_up_seconds:.1f} s"),
        ("making the dataset", f"{results.dataset_seconds:.1f} s"),
        (f"one epoch in batches of {results.batch_size}, checksums compared", f"{results.epoch_seconds:.1f} s, {speed:,.0f} latents/s"),
        ("training the tiny latent_resnet here", f"{train:,.0f} latents/s"),
        ("reading is faster than training by", f"{speed / train:,.0f} x"),
    ]
    rows += [
        (f"memory, {moment}", f"{values['resident']:,.0f} MiB resident, {values['anonymous']:,.0f} MiB of it anonymous")
        for moment, values in results.memory.items()
        if values
    ]
    return "\n".join(["| what | measured |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)]) + "\n"


def main() -> None:
    config = parse_config(LatentCacheBenchmarkConfig, description="Measure a large latent cache: opening, memory, speed.").benchmark
    set_num_threads(config.num_threads)
    folder = Path(tempfile.mkdtemp(prefix="latent_cache_", dir=config.folder))
    try:
        start = time.perf_counter()
        writer = multiprocessing.Process(target=build, args=(folder, config))  # what it allocates is not measured
        writer.start()
        writer.join()
        if writer.exitcode:
            raise UserError(f"the cache could not be built in {folder}; see above, and give another folder")
        results = measure(folder, config, time.perf_counter() - start)
    finally:
        shutil.rmtree(folder)
    atomic_write_text(config.output.with_suffix(".json"), json.dumps(asdict(results), indent=1) + "\n")
    atomic_write_text(config.output.with_suffix(".md"), table(results))
    print(table(results))


if __name__ == "__main__":
    run_main(main)
