"""Tables as rows, one at a time, whatever the format: CSV, TSV, JSON lines, a JSON list, parquet."""

import csv
import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from library.errors import UserError
from library.scorer_data.readers.files import is_utf8
from library.scorer_data.readers.parquet import class_names, open_parquet, text_columns
from library.scorer_data.records import Skipped

_CHUNK = 1 << 20
_LONGEST_ITEM = 1 << 24  # characters of one object in a JSON list; longer ones are a missing bracket
_SEPARATOR = re.compile(r"sep=([,;\t])\s*")
_DECIMAL_COMMA = re.compile(r"\s*([+-]?\d+),(\d+)\s*$")  # where columns are parted by ;
_BETWEEN_ITEMS = re.compile(r"[\s,]*")


@dataclass(frozen=True, slots=True)
class Row:
    """One row.

    Attributes:
        where: file and line, for messages.
        values: by column. In CSV and parquet the names of columns are in lower case.
        place: (row group, row in it) in a parquet file.
    """

    where: str
    values: Mapping[str, Any]
    place: tuple[int, int] | None = None

    def get(self, column: str) -> Any:
        """Its value, or None. The column may be written in capitals where the row's columns are in lower case."""
        return self.values.get(column, self.values.get(column.lower()))


Rows = Iterator[Row | Skipped]
Needed = Sequence[Sequence[str]]


def read_rows(path: Path, needed: Needed = (), columns: Collection[str] | None = None) -> Rows:
    """The rows of a table.

    Args:
        needed: for each thing that a row must have, the columns that it can be in.
        columns: read no others, where the format allows; None reads all but pictures.

    Raises:
        UserError: if there is no such file, it is of another format, or its header has none of the columns for a thing that is needed.
    """
    if not path.is_file():
        raise UserError(f"there is no data file {path}; it can be {', '.join(ROW_FORMATS)}")
    suffix = path.suffix.lower()
    if suffix not in ROW_FORMATS:
        raise UserError(f"data file {path} ends in {path.suffix!r}; it can be {', '.join(ROW_FORMATS)}")
    with path.open("rb") as file:
        if file.read(2) in (b"\xff\xfe", b"\xfe\xff"):
            raise UserError(f"{path} is text in UTF-16; save it as UTF-8")
    return ROW_FORMATS[suffix](path, needed, columns)


def first_row(path: Path) -> Mapping[str, Any]:
    """The first row that can be read, to see what a file is; empty if there is none. Raises UserError as `read_rows`."""
    return next((row.values for row in read_rows(path) if isinstance(row, Row)), {})


def _csv(path: Path, needed: Needed, columns: Collection[str] | None) -> Rows:
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        first = file.readline()
        if separator := _SEPARATOR.fullmatch(first):  # a first line for Excel
            delimiter, skipped = separator[1], 1
        else:
            found = [mark for mark in ",;\t" if mark in first]  # a name of a column may hold one of the later
            delimiter, skipped = "\t" if path.suffix.lower() == ".tsv" else (*found, ",")[0], 0
            file.seek(0)
        reader = csv.reader(file, delimiter=delimiter, strict=True)
        try:
            header = [name.strip().lower() for name in next(reader, [])]
        except csv.Error as error:
            raise UserError(f"{path}, line {1 + skipped}: these are no names of columns ({error}); quote a whole name, or none") from error
        decimals = {name.lower() for names in needed for name in names} | {"weight"} if delimiter == ";" else set()
        decimals = [number for number, name in enumerate(header) if name in decimals - {"path", "label", "tags"}]
        if not any(header):
            raise UserError(f"{path} is empty; its first line must name its columns")
        _check_header(path, header, needed)
        while True:
            opened = reader.line_num + skipped + 1
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                lines = reader.line_num + skipped + 1 - opened
                where = f"{path}, line {opened}" + (f" to {opened + lines - 1}, from a quote in the first" if lines > 1 else "")
                yield Skipped(f"{where}: this is not a row of {path.suffix} text ({error})", "row cannot be read", max(1, lines))
                continue
            where = f"{path}, line {reader.line_num + skipped}"
            if not any(cells):
                continue
            if len(cells) != len(header):
                yield Skipped(f"{where}: line 1 has {len(header)} columns and this row has {len(cells)}; quote texts", "row cannot be read")
            elif not all(map(is_utf8, cells)):
                yield Skipped(f"{where}: this is not text in UTF-8", "row cannot be read")
            else:
                for number in decimals:
                    cells[number] = _DECIMAL_COMMA.sub(r"\1.\2", cells[number])
                yield Row(where, dict(zip(header, cells, strict=True)))


