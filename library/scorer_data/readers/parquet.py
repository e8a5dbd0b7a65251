"""Parquet files, and pictures that are cells of one. Needs pyarrow, which is imported when the first file is opened."""

import functools
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from library.errors import UserError
from library.scorer_data.records import FileState

if TYPE_CHECKING:
    import pyarrow


def open_parquet(path: Path) -> Any:
    """A pyarrow.parquet.ParquetFile. Raises UserError if it is none, or pyarrow is not installed."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(f"reading {path} needs the package pyarrow: pip install pyarrow") from error
    try:
        file = pyarrow.parquet.ParquetFile(path)
        _ = file.schema_arrow  # read now
    except Exception as error:  # pyarrow raises OSError, its own, and what Python makes of names that are no text
        raise UserError(f"{path} is not a parquet file: {' '.join(str(error).split())[:200]}") from error
    return file


def text_columns(schema: "pyarrow.Schema") -> list[str]:
    """The columns that hold no binary data, which are those that are rows; pictures are read one by one."""
    return [field.name for field in schema if not _is_picture(field.type)]


def picture_column(schema: "pyarrow.Schema", name: str) -> str | None:
    """Where the bytes of the pictures of a column are: in itself, in its part `bytes`, as the library datasets has it, or nowhere."""
    index = schema.get_field_index(name)
    if index < 0 or not _is_picture(schema.field(index).type):
        return None
    return name if _is_binary(schema.field(index).type) else f"{name}.bytes"


def class_names(schema: "pyarrow.Schema") -> dict[str, list[str]]:
    """The names of the classes of columns that hold the numbers of classes, as the library datasets writes them into the file."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return {name: feature["names"] for name, feature in features.items() if isinstance(feature, dict) and feature.get("names")}
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError):
        return {}


def _is_binary(kind: "pyarrow.DataType") -> bool:
    import pyarrow

    return pyarrow.types.is_binary(kind) or pyarrow.types.is_large_binary(kind) or pyarrow.types.is_fixed_size_binary(kind)


def _is_picture(kind: "pyarrow.DataType") -> bool:
    import pyarrow

    return _is_binary(kind) or (pyarrow.types.is_struct(kind) and any(part.name == "bytes" and _is_binary(part.type) for part in kind))


@dataclass(frozen=True, slots=True)
class ParquetPicture:
    """A picture in a cell: in row `row` of row group `row_group`, in `column`, such as jpg_0 or image.bytes."""

    path: Path
    row_group: int
    row: int
    column: str

    @property
    def key(self) -> str:
        return f"{self.path}#{self.column}[{self.row_group},{self.row}]"

    def state(self) -> FileState:
        return FileState.of(self.path)

    def open(self) -> BinaryIO:
        try:
            content = _column(self.path, self.state().mtime_ns, self.row_group, self.column)[self.row].as_py()
        except (UserError, IndexError) as error:  # the file was changed since its rows were read
            raise OSError(f"{self.key} cannot be read: {error}") from error
        if not content:
            raise OSError(f"{self.key} is empty")
        return io.BytesIO(content)


@functools.lru_cache(
    maxsize=4
)  # parquet can only read a whole row group; neighbours are read one after another, a pair's two columns in turn
def _column(path: Path, mtime_ns: int, row_group: int, column: str) -> Any:
    """Its cells, a pyarrow array. `mtime_ns` is there so that a changed file is read anew."""
    import pyarrow

    values = open_parquet(path).read_row_group(row_group, columns=[column]).column(0)
    for part in column.split(".")[1:]:
        values = pyarrow.chunked_array([chunk.field(part) for chunk in values.chunks])
    return values
