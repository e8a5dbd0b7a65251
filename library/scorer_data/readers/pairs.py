"""Pairs of pictures of which one was preferred: tables of one's own, Pick-a-Pic and HPDv2."""

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from library.scorer_data.readers.base import (
    READERS,
    SPLIT_NAMES,
    BadValue,
    Reader,
    ReaderOptions,
    Source,
    number,
    split_name,
    weight_value,
)
from library.scorer_data.readers.exports import plain_answer
from library.scorer_data.readers.files import PictureFiles, own_folder, source_files
from library.scorer_data.readers.parquet import ParquetPicture, open_parquet, picture_column
from library.scorer_data.readers.rows import ROW_FORMATS, Row, read_rows, records_of
from library.scorer_data.readers.tables import PROMPTS, find_picture, path_text
from library.scorer_data.records import FilePicture, Picture, RatedPair, Records, Skipped

PREFERENCES: Mapping[str, float] = {
    **{word: 1.0 for word in ("1", "a", "first", "left")},
    **{word: 0.0 for word in ("0", "b", "second", "right")},
    **{word: 0.5 for word in ("0.5", "tie", "equal", "draw")},
}
HPD_FOLDERS = ("", "train", "test")  # names in the lists are relative to one of them


@READERS.register("pairs")
class Pairs(Reader):
    """A table with path_a, path_b and label: 1, a, first or left: the first is better; 0, b, second or right: the second is; 0.5 or tie.

    Label Studio's export of comparisons is one. Also read: prompt, weight, split. Options: image_dir.
    """

    targets = ("pair",)
    known = ("image_dir",)

    @staticmethod
    def recognises(source: Source) -> bool:
        return {"path_a", "path_b"} <= source.columns

    @staticmethod
    def read(path: Path, options: ReaderOptions) -> Records:
        files = PictureFiles(options.image_dir or own_folder(path), once=False)

        def pair(row: Row) -> RatedPair:
            (first_name, first), (second_name, second) = (find_picture(files, row.get(side)) for side in ("path_a", "path_b"))
            return _pair(
                first,
                second,
                name=f"{first_name} | {second_name}",
                where=row.where,
                preference=preference_value(row.get("label")),
                prompt=str(row.get(*PROMPTS) or ""),
                weight=weight_value(row.get("weight")),
                split=split_name(row.get("split")),
            )

        columns = ("path_a", "path_b", "label", *PROMPTS, "weight", "split")
        for source in source_files(path, ROW_FORMATS):
            yield from records_of(read_rows(source, [["path_a"], ["path_b"], ["label"]], columns), pair)


def preference_value(value: object) -> float:
    """1, 0 or 0.5. Raises BadValue."""
    text = str(plain_answer(value)).strip().lower()
    if text in PREFERENCES:
        return PREFERENCES[text]
    try:
        return PREFERENCES[f"{number(value, 'label'):g}"]
    except (BadValue, KeyError):
        raise BadValue("label is no preference", f"label {value!r} is not 1 (the first is better), 0 (the second is) or 0.5") from None


def _pair(first: Picture, second: Picture, **fields) -> RatedPair:
    if first == second:
        raise BadValue("both pictures are the same")
    return RatedPair(first=first, second=second, **fields)