def _json(path: Path, needed: Needed, columns: Collection[str] | None) -> Rows:
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        is_list = file.read(_CHUNK).lstrip().startswith("[")
    for where, item in _json_list(path) if is_list else _json_lines(path):
        if isinstance(item, Skipped):
            yield item
        elif not isinstance(item, dict):
            yield Skipped(f"{where}: this is no JSON object", "row is no JSON object")
        else:
            missing = next((names for names in needed if all(item.get(name) is None for name in names)), None)
            if missing is None:
                yield Row(where, item)
            else:
                yield Skipped(f"{where}: there is no {missing[0]!r}; it has {', '.join(map(str, item))}", f"row has no {missing[0]}")


def _json_lines(path: Path) -> Iterator[tuple[str, object]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            try:
                yield where, json.loads(line)
            except (ValueError, RecursionError) as error:
                yield where, Skipped(f"{where}: this is not JSON ({error}); each line must be one object", "row is no JSON object")


def _json_list(path: Path) -> Iterator[tuple[str, object]]:
    """The items of a JSON list, of which only one is in memory."""
    decoder = json.JSONDecoder()
    number = 1
    with path.open(encoding="utf-8-sig") as file:
        try:
            text = file.read(_CHUNK)
            start = text.index("[") + 1
            while True:
                match = _BETWEEN_ITEMS.match(text, start)
                start = match.end() if match else start
                if text[start : start + 1] == "]":
                    return
                try:
                    item, start = decoder.raw_decode(text, start)
                except (ValueError, RecursionError) as error:
                    more = file.read(_CHUNK)
                    if not more or len(text) - start > _LONGEST_ITEM:
                        yield (
                            "",
                            Skipped(
                                f"{path}: from item {number} on it is not JSON ({getattr(error, 'msg', error)})",
                                "rest of the file cannot be read",
                            ),
                        )
                        return
                    text, start = text[start:] + more, 0
                else:
                    yield f"{path}, item {number}", item
                    number += 1
        except UnicodeDecodeError:
            yield "", Skipped(f"{path}: from about item {number} on it is not text in UTF-8", "rest of the file cannot be read")


def _parquet(path: Path, needed: Needed, columns: Collection[str] | None) -> Rows:
    file = open_parquet(path)
    header = file.schema_arrow.names
    _check_header(path, [name.lower() for name in header], needed)
    readable = text_columns(file.schema_arrow)
    wanted = None if columns is None else {name.lower() for name in columns}
    chosen = [name for name in readable if wanted is None or name.lower() in wanted]
    classes = {name: names for name, names in class_names(file.schema_arrow).items() if name in chosen}
    number = 0
    for group in range(file.num_row_groups):
        row = 0
        batches = file.iter_batches(batch_size=1024, row_groups=[group], columns=chosen)
        while True:
            try:
                batch = next(batches, None)
            except Exception as error:  # pyarrow raises OSError, and its own, where bytes are not what the footer says
                left = file.metadata.num_rows - number
                yield Skipped(f"{path}: from row {number + 1} on it is damaged ({error})", "rest of the file cannot be read", left)
                return
            if batch is None:
                break
            for values in batch.to_pylist():
                for name, names in classes.items():
                    values[name] = names[values[name]] if values[name] in range(len(names)) else None
                number += 1
                yield Row(f"{path}, row {number}", {name.lower(): value for name, value in values.items()}, (group, row))
                row += 1


def _check_header(path: Path, header: Sequence[str], needed: Needed) -> None:
    for names in needed:
        if not any(name.lower() in header for name in names):
            wanted = " or ".join(repr(name) for name in names)
            raise UserError(f"{path} has no column {wanted}; it has {', '.join(header)}")


RowFormat = Callable[[Path, Needed, Collection[str] | None], Rows]
ROW_FORMATS: Mapping[str, RowFormat] = MappingProxyType(
    {".csv": _csv, ".tsv": _csv, ".jsonl": _json, ".ndjson": _json, ".json": _json, ".parquet": _parquet}
)
