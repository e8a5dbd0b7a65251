"""Which rated pictures a scorer learns from: one file, or a dataset.toml that mixes several, in the manner of sd-scripts. A dataset.toml:

    [general]                    # defaults for every dataset
    validation_split = 0.05

    [[datasets]]                 # a thing to learn, with a head of its own
    name = "aesthetic"
    criterion = "emd"
    proportion = 2               # of every batch, beside the others' proportions

      [[datasets.subsets]]       # where its pictures come from
      reader = "ava"
      path = "AVA/AVA.txt"
      image_dir = "AVA/images"

      [[datasets.subsets]]
      path = "mine.csv"
      num_repeats = 10

Keys of a subset that are not listed in `Subset` go to its reader. Paths are relative to the working directory, as they are everywhere.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from library.errors import UserError
from library.scorer_data.readers.base import READERS
from library.scorer_training.criteria.base import CRITERIA
from library.settings.option_values import did_you_mean
from library.settings.options import check_at_least, check_not_set, option
from library.settings.toml_files import read_toml

MAX_TAGS = 1000
VALIDATION_SPLIT = 0.1


@dataclass(frozen=True, kw_only=True)
class Subset:
    """One source of a dataset.

    Attributes:
        path: file or folder. reader: a name in `library.scorer_data.readers.base.READERS`, or "auto".
        image_dir: what the paths in it are relative to; its own folder if not set.
        num_repeats: how often each of its training pictures counts in an epoch.
        reader_options: the other keys, for the reader.
    """

    path: Path
    reader: str = "auto"
    image_dir: Path | None = None
    num_repeats: int = 1
    reader_options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """One thing to learn.

    Attributes:
        name: of its head, in logs and in the scorer's file.
        criterion: a name in CRITERIA.
        subsets: where its pictures come from.
        proportion: its share of every batch, relative to the other datasets'.
        weight: of its loss, where losses are summed.
        target_class: the class or tag whose log odds are the score; the first if not set.
        max_tags: how many tags are learned, the most frequent ones; MAX_TAGS if not set.
        validation_split: the share kept for validation where a source has no split of its own; None is the run's, or VALIDATION_SPLIT.
    """

    name: str
    criterion: str
    subsets: tuple[Subset, ...]
    proportion: float = 1.0
    weight: float = 1.0
    target_class: str | None = None
    max_tags: int | None = None
    validation_split: float | None = None


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The rated pictures: one file or folder, or a mixture."""

    train_data_file: Path | None = option(
        None,
        help="Rated pictures: a table with path and score, any source of docs/datasets.md, or a dataset.toml that mixes several sources "
        "and criteria, of which the first is the score.",
    )
    data_reader: str | None = option(None, choices=READERS, help="Reader of train_data_file; not set: by what it looks like.")
    image_dir: Path | None = option(None, help="What the paths in the file are relative to; not set: the file's own folder.")
    criterion: str | None = option(None, choices=CRITERIA, help="What is learned from train_data_file, and how; not set: mse.")
    score_column: str | None = option(None, help="Column to take as the score, such as year; not set: score.")
    path_column: str | None = option(None, help="Column with the pictures' paths; not set: path, file_name, filename, image ...")
    target_class: str | None = option(None, help="Class or tag whose log odds are the score; not set: the first.")
    marks_worth: tuple[float, ...] = option(
        (),
        help="Where the scores are marks of another scorer: its rank correlation with ratings that it had not learned, and the 95 % "
        "interval of that, such as 0.8 0.6 0.9. What the file says of itself is that times how well it follows the marks.",
        expert=True,
    )
    validation_split: float | None = option(
        None, help="Share of the pictures kept for validation, chosen by a hash of their path; not set: 0.1."
    )
    validation_folds: int | None = option(
        None,
        help="Folds of the score's pictures to validate by, in place of validation_split; 0: none. Not set: 5 for fewer than 300 pictures "
        "without a split of their own.",
        expert=True,
    )
    cache_dir: Path | None = option(None, help="Folder of the latent cache; not set: output_dir/latent_cache.")

    def __post_init__(self) -> None:
        if self.train_data_file is None:
            raise UserError("train_data_file is not set; give a table with the columns path and score, or a mixture as a dataset.toml")
        if _is_mixture(self.train_data_file):
            of_one = ("data_reader", "image_dir", "criterion", "score_column", "path_column", "target_class")
            check_not_set(self, "the mixture of train_data_file says it for each dataset", *of_one)
        if self.criterion is not None and not CRITERIA[self.criterion].gives_score:
            raise UserError(f"criterion {self.criterion} gives no score; it is for pretrain_criterion")
        if self.marks_worth:
            value, low, high = self.marks_worth if len(self.marks_worth) == 3 else (2.0, 0.0, 0.0)
            if not -1 <= low <= value <= high <= 1:
                given = " ".join(f"{number:g}" for number in self.marks_worth)
                raise UserError(f"marks_worth is {given}, but it is a correlation and the ends of its interval, such as 0.8 0.6 0.9")
        if self.validation_split is not None and not 0 < self.validation_split < 1:
            raise UserError(f"validation_split is {self.validation_split}, but it must be above 0 and below 1, such as 0.1")
        if self.validation_folds is not None and (self.validation_folds < 0 or self.validation_folds == 1):
            raise UserError(f"validation_folds is {self.validation_folds}, but it must be 0 for none, or 2 at least, such as 5")

    def datasets(self) -> tuple[Dataset, ...]:
        """What is to be learned, the score's own first. Raises UserError when a mixture is not as it must be."""
        assert self.train_data_file is not None
        if not _is_mixture(self.train_data_file):
            options = {name: value for name in ("score_column", "path_column") if (value := getattr(self, name))}
            reader = self.data_reader or "auto"
            subset = Subset(path=self.train_data_file, reader=reader, image_dir=self.image_dir, reader_options=options)
            return (Dataset(name="score", criterion=self.criterion or "mse", subsets=(subset,), target_class=self.target_class),)
        datasets = read_dataset_config(self.train_data_file)
        for dataset in datasets:
            if not CRITERIA[dataset.criterion].gives_score:
                raise UserError(f"dataset {dataset.name}: criterion {dataset.criterion} gives no score; it is for pretrain_data_file")
        return datasets


