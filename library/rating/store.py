"""A rating project on disk: pictures, opinions, and every answer that a person gave, in one SQLite file.

A folder holds `project.sqlite` (write-ahead log), `pictures/` with what was made for it, and a folder for each opinion's training. Every
answer is on the disk before it is acknowledged, and has a token of its own from the page, so that an answer that is sent twice counts
once. Nothing is ever deleted: an answer that was taken back is marked so. Several processes may use a project at once.
"""

from __future__ import annotations

import contextlib
import sqlite3
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from library.errors import UserError

FILE = "project.sqlite"
PICTURES = "pictures"
MODES = ("stars", "pair", "skip")
REASONS = ("random", "chosen", "repeat", "picked", "imported")
"""Why a picture was shown: drawn by chance, chosen to learn from, asked again, picked by the person, or rated elsewhere."""
LEVELS = (5, 10)
LONGEST_NAME = 40
_FULL = ("database or disk is full", "disk I/O error", "attempt to write a readonly database")
SCHEMA = """
CREATE TABLE IF NOT EXISTS pictures (
    id INTEGER PRIMARY KEY, hash TEXT NOT NULL UNIQUE, file TEXT NOT NULL, shown TEXT NOT NULL, prompt TEXT NOT NULL, seed INTEGER,
    width INTEGER NOT NULL, height INTEGER NOT NULL, features BLOB NOT NULL, added REAL NOT NULL
) STRICT;
CREATE TABLE IF NOT EXISTS opinions (
    id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE COLLATE NOCASE, levels INTEGER NOT NULL, added REAL NOT NULL
) STRICT;
CREATE TABLE IF NOT EXISTS ratings (
    id INTEGER PRIMARY KEY, token TEXT NOT NULL UNIQUE, opinion INTEGER NOT NULL REFERENCES opinions, mode TEXT NOT NULL,
    first INTEGER NOT NULL REFERENCES pictures, second INTEGER REFERENCES pictures, value REAL, reason TEXT NOT NULL,
    predicted REAL, time REAL NOT NULL, undone INTEGER NOT NULL DEFAULT 0
) STRICT;
CREATE TABLE IF NOT EXISTS taken_back (token TEXT PRIMARY KEY) STRICT;
CREATE INDEX IF NOT EXISTS ratings_by_opinion ON ratings (opinion, undone, id);
"""


@dataclass(frozen=True, kw_only=True)
class StoredPicture:
    """A picture of the project.

    Attributes:
        hash: sha256 of its pixels or its file, hexadecimal.
        file: relative to the project's folder, or absolute where it is somebody else's.
        shown: what the page shows, relative to the project's folder: written by us, whoever made `file`.
        prompt, seed: what it was made from; "" and None where that is not known.
        features: what a model sees in it [D] float32.
    """

    hash: str
    file: str
    shown: str
    prompt: str = ""
    seed: int | None = None
    width: int
    height: int
    features: np.ndarray
    id: int = 0


@dataclass(frozen=True, kw_only=True)
class Rating:
    """One answer.

    Attributes:
        token: its name, made by whoever asked; a second one of that name is not taken.
        mode: "stars", "pair", or "skip" for no answer.
        first, second: ids of the pictures; second only of a pair.
        value: stars from 1; of a pair 1 when the first is better, 0 when the second is, 0.5 for equal; None of a skip.
        reason: one of REASONS.
        predicted: what the running scorer said before it knew the answer: a score, of a pair the first's lead; None if there was none.
        time: seconds since 1970.
    """

    token: str
    mode: str
    first: int
    second: int | None = None
    value: float | None = None
    reason: str = "picked"
    predicted: float | None = None
    time: float = 0.0
    id: int = 0


@dataclass(frozen=True)
class Opinion:
    """Something that pictures are rated for: its name, and how many stars there are."""

    id: int
    name: str
    levels: int


