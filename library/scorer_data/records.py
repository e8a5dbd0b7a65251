"""What a reader of rated pictures yields: pictures, pairs of them, and what had to be left out.

A picture is wherever its bytes are: a file, a member of a tar, a cell of a parquet file. What a row says of it (a score, a label,
votes, tags) is None where its source does not say it.
"""

import hashlib
import io
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

EXAMPLES = 3  # of what was left out, in a report
SPLITS = ("train", "val", "test")  # test rows are neither trained on nor validated with


@dataclass(frozen=True)
class FileState:
    """What tells that a file has not changed: its size in bytes and its time of modification in ns."""

    size: int
    mtime_ns: int

    @staticmethod
    def of(path: Path) -> "FileState":
        """Raises OSError if there is no such file."""
        status = path.stat()
        return FileState(status.st_size, status.st_mtime_ns)


class Picture(Protocol):
    """Where a picture's bytes are. Hashable and small: there may be a million."""

    @property
    def key(self) -> str:
        """Names the picture, the same in every run on this machine: a path, and the place within it where it is a part of a file."""
        ...

    def state(self) -> FileState:
        """Of the file that it is, or is in. Raises OSError if there is none."""
        ...

    def open(self) -> BinaryIO:
        """Its bytes. Raises OSError if they cannot be read."""
        ...


@dataclass(frozen=True, slots=True)
class FilePicture:
    """A picture file, by its absolute path, which is kept as text: a `Path` takes several times the memory."""

    location: str | Path

    def __post_init__(self) -> None:
        object.__setattr__(self, "location", str(self.location))

    @property
    def path(self) -> Path:
        return Path(self.location)

    @property
    def key(self) -> str:
        return str(self.location)

    def state(self) -> FileState:
        return FileState.of(self.path)

    def open(self) -> BinaryIO:
        return self.path.open("rb")


@dataclass(frozen=True, slots=True)
class SlicePicture:
    """A picture that is `size` bytes of a file from `offset` on, such as a member of an uncompressed tar; `name` is for messages."""

    path: Path
    offset: int
    size: int
    name: str

    @property
    def key(self) -> str:
        return f"{self.path}#{self.offset}+{self.size}"

    def state(self) -> FileState:
        return FileState.of(self.path)

    def open(self) -> BinaryIO:
        with self.path.open("rb") as file:
            file.seek(self.offset)
            return io.BytesIO(file.read(self.size))


@dataclass(frozen=True, kw_only=True, slots=True)
class RatedImage:
    """One rated picture.

    Attributes:
        picture: where it is. name: the path as the source has it, with forward slashes: the same on every machine.
        where: file and line, for messages.
        score: finite. label: its class. votes: counts of the ratings 1, 2, ... 10. tags: those that apply.
        prompt: what was asked for when the picture was made.
        weight: in the loss, relative to the others; above 0.
        split: one of SPLITS, or None to let the run decide.
    """

    picture: Picture
    name: str
    where: str
    score: float | None = None
    label: str | None = None
    votes: tuple[float, ...] | None = None
    tags: tuple[str, ...] | None = None
    prompt: str = ""
    weight: float = 1.0
    split: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class RatedPair:
    """Two pictures of which one was preferred.

    Attributes:
        first, second: where they are. name: of the pair, as the source has it.
        preference: 1 when the first is better, 0 when the second is, 0.5 for a tie.
        where, prompt, weight, split: as in RatedImage.
    """

    first: Picture
    second: Picture
    name: str
    where: str
    preference: float
    prompt: str = ""
    weight: float = 1.0
    split: str | None = None


@dataclass(frozen=True, slots=True)
class Skipped:
    """Rows or pictures that were left out.

    Attributes:
        reason: one sentence that says where, and why.
        kind: the why alone, in the same words for all of a kind: reports count by it. Empty: counted as "other".
        count: how many this stands for, where they would be too many to name.
    """

    reason: str
    kind: str = ""
    count: int = 1


Records = Iterator[RatedImage | RatedPair | Skipped]


class SkipReport:
    """Counts what was left out by its kind, with the first examples of each."""

    def __init__(self) -> None:
        self._kinds: dict[str, tuple[int, list[str]]] = {}

    def add(self, skipped: Skipped) -> None:
        count, reasons = self._kinds.setdefault(skipped.kind or "other", (0, []))
        if len(reasons) < EXAMPLES:
            reasons.append(skipped.reason)
        self._kinds[skipped.kind or "other"] = (count + skipped.count, reasons)

    def __len__(self) -> int:
        """How many were left out."""
        return sum(count for count, _ in self._kinds.values())

    @property
    def counts(self) -> dict[str, int]:
        """How many of each kind, the most frequent first."""
        return {kind: count for kind, (count, _) in sorted(self._kinds.items(), key=lambda item: -item[1][0])}

    def first(self) -> str:
        """One example, of the most frequent kind; empty if nothing was left out."""
        return self._kinds[next(iter(self.counts))][1][0] if self._kinds else ""

    def __str__(self) -> str:
        """One line for each kind, the most frequent first, and its examples below it."""
        lines = [f"left out: {len(self):,}"]
        for kind, count in self.counts.items():
            lines.append(f"  {count:,}: {kind}")
            lines += [f"    {reason}" for reason in self._kinds[kind][1]]
        return "\n".join(lines)

    def skipped(self) -> Iterator[Skipped]:
        """One for each kind, with its count and its first example: for rows that are too many to name each."""
        for kind, (count, reasons) in self._kinds.items():
            yield Skipped(f"{reasons[0]} (the first of {count:,} such)" if count > 1 else reasons[0], kind, count)

    def log(self, logger: logging.Logger) -> None:
        """As a warning, if there is anything to say."""
        if self._kinds:
            logger.warning("%s", self)


def split_of(record: RatedImage | RatedPair, validation_split: float) -> str:
    """ "train", "val" or "test": what the record says, else by a hash: the same in every run and on every machine.

    The hash is of the name, so that old pictures stay where they were when new ones are added. A pair goes by its prompt if it has one:
    a picture takes part in several pairs of one prompt, and must not be on both sides.
    """
    if record.split is not None:
        return record.split
    return "val" if name_fraction(split_key(record)) < validation_split else "train"


def split_key(record: RatedImage | RatedPair) -> str:
    """What must not be on both sides of a split."""
    return record.prompt or record.name if isinstance(record, RatedPair) else record.name


def name_fraction(name: str) -> float:
    """A number in 0..1 that depends on the name alone, evenly spread over names."""
    return int.from_bytes(hashlib.sha256(name.encode(errors="surrogateescape")).digest()[:8], "big") / 2**64
