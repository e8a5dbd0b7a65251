"""What the sources of a dataset hold, by column."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from library.errors import UserError
from library.scorer_data.readers.base import ReaderOptions
from library.scorer_data.readers.files import pictures_below
from library.scorer_data.readers.recognition import read_records
from library.scorer_data.records import FilePicture, Picture, RatedImage, RatedPair, Records, Skipped, SkipReport, split_key, split_of
from library.scorer_training.criteria.base import get_criterion
from library.scorer_training.dataset_config import VALIDATION_SPLIT, Dataset, Subset

logger = logging.getLogger(__name__)


@dataclass
class Collected:
    """The usable rows of a dataset, by column.

    `second` is filled for pairs only, `repeats` says how often a row counts, `names` what must stay on one side of a split, `has_split`
    whether a source says that of a row, `is_parted` whether validation_split did, `complaint` is an example of what was left out.
    """

    pictures: list[Picture] = field(default_factory=list)
    second: list[Picture] = field(default_factory=list)
    targets: list[Any] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    prompts: list[str] = field(default_factory=list)
    repeats: list[int] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    is_train: list[bool] = field(default_factory=list)
    has_split: bool = False
    is_parted: bool = False
    complaint: str = ""

    def digest(self, *, in_folds: bool) -> str:
        """What tells these rows from others; their split is no part of it in folds, which do not read it."""
        hashed, splits = hashlib.sha256(), [True] * len(self.targets) if in_folds else self.is_train
        for row in zip((picture.key for picture in self.pictures), self.targets, self.weights, self.repeats, splits, strict=True):
            hashed.update(repr(row).encode("utf-8", "surrogateescape"))
        return f"{len(self.targets)} with hash {hashed.hexdigest()[:16]}"


def collect(dataset: Dataset, validation_split: float | None) -> Collected:
    """Read a dataset's subsets. What cannot be used is reported in the log.

    Raises:
        UserError: a source that cannot be read at all.
    """
    target, rows, report = get_criterion(dataset.criterion).target, Collected(), SkipReport()
    for subset in dataset.subsets:
        for record in _records(subset, target):
            value = None if isinstance(record, Skipped) else _target(record, target)
            if isinstance(record, Skipped):
                report.add(record)
            elif value is None:
                report.add(Skipped(f"{record.where}: {record.name} has no {target}, which {dataset.criterion} learns", f"no {target}"))
            else:
                split = split_of(record, dataset.validation_split or validation_split or VALIDATION_SPLIT)
                if split == "test":
                    continue
                rows.pictures.append(record.first if isinstance(record, RatedPair) else record.picture)
                if isinstance(record, RatedPair):
                    rows.second.append(record.second)
                rows.targets.append(value)
                rows.weights.append(record.weight)
                rows.prompts.append(record.prompt)
                rows.repeats.append(subset.num_repeats)
                rows.names.append(split_key(record))
                rows.is_train.append(split == "train")
                rows.has_split |= record.split is not None
                rows.is_parted |= record.split is None
    if report:
        logger.warning("dataset %s:", dataset.name)
    report.log(logger)
    rows.complaint = report.first()
    return rows


def pictures_of(collections: Iterable[Collected]) -> list[Picture]:
    """Every picture once, in the order of their first appearance."""
    return list(dict.fromkeys(picture for rows in collections for picture in (*rows.pictures, *rows.second)))


def _records(subset: Subset, target: str) -> Records:
    """What a subset holds; for pretraining from pictures alone, every picture of a folder."""
    if target != "picture":
        options = ReaderOptions.of(subset.reader_options, target=target, image_dir=subset.image_dir)
        yield from read_records(subset.path, subset.reader, options)
        return
    if not subset.path.is_dir():
        raise UserError(f"pretraining without ratings learns from the pictures of a folder, and {subset.path} is none; give a folder")
    tally, folder = SkipReport(), subset.path.absolute()
    for name in pictures_below(folder, tally):
        yield RatedImage(picture=FilePicture(folder / name), name=name, where=str(folder / name), score=0.0)
    yield from tally.skipped()


def _target(record: RatedImage | RatedPair, target: str) -> Any:
    """What is learned of a record, or None if it does not say it."""
    if isinstance(record, RatedPair):
        return record.preference if target == "pair" else None
    return None if target == "pair" else getattr(record, "score" if target == "picture" else target)
