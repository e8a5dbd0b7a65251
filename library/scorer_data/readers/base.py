"""What every reader is given and gives back, and the values that are the same in all of them."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from library.errors import UserError
from library.scorer_data.readers.exports import VOTES, from_json, plain_answer
from library.scorer_data.records import Records, Skipped
from library.settings.option_values import did_you_mean
from library.settings.registry import Registry

TARGETS = ("score", "label", "votes", "tags", "pair")
SPLIT_NAMES: Mapping[str, str] = {
    **{name: "train" for name in ("train", "training")},
    **{name: "val" for name in ("val", "valid", "validation")},
    **{name: "test" for name in ("test", "testing")},
}
_KINDS: Mapping[Any, str] = {str: "a text", bool: "true or false", list: "a list"}


@dataclass(frozen=True, kw_only=True)
class ReaderOptions:
    """What a reader is asked for. A reader refuses an option that it does not know with a UserError that names those it knows.

    Attributes:
        target: what is to be learned, one of TARGETS. A reader leaves out what has none, and fills in little else.
        image_dir: what paths are relative to; None is the source's own folder.
        score_column: the column or field that is the score, where it is not the source's usual one.
        score_range: lowest and highest score; others are left out.
        split: which of its official splits to use, where a source has several.
        extra: what only this reader knows; its docstring and docs/datasets.md say what.
    """

    target: str = "score"
    image_dir: Path | None = None
    score_column: str = ""
    score_range: tuple[float, float] | None = None
    split: str = ""
    extra: Mapping[str, Any] = field(default_factory=dict)

    @staticmethod
    def of(keys: Mapping[str, Any], *, target: str, image_dir: Path | None = None) -> "ReaderOptions":
        """From the keys of a subset in a dataset.toml. Raises UserError for a value of the wrong kind."""
        extra = dict(keys)
        score_column, split = (extra.pop(name, "") for name in ("score_column", "split"))
        score_range = extra.pop("score_range", None)
        for name, value in (("score_column", score_column), ("split", split)):
            if not isinstance(value, str):
                raise UserError(f"{name} is {value!r}, but it must be a text")
        if score_range is not None:
            try:
                low, high = (float(bound) for bound in score_range)
            except (TypeError, ValueError):
                low, high = math.nan, math.nan
            if not low < high:
                raise UserError(f"score_range is {score_range!r}, but it must be the lowest and the highest score, such as [1, 10]")
            score_range = (low, high)
        return ReaderOptions(
            target=target, image_dir=image_dir, score_column=score_column, score_range=score_range, split=split, extra=extra
        )


@dataclass(frozen=True, kw_only=True)
class Source:
    """What a file or a folder looks like, for readers to recognise.

    Attributes:
        path: where it is.
        is_table: whether it has rows: a table, a pattern of tables, or a folder of parquet files.
        columns: of its first row.
        first_words: of a text file, those of its first line.
        files, folders: names of what a folder holds; where there is a folder train, the folders in that.
    """

    path: Path
    is_table: bool = False
    columns: frozenset[str] = frozenset()
    first_words: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
    folders: tuple[str, ...] = ()


class Reader(ABC):
    """A source of rated pictures. `targets`, `known` and `own` say what it can be asked for; anything else is refused by name.

    Attributes:
        targets: what can be learned from it, of TARGETS.
        known: those of image_dir, score_column, score_range and split that it uses.
        own: its own options: the type that each must have, or a tuple of the values or types that it can have.
        is_general: whether it is asked only about sources that no other reader recognises.
    """

    targets: ClassVar[tuple[str, ...]]
    known: ClassVar[tuple[str, ...]] = ()
    own: ClassVar[Mapping[str, Any]] = {}
    is_general: ClassVar[bool] = False

    @staticmethod
    def recognises(source: Source) -> bool:
        """Whether this is what it reads."""
        return False

    @staticmethod
    @abstractmethod
    def read(path: Path, options: ReaderOptions) -> Records:
        """What the source holds, one record at a time. Raises UserError, here or when iterated, if it cannot be used at all."""


READERS: Registry[type[Reader]] = Registry("reader", "library.scorer_data.readers")


def check_options(name: str, options: ReaderOptions) -> None:
    """Raises UserError for what the reader of this name does not know."""
    reader = READERS[name]
    if options.target not in reader.targets:
        wanted = " or ".join(reader.targets)
        raise UserError(
            f"reader {name!r} gives {wanted}, but {options.target} is to be learned; choose another criterion, or give a table of that"
        )
    given = [key for key in ("image_dir", "score_column", "score_range", "split") if getattr(options, key)]
    for key in [*given, *options.extra]:
        known = [*reader.known, *reader.own]
        if key not in known:
            raise UserError(f"reader {name!r} has no option {key!r}{did_you_mean(key, known)}; it has {', '.join(known) or 'none'}")
        if key in ("score_column", "score_range") and options.target != "score":
            raise UserError(f"{key} is set for reader {name!r}, but {options.target} is to be learned and not a score; leave it out")
    for key, value in options.extra.items():
        allowed = reader.own[key] if isinstance(reader.own[key], tuple) else (reader.own[key],)
        fits = isinstance(value, allowed) if isinstance(allowed[0], type) else value in allowed
        if not fits:
            words = [_KINDS.get(entry, repr(entry)) for entry in allowed]
            raise UserError(f"{key} of reader {name!r} is {value!r}; it can be {' or '.join(words)}")


class BadValue(ValueError):
    """A row that cannot be used.

    Args:
        kind: why, in the same words for all rows of the kind.
        detail: why, with what the row has; `kind` if there is no more to say.
    """

    def __init__(self, kind: str, detail: str = "") -> None:
        super().__init__(detail or kind)
        self.kind = kind

    def at(self, where: str) -> Skipped:
        """As what a reader yields; `where` is file and line."""
        return Skipped(f"{where}: {self}", self.kind)


# -- values --------------------------------------------------------------------------------------------------------------
# As they stand in a cell: text, or what JSON and parquet have. All raise BadValue.


def number(value: object, name: str) -> float:
    """Finite. A bool is none."""
    result = _float(value)
    if math.isnan(result) and isinstance(value, (str, list, dict)):
        result = _float(plain_answer(value))
    if not math.isfinite(result):
        raise BadValue(f"{name} is not a finite number", f"{name} {_shown(value)} is not a finite number")
    return result


def score_in_range(value: float, options: ReaderOptions) -> float:
    """The score itself."""
    if options.score_range is not None and not options.score_range[0] <= value <= options.score_range[1]:
        low, high = options.score_range
        raise BadValue("score is outside score_range", f"score {value:g} is outside score_range, {low:g} to {high:g}")
    return value


def label_text(value: object) -> str:
    """The name of a class; the number of one becomes its digits."""
    value = plain_answer(value)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    text = "" if value is None or value != value else str(value).strip()
    if not text:
        raise BadValue("label is empty")
    return text


def ten_votes(values: object) -> tuple[float, ...]:
    """Counts of the ratings 1 to 10, as a list or as JSON text of one."""
    values = from_json(values)
    if not isinstance(values, Sequence) or isinstance(values, str) or len(values) != VOTES:
        raise BadValue("votes are not ten counts", f"votes {_shown(values)} are not ten counts, of the ratings 1 to 10")
    counts = tuple(number(value, "a count of votes") for value in values)
    if min(counts) < 0 or not sum(counts) > 0:
        raise BadValue("votes are negative or none", f"votes {_shown(counts)} have a negative count, or none at all")
    return counts


def mean_vote(votes: Sequence[float]) -> float:
    """Mean rating of counts [10] of the ratings 1 to 10."""
    return sum(rating * count for rating, count in enumerate(votes, start=1)) / sum(votes)


def tag_names(value: object) -> tuple[str, ...]:
    """Tags from a list, JSON text of one, or text parted by commas, or by spaces where it has no comma. Each once."""
    value = plain_answer(value)
    if isinstance(value, str):
        value = value.split(",") if "," in value else value.split()
    if not isinstance(value, Sequence) or not all(isinstance(tag, str) for tag in value):
        raise BadValue("tags are no list of texts", f"tags {_shown(value)} are no list of texts")
    return tuple(dict.fromkeys(stripped for tag in value if (stripped := tag.strip())))


def split_name(value: object) -> str | None:
    """One of records.SPLITS; None if empty."""
    text = "" if value is None else str(value).strip().lower()
    if text and text not in SPLIT_NAMES:
        raise BadValue("split is unknown", f"split {_shown(value)} is not train, val or test; leave it empty to let the run decide")
    return SPLIT_NAMES.get(text)


def weight_value(value: object) -> float:
    """Above 0; 1 if empty."""
    weight = 1.0 if value is None or value == "" else number(value, "weight")
    if weight <= 0:
        raise BadValue("weight is not above 0", f"weight {weight:g} is not above 0; leave the row out instead")
    return weight


def _float(value: object) -> float:
    try:
        return math.nan if isinstance(value, bool) else float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        return math.nan


def _shown(value: object, longest: int = 60) -> str:
    text = repr(value)
    return text if len(text) <= longest else f"{text[:longest]}..."
