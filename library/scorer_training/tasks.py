"""From the datasets of a run to what is trained on: latents, targets and a head for each."""

from __future__ import annotations

import dataclasses
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from library.errors import UserError
from library.models.vae import Autoencoder, VaeFingerprint
from library.scorer_data.batches import LatentDataset, PackedTags
from library.scorer_data.encoding import encode_missing, make_encoder
from library.scorer_data.latent_cache import LatentCache, open_cache
from library.scorer_data.records import Picture, SkipReport
from library.scorer_data.splits import assign_folds
from library.scorer_training.collecting import Collected, collect, pictures_of
from library.scorer_training.config import LatentScorerConfig, ScorerTrainingConfig
from library.scorer_training.criteria.base import Criterion, get_criterion
from library.scorer_training.dataset_config import MAX_TAGS, DataConfig, Dataset
from library.scorers.base import ModelSource
from library.scorers.heads import HeadSpec

if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.getLogger(__name__)

MIN_TAG_COUNT = 5  # a tag on fewer training pictures teaches nothing
ENCODED_AT_A_TIME = 8  # pictures
MOST_VALIDATED = 5000  # pictures of a dataset, chosen at random
FEW = 300  # pictures of the score: a tenth of fewer is no validation set
FOLDS = 5
HEAD_SAMPLE = 100_000  # targets that a head's scale and levels are taken from


@dataclass(frozen=True)
class Task:
    """One thing to learn: its pictures, and the head that learns it.

    Attributes:
        dataset: as the user described it.
        train, validation: share no picture.
        train_pictures: a number for the picture of each row of `train`; a picture that counts twice has two rows.
        ratings: what tells its pictures and targets from others.
        marks_worth: of `DataConfig`.
        folds: seed -> the task for each fold of its pictures, which it validates with; None where it has a validation set.
    """

    dataset: Dataset
    criterion: Criterion
    head: HeadSpec
    train: LatentDataset
    validation: LatentDataset
    train_pictures: Tensor
    ratings: str = ""
    marks_worth: Sequence[float] = ()
    folds: Callable[[int], list[Task]] | None = None

    @property
    def name(self) -> str:
        return self.dataset.name

    def describe(self) -> dict[str, Any]:
        """For the record in the scorer's file."""
        pictures = {"train": len(self.train), "validation": len(self.validation)}
        return {"criterion": self.criterion.name, "pictures": pictures, "proportion": self.dataset.proportion}


def make_task(dataset: Dataset, rows: Collected, cache: LatentCache, config: LatentScorerConfig, *, folds: int = 0) -> Task:
    """Look up the latents of what was collected, part it, and choose the head.

    Args:
        folds: into which all pictures can be parted; 0: a part of them is the validation set.

    Raises:
        UserError: too few pictures, or targets from which nothing can be learned.
    """
    criterion = get_criterion(dataset.criterion)
    pictures = [rows.pictures, rows.second] if rows.second else [rows.pictures]
    found = torch.stack([cache.find_all(part, config.variants.names) for part in pictures], 1)  # [N, P, V]
    usable = (found[..., 0] >= 0).all(1)
    is_train = torch.tensor(rows.is_train, dtype=torch.bool)
    if folds:
        is_train = torch.ones_like(is_train)
    train, validation = (_shuffled((usable & mine).nonzero().flatten()) for mine in (is_train, ~is_train))
    validation = validation[:MOST_VALIDATED]
    complaint = f" ({rows.complaint})" if rows.complaint else "" if rows.targets else " (its source is empty)"
    if not usable.any():
        raise UserError(f"dataset {dataset.name} has no picture that can be used{complaint}")
    if folds and len(train) < 2 * folds:
        few = f"dataset {dataset.name} has {len(train)} pictures that can be used, which are too few to learn from"
        raise UserError(f"{few}; rate {2 * folds} at least, some hundred better{complaint}")
    for name, indices in (("training", train), ("validation", validation)):
        if len(indices) < 2 and not folds:
            raise UserError(
                f"dataset {dataset.name} leaves {len(indices)} pictures for {name}; "
                f"rate more pictures, or change validation_split or their split{complaint}"
            )
    classes, targets = _encode_targets(dataset, criterion.target, rows, train, usable)
    options = {"target_class": dataset.target_class, "members": config.scorer.head_members}
    head = criterion.make_head(dataset.name, targets[train[:HEAD_SAMPLE]], classes, options)
    if criterion.target == "score" and not folds and (targets[validation] == targets[validation][0]).all():
        alike = f"all {len(validation)} validation scores of dataset {dataset.name} are {targets[validation][0]:g}"
        raise UserError(f"{alike}, so no state of the scorer can be told from another; choose others for validation")

    def part(indices: Tensor, *, vary: bool) -> LatentDataset:
        return LatentDataset(
            cache,
            found[indices] if vary else found[indices, :, :1],
            targets.take(indices) if isinstance(targets, PackedTags) else targets[indices],
            torch.tensor([rows.weights[index] for index in indices.tolist()]),
            [rows.prompts[index] for index in indices.tolist()],
        )

    def parted(train: Tensor, validation: Tensor) -> Task:
        repeated = torch.repeat_interleave(train, torch.tensor(rows.repeats)[train])
        return Task(dataset, criterion, head, part(repeated, vary=True), part(validation, vary=False), repeated)

    def in_folds(seed: int) -> list[Task]:
        names = [rows.names[index] for index in train.tolist()]
        ordered = targets[train] if isinstance(targets, Tensor) and targets.ndim == 1 else None
        fold = assign_folds(names, ordered, folds, seed)
        return [parted(train[fold != own], train[fold == own]) for own in range(folds)]

    logger.info(
        "dataset %s: %d pictures to train on, %s to validate with", dataset.name, len(train), f"{folds} folds" if folds else len(validation)
    )
    return dataclasses.replace(parted(train, validation), ratings=rows.digest(in_folds=folds > 0), folds=in_folds if folds else None)


