"""An opinion while it is given: its answers, its running scorer, and the questions that wait."""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from library.rating.choice import Question, choose
from library.rating.progress import Progress, find_drift, measure_progress, mostly_pairs
from library.rating.space import FeatureSpace
from library.rating.store import Opinion, Project, Rating, StoredPicture
from library.rating.taste import Answers, Taste

QUEUE = 16  # questions that wait, so that none is waited for
LEARN_EVERY = 5  # answers
FIRST_BY_CHANCE = 10  # answers: before that many, what is chosen teaches less than what is drawn
REPEAT_AFTER = 10  # answers, at the earliest, a question is asked again
REPEAT_EVERY = (11, 19)  # answers lie between two that are asked again, unannounced: about one in fifteen
MEASURE_EVERY = 10  # answers
REST = 6.0  # seconds without an answer, after which what came since is learned and measured, however little it is
WEIGHED = 20  # answers, from which on assumptions change little by little
LEASE = 600.0  # seconds for which a picture that one tab shows is not shown in another
GROWTH = 1.1  # of the pictures, after which features are made comparable anew
MOST_LEARNED = 1500  # of the newest answers


@dataclass(frozen=True)
class OpenQuestion:
    """A question on its way to a page: what it is answered with is the token of the answer."""

    token: str
    pictures: tuple[int, ...]
    reason: str


class Gallery:
    """The project's pictures in memory, and where they lie. Shared by its opinions."""

    def __init__(self, project: Project) -> None:
        self._project = project
        self.pictures: list[StoredPicture] = []
        self.row_of: dict[int, int] = {}
        self.space = FeatureSpace(np.zeros((0, 9)))

    def refresh(self) -> bool:
        """See what was added; whether the space is another now."""
        for picture in self._project.pictures(after=self.pictures[-1].id if self.pictures else 0):
            self.row_of[picture.id] = len(self.pictures)
            self.pictures.append(picture)
        few = len(self.pictures) < 64
        if len(self.pictures) > self.space.size * (1.0 if few else GROWTH) or (len(self.pictures) and not self.space.size):
            self.space = FeatureSpace(np.stack([picture.features for picture in self.pictures]))
            return True
        return False


