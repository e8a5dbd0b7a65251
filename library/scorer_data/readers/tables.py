"""Tables of rated pictures of one's own: CSV, TSV, JSON and parquet, one picture a row."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any

from library.scorer_data.readers.base import (
    READERS,
    SPLIT_NAMES,
    VOTES,
    BadValue,
    Reader,
    ReaderOptions,
    Source,
    label_text,
    mean_vote,
    score_in_range,
    split_name,
    tag_names,
    ten_votes,
    weight_value,
)
from library.scorer_data.readers.exports import picture_names
from library.scorer_data.readers.files import PictureFiles, own_folder, source_files, subfolders
from library.scorer_data.readers.parquet import ParquetPicture, open_parquet, picture_column
from library.scorer_data.readers.rows import ROW_FORMATS, Needed, Row, read_rows, records_of
from library.scorer_data.records import Picture, RatedImage, Records

PATHS = ("path", "file_name", "filename", "image_path", "image", "image_id")  # file_name: Hugging Face, image_id: idealo
PROMPTS = ("prompt", "text", "caption")
VOTE_COLUMNS = tuple(f"votes_{rating}" for rating in range(1, VOTES + 1))


@dataclass(frozen=True, kw_only=True)
class Columns:
    """Under which names, in lower case, a table has what; of several names the first that a row has."""

    path: tuple[str, ...] = PATHS
    image: str = "image"
    score: str = "score"
    label: str = "label"
    tags: str = "tags"
    prompt: tuple[str, ...] = PROMPTS
    weight: str = "weight"
    split: str = "split"

    @staticmethod
    def of(options: ReaderOptions) -> "Columns":
        several = {field.name for field in fields(Columns) if not isinstance(field.default, str)}
        given = {name: options.extra[key].lower() for key, name in COLUMN_OPTIONS.items() if key in options.extra}
        names: dict[str, Any] = {name: (column,) if name in several else column for name, column in given.items()}
        return Columns(**names, score=options.score_column.lower() or "score")

    def read(self) -> list[str]:
        """Every column that may be read."""
        one = (self.image, self.score, self.label, self.tags, self.weight, self.split)
        return [*self.path, *self.prompt, *one, "votes", *VOTE_COLUMNS]

    def needed(self, target: str) -> tuple[str, ...]:
        """The columns of which one must be there for a target."""
        votes = ("votes", VOTE_COLUMNS[0])
        return {"score": (self.score, *votes), "votes": votes, "label": (self.label,), "tags": (self.tags,)}[target]


COLUMN_OPTIONS: Mapping[str, str] = {f"{field.name}_column": field.name for field in fields(Columns) if field.name != "score"}


@READERS.register("table")
class Table(Reader):
    """Rows with `path` and what is to be learned: `score`, `label`, `tags`, `votes` (a JSON list) or `votes_1` ... `votes_10`.

    Also read: `prompt`, `weight`, `split`. A row with votes and no score has their mean for a score. Other columns are ignored; other usual
    names are known (`PATHS`, `PROMPTS`). A parquet table without `path` can have its pictures in a column `image`. `path` can be a pattern
    of tables, a folder of them, or of pictures with Hugging Face's metadata.jsonl (.csv, .parquet) in it, or in its folders train, test ...

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
        for source, folder, split in _sources(path):
            stored = _stored_pictures(source, columns)

            def record(row: Row, source=source, folder=folder, split=split, stored=stored) -> RatedImage:
                if stored and row.place:
                    picture, name = ParquetPicture(source.absolute(), *row.place, stored), f"{source.name}#{row.place[0]},{row.place[1]}"
                else:
                    name, picture = find_picture(files, row.get(*columns.path), folder)
                return rated_image(row, picture, name, columns, options, split)

            needed: Needed = [columns.needed(options.target), *([] if stored else [columns.path])]
            yield from records_of(read_rows(source, needed, columns.read()), record)


def metadata_files(path: Path) -> list[tuple[Path, str, str | None]]:
    """Hugging Face's metadata of a folder of pictures: each file, the folder that its paths are relative to, and its split."""
    splits = [folder for folder in subfolders(path) if folder.lower() in SPLIT_NAMES]
    places = [("", None), *((folder, SPLIT_NAMES[folder.lower()]) for folder in splits)]
    found = [(file, folder, split) for folder, split in places for file in sorted((path / folder).glob("metadata.*"))]
    found = [place for place in found if place[0].suffix.lower() in (".jsonl", ".csv", ".parquet")]
    has_validation = any(split == "val" for _, _, split in found)
    return [(file, folder, None if split == "train" and not has_validation else split) for file, folder, split in found]


def path_text(value: object) -> str:
    """A path with forward slashes. Raises BadValue if it is empty."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    name = "" if value is None else str(value).strip().replace("\\", "/")
    if not name:
        raise BadValue("path is empty")
    return name


def find_picture(files: PictureFiles, value: object, folder: str = "") -> tuple[str, Picture]:
    """The name and the picture of what a row says is its path, in `folder` of the pictures. Raises BadValue."""
    names = [f"{folder}/{name}" if folder else name for name in picture_names(path_text(value))]
    if folder and names[0].startswith(f"{folder}/{folder}/"):  # relative to the folder above, as people write them
        names.append(names[0].removeprefix(f"{folder}/"))
    for name in names[:-1]:
        if picture := files.find_or_none(name):
            return name, picture
    return names[-1], files.find(names[-1])


def rated_image(row: Row, picture: Picture, name: str, columns: Columns, options: ReaderOptions, split: str | None = None) -> RatedImage:
    """A row as a record with what is to be learned; `split` where it does not say its own. Raises BadValue."""
    target = options.target
    votes = _votes(row) if target == "votes" or (target == "score" and row.get(columns.score) in (None, "")) else None
    score = None
    if target == "score":
        score = score_in_range(mean_vote(votes) if votes else row.number(columns.score), options)
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
        prompt=str(row.get(*columns.prompt) or ""),
        weight=weight_value(row.get(columns.weight)),
        split=split_name(row.get(columns.split)) or split,
    )


def _votes(row: Row) -> tuple[float, ...] | None:
    """Raises BadValue if they are there and wrong."""
    if row.get("votes") not in (None, ""):
        return ten_votes(row.get("votes"))
    counts = [row.get(name) for name in VOTE_COLUMNS]
    return None if all(count in (None, "") for count in counts) else ten_votes(counts)


def _sources(path: Path) -> Iterator[tuple[Path, str, str | None]]:
    """The tables of a source, the folder in it that their paths are relative to, and their split."""
    found = metadata_files(path) if path.is_dir() else []
    yield from found or ((file, "", None) for file in source_files(path, ROW_FORMATS))


def _stored_pictures(source: Path, columns: Columns) -> str | None:
    """The column of a parquet table that holds its pictures, if it has no column of paths."""
    if source.suffix.lower() != ".parquet":
        return None
    schema = open_parquet(source).schema_arrow
    return None if columns.path[0] in schema.names else picture_column(schema, columns.image)
