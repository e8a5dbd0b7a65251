"""The readers there are. To add one: write a `Reader` in a file of its own, add its row here, and say in docs/datasets.md what it reads."""

import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from library.errors import UserError
from library.scorer_data.readers.ava import COLUMNS as AVA_COLUMNS
from library.scorer_data.readers.ava import read_ava
from library.scorer_data.readers.base import Reader, ReaderOptions
from library.scorer_data.readers.danbooru import read_danbooru
from library.scorer_data.readers.files import source_files, subfolders
from library.scorer_data.readers.folders import read_class_folders, read_score_folders
from library.scorer_data.readers.pairs import read_hpdv2, read_pairs, read_pick_a_pic
from library.scorer_data.readers.rows import ROW_FORMATS, first_row
from library.scorer_data.readers.simulacra import read_simulacra
from library.scorer_data.readers.tables import read_table
from library.scorer_data.readers.webdataset import read_webdataset
from library.scorer_data.readers.wikiart import STYLES, TASKS, read_wikiart
from library.scorer_data.records import Records

READERS: Mapping[str, Reader] = MappingProxyType(
    {
        "table": read_table,
        "folders": read_class_folders,
        "score_folders": read_score_folders,
        "ava": read_ava,
        "danbooru": read_danbooru,
        "wikiart": read_wikiart,
        "simulacra": read_simulacra,
        "webdataset": read_webdataset,
        "pairs": read_pairs,
        "pick_a_pic": read_pick_a_pic,
        "hpdv2": read_hpdv2,
    }
)


def read_records(path: Path, reader: str = "auto", options: ReaderOptions | None = None) -> Records:
    """What a source holds, one record at a time.

    Args:
        path: file, folder or pattern.
        reader: a key of READERS, or "auto" to go by what the source looks like.

    Raises:
        UserError: here or when iterated, if the source cannot be used at all, or an option is not one of the reader's.
    """
    options = options or ReaderOptions()
    name = recognise(path) if reader == "auto" else reader
    if name not in READERS:
        raise UserError(f"reader is {reader!r}; it can be auto, {', '.join(READERS)}")
    return READERS[name](path, options)


def recognise(path: Path) -> str:
    """The reader for a source, by its suffix, its columns or its folders. Raises UserError if it looks like none."""
    name = _of_folder(path) if path.is_dir() else _of_file(path)
    if name is None:
        raise UserError(f"it does not show what {path} is; set reader to one of {', '.join(READERS)}")
    return name


def _of_file(path: Path) -> str | None:
    suffix = path.suffix.lower()
    if suffix == ".tar":
        return "webdataset"
    if not path.exists():
        path = source_files(path, ROW_FORMATS)[0]  # of a pattern
    if suffix in (".sqlite", ".sqlite3", ".db"):
        return "simulacra"
    if suffix == ".txt":
        with path.open(encoding="utf-8-sig", errors="replace") as file:
            return "ava" if len(file.readline().split()) == AVA_COLUMNS else None
    if suffix not in ROW_FORMATS:
        return None
    if suffix == ".csv" and path.stem.lower().startswith(tuple(f"{task}_" for task in TASKS)):
        return "wikiart"
    return _of_columns(set(first_row(path)))


def _of_columns(columns: set[str]) -> str | None:
    """The reader for a table; of one with no rows nothing is known, and `table` says so."""
    signs: Mapping[str, bool] = {
        "pairs": {"path_a", "path_b"} <= columns,
        "pick_a_pic": {"image_0_uid", "image_1_uid", "label_0"} <= columns,
        "hpdv2": {"human_preference", "file_path"} <= columns or {"rank", "image_path"} <= columns,
        "ava": {"img_name", "c1", "c10"} <= columns,
        "wikiart": {"filename", "artist", "genre"} <= columns,
        "danbooru": {"id", "rating"} <= columns and bool({"tags", "tag_string", "tag_string_general"} & columns),
        "table": True,
    }
    return next(name for name, is_so in signs.items() if is_so)


def _of_folder(path: Path) -> str | None:
    files = [file for file in sorted(path.iterdir()) if file.is_file()]
    names = {file.name for file in files}
    folders = subfolders(path)
    if "AVA.txt" in names:
        return "ava"
    if "metadata" in folders or any(re.fullmatch(r"posts.*\.jsonl?", name) for name in names):
        return "danbooru"
    if any(name.endswith(".tar") for name in names):
        return "webdataset"
    if any(name.startswith("style_train") for name in names) or not set(STYLES).isdisjoint(folders):
        return "wikiart"
    tables = [file for file in files if file.suffix.lower() == ".parquet"]
    if tables:
        return _of_columns(set(first_row(tables[0])))
    if not folders:
        return None
    return "score_folders" if all(re.fullmatch(r"[+-]?\d+(\.\d+)?", name) for name in _classes(path, folders)) else "folders"


def _classes(path: Path, folders: list[str]) -> list[str]:
    return subfolders(path / "train") if "train" in folders else folders
