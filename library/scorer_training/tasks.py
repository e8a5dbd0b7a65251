"""From the datasets of a run to what is trained on: latents, targets and a head for each."""

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from library.errors import UserError
from library.scorer_data.batches import LatentDataset
from library.scorer_data.buckets import BucketConfig
from library.scorer_data.encoding import encode_missing
from library.scorer_data.latent_cache import LatentCache
from library.scorer_data.readers.base import ReaderOptions, Tally
from library.scorer_data.readers.files import pictures_below
from library.scorer_data.readers.registry import read_records
from library.scorer_data.records import FilePicture, Picture, RatedImage, RatedPair, Records, Skipped
from library.scorer_data.skips import SkipReport
from library.scorer_data.splits import split_of
from library.scorer_training.config import DataConfig
from library.scorer_training.criteria.base import Criterion
from library.scorer_training.criteria.registry import get_criterion
from library.scorer_training.dataset_config import Dataset, Subset
from library.scorers.heads import HeadSpec

logger = logging.getLogger(__name__)

MIN_TAG_COUNT = 5  # a tag on fewer training pictures teaches nothing
HEAD_SAMPLE = 100_000  # targets that a head's scale and levels are taken from


@dataclass(frozen=True)
class Task:
    """One thing to learn: its pictures, and the head that learns it.

    Attributes:
        dataset: as the user described it.
        train, validation: share no picture.
        train_pictures: a number for the picture of each row of `train`; a picture that counts twice has two rows.
    """

    dataset: Dataset
    criterion: Criterion
    head: HeadSpec
    train: LatentDataset
    validation: LatentDataset
    train_pictures: Tensor

    @property
    def name(self) -> str:
        return self.dataset.name

    def describe(self) -> dict[str, Any]:
        """For the record in the scorer's file."""
        pictures = {"train": len(self.train), "validation": len(self.validation)}
        return {"criterion": self.criterion.name, "pictures": pictures, "proportion": self.dataset.proportion}


