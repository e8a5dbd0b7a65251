"""Danbooru's metadata: the JSON of both generations of gwern's Danbooru20xx, and the parquet dumps that came after."""

import datetime
import itertools
import logging
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from library.errors import UserError
from library.scorer_data.readers.base import READERS, BadValue, Reader, ReaderOptions, Source, number, score_in_range, tag_names
from library.scorer_data.readers.danbooru_popularity import PopularityModel
from library.scorer_data.readers.files import PICTURE_SUFFIXES, PictureFiles, own_folder, source_files, subfolders
from library.scorer_data.readers.rows import Row, RowIterator, read_rows, records_of
from library.scorer_data.records import FilePicture, RatedImage, Records

logger = logging.getLogger(__name__)

TAG_CATEGORIES: Mapping[str, int] = {"general": 0, "artist": 1, "copyright": 3, "character": 4, "meta": 5}
NEW_RATINGS: Mapping[str, str] = {"g": "general", "s": "sensitive", "q": "questionable", "e": "explicit"}
OLD_RATINGS: Mapping[str, str] = {"s": "safe", "q": "questionable", "e": "explicit"}  # until January 2022
LAYOUTS: Mapping[str, str] = {
    "original": "original/{bucket}/{id}{suffix}",
    "512px": "512px/{bucket}/{id}{suffix}",
    "buckets": "{bucket}/{id}{suffix}",
    "flat": "{id}{suffix}",
}
PEEKED_POSTS = 10_000  # general posts are a third of new dumps
COLUMNS = (
    *("id", "created_at", "updated_at", "score", "up_score", "down_score", "fav_count", "rating", "file_ext", "media_asset"),
    *("is_deleted", "is_banned", "is_pending", "tag_string", "tags"),
    *(f"tag_string_{category}" for category in TAG_CATEGORIES),
)


@READERS.register("danbooru")
class Danbooru(Reader):
    """A file of posts, a folder of them (posts*.json, *.parquet), or the folder that has them in `metadata`.

    What it gives: score; label, which is the rating; tags. Posts that are deleted, banned or pending are left out, and videos, archives and
    Flash. These, and posts whose picture is not there, are reported by their number.

    Options:
        image_dir: the folder of the pictures; if not set, that of the source, or of `metadata`.
        score_column: "score" (default: up and down votes), "fav_count", "up_score", or another number of a post.
        score_range: of the corrected score, if it is corrected.
        layout: where post 1234567 is: "original" (original/0567/1234567.EXT), "512px" (512px/0567/1234567.jpg), "buckets"
            (0567/1234567.EXT), "flat" (1234567.EXT), or "auto" (default), which tries those that there are folders for.
        age_correction: true (default) scores a post among those of its age and rating: see `PopularityModel`. Reads the metadata twice.
        ratings: what "s" means: "new" sensitive, beside g for general; "old" safe, before 2022; "auto" (default) is new if one of
            the first 10,000 posts is g or was changed in 2022 or later.
        tags: the categories of tags, of general (default), artist, copyright, character and meta: one, or a list.
    """

    targets = ("score", "label", "tags")
    known = ("image_dir", "score_column", "score_range")
    own = MappingProxyType({"layout": ("auto", *LAYOUTS), "age_correction": bool, "ratings": ("auto", "old", "new"), "tags": (str, list)})

    @staticmethod
    def recognises(source: Source) -> bool:
        has_posts = {"id", "rating"} <= source.columns and not source.columns.isdisjoint(("tags", "tag_string", "tag_string_general"))
        return has_posts or "metadata" in source.folders or any(re.fullmatch(r"posts.*\.jsonl?", name) for name in source.files)

    @staticmethod
    def read(path: Path, options: ReaderOptions) -> Records:
        shards = _shards(path)
        own = own_folder(shards[0])
        root = options.image_dir or (own.parent if own.name == "metadata" else own)
        pictures = _Pictures(root, options.extra.get("layout", "auto"))
        column = options.score_column or "score"
        corrected = options.target == "score" and options.extra.get("age_correction", True)
        model = _popularity(shards, column) if corrected else None
        classes = _classes(shards, options.extra.get("ratings", "auto")) if options.target == "label" else {}
        categories = _categories(options.extra.get("tags", "general"))

        def post(row: Row) -> RatedImage:
            _check_status(row)
            score = label = tags = None
            if options.target == "score":
                votes = _votes(row, column)
                score = score_in_range(model.score(votes, _day(row), _rating(row)) if model else votes, options)
            elif options.target == "label":
                label = _label(row, classes)
            else:
                tags = _tags(row, categories)
            picture, name = pictures.find(_id(row), _suffix(row))
            return RatedImage(picture=picture, name=name, where=row.where, score=score, label=label, tags=tags)

        yield from records_of(_rows(shards), post)


def _shards(path: Path) -> list[Path]:
    folder = path / "metadata" if (path / "metadata").is_dir() else path
    files = source_files(folder, (".json", ".jsonl", ".parquet"))
    posts = [file for file in files if file.name.startswith("posts")]
    return posts or [file for file in files if not file.name.startswith("tags")] or files


def _rows(shards: Sequence[Path]) -> RowIterator:
    for shard in shards:
        yield from read_rows(shard, [["id"]], COLUMNS)


# -- what a post says ----------------------------------------------------------------------------------------------------
# The first generation has all numbers as text, favourites as a list of users, and tags as objects.


