"""From a path to its records: by the reader that is named, or by the one that recognises it."""

import logging
from pathlib import Path

from library.errors import UserError
from library.scorer_data.readers.base import READERS, ReaderOptions, Source, check_options
from library.scorer_data.readers.files import source_files, subfolders
from library.scorer_data.readers.rows import ROW_FORMATS, first_row
from library.scorer_data.readers.tables import metadata_files
from library.scorer_data.records import Records, Skipped

logger = logging.getLogger(__name__)


def read_records(path: Path, reader: str = "auto", options: ReaderOptions | None = None) -> Records:
    """What a source holds, one record at a time.

    Args:
        path: file, folder or pattern.
        reader: a name in READERS, or "auto" to go by what the source looks like.

    Raises:
        UserError: here or when iterated, if the source cannot be used at all, or an option is not one of the reader's.
    """
    options = options or ReaderOptions()
    name = recognise(path) if reader == "auto" else reader
    check_options(name, options)
    return _counted(READERS[name].read(path, options), path)


def _counted(records: Records, path: Path) -> Records:
    """The same records; how many there were of how many rows is said in the log."""
    used = left_out = 0
    for record in records:
        if isinstance(record, Skipped):
            left_out += record.count
        else:
            used += 1
        yield record
    logger.info("%s: used %s of %s rows", path, f"{used:,}", f"{used + left_out:,}")


def recognise(path: Path) -> str:
    """The reader for a source, by its suffix, its columns or its folders. Raises UserError if it looks like none."""
    source = source_at(path)
    for name in sorted(READERS, key=lambda name: READERS[name].is_general):
        if READERS[name].recognises(source):
            return name
    tables = [path / name for name in source.files if Path(name).suffix.lower() in ROW_FORMATS]
    remedy = f"give one of its tables ({', '.join(map(str, tables[:3]))})" if tables else f"give a table ({', '.join(ROW_FORMATS)})"
    raise UserError(
        f"it does not show what {path} is; {remedy}, or set data_reader (reader in a dataset.toml) to one of {', '.join(READERS)}"
    )


def source_at(path: Path) -> Source:
    """What a source looks like. Raises UserError if there is nothing at this path."""
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.is_file())
        folders = subfolders(path)
        tables = [file for file, _, _ in metadata_files(path)] or [file for file in files if file.suffix.lower() == ".parquet"]
        return Source(
            path=path,
            is_table=bool(tables),
            columns=frozenset(first_row(tables[0]) if tables else ()),
            files=tuple(file.name for file in files),
            folders=tuple(subfolders(path / "train") if "train" in folders else folders),
        )
    suffix = path.suffix.lower()
    if suffix == ".tar":  # which may be a pattern with braces
        return Source(path=path)
    file = path if path.exists() else source_files(path, ROW_FORMATS)[0]  # of a pattern
    if suffix == ".txt":
        with file.open(encoding="utf-8-sig", errors="replace") as stream:
            line = stream.readline()
        if not any(mark in line for mark in ",;\t|"):
            return Source(path=path, first_words=tuple(line.split()))
    is_table = suffix in (*ROW_FORMATS, ".txt")
    return Source(path=path, is_table=is_table, columns=frozenset(first_row(file) if is_table else ()))
