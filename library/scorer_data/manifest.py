"""Lists of rated pictures: one row each with `path`, `score` and optionally `prompt`, `weight`, `split`, `label`."""

import csv
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from library.errors import UserError

SPLITS = ("train", "val", "test")  # test rows are neither trained on nor validated with


@dataclass(frozen=True, kw_only=True)
class RatedImage:
    """One row.

    Attributes:
        path: where the picture is, absolute.
        name: the path as the file has it, with forward slashes: the same on every machine.
        line: in the file, from 1.
        score: finite; None if the file has no scores.
        label: class; None if the file has none.
        prompt: what was asked for when the picture was made.
        weight: in the loss, relative to the others; above 0.
        split: one of SPLITS, or None to let the run decide.
    """

    path: Path
    name: str
    line: int
    score: float | None = None
    label: str | None = None
    prompt: str = ""
    weight: float = 1.0
    split: str | None = None


@dataclass(frozen=True)
class Manifest:
    """The rows that can be used, and one sentence for each that cannot."""

    images: list[RatedImage]
    skipped: list[str] = field(default_factory=list)


def read_manifest(
    path: str | Path, image_dir: str | Path | None = None, *, target: str = "score", skip_bad_images: bool = False
) -> Manifest:
    """Read a list of rated pictures.

    Args:
        path: a .csv, .tsv or .jsonl file in UTF-8; columns that are not known are ignored.
        image_dir: what the paths in it are relative to; the file's own folder if not given.
        target: the column that every row must have: "score" or "label".
        skip_bad_images: report rows whose picture is missing, or is listed before, instead of raising.

    Raises:
        UserError: naming the line, when anything in the file is not as it must be.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"there is no data file {path}; give a .csv, .tsv or .jsonl file with the columns path and {target}")
    if path.suffix.lower() not in MANIFEST_FORMATS:
        raise UserError(f"data file {path} ends in {path.suffix!r}; it can be {', '.join(MANIFEST_FORMATS)}")
    folder = Path(image_dir) if image_dir else path.parent
    if not folder.is_dir():
        raise UserError(f"image_dir {folder} is not a folder")

    images: list[RatedImage] = []
    skipped: list[str] = []
    lines: dict[Path, int] = {}
    try:
        for line, row in MANIFEST_FORMATS[path.suffix.lower()](path, ("path", target)):
            image = _parse_row(row, folder, f"{path}, line {line}", line, target)
            complaint = None
            if image.path in lines:
                complaint = f"{path}, line {line}: picture {image.name} is on line {lines[image.path]} already; list each picture once"
            elif not image.path.is_file():
                complaint = f"{path}, line {line}: there is no picture {image.path}; paths are relative to {folder}"
            if complaint is None:
                lines[image.path] = line
                images.append(image)
            elif skip_bad_images:
                skipped.append(complaint)
            else:
                raise UserError(complaint)
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} cannot be read as {path.suffix} text in UTF-8: {error}") from error
    if not images:
        raise UserError(f"{path} lists no pictures" + (f" that can be used: {skipped[0]}" if skipped else ""))
    return Manifest(images, skipped)


def split_images(images: Sequence[RatedImage], validation_split: float) -> tuple[list[RatedImage], list[RatedImage]]:
    """Part training from validation pictures: by their `split`, else by a hash of their name.

    The hash makes the choice the same in every run and on every machine, and leaves old pictures where they were when new ones are added.
    """
    train: list[RatedImage] = []
    validation: list[RatedImage] = []
    for image in images:
        if image.split == "train" or (image.split is None and name_fraction(image.name) >= validation_split):
            train.append(image)
        elif image.split != "test":
            validation.append(image)
    return train, validation


def name_fraction(name: str) -> float:
    """A number in 0..1 that depends on the name alone, evenly spread over names."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64


def _read_table(path: Path, needed: Sequence[str], delimiter: str) -> Iterator[tuple[int, dict[str, Any]]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, delimiter=delimiter, strict=True)
        columns = [(column or "").strip().lower() for column in reader.fieldnames or ()]
        if not columns:
            raise UserError(f"{path} is empty; its first line must name the columns {' and '.join(needed)}")
        _require(columns, needed, f"{path}, line 1")
        reader.fieldnames = columns
        for row in reader:
            if None in row or None in row.values():
                raise UserError(f"{path}, line {reader.line_num}: line 1 has {len(columns)} columns and this line has not; quote texts")
            yield reader.line_num, row


def _read_csv(path: Path, needed: Sequence[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    return _read_table(path, needed, ",")


def _read_tsv(path: Path, needed: Sequence[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    return _read_table(path, needed, "\t")


def _read_jsonl(path: Path, needed: Sequence[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    with path.open(encoding="utf-8-sig") as file:
        for number, text in enumerate(file, start=1):
            if not text.strip():
                continue
            try:
                row = json.loads(text)
            except json.JSONDecodeError as error:
                raise UserError(f"{path}, line {number}: this is not JSON ({error.msg}); each line must be one object") from error
            if not isinstance(row, dict):
                raise UserError(f"{path}, line {number}: this is no JSON object; each line must be one, with {', '.join(needed)}")
            _require(row, needed, f"{path}, line {number}")
            yield number, row


# A reader yields (line number, row) and sees to it that every row has the needed columns.
ManifestReader = Callable[[Path, Sequence[str]], Iterator[tuple[int, dict[str, Any]]]]
MANIFEST_FORMATS: Mapping[str, ManifestReader] = MappingProxyType({".csv": _read_csv, ".tsv": _read_tsv, ".jsonl": _read_jsonl})


def _require(columns: Iterable[str], needed: Sequence[str], where: str) -> None:
    columns = list(columns)
    for name in needed:
        if name not in columns:
            raise UserError(f"{where}: there is no column {name!r}; it has {', '.join(columns)}")


def _parse_row(row: Mapping[str, Any], folder: Path, where: str, line: int, target: str) -> RatedImage:
    name = str(row["path"] or "").strip().replace("\\", "/")
    if not name:
        raise UserError(f"{where}: the path is empty")
    label = str(row.get("label", "")).strip()
    if target == "label" and not label:
        raise UserError(f"{where}: the label is empty")
    split = str(row.get("split") or "").strip().lower() or None
    if split not in (None, *SPLITS):
        raise UserError(f"{where}: split {split!r} is not one of {', '.join(SPLITS)}; leave it empty to let the run decide")
    weight = 1.0 if row.get("weight") in (None, "") else _number(row["weight"], "weight", where)
    if weight <= 0:
        raise UserError(f"{where}: weight {weight:g} is not above 0; leave the row out instead")
    return RatedImage(
        path=Path(os.path.abspath(folder / name)),
        name=name,
        line=line,
        score=_number(row["score"], "score", where) if target == "score" else None,
        label=label or None,
        prompt=str(row.get("prompt") or ""),
        weight=weight,
        split=split,
    )


def _number(value: object, column: str, where: str) -> float:
    try:
        number = math.nan if isinstance(value, bool) else float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise UserError(f"{where}: {column} {value!r} is not a finite number")
    return number