def _id(row: Row) -> int:
    value = number(row.get("id"), "id")
    if value != int(value) or value <= 0:
        raise BadValue("id is no whole number")
    return int(value)


def _check_status(row: Row) -> None:
    for flag in ("is_deleted", "is_banned", "is_pending"):
        if str(row.get(flag)).lower() in ("true", "t", "1"):
            raise BadValue(f"post {flag.replace('_', ' ')}")
    suffix = _suffix(row)
    if suffix and suffix not in PICTURE_SUFFIXES:
        raise BadValue("post is no picture", f"post is no picture, but {suffix}")


def _suffix(row: Row) -> str:
    """With its dot, in lower case; empty if the dump does not say."""
    asset = row.get("media_asset")
    extension = row.get("file_ext") or (asset.get("file_ext") if isinstance(asset, dict) else None)
    return f".{extension}".lower() if extension else ""


def _votes(row: Row, column: str) -> float:
    if column == "fav_count" and row.get("fav_count") is None and isinstance(row.get("favs"), list):
        return float(len(row.get("favs")))
    return number(row.get(column), column)


def _day(row: Row) -> int:
    """A running number of the day on which it was uploaded."""
    created = row.get("created_at")
    try:
        date = created.date() if isinstance(created, datetime.datetime) else datetime.date.fromisoformat(str(created)[:10])
    except ValueError:
        raise BadValue("created_at is no date", f"created_at {created!r} is no date; set age_correction = false to do without") from None
    return date.toordinal()


def _rating(row: Row) -> str:
    """Its first letter."""
    return str(row.get("rating") or "").strip().lower()[:1]


def _label(row: Row, classes: Mapping[str, str]) -> str:
    rating = _rating(row)
    if rating not in classes:
        raise BadValue("rating is unknown", f"rating {row.get('rating')!r} is not one of {', '.join(classes)}")
    return classes[rating]


def _tags(row: Row, categories: Sequence[str]) -> tuple[str, ...]:
    texts = [row.get(f"tag_string_{category}") for category in categories]
    if any(text is not None for text in texts):
        names = [name for text in texts for name in str(text or "").split()]
    elif isinstance(row.get("tags"), list):
        numbers = {str(TAG_CATEGORIES[category]) for category in categories}
        names = [str(tag.get("name")) for tag in row.get("tags") if isinstance(tag, dict) and str(tag.get("category")) in numbers]
    elif row.get("tag_string") is not None:
        names = list(tag_names(str(row.get("tag_string")).replace(",", " ")))  # a dump that does not say their categories
    else:
        raise BadValue("tags are not there")
    return tuple(dict.fromkeys(map(sys.intern, names)))  # a million posts share their tags


# -- what the dump is like -----------------------------------------------------------------------------------------------


def _popularity(shards: Sequence[Path], column: str) -> PopularityModel:
    model = PopularityModel()
    for row in _rows(shards):
        if isinstance(row, Row):
            try:
                _check_status(row)
                model.add(_votes(row, column), _day(row), _rating(row))
            except BadValue:
                continue  # reported when the posts are read
    model.fit()
    return model


def _classes(shards: Sequence[Path], ratings: str) -> Mapping[str, str]:
    """The class of each letter."""
    if ratings == "auto":
        rows = (row for row in itertools.islice(_rows(shards), PEEKED_POSTS) if isinstance(row, Row))
        is_new = any(_rating(row) == "g" or _year(row) >= 2022 for row in rows)
        meaning = "sensitive (it has g, or posts of 2022 or later)" if is_new else "safe (it has no g, and no posts of 2022 or later)"
        logger.info("%s: rating s means %s; set ratings to old or new if that is wrong", shards[0], meaning)
        ratings = "new" if is_new else "old"
    return NEW_RATINGS if ratings == "new" else OLD_RATINGS


def _year(row: Row) -> int:
    """When it was changed last, as far as the dump says."""
    texts = [str(row.get(name) or "")[:4] for name in ("created_at", "updated_at")]
    return max((int(text) for text in texts if text.isdecimal()), default=0)


def _categories(value: Any) -> list[str]:
    categories = [value] if isinstance(value, str) else value
    for category in categories:
        if category not in TAG_CATEGORIES:
            raise UserError(f"tags of reader 'danbooru' has {category!r}; it can have {', '.join(TAG_CATEGORIES)}")
    return categories


class _Pictures:
    """Where the picture of a post is, by its ID."""

    def __init__(self, root: Path, layout: str) -> None:
        self._files = PictureFiles(root)
        present = set(subfolders(root))
        has_buckets = any(len(name) == 4 and name.isdecimal() for name in present)
        found = {"original": "original" in present, "512px": "512px" in present, "buckets": has_buckets, "flat": True}
        self._layouts = [LAYOUTS[name] for name in LAYOUTS if (found[name] if layout == "auto" else name == layout)]

    def find(self, post: int, suffix: str) -> tuple[FilePicture, str]:
        """The picture and its name. The file may have been converted, so that its suffix is not what the post says. Raises BadValue."""
        suffixes = dict.fromkeys((suffix or ".jpg", ".jpg", ".png", ".webp", ".jpeg", ".gif"))
        for layout in self._layouts:
            for ending in suffixes:
                name = layout.format(bucket=f"{post % 1000:04d}", id=post, suffix=ending)
                picture = self._files.find_or_none(name)
                if picture is not None:
                    return picture, name
        raise BadValue("picture is missing", f"there is no picture of post {post} in {self._files.folder}")