class Project:
    """A project's folder, made if it is not there. Several threads may use one, and several processes one each.

    Raises:
        UserError: it cannot be read or written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder.absolute()
        with refusals(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / PICTURES).mkdir(exist_ok=True)
            # a transaction must not begin within another thread's, nor while one reads: it would begin from what that one sees, and be
            # refused at once where another process has written since
            self._one_at_a_time = threading.Lock()
            self._db = sqlite3.connect(self.folder / FILE, timeout=30, isolation_level=None, check_same_thread=False)
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=FULL")  # an acknowledged answer survives a power cut, too
            self._db.execute("PRAGMA foreign_keys=ON")
            self._db.executescript(SCHEMA)

    def close(self) -> None:
        self._db.close()

    # -- pictures ----------------------------------------------------------------------------------------------------

    def path_of(self, file: str) -> Path:
        """Where a picture's file is."""
        return self.folder / file

    def add_pictures(self, pictures: Iterable[StoredPicture]) -> int:
        """Add those whose hash is new, and return how many were."""
        rows = [
            (p.hash, p.file, p.shown, p.prompt, p.seed, p.width, p.height, p.features.astype("<f4").tobytes(), time.time())
            for p in pictures
        ]
        columns = "hash, file, shown, prompt, seed, width, height, features, added"
        with self._writing() as db:
            before = db.total_changes
            db.executemany(f"INSERT OR IGNORE INTO pictures ({columns}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", rows)
            return db.total_changes - before

    def pictures(self, after: int = 0) -> list[StoredPicture]:
        """All with an id above `after`, in the order in which they came."""
        names = ("id", "hash", "file", "shown", "prompt", "seed", "width", "height")
        rows = self._read(f"SELECT {', '.join(names)}, features FROM pictures WHERE id > ? ORDER BY id", after)
        return [StoredPicture(**dict(zip(names, row, strict=False)), features=np.frombuffer(row[-1], dtype="<f4")) for row in rows]

    def known_files(self) -> set[str]:
        return {file for (file,) in self._read("SELECT file FROM pictures")}

    def count_pictures(self) -> int:
        return self._read("SELECT count(*) FROM pictures")[0][0]

    def count_rated(self) -> int:
        """Pictures that were shown and answered for the opinion that has most of them."""
        sql = "SELECT count(DISTINCT first) + count(DISTINCT second) FROM ratings WHERE undone = 0 GROUP BY opinion"
        return max((count for (count,) in self._read(sql)), default=0)

    # -- opinions ----------------------------------------------------------------------------------------------------

    def opinions(self) -> list[Opinion]:
        return [Opinion(*row) for row in self._read("SELECT id, name, levels FROM opinions ORDER BY id")]

    def opinion(self, name: str) -> Opinion:
        """Raises UserError if there is none of that name."""
        rows = self._read("SELECT id, name, levels FROM opinions WHERE name = ?", name)
        if not rows:
            raise UserError(f"this project has no opinion {name!r}; it has {', '.join(o.name for o in self.opinions()) or 'none'}")
        return Opinion(*rows[0])

    def add_opinion(self, name: str, levels: int = 5) -> Opinion:
        """A new one, or the one that there is. Raises UserError for a name that cannot be one of a folder, too, or other levels."""
        name = " ".join(name.split())
        plain = name.replace(" ", "").replace("_", "").replace("-", "")
        if not plain.isalnum() or len(name) > LONGEST_NAME:
            raise UserError(
                f"{name[:LONGEST_NAME]!r} is no name for an opinion; give one of letters, digits, spaces, - and _, such as beauty"
            )
        if levels not in LEVELS:
            raise UserError(f"{levels} stars cannot be given; choose 5 or 10")
        with self._writing() as db:
            db.execute("INSERT OR IGNORE INTO opinions (name, levels, added) VALUES (?, ?, ?)", (name, levels, time.time()))
        return self.opinion(name)

    # -- ratings -----------------------------------------------------------------------------------------------------

    def add_ratings(self, opinion: Opinion, ratings: Sequence[Rating]) -> int:
        """Keep answers; when this returns they are on the disk. Returns how many were new.

        Raises:
            UserError: an answer that cannot be one, or nothing could be written; then none is kept.
        """
        for rating in ratings:
            check_rating(rating, opinion)
        rows = [(r.token, opinion.id, r.mode, r.first, r.second, r.value, r.reason, r.predicted, r.time or time.time()) for r in ratings]
        columns = "token, opinion, mode, first, second, value, reason, predicted, time, undone"
        undone = "EXISTS (SELECT 1 FROM taken_back WHERE token = ?1)"
        with self._writing() as db:
            before = db.total_changes
            try:
                # on conflict of the token alone: INSERT OR IGNORE would pass over a picture that does not exist
                sql = (
                    f"INSERT INTO ratings ({columns}) VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, {undone}) ON CONFLICT (token) DO NOTHING"
                )
                db.executemany(sql, rows)
            except sqlite3.IntegrityError as error:
                raise UserError("the answer names a picture that this project does not have; load the page anew") from error
            return db.total_changes - before

    def undo(self, opinion: Opinion, token: str) -> Rating | None:
        """Take back the answer of that token -> it, or None if there is none (any more).

        One that is still on its way does not count when it arrives: a page sends answers and what is taken back by requests of their own,
        which may overtake each other.
        """
        found = next((rating for rating in self.ratings(opinion) if rating.token == token), None)
        with self._writing() as db:
            db.execute("UPDATE ratings SET undone = 1 WHERE token = ? AND opinion = ?", (token, opinion.id))
            if found is None:
                db.execute("INSERT OR IGNORE INTO taken_back (token) VALUES (?)", (token,))
        return found

    def ratings(self, opinion: Opinion) -> list[Rating]:
        """The answers that stand, in the order in which they were given."""
        names = ("token", "mode", "first", "second", "value", "reason", "predicted", "time", "id")
        sql = f"SELECT {', '.join(names)} FROM ratings WHERE opinion = ? AND undone = 0 ORDER BY id"
        return [Rating(**dict(zip(names, row, strict=True))) for row in self._read(sql, opinion.id)]

    def _read(self, sql: str, *values: object) -> list[Any]:
        """All rows."""
        with self._one_at_a_time:
            return self._db.execute(sql, values).fetchall()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        """A transaction: all of it or nothing."""
        with self._one_at_a_time, refusals(self.folder):
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
                self._db.execute("COMMIT")
            except BaseException:
                with contextlib.suppress(sqlite3.Error):
                    self._db.execute("ROLLBACK")
                raise