@dataclass(frozen=True, kw_only=True)
class PretrainingConfig:
    """Teaching the backbone something else first, for which there are many pictures; then the score, for which there are few ratings."""

    pretrain_data_file: Path | None = option(
        None, help="Pictures to pretrain on: as train_data_file, a dataset.toml too; labels are learned by default."
    )
    pretrain_criterion: str | None = option(
        None, choices=CRITERIA, help="What pretrain_data_file teaches, masked or imitation without ratings; not set: classification."
    )
    pretrain_steps: int | None = option(None, help="Steps of pretraining; not set: 2000.")

    def __post_init__(self) -> None:
        if self.pretrain_data_file is None:
            check_not_set(self, "nothing is pretrained on; give pretrain_data_file", "pretrain_criterion", "pretrain_steps")
        elif _is_mixture(self.pretrain_data_file):
            check_not_set(self, "the mixture of pretrain_data_file says it for each dataset", "pretrain_criterion")
        check_at_least(self, 1, "pretrain_steps")

    @property
    def steps(self) -> int:
        return self.pretrain_steps or 2000

    def datasets(self) -> tuple[Dataset, ...]:
        """What is learned first; nothing if there is no pretraining."""
        if self.pretrain_data_file is None:
            return ()
        if _is_mixture(self.pretrain_data_file):
            return read_dataset_config(self.pretrain_data_file)
        criterion = self.pretrain_criterion or "classification"
        return (Dataset(name="pretraining", criterion=criterion, subsets=(Subset(path=self.pretrain_data_file),)),)


def _is_mixture(path: Path) -> bool:
    return path.suffix == ".toml"