@READERS.register("pick_a_pic")
class PickAPic(Reader):
    """Pick-a-Pic's parquet files (v1, v2), or what was exported of them as CSV or JSON: a file, a folder or a pattern.

    The pictures are in the cells jpg_0 and jpg_1 of a parquet file; where it has none (the version without pictures, and exports), they are
    UID.jpg (.png, .webp) in `image_dir`. A file train-... is open, validation... is for validation, test... for testing. Rows without a
    label are left out.
    """

    targets = ("pair",)
    known = ("image_dir",)

    @staticmethod
    def recognises(source: Source) -> bool:
        return {"image_0_uid", "image_1_uid", "label_0"} <= source.columns

    @staticmethod
    def read(path: Path, options: ReaderOptions) -> Records:
        needed = [["label_0"], ["image_0_uid"], ["image_1_uid"]]
        columns = ("label_0", "label_1", "has_label", "caption", "image_0_uid", "image_1_uid", "ranking_id")
        files = None
        for source in source_files(path, ROW_FORMATS):
            location, split = source.absolute(), _split_of_file(source)
            schema = open_parquet(source).schema_arrow if source.suffix.lower() == ".parquet" else None
            stored = [picture_column(schema, name) if schema else None for name in ("jpg_0", "jpg_1")]
            if None in stored and files is None:
                files = PictureFiles(options.image_dir or own_folder(path), once=False)

            def pair(row: Row, files=files, location=location, stored=stored, split=split) -> RatedPair:
                if str(row.get("has_label")).lower() in ("false", "0"):
                    raise BadValue("pair has no label")
                uids = str(row.get("image_0_uid")), str(row.get("image_1_uid"))
                if uids[0] == uids[1]:
                    raise BadValue("both pictures are the same")
                first, second = (
                    ParquetPicture(location, *row.place, column) if column and row.place else _by_uid(files, uid)
                    for column, uid in zip(stored, uids, strict=True)
                )
                return _pair(
                    first,
                    second,
                    name=str(row.get("ranking_id") or " | ".join(uids)),
                    where=row.where,
                    preference=preference_value(row.get("label_0")),
                    prompt=str(row.get("caption") or ""),
                    split=split,
                )

            yield from records_of(read_rows(source, needed, columns), pair)


def _by_uid(files: PictureFiles | None, uid: str) -> FilePicture:
    assert files is not None
    return files.find(uid)


def _split_of_file(path: Path) -> str | None:
    """As the library datasets names files: train-00000-of-00001.parquet, validation_unique-...; training pictures are open."""
    split = SPLIT_NAMES.get(re.split(r"[-_.]", path.name.lower())[0])
    return None if split == "train" else split


@READERS.register("hpdv2")
class Hpdv2(Reader):
    """HPDv2's train.json (human_preference, file_path), whose pairs are open, or test.json (rank, image_path), for testing.

    Rank 0 is the best of the pictures of a prompt; each two of them are a pair. Pictures are in `image_dir`, or in train or test in it.
    """

    targets = ("pair",)
    known = ("image_dir",)

    @staticmethod
    def recognises(source: Source) -> bool:
        return {"human_preference", "file_path"} <= source.columns or {"rank", "image_path"} <= source.columns

    @staticmethod
    def read(path: Path, options: ReaderOptions) -> Records:
        files = PictureFiles(options.image_dir or own_folder(path), once=False)
        for row in read_rows(path, [["file_path", "image_path"], ["human_preference", "rank"]]):
            if isinstance(row, Skipped):
                yield row
                continue
            try:
                names = [path_text(name) for name in row.get("file_path") or row.get("image_path")]
                ranked = row.get("human_preference") is None
                values = [-rank for rank in row.get("rank")] if ranked else list(row.get("human_preference"))
                if len(values) != len(names) or len(names) < 2:
                    raise BadValue("pictures and preferences are not as many", f"{len(names)} pictures, {len(values)} preferences")
            except BadValue as error:
                yield error.at(row.where)
                continue
            except TypeError:
                yield Skipped(f"{row.where}: pictures and preferences are no lists", "row is not one of HPDv2")
                continue
            yield from _all_pairs(names, values, files, row, "test" if ranked else None)


def _all_pairs(
    names: Sequence[str], values: Sequence[float], files: PictureFiles, row: Row, split: str | None
) -> Iterator[RatedPair | Skipped]:
    for first, second in itertools.combinations(range(len(names)), 2):
        try:
            yield _pair(
                _in_folders(files, names[first]),
                _in_folders(files, names[second]),
                name=f"{names[first]} | {names[second]}",
                where=row.where,
                preference=1.0 if values[first] > values[second] else 0.0 if values[first] < values[second] else 0.5,
                prompt=str(row.get("prompt") or ""),
                split=split,
            )
        except BadValue as error:
            yield error.at(row.where)


def _in_folders(files: PictureFiles, name: str) -> FilePicture:
    for folder in HPD_FOLDERS:
        picture = files.find_or_none(f"{folder}/{name}" if folder else name)
        if picture is not None:
            return picture
    raise BadValue("picture is missing", f"there is no picture {name} in {files.folder}, nor in train or test there")
