"""Ratings as tables: written in the layouts that train_latent_scorer.py reads, and read from any source that it reads."""

from __future__ import annotations

import csv
import hashlib
import io
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from library.atomic_files import atomic_write_text
from library.errors import UserError
from library.rating.live import LiveOpinion
from library.rating.store import Opinion, Project, Rating, StoredPicture

MOST_MARKED = 1000


def ratings_csv(project: Project, opinion: Opinion) -> str:
    """path, score, prompt, and how often and when it was rated last: a row for each picture, with the mean of its stars."""
    pictures = {picture.id: picture for picture in project.pictures()}
    given: dict[int, list[Rating]] = defaultdict(list)
    for rating in project.ratings(opinion):
        if rating.mode == "stars":
            given[rating.first].append(rating)
    rows: list[Sequence[object]] = []
    for picture, ratings in given.items():
        own = pictures[picture]
        score = np.mean([rating.value or 0.0 for rating in ratings])
        rows.append([own.file, f"{score:g}", own.prompt, len(ratings), round(ratings[-1].time, 3), own.hash])
    return _table(("path", "score", "prompt", "ratings", "time", "hash"), rows)


def pairs_csv(project: Project, opinion: Opinion) -> str:
    """path_a, path_b, label (1 the first, 0 the second, 0.5 equal), and when it was said: a row for each answer."""
    pictures = {picture.id: picture for picture in project.pictures()}
    rows: list[Sequence[object]] = []
    for rating in project.ratings(opinion):
        if rating.mode == "pair" and rating.second is not None:
            first, second = pictures[rating.first], pictures[rating.second]
            rows.append([first.file, second.file, f"{rating.value:g}", round(rating.time, 3), first.hash, second.hash])
    return _table(("path_a", "path_b", "label", "time", "hash_a", "hash_b"), rows)


def marks_csv(live: LiveOpinion) -> str:
    """path, score, prompt: what the running scorer says of every picture, rated or not; of more than `MOST_MARKED`, every few of them."""
    worth, pictures = live.worths()[0], live.gallery.pictures
    rows = np.unique(np.linspace(0, len(worth) - 1, min(len(worth), MOST_MARKED)).round().astype(int))
    return _table(("path", "score", "prompt"), [(pictures[row].file, f"{worth[row]:.5f}", pictures[row].prompt) for row in rows])


def write_tables(project: Project, opinion: Opinion, folder: Path) -> tuple[Path | None, Path | None]:
    """ratings.csv and pairs.csv in a folder, those that there is something to write into."""
    modes = {rating.mode for rating in project.ratings(opinion)}
    written: list[Path | None] = []
    for mode, name, table in (("stars", "ratings.csv", ratings_csv), ("pair", "pairs.csv", pairs_csv)):
        if mode in modes:
            atomic_write_text(folder / name, table(project, opinion))
        written.append(folder / name if mode in modes else None)
    return written[0], written[1]


def import_ratings(project: Project, opinion: Opinion, path: Path) -> tuple[int, int]:
    """Take in answers about pictures that the project has, from a table that `write_tables` wrote or any with path and score, or pairs.

    Scores that are no stars are spread over them, the lowest to one star. The same table twice counts once. Returns how many answers were
    new, and how many rows named pictures that the project does not have.

    Raises:
        UserError: the table cannot be read, or holds nothing.
    """
    from library.scorer_data.readers.base import ReaderOptions  # what reads tables takes a while to load
    from library.scorer_data.readers.recognition import read_records
    from library.scorer_data.records import RatedImage, RatedPair

    by_path = {str(project.path_of(picture.file).resolve()): picture for picture in project.pictures()}

    def known(location: object) -> StoredPicture | None:
        return by_path.get(str(Path(str(location)).resolve()))

    header = path.read_text(encoding="utf-8-sig", errors="replace").partition("\n")[0]
    target = "pair" if "path_a" in header else "score"
    ratings, missing = [], 0
    records = list(read_records(path, "auto", ReaderOptions(target=target, image_dir=project.folder)))
    scores = [record.score for record in records if isinstance(record, RatedImage) and record.score is not None]
    for record in records:
        if isinstance(record, RatedImage) and record.score is not None:
            picture = known(record.picture.key)
            if picture is not None:
                value = _as_stars(record.score, scores, opinion.levels)
                ratings.append(
                    Rating(token=_token(opinion, picture.hash, value), mode="stars", first=picture.id, value=value, reason="imported")
                )
                continue
        elif isinstance(record, RatedPair):
            first, second = known(record.first.key), known(record.second.key)
            if first is not None and second is not None:
                token = _token(opinion, first.hash, second.hash, record.preference)
                ratings.append(
                    Rating(token=token, mode="pair", first=first.id, second=second.id, value=record.preference, reason="imported")
                )
                continue
        missing += 1
    if not ratings:
        raise UserError(f"none of the {missing} rows names a picture of this project; give a table that this project wrote, or its paths")
    return project.add_ratings(opinion, ratings), missing


def _as_stars(score: float, scores: Sequence[float], levels: int) -> float:
    if all(1 <= other <= levels for other in scores):
        return float(np.floor(score + 0.5))
    low, high = min(scores), max(scores)
    return float(1 + round((score - low) / max(high - low, 1e-12) * (levels - 1)))


def _token(opinion: Opinion, *parts: object) -> str:
    return "i" + hashlib.sha256("\0".join(map(str, (opinion.id, *parts))).encode()).hexdigest()[:40]


def _table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return stream.getvalue()
