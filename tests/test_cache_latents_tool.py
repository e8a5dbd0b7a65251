"""tools/cache_latents.py: what it encodes is what training looks for."""

import itertools
import logging
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from library.models.vae import VaeFingerprint
from library.scorer_data import encoding
from library.scorer_data.buckets import BucketConfig
from library.scorer_data.latent_cache import LatentCache, open_cache
from library.scorer_data.records import FilePicture
from library.scorer_training import tasks
from library.settings.cli import run_main
from tests.helpers.processes import run_processes
from tests.helpers.tiny_models import tiny_vae
from tools import cache_latents

ROOT = Path(__file__).resolve().parents[1]
SIZING = ["--resolution", "64", "--no-enable_bucket"]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A VAE, and pictures of which three are rated."""
    folder = tmp_path_factory.mktemp("cache latents")
    tiny_vae().save_pretrained(folder / "vae")
    (folder / "photos" / "sub folder").mkdir(parents=True)
    draw = np.random.default_rng(0)
    for name in ("a.png", "b ü.png", "c.png", "sub folder/d.jpg"):
        Image.fromarray(draw.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(folder / "photos" / name)
    (folder / "photos" / "notes.txt").write_text("none")
    (folder / "photos" / "broken.png").write_bytes(b"")
    (folder / "ratings.csv").write_text("path,score\nphotos/a.png,1\nphotos/b ü.png,2\nphotos/c.png,3\n", encoding="utf-8")
    return folder


def words(workplace: Path, cache_dir: Path, *more: str) -> list[str]:
    return ["--vae", str(workplace / "vae"), "--model_family", "sd1", "--cache_dir", str(cache_dir), "--num_threads", "1", *SIZING, *more]


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["cache_latents.py", *arguments])
    run_main(cache_latents.main)


def cached(workplace: Path, cache_dir: Path) -> LatentCache:
    return open_cache(cache_dir, VaeFingerprint.of(tiny_vae()), BucketConfig(resolution="64", enable_bucket=False))


def found(cache: LatentCache, workplace: Path, variants: tuple[str, ...] = ("",)) -> list[bool]:
    names = ("a.png", "b ü.png", "c.png", "sub folder/d.jpg", "broken.png")
    return (cache.find_all([FilePicture(workplace / "photos" / name) for name in names], variants) >= 0).all(1).tolist()


def test_a_folder_of_pictures(workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    run(monkeypatch, *words(workplace, tmp_path, "--picture_folder", str(workplace / "photos")))
    assert found(cached(workplace, tmp_path), workplace) == [True] * 4 + [False]
    assert "broken.png" in caplog.text and "cannot be read" in caplog.text


def test_the_pictures_that_a_training_would_ask_for(workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(monkeypatch, *words(workplace, tmp_path, "--train_data_file", str(workplace / "ratings.csv"), "--flip_aug", "--crop_variants", "1"))
    cache = cached(workplace, tmp_path)
    assert found(cache, workplace, ("", "flip", "crop:1@0.8")) == [True] * 3 + [False] * 2 and len(cache) == 9


def test_a_cache_can_be_verified(
    workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    arguments = words(workplace, tmp_path, "--train_data_file", str(workplace / "ratings.csv"))
    run(monkeypatch, *arguments)
    [shard] = tmp_path.glob("*/0064x0064*.safetensors")
    latents = cached(workplace, tmp_path).read([1])[0].half().numpy().tobytes()
    content = shard.read_bytes()
    assert content.count(latents) == 1
    shard.write_bytes(content.replace(latents, bytes(len(latents))))
    run(monkeypatch, *arguments, "--verify_cache")
    assert "1 of 3 latents are damaged" in caplog.text
    cache = cached(workplace, tmp_path)
    assert found(cache, workplace) == [True] * 3 + [False] * 2 and cache.verify() == 0


@pytest.mark.skipif(os.name != "posix", reason="POSIX only")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_interrupted_it_keeps_what_is_encoded(
    workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals, code: int
) -> None:
    arguments = words(workplace, tmp_path, "--train_data_file", str(workplace / "ratings.csv"))
    monkeypatch.setattr(tasks, "ENCODED_AT_A_TIME", 1)
    take, taken = encoding._Filler.take, itertools.count(1)

    def take_and_end(self: encoding._Filler, prepared: encoding._Prepared) -> None:
        take(self, prepared)
        if next(taken) == 2:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(encoding._Filler, "take", take_and_end)
    with pytest.raises(SystemExit) as ended:
        run(monkeypatch, *arguments)
    assert ended.value.code == code
    cache = cached(workplace, tmp_path)
    assert len(cache) == 2 and cache.verify() == 0 and not list(cache.folder.glob(".*"))
    run(monkeypatch, *arguments)
    assert found(cached(workplace, tmp_path), workplace) == [True] * 3 + [False] * 2


@pytest.mark.parametrize(
    ("more", "complaint"),
    [
        ([], "train_data_file is not set"),
        (["--picture_folder", "nowhere"], "picture_folder nowhere is not a folder"),
        (["--picture_folder", "none"], "there is no picture in none; pictures end in .jpg"),
        (["--picture_folder", "broken"], "there is no picture that can be encoded in broken"),
        (["--picture_folder", ".", "--crop_variants", "-1"], "crop_variants is -1"),
    ],
)
def test_a_mistake_is_one_sentence(
    workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: Callable[..., str], more: list[str], complaint: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "none").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.png").write_bytes(b"")
    assert complaint in refused(cache_latents.main, *words(workplace, tmp_path / "cache", *more))


@pytest.mark.skipif(os.name != "posix", reason="fork")
def test_two_processes_of_a_launcher(workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = words(workplace, tmp_path, "--picture_folder", str(workplace / "photos"))

    def logged() -> None:
        logging.getLogger().setLevel(logging.INFO)
        logging.getLogger().addHandler(logging.FileHandler(tmp_path / f"process {os.environ['RANK']}.log"))
        run(monkeypatch, *arguments)

    run_processes(2, logged)
    cache = cached(workplace, tmp_path)
    assert found(cache, workplace) == [True] * 4 + [False] and len(cache) == 4
    assert "".join(path.read_text() for path in tmp_path.glob("*.log")).count("holds 4 latents") == 1
    assert len(list(cache.folder.glob("0064x0064*.safetensors"))) == len(set(shares(workplace)))


def shares(workplace: Path) -> list[int]:
    names = ("a.png", "b ü.png", "c.png", "sub folder/d.jpg")
    return [encoding.share_of(str(workplace / "photos" / name), 2) for name in names]
