"""Tiny sources of rated pictures, and reading them."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from PIL import Image

from library.scorer_data.readers.base import ReaderOptions
from library.scorer_data.readers.recognition import read_records
from library.scorer_data.records import RatedImage, RatedPair, Skipped


def add_pictures(folder: Path, names: Iterable[str]) -> None:
    """A picture for each name, each with a grey of its own, in folders that are made where they are missing."""
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        suffix = Path(name).suffix.lower()
        Image.new("RGB", (4, 4), (number % 256,) * 3).save(folder / name, format="JPEG" if suffix in (".jpg", ".jpeg") else "PNG")


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def read(
    path: Path, reader: str = "auto", *, target: str = "score", image_dir: Path | None = None, **keys: Any
) -> tuple[list[RatedImage], list[Skipped]]:
    """All that a source holds, with keys as in a dataset.toml; and every picture can be opened."""
    found = list(read_records(path, reader, ReaderOptions.of(keys, target=target, image_dir=image_dir)))
    images = [record for record in found if isinstance(record, RatedImage)]
    for image in images:
        Image.open(image.picture.open()).load()
        assert image.picture.state().size > 0
    return images, [record for record in found if isinstance(record, Skipped)]


def read_pairs(path: Path, reader: str = "auto", *, image_dir: Path | None = None, **keys: Any) -> tuple[list[RatedPair], list[Skipped]]:
    found = list(read_records(path, reader, ReaderOptions.of(keys, target="pair", image_dir=image_dir)))
    return [record for record in found if isinstance(record, RatedPair)], [record for record in found if isinstance(record, Skipped)]


def counts(skipped: Iterable[Skipped]) -> dict[str, int]:
    """How many were left out, by kind."""
    total: dict[str, int] = {}
    for record in skipped:
        total[record.kind] = total.get(record.kind, 0) + record.count
    return total
