"""Simulacra Aesthetic Captions (Pressman et al., 2022): 238,000 generated pictures with their prompts and 176,000 ratings from 1 to 10."""

import contextlib
import sqlite3
from pathlib import Path

from library.errors import UserError
from library.scorer_data.readers.base import READERS, BadValue, Reader, ReaderOptions, Source, mean_vote, score_in_range, ten_votes
from library.scorer_data.readers.files import PictureFiles, own_folder
from library.scorer_data.readers.rows import Row, records_of
from library.scorer_data.readers.tables import VOTE_COLUMNS, find_picture
from library.scorer_data.records import RatedImage, Records

# The ratings are summed up before they are joined: a picture may have several paths, each of which would count them again.
_SUMS = ", ".join(f"SUM(rating = {rating}) AS {name}" for rating, name in enumerate(VOTE_COLUMNS, start=1))
_QUERY = f"""
    SELECT images.id, paths.path, generations.prompt, rated.mean, {", ".join(VOTE_COLUMNS)}
    FROM (
        SELECT iid, AVG(rating) AS mean, {_SUMS}
        FROM ratings GROUP BY iid
    ) AS rated
    JOIN images ON images.id = rated.iid
    JOIN generations ON generations.id = images.gid
    JOIN paths ON paths.iid = images.id
    GROUP BY images.id ORDER BY images.id
"""


@READERS.register("simulacra")
class Simulacra(Reader):
    """The sqlite file, with the tables images, generations, ratings and paths. The score is the mean of a picture's ratings.

    Options: image_dir, score_range.
    """

    targets = ("score", "votes")
    known = ("image_dir", "score_range")

    @staticmethod
    def recognises(source: Source) -> bool:
        return source.path.suffix.lower() in (".sqlite", ".sqlite3", ".db")

    @staticmethod
    def read(path: Path, options: ReaderOptions) -> Records:
        if not path.is_file():
            raise UserError(f"there is no sqlite file {path}")
        files = PictureFiles(options.image_dir or own_folder(path))

        def record(row: Row) -> RatedImage:
            votes = ten_votes([row.get(name) for name in VOTE_COLUMNS])
            score = score_in_range(row.number("mean"), options)
            if abs(mean_vote(votes) - score) > 1e-6:
                raise BadValue("rating is not one of 1 to 10")
            name, picture = find_picture(files, row.get("path"))
            return RatedImage(picture=picture, name=name, where=row.where, score=score, votes=votes, prompt=row.get("prompt") or "")

        with contextlib.closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as database:
            try:
                rows = database.execute(_QUERY)
            except sqlite3.Error as error:
                raise UserError(f"{path} is not the sqlite file of Simulacra Aesthetic Captions: {error}") from error
            names = ("id", "path", "prompt", "mean", *VOTE_COLUMNS)
            yield from records_of((Row(f"{path}, image {cells[0]}", dict(zip(names, cells, strict=True))) for cells in rows), record)