def read_dataset_config(path: Path) -> tuple[Dataset, ...]:
    """Read a dataset.toml. Raises UserError naming the table when anything in it is not as it must be."""
    if not path.is_file():
        raise UserError(f"there is no dataset_config {path}; docs/datasets.md shows one")
    content = read_toml(path, "dataset_config")
    general = content.pop("general", {})
    tables = content.pop("datasets", [])
    if content or not isinstance(general, dict):
        raise UserError(f"{path}: {', '.join(content) or 'general'} is not a table that belongs here; it can be [general] and [[datasets]]")
    if not isinstance(tables, list) or not tables:
        raise UserError(f"{path} has no [[datasets]]; each names a criterion and has [[datasets.subsets]]")
    datasets = [_dataset(general, table, f"{path}, dataset {number}") for number, table in enumerate(tables, start=1)]
    names = [dataset.name for dataset in datasets]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"{path}: two datasets have the name {name!r}; give each a name of its own")
    return tuple(datasets)


def _dataset(general: Mapping[str, Any], own: Mapping[str, Any], where: str) -> Dataset:
    values = {**general, **own}
    subsets = values.pop("subsets", None)
    if not isinstance(subsets, list) or not subsets:
        raise UserError(f"{where} has no [[datasets.subsets]]; each needs at least a path")
    known = {entry.name: entry.type for entry in fields(Dataset)}
    for key in values:
        if key not in known:
            hint = did_you_mean(key, known)
            raise UserError(f"{where}: there is no key {key!r}{hint}; it can be {', '.join(known)}; a reader's keys belong into its subset")
    for key in ("name", "criterion", "target_class"):
        _check(values, key, str, where)
    _check(values, "max_tags", int, where, above=0)
    for key in ("proportion", "weight", "validation_split"):
        _check(values, key, (int, float), where, above=0)
    criterion = values.get("criterion", "")
    if criterion not in CRITERIA:
        raise UserError(f"{where}: criterion is {criterion!r}; it can be {', '.join(CRITERIA)}")
    if "max_tags" in own and CRITERIA[criterion].target != "tags":
        raise UserError(f"{where}: max_tags is set, but {criterion} learns no tags; leave it out")
    values.setdefault("name", criterion)
    if not values["name"].replace("_", "").replace("-", "").isalnum():
        raise UserError(f"{where}: name is {values['name']!r}, but it must be letters, digits, - and _")
    if values.get("validation_split", 0.5) >= 1:
        raise UserError(f"{where}: validation_split is {values['validation_split']}, but it must be above 0 and below 1")
    return Dataset(**values, subsets=tuple(_subset(entry, f"{where}, subset {n}") for n, entry in enumerate(subsets, start=1)))


def _subset(table: Mapping[str, Any], where: str) -> Subset:
    values = dict(table)
    for key, kind in (("path", str), ("reader", str), ("image_dir", str)):
        _check(values, key, kind, where)
    _check(values, "num_repeats", int, where, above=0)
    if not values.get("path"):
        raise UserError(f"{where} has no path; give the file or folder of its pictures")
    own = {entry.name for entry in fields(Subset)} - {"reader_options"}
    known = {key: values[key] for key in values if key in own}
    known["path"] = Path(known["path"])
    if known.get("image_dir"):
        known["image_dir"] = Path(known["image_dir"])
    return Subset(**known, reader_options={key: value for key, value in values.items() if key not in own})


def _check(values: Mapping[str, Any], key: str, kind: type | tuple[type, ...], where: str, above: float | None = None) -> None:
    value = values.get(key)
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, kind):
        wanted = "a text" if kind is str else "a whole number" if kind is int else "a number"
        raise UserError(f"{where}: {key} is {value!r}, but it must be {wanted}")
    if above is not None and not above < value < math.inf:
        raise UserError(f"{where}: {key} is {value}, but it must be above {above:g}" + " and finite" * (value == math.inf))