@contextlib.contextmanager
def refusals(folder: Path) -> Iterator[None]:
    """What SQLite and the operating system refuse, as a UserError."""
    try:
        yield
    except sqlite3.DatabaseError as error:
        if isinstance(error, sqlite3.IntegrityError):
            raise
        full = any(words in str(error) for words in _FULL)
        advice = "free the space or choose another folder" if full else "close other programs that use it, or choose another folder"
        raise UserError(f"the project {folder} cannot be written ({error}): what was rated before is safe; {advice}") from error
    except OSError as error:
        raise UserError(f"the project {folder} cannot be used ({error.strerror or error}); choose another folder") from error


def check_rating(rating: Rating, opinion: Opinion) -> None:
    """Raises UserError for an answer that cannot be one."""
    stars = rating.mode == "stars" and rating.second is None and rating.value in range(1, opinion.levels + 1)
    pair = rating.mode == "pair" and rating.second not in (None, rating.first) and rating.value in (0, 0.5, 1)
    if not (stars or pair or (rating.mode == "skip" and rating.value is None)) or rating.reason not in REASONS:
        raise UserError(
            f"{rating.value!r} is no answer to {rating.mode!r}; stars go from 1 to {opinion.levels}, and of a pair 1 says that the first "
            "is better, 0 the second, 0.5 that they are equal"
        )
    if not 0 < len(rating.token) <= 64:
        raise UserError("an answer needs a token of 1 to 64 characters")
