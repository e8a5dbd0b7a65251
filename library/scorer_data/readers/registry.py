"""The readers there are. To add one: write a `Reader` in a file of its own, add its row here, and say in docs/datasets.md what it reads."""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from library.errors import UserError
from library.scorer_data.readers.base import Reader, ReaderOptions
from library.scorer_data.readers.tables import read_table
from library.scorer_data.records import Records

READERS: Mapping[str, Reader] = MappingProxyType({"table": read_table})


def read_records(path: Path, reader: str = "auto", options: ReaderOptions | None = None) -> Records:
    """What a source holds, one record at a time.

    Args:
        path: file, folder or pattern.
        reader: a key of READERS, or "auto" to go by what the source looks like.

    Raises:
        UserError: when iterated, if the source cannot be used at all, or an option is not one of the reader's.
    """
    options = options or ReaderOptions()
    name = recognise(path) if reader == "auto" else reader
    if name not in READERS:
        raise UserError(f"reader is {reader!r}; it can be auto, {', '.join(READERS)}")
    return READERS[name](path, options)


def recognise(path: Path) -> str:
    """The reader for a source. Raises UserError if it looks like none."""
    return "table"