class LiveOpinion:
    """One opinion of a project. Its methods may be called from several threads; `learn` and `measure` take the time."""

    def __init__(self, project: Project, gallery: Gallery, opinion: Opinion, seed: int | None = None) -> None:
        self.project, self.gallery, self.opinion = project, gallery, opinion
        self.progress = Progress(answers=0, measure="rank correlation")
        self.ratings: list[Rating] = project.ratings(opinion)
        self.taste: Taste | None = None
        self.learned = self.measured = -1
        self._changed = time.monotonic()
        self._rng = np.random.default_rng(seed)
        self._queues: dict[bool, list[Question]] = {False: [], True: []}
        self._leases: dict[int, float] = {}
        self._reasons: dict[str, str] = {}
        self._repeat_at = int(self._rng.integers(*REPEAT_EVERY, endpoint=True))
        self._lock = threading.RLock()

    # -- asking ------------------------------------------------------------------------------------------------------

    def ask(self, count: int, *, pairs: bool = False, prompt: str | None = None) -> list[OpenQuestion]:
        """Up to `count` questions, about pictures that nobody else is being asked about; fewer where no more are left."""
        with self._lock:
            now = time.monotonic()
            self._leases = {picture: until for picture, until in self._leases.items() if until > now}
            taken = self._seen() | self._leases.keys()
            asked: list[OpenQuestion] = []
            queue = self._queues[pairs]
            kept: list[Question] = []
            if prompt is None and (again := self._again(pairs)):
                asked.append(self._hand_out(again, "repeat", now))
            while queue and len(asked) < count:
                question = queue.pop(0)
                ids = tuple(self.gallery.pictures[row].id for row in question.pictures)
                free = not taken & set(ids)
                if prompt is not None and any(self._picture(picture).prompt != prompt for picture in ids):
                    kept.append(question)
                elif free:
                    asked.append(self._hand_out(ids, question.reason, now))
                    taken |= set(ids)
            queue[:0] = kept
            if len(asked) < count:  # what waits has run out: by chance, at once
                asked += [self._hand_out(ids, "random", now) for ids in self._by_chance(count - len(asked), pairs, prompt, taken)]
            return asked

    def _again(self, pairs: bool) -> tuple[int, ...]:
        """Pictures to ask about a second time, if one is due; the older answers are, the likelier they are forgotten."""
        given = [rating for rating in self.ratings if rating.mode == ("pair" if pairs else "stars")]
        if len(given) < self._repeat_at:
            return ()
        again = {_pictures_of(rating) for rating in given if rating.reason == "repeat"}
        old = [_pictures_of(rating) for rating in given[:-REPEAT_AFTER] if rating.reason != "repeat"]
        old = [pictures for pictures in old if pictures not in again and not self._leases.keys() & set(pictures)]
        self._repeat_at = len(given) + int(self._rng.integers(*REPEAT_EVERY, endpoint=True))
        return old[int(self._rng.integers(len(old)))] if old else ()

    def _hand_out(self, ids: tuple[int, ...], reason: str, now: float) -> OpenQuestion:
        self._leases.update(dict.fromkeys(ids, now + LEASE))
        asked = OpenQuestion(uuid.uuid4().hex, ids, reason)
        self._reasons[asked.token] = reason
        return asked

    def reason_of(self, token: str) -> str:
        """Why this was asked; "picked" of what nobody here asked."""
        return self._reasons.get(token, "picked")

    def _by_chance(self, count: int, pairs: bool, prompt: str | None, taken: set[int]) -> list[tuple[int, ...]]:
        fresh = [p.id for p in self.gallery.pictures if p.id not in taken and (prompt is None or p.prompt == prompt)]
        picked = [fresh[place] for place in self._rng.permutation(len(fresh))[: count * (1 + pairs)]]
        return list(zip(picked[::2], picked[1::2], strict=False)) if pairs else [(picture,) for picture in picked]

    # -- answers -----------------------------------------------------------------------------------------------------

    def answer(self, ratings: Sequence[Rating]) -> int:
        """Keep answers, with what the running scorer says of them before it learns them. Returns how many were new."""
        with self._lock:
            known = [replace(rating, predicted=self._predict(rating)) for rating in ratings]
            new = self.project.add_ratings(self.opinion, known)
            self.reload()
            for rating in ratings:
                for picture in (rating.first, rating.second):
                    self._leases.pop(picture or 0, None)
            return new

    def undo(self, token: str) -> Rating | None:
        with self._lock:
            taken_back = self.project.undo(self.opinion, token)
            self.reload()
            return taken_back

    def reload(self) -> None:
        """Read the answers anew, where somebody else may have written some."""
        self.ratings = self.project.ratings(self.opinion)
        self._changed = time.monotonic()

    def _predict(self, rating: Rating) -> float | None:
        taste = self.taste
        rows = [self.gallery.row_of.get(picture or 0, -1) for picture in (rating.first, rating.second)]
        if taste is None or not len(taste.answers) or rows[0] < 0 or rows[0] >= taste.size or rows[1] >= taste.size:
            return None
        worth = taste.means(np.array([row for row in rows if row >= 0]))
        return float(worth[0] - worth[1]) if len(worth) == 2 else float(worth[0])

    # -- learning ----------------------------------------------------------------------------------------------------

    def due(self) -> bool:
        """Whether there is something to learn."""
        return self._behind(self.learned, LEARN_EVERY) or min(map(len, self._queues.values())) < 4

    def measure_due(self) -> bool:
        """Whether the figures are of too few answers."""
        return self._behind(self.measured, MEASURE_EVERY)

    def _behind(self, known: int, most: int) -> bool:
        count = len(self.ratings)
        return known < 0 or abs(count - known) >= most or (count != known and time.monotonic() - self._changed > REST)

    def learn(self) -> None:
        """Learn all answers, and choose what to ask next."""
        with self._lock:
            ratings, space = self.ratings, self.gallery.space
            stars, pairs = self._answers(ratings, space.size)
            seen = self._seen() | self._leases.keys()
            before = self.taste.choices if self.taste is not None and len(self.taste.answers) >= WEIGHED else None
        answers = Answers.of([s[:2] for s in stars], [p[:3] for p in pairs], self.opinion.levels)
        taste = Taste(space, answers, near=before)
        fresh = np.array([row for row in range(space.size) if self.gallery.pictures[row].id not in seen], dtype=int)
        chosen = {}
        for in_pairs in (False, True):
            chosen[in_pairs] = choose(
                taste, fresh, space.size, QUEUE, pairs=in_pairs, rng=self._rng, at_random=len(answers) < FIRST_BY_CHANCE
            )
        with self._lock:
            self.taste, self._queues, self.learned = taste, chosen, len(ratings)

    def measure(self) -> None:
        """Measure how well the running scorer does."""
        with self._lock:
            ratings, taste, space = self.ratings, self.taste, self.gallery.space
        if taste is None or taste.size != space.size:
            return
        stars, pairs = self._answers(ratings, space.size)
        both = [*stars, *pairs]
        answers = Answers.of([s[:2] for s in stars], [p[:3] for p in pairs], self.opinion.levels)
        known = [entry[-1] for entry in stars if entry[-1].predicted is not None]
        times, values, predicted = (np.array([getattr(r, name) for r in known], dtype=float) for name in ("time", "value", "predicted"))
        at_random = np.array([entry[-1].reason in ("random", "imported") for entry in both], dtype=bool)
        self.progress = measure_progress(
            space,
            answers,
            taste.choices,
            at_random=at_random,
            ahead=np.array([np.nan if entry[-1].predicted is None else entry[-1].predicted for entry in both]),
            repeats=_twice(ratings, "pair" if mostly_pairs(answers, at_random) else "stars"),
            drift=find_drift(times, values, predicted),
        )
        self.measured = len(ratings)

    def worths(self) -> tuple[np.ndarray, np.ndarray]:
        """What the running scorer says of every picture, by row: worth and standard deviation."""
        taste = self.taste
        if taste is None or not len(taste.answers):
            return np.zeros(0), np.zeros(0)
        rows = np.arange(taste.size)
        return taste.means(rows), taste.deviations(rows)

    def _answers(self, ratings: Sequence[Rating], size: int) -> tuple[list[Any], list[Any]]:
        """(row, stars, rating) and (row, row, preference, rating) of the newest answers about pictures that the space knows."""
        row = self.gallery.row_of
        known = [r for r in ratings if all(row.get(picture, size) < size for picture in _pictures_of(r))][-MOST_LEARNED:]
        stars = [(row[r.first], r.value, r) for r in known if r.mode == "stars"]
        return stars, [(row[r.first], row[r.second], r.value, r) for r in known if r.mode == "pair" and r.second is not None]

    def _seen(self) -> set[int]:
        return {picture for rating in self.ratings for picture in _pictures_of(rating)}

    def _picture(self, picture: int) -> StoredPicture:
        return self.gallery.pictures[self.gallery.row_of[picture]]


def _pictures_of(rating: Rating) -> tuple[int, ...]:
    return (rating.first,) if rating.second is None else (rating.first, rating.second)


def _twice(ratings: Iterable[Rating], mode: str) -> np.ndarray:
    """The first and the second answer [R, 2] to what was asked again."""
    first: dict[tuple[int, ...], float] = {}
    found = []
    for rating in ratings:
        if rating.mode == mode and rating.value is not None:
            if rating.reason == "repeat" and _pictures_of(rating) in first:
                found.append((first[_pictures_of(rating)], rating.value))
            first.setdefault(_pictures_of(rating), rating.value)
    return np.array(found, dtype=float).reshape(-1, 2)
