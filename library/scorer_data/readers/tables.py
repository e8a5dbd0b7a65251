"""Tables of rated pictures of one's own: CSV, TSV, JSON and parquet, one picture a row."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from types import MappingProxyType

from library.scorer_data.readers.base import (
    READERS,
    VOTES,
    BadValue,
    Reader,
    ReaderOptions,
    Source,
    label_text,
    mean_vote,
    number,
    score_in_range,
    split_name,
    tag_names,
    ten_votes,
    weight_value,
)
from library.scorer_data.readers.files import PictureFiles, own_folder, source_files
from library.scorer_data.readers.parquet import ParquetPicture, open_parquet, picture_column
from library.scorer_data.readers.rows import ROW_FORMATS, Needed, Row, read_rows
from library.scorer_data.records import Picture, RatedImage, Records, Skipped

VOTE_COLUMNS = tuple(f"votes_{rating}" for rating in range(1, VOTES + 1))


@dataclass(frozen=True, kw_only=True)
class Columns:
    """Under which name a table has what."""

    path: str = "path"
    image: str = "image"
    score: str = "score"
    label: str = "label"
    tags: str = "tags"
    prompt: str = "prompt"
    weight: str = "weight"
    split: str = "split"

    @staticmethod
    def of(options: ReaderOptions) -> "Columns":
        names = {name: options.extra[key] for key, name in COLUMN_OPTIONS.items() if key in options.extra}
        return Columns(**names, score=options.score_column or "score")

    def read(self) -> list[str]:
        """Every column that may be read."""
        return [*(getattr(self, field.name) for field in fields(self)), "votes", *VOTE_COLUMNS]

    def needed(self, target: str) -> tuple[str, ...]:
        """The columns of which one must be there for a target."""
        votes = ("votes", VOTE_COLUMNS[0])
        return {"score": (self.score, *votes), "votes": votes, "label": (self.label,), "tags": (self.tags,)}[target]


COLUMN_OPTIONS: Mapping[str, str] = {f"{field.name}_column": field.name for field in fields(Columns) if field.name != "score"}


@READERS.register("table")
class Table(Reader):
    """Rows with `path` and what is to be learned: `score`, `label`, `tags`, `votes` (a JSON list) or `votes_1` ... `votes_10`.

    Also read: `prompt`, `weight`, `split`. A row with votes and no score has their mean for a score. Other columns are ignored.
    A parquet table without `path` can have its pictures in a column `image`. `path` can be a folder or a pattern of tables.

    Options: image_dir, score_column, score_range, and the names of the other columns: path_column, image_column, label_column,
    tags_column, prompt_column, weight_column, split_column.
    """

    targets = ("score", "label", "votes", "tags")
    known = ("image_dir", "score_column", "score_range")
    own = MappingProxyType(dict.fromkeys(COLUMN_OPTIONS, str))
    is_general = True

    @staticmethod
    def recognises(source: Source) -> bool:
        return source.is_table

    @staticmethod
    def read(path: Path, options: ReaderOptions) -> Records:
        columns = Columns.of(options)
        files = PictureFiles(options.image_dir or own_folder(path))
        for source in source_files(path, ROW_FORMATS):
            location, stored = source.absolute(), _stored_pictures(source, columns)
            needed: Needed = [columns.needed(options.target), *([] if stored else [(columns.path,)])]
            for row in read_rows(source, needed, columns.read()):
                if isinstance(row, Skipped):
                    yield row
                    continue
                try:
                    if stored and row.place:
                        picture, name = ParquetPicture(location, *row.place, stored), f"{source.name}#{row.place[0]},{row.place[1]}"
                    else:
                        name = path_text(row.get(columns.path))
                        picture = files.find(name)
                    yield rated_image(row, picture, name, columns, options)
                except BadValue as error:
                    yield error.at(row.where)


def path_text(value: object) -> str:
    """A path with forward slashes. Raises BadValue if it is empty."""
    name = str(value or "").strip().replace("\\", "/")
    if not name:
        raise BadValue("path is empty")
    return name


def rated_image(row: Row, picture: Picture, name: str, columns: Columns, options: ReaderOptions) -> RatedImage:
    """A row as a record with what is to be learned. Raises BadValue."""
    target = options.target
    votes = _votes(row) if target == "votes" or (target == "score" and row.get(columns.score) in (None, "")) else None
    score = None
    if target == "score":
        score = score_in_range(mean_vote(votes) if votes else number(row.get(columns.score), columns.score), options)
    elif target == "votes" and not votes:
        raise BadValue("votes are not there")
    if target == "tags" and row.get(columns.tags) is None:
        raise BadValue("tags are not there")
    return RatedImage(
        picture=picture,
        name=name,
        where=row.where,
        score=score,
        label=label_text(row.get(columns.label)) if target == "label" else None,
        votes=votes,
        tags=tag_names(row.get(columns.tags)) if target == "tags" else None,
        prompt=str(row.get(columns.prompt) or ""),
        weight=weight_value(row.get(columns.weight)),
        split=split_name(row.get(columns.split)),
    )


def _votes(row: Row) -> tuple[float, ...] | None:
    """Raises BadValue if they are there and wrong."""
    if row.get("votes") not in (None, ""):
        return ten_votes(row.get("votes"))
    counts = [row.get(name) for name in VOTE_COLUMNS]
    return None if all(count in (None, "") for count in counts) else ten_votes(counts)


def _stored_pictures(source: Path, columns: Columns) -> str | None:
    """The column of a parquet table that holds its pictures, if it has no column of paths."""
    if source.suffix.lower() != ".parquet":
        return None
    schema = open_parquet(source).schema_arrow
    return None if columns.path in schema.names else picture_column(schema, columns.image)