class PackedTags:
    """Which of K tags each of N pictures has, an eighth of a byte each; indexed like a tensor, it gives [B, K] float32 of 0 and 1."""

    def __init__(self, tags: Iterable[tuple[str, ...]], classes: Sequence[str]) -> None:
        self._width = len(classes)
        numbers = {name: number for number, name in enumerate(classes)}
        rows = []
        for own in tags:
            row = np.zeros(self._width, dtype=bool)
            row[[numbers[tag] for tag in own if tag in numbers]] = True
            rows.append(np.packbits(row))
        self._bits = np.stack(rows) if rows else np.zeros((0, (self._width + 7) // 8), dtype=np.uint8)

    def __len__(self) -> int:
        return len(self._bits)

    def take(self, indices: Tensor) -> "PackedTags":
        """The same of these pictures only, in this order."""
        taken = PackedTags((), ())
        taken._width, taken._bits = self._width, self._bits[indices.numpy()]
        return taken

    def __getitem__(self, indices: Tensor | slice) -> Tensor:
        chosen = self._bits[indices if isinstance(indices, slice) else indices.numpy()]
        return torch.from_numpy(np.unpackbits(chosen, axis=1, count=self._width)).float()


@dataclass
class Collected:
    """The usable rows of a dataset, by column.

    `second` is filled for pairs only, `repeats` says how often a row counts, `complaint` is an example of what was left out.
    """

    pictures: list[Picture] = field(default_factory=list)
    second: list[Picture] = field(default_factory=list)
    targets: list[Any] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    prompts: list[str] = field(default_factory=list)
    repeats: list[int] = field(default_factory=list)
    is_train: list[bool] = field(default_factory=list)
    complaint: str = ""


def collect(dataset: Dataset, validation_split: float) -> Collected:
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
                split = split_of(record, dataset.validation_split or validation_split)
                if split == "test":
                    continue
                rows.pictures.append(record.first if isinstance(record, RatedPair) else record.picture)
                if isinstance(record, RatedPair):
                    rows.second.append(record.second)
                rows.targets.append(value)
                rows.weights.append(record.weight)
                rows.prompts.append(record.prompt)
                rows.repeats.append(subset.num_repeats)
                rows.is_train.append(split == "train")
    if report:
        logger.warning("dataset %s:", dataset.name)
    report.log(logger)
    rows.complaint = report.first()
    return rows


def make_task(
    dataset: Dataset,
    rows: Collected,
    cache: LatentCache,
    variants: Sequence[str],
    max_validation_pictures: int,
    head_options: dict[str, Any],
) -> Task:
    """Look up the latents of what was collected, part it, and choose the head.

    Args:
        variants: which of a picture's cached variants training draws from; the first is the plain one.

    Raises:
        UserError: too few pictures, or targets from which nothing can be learned.
    """
    criterion = get_criterion(dataset.criterion)
    found = cache.find_all(rows.pictures, variants)
    usable = found[:, 0] >= 0
    second = None
    if rows.second:
        second = cache.find_all(rows.second, variants)
        usable &= second[:, 0] >= 0
    is_train = torch.tensor(rows.is_train, dtype=torch.bool)
    train, validation = (_shuffled((usable & mine).nonzero().flatten()) for mine in (is_train, ~is_train))
    validation = validation[:max_validation_pictures]
    for name, indices in (("training", train), ("validation", validation)):
        if len(indices) < 2:
            raise UserError(
                f"dataset {dataset.name} leaves {len(indices)} pictures for {name}; "
                "rate more pictures, or change validation_split or their split" + (f" ({rows.complaint})" if rows.complaint else "")
            )
    classes, targets = _encode_targets(dataset, criterion.target, rows, train, usable)
    head = criterion.make_head(dataset.name, targets[train[:HEAD_SAMPLE]], classes, {"target_class": dataset.target_class, **head_options})

    def part(indices: Tensor, *, vary: bool) -> LatentDataset:
        return LatentDataset(
            cache,
            found[indices, 0],
            targets.take(indices) if isinstance(targets, PackedTags) else targets[indices],
            torch.tensor([rows.weights[index] for index in indices.tolist()]),
            variant_rows=found[indices] if vary and len(variants) > 1 else None,
            second_rows=None if second is None else second[indices, 0],
            second_variant_rows=second[indices] if second is not None and vary and len(variants) > 1 else None,
            prompts=[rows.prompts[index] for index in indices.tolist()],
        )

    repeated = torch.repeat_interleave(train, torch.tensor(rows.repeats)[train])
    logger.info("dataset %s: %d pictures to train on, %d to validate with", dataset.name, len(train), len(validation))
    return Task(dataset, criterion, head, part(repeated, vary=True), part(validation, vary=False), repeated)


def load_tasks(
    stages: Sequence[Sequence[Dataset]],
    *,
    cache: LatentCache,
    encode: Callable[[Tensor], Tensor],
    data: DataConfig,
    buckets: BucketConfig,
    variants: Sequence[str],
    head_options: dict[str, Any],
    max_validation_pictures: int,
    accelerator: Accelerator,
) -> list[list[Task]]:
    """The tasks of every stage of a run: its pictures read, encoded by all processes where the cache lacks them, and looked up.

    Of several datasets in a stage, one from which nothing can be learned is left out with a warning, but for the first.

    Args:
        encode: pixels [B, 3, H, W] in -1..1 to scaled latents [B, C, h, w].

    Raises:
        UserError: a source that cannot be read, or a first dataset that cannot be learned.
    """
    collected = [[(dataset, collect(dataset, data.validation_split)) for dataset in datasets] for datasets in stages]
    report = SkipReport()
    skipped = encode_missing(
        cache,
        pictures_of(rows for stage in collected for _, rows in stage),
        encode,
        buckets,
        variants=variants,
        batch_size=data.vae_batch_size,
        read_npz=data.use_npz_caches,
        process_index=accelerator.process_index,
        num_processes=accelerator.num_processes,
    )
    for entry in skipped:
        report.add(entry)
    report.log(logger)
    accelerator.wait_for_everyone()
    cache.refresh()  # with what the other processes wrote

    tasks: list[list[Task]] = []
    for stage in collected:
        tasks.append([])
        for dataset, rows in stage:
            try:
                task = make_task(
                    dataset,
                    rows,
                    cache,
                    variants=variants,
                    max_validation_pictures=max_validation_pictures,
                    head_options=head_options,
                )
                tasks[-1].append(task)
            except UserError as error:
                if dataset is stage[0][0]:
                    raise
                logger.warning("dataset %s is left out: %s", dataset.name, error)
    return tasks


def pictures_of(collections: Iterable[Collected]) -> list[Picture]:
    """Every picture once, in the order of their first appearance."""
    return list(dict.fromkeys(picture for rows in collections for picture in (*rows.pictures, *rows.second)))


def _records(subset: Subset, target: str) -> Records:
    """What a subset holds; for masked pretraining, which learns from pictures alone, every picture of a folder."""
    if target != "picture":
        options = ReaderOptions.of(subset.reader_options, target=target, image_dir=subset.image_dir)
        yield from read_records(subset.path, subset.reader, options)
        return
    if not subset.path.is_dir():
        raise UserError(f"masked pretraining learns from the pictures of a folder, and {subset.path} is none; give a folder")
    tally, folder = Tally(), subset.path.absolute()
    for name in pictures_below(folder, tally):
        yield RatedImage(picture=FilePicture(folder / name), name=name, where=str(folder / name), score=0.0)
    yield from tally.skipped()


def _target(record: RatedImage | RatedPair, target: str) -> Any:
    """What is learned of a record, or None if it does not say it."""
    if isinstance(record, RatedPair):
        return record.preference if target == "pair" else None
    return None if target == "pair" else getattr(record, "score" if target == "picture" else target)


def _shuffled(indices: Tensor) -> Tensor:
    """In an order that is random and always the same: sources are often sorted, and the first ones are then of one kind."""
    return indices[torch.randperm(len(indices), generator=torch.Generator().manual_seed(0))]


def _encode_targets(
    dataset: Dataset, target: str, rows: Collected, train: Tensor, usable: Tensor
) -> tuple[tuple[str, ...], "Tensor | PackedTags"]:
    """Names of the classes, and the targets of all rows. Classes are those of usable pictures, alphabetically; tags the most frequent."""
    if target == "label":
        classes = tuple(sorted({rows.targets[index] for index in usable.nonzero().flatten().tolist()}))
        numbers = {label: number for number, label in enumerate(classes)}
        return classes, torch.tensor([numbers.get(label, -1) for label in rows.targets])
    if target == "tags":
        counts = Counter(tag for index in train.tolist() for tag in rows.targets[index])
        classes = tuple(tag for tag, count in counts.most_common(int(dataset.max_tags)) if count >= MIN_TAG_COUNT)
        return classes, PackedTags(rows.targets, classes)
    return (), torch.tensor(rows.targets, dtype=torch.float32)
