"""Which rated pictures a scorer learns from: one file, or a dataset.toml that mixes several, in the manner of sd-scripts.

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

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from library.errors import UserError
from library.scorer_training.criteria.registry import PRETRAINING_CRITERIA
from library.settings.options import nearest


@dataclass(frozen=True, kw_only=True)
class Subset:
    """One source of a dataset.

    Attributes:
        path: file or folder. reader: one of `library.scorer_data.readers.READERS`, or "auto".
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
        criterion: a key of PRETRAINING_CRITERIA.
        subsets: where its pictures come from.
        proportion: its share of every batch, relative to the other datasets'.
        weight: of its loss, where losses are summed.
        target_class: the class or tag whose log odds are the score; the first if not set.
        max_tags: how many tags are learned, the most frequent ones.
        validation_split: the share kept for validation where a source has no split of its own; None is the run's.
    """

    name: str
    criterion: str
    subsets: tuple[Subset, ...]
    proportion: float = 1.0
    weight: float = 1.0
    target_class: str = ""
    max_tags: int = 1000
    validation_split: float | None = None


def read_dataset_config(path: Path) -> tuple[Dataset, ...]:
    """Read a dataset.toml. Raises UserError naming the table when anything in it is not as it must be."""
    if not path.is_file():
        raise UserError(f"there is no dataset_config {path}; docs/datasets.md shows one")
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"dataset_config {path} is not TOML: {error}") from error
    general = content.pop("general", {})
    tables = content.pop("datasets", [])
    if content or not isinstance(general, dict):
        raise UserError(f"{path}: {', '.join(content) or 'general'} is not a table that belongs here; it can be [general] and [[datasets]]")
    if not isinstance(tables, list) or not tables:
        raise UserError(f"{path} has no [[datasets]]; each names a criterion and has [[datasets.subsets]]")
    datasets = [_dataset({**general, **table}, f"{path}, dataset {number}") for number, table in enumerate(tables, start=1)]
    check_names(datasets, str(path))
    return tuple(datasets)


def check_names(datasets: Sequence[Dataset], where: str) -> None:
    """Raises UserError when two datasets have one name."""
    names = [dataset.name for dataset in datasets]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"{where}: two datasets have the name {name!r}; give each a name of its own")


def _dataset(table: Mapping[str, Any], where: str) -> Dataset:
    values = dict(table)
    subsets = values.pop("subsets", None)
    if not isinstance(subsets, list) or not subsets:
        raise UserError(f"{where} has no [[datasets.subsets]]; each needs at least a path")
    known = {entry.name: entry.type for entry in fields(Dataset)}
    for key in values:
        if key not in known:
            match = nearest(key, known)
            hint = f" (did you mean {match!r}?)" if match else ""
            raise UserError(f"{where}: there is no key {key!r}{hint}; it can be {', '.join(known)}; a reader's keys belong into its subset")
    for key in ("name", "criterion", "target_class"):
        _check(values, key, str, where)
    for key in ("proportion", "weight", "max_tags", "validation_split"):
        _check(values, key, (int, float), where, above=0)
    criterion = values.get("criterion", "")
    if criterion not in PRETRAINING_CRITERIA:
        raise UserError(f"{where}: criterion is {criterion!r}; it can be {', '.join(PRETRAINING_CRITERIA)}")
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
    if above is not None and not value > above:
        raise UserError(f"{where}: {key} is {value}, but it must be above {above:g}")