def load_tasks(config: LatentScorerConfig, source: ModelSource, accelerator: Accelerator) -> tuple[list[Task], list[Task]]:
    """What is learned, the score first, and what is learned before it. All processes encode what the cache lacks.

    Of several datasets in a stage, one from which nothing can be learned is left out with a warning, but for the first.

    Raises:
        UserError: a source that cannot be read, a first dataset that cannot be learned, or a setting that does nothing with these datasets.
    """
    stages = config.data.datasets(), config.pretraining.datasets()
    check_settings(config.training, [dataset for datasets in stages for dataset in datasets])
    collected = [[(dataset, collect(dataset, config.data.validation_split)) for dataset in datasets] for datasets in stages]
    folds_of_score = _num_folds(config.data, collected[0][0][1])
    _warn_of_unread_split(config.data, [entry for stage in collected for entry in stage], folds_of_score)
    cache = fill_cache(config, source.vae, accelerator, pictures_of(rows for stage in collected for _, rows in stage))

    training, pretraining = [], []
    for stage, tasks in zip(collected, (training, pretraining), strict=True):
        for dataset, rows in stage:
            try:
                folds = folds_of_score if dataset is collected[0][0][0] else 0
                tasks.append(make_task(dataset, rows, cache, config, folds=folds))
            except UserError as error:
                if dataset is stage[0][0]:
                    raise
                logger.warning("dataset %s is left out: %s", dataset.name, error)
    training[0] = dataclasses.replace(training[0], marks_worth=config.data.marks_worth)
    return training, pretraining


def check_settings(training: ScorerTrainingConfig, datasets: Sequence[Dataset]) -> None:
    """Raises UserError for a setting that does nothing with these datasets."""
    for dataset in datasets:
        if dataset.weight != 1 and training.balancing == "independent":
            raise UserError(
                f"dataset {dataset.name} has weight {dataset.weight:g}, but with balancing independent losses are not summed; leave it out"
            )


def fill_cache(config: LatentScorerConfig, vae: Autoencoder, accelerator: Accelerator, pictures: Iterable[Picture]) -> LatentCache:
    """The run's cache with the latents of all these pictures in it; what could not be read is reported in the log."""
    cache, report = open_cache(config.cache_dir, VaeFingerprint.of(vae), config.buckets), SkipReport()
    for skipped in encode_missing(
        cache,
        pictures,
        make_encoder(vae),
        config.buckets,
        variants=config.variants.names,
        batch_size=ENCODED_AT_A_TIME,
        process_index=accelerator.process_index,
        num_processes=accelerator.num_processes,
    ):
        report.add(skipped)
    report.log(logger)
    accelerator.wait_for_everyone()
    cache.refresh()  # with what the other processes wrote
    return cache


def _num_folds(config: DataConfig, rows: Collected) -> int:
    if config.validation_folds is not None:
        return config.validation_folds
    return FOLDS if len(rows.targets) < FEW and not rows.has_split else 0


def _warn_of_unread_split(config: DataConfig, datasets: Sequence[tuple[Dataset, Collected]], folds: int) -> None:
    """Where a share for validation is asked for, and what the score is validated with is another."""
    score, rows = datasets[0]
    share = score.validation_split or config.validation_split
    if folds:
        why = f"the {len(rows.targets)} pictures of {score.name} are validated by {folds} folds (validation_folds 0 has it read)"
    else:
        why = "every picture's source says which split it is in"
    if share is not None and rows.targets and (folds or not any(rows.is_parted for _, rows in datasets)):
        logger.warning("validation_split %g does nothing here: %s", share, why)


def _shuffled(indices: Tensor) -> Tensor:
    """In an order that is random and always the same: sources are often sorted, and the first ones are then of one kind."""
    return indices[torch.randperm(len(indices), generator=torch.Generator().manual_seed(0))]


def _encode_targets(
    dataset: Dataset, target: str, rows: Collected, train: Tensor, usable: Tensor
) -> tuple[tuple[str, ...], Tensor | PackedTags]:
    """Names of the classes, and the targets of all rows. Classes are those of usable pictures, alphabetically; tags the most frequent."""
    if target == "label":
        classes = tuple(sorted({rows.targets[index] for index in usable.nonzero().flatten().tolist()}))
        numbers = {label: number for number, label in enumerate(classes)}
        return classes, torch.tensor([numbers.get(label, -1) for label in rows.targets])
    if target == "tags":
        counts = Counter(tag for index in train.tolist() for tag in rows.targets[index])
        classes = tuple(tag for tag, count in counts.most_common(dataset.max_tags or MAX_TAGS) if count >= MIN_TAG_COUNT)
        return classes, PackedTags(rows.targets, classes)
    return (), torch.tensor(rows.targets, dtype=torch.float32)
