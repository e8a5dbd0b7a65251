"""Tables as rows, one at a time, whatever the format: CSV, TSV, JSON lines, a JSON list, parquet."""

import csv
import itertools
import json
import re
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, TextIO, TypeVar

from library.errors import UserError
from library.scorer_data.readers.base import BadValue, number
from library.scorer_data.readers.exports import PICTURE, is_export, plain_row
from library.scorer_data.readers.files import is_utf8
from library.scorer_data.readers.parquet import class_names, open_parquet, text_columns
from library.scorer_data.records import Skipped

_CHUNK = 1 << 20
_LONGEST_ITEM = 1 << 24  # characters of one object in a JSON list; longer ones are a missing bracket
_MOST_LINES = 100  # of one row of a CSV, whose texts may have line ends; more are a quote that never closes
_SEPARATOR = re.compile(r"sep=([,;|\t])\s*")
_DECIMAL_COMMA = re.compile(r"\s*([+-]?\d+),(\d+)\s*")
_BETWEEN_ITEMS = re.compile(r"[\s,]*")
_ITEM = re.compile(r"[\s,]*\S")  # up to an item's first character


@dataclass(frozen=True, slots=True)
class Row:
    """One row.

    Attributes:
        where: file and line, for messages.
        values: by column, in lower case.
        place: (row group, row in it) in a parquet file.
        parted_by_comma: whether a comma parts columns: then 1,234 is no number, for it could be two.
    """

    where: str
    values: Mapping[str, Any]
    place: tuple[int, int] | None = None
    parted_by_comma: bool = False

    def get(self, *columns: str) -> Any:
        """The value of the first of these columns that has one, or None; "" where they are only empty."""
        found = None
        for column in columns:
            value = self.values.get(column.lower())
            if value not in (None, ""):
                return value
            found = value if found is None else found
        return found

    def number(self, column: str) -> float:
        """Finite; 7,5 is 7.5. Raises BadValue."""
        value = self.get(column)
        comma = _DECIMAL_COMMA.fullmatch(value) if isinstance(value, str) and "," in value else None
        if comma and not (self.parted_by_comma and len(comma[2]) == 3):
            value = f"{comma[1]}.{comma[2]}"
        return number(value, column)


RowIterator = Iterator[Row | Skipped]
Needed = Sequence[Sequence[str]]
RecordT = TypeVar("RecordT")


def read_rows(path: Path, needed: Needed = (), columns: Collection[str] | None = None) -> RowIterator:
    """The rows of a table.

    Args:
        needed: for each thing that a row must have, the columns that it can be in.
        columns: read no others, where the format allows; None reads all but pictures.

    Raises:
        UserError: if there is no such file, it is of another format, or its header has none of the columns for a thing that is needed, or
            twice one that is read.
    """
    if not path.is_file():
        raise UserError(f"there is no data file {path}; it can be {', '.join(ROW_FORMATS)}")
    read = {**ROW_FORMATS, ".txt": _csv}.get(path.suffix.lower())
    if read is None:
        raise UserError(f"data file {path} ends in {path.suffix!r}; it can be {', '.join(ROW_FORMATS)}: save it as .csv")
    with path.open("rb") as file:
        if file.read(2) in (b"\xff\xfe", b"\xfe\xff"):
            raise UserError(f"{path} is text in UTF-16; save it as UTF-8")
    return read(path, needed, columns)


def first_row(path: Path) -> Mapping[str, Any]:
    """The first row that can be read, to see what a file is; empty if there is none. Raises UserError as `read_rows`."""
    return next((row.values for row in read_rows(path) if isinstance(row, Row)), {})


def records_of(rows: RowIterator, make: Callable[[Row], RecordT]) -> Iterator[RecordT | Skipped]:
    """What `make` makes of each row; rows that cannot be read, and those of which it raises BadValue, are what was left out."""
    for row in rows:
        if isinstance(row, Skipped):
            yield row
            continue
        try:
            yield make(row)
        except BadValue as error:
            yield error.at(row.where)


class _Lines:
    """The lines of a file for csv.reader, which can go back to the second line of a row: its first line has opened a quote for ever."""

    def __init__(self, file: TextIO, number: int) -> None:
        self.row: list[str] = []
        self.number = number  # of lines read
        self._file = file
        self._again: deque[str] = deque()

    def __iter__(self) -> "_Lines":
        return self

    def __next__(self) -> str:
        if len(self.row) == _MOST_LINES:
            raise StopIteration
        line = self._again.popleft() if self._again else next(self._file)
        self.row.append(line)
        self.number += 1
        return line

    def go_back(self) -> None:
        self._again.extendleft(reversed(self.row[1:]))
        self.number -= len(self.row) - 1


def _csv(path: Path, needed: Needed, columns: Collection[str] | None) -> RowIterator:
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        first = file.readline()
        separator = _SEPARATOR.fullmatch(first)  # a first line for Excel
        if separator:
            delimiter = separator[1]
        else:
            found = [mark for mark in ",;\t|" if mark in first]  # a name of a column may hold one of the later
            delimiter = "\t" if path.suffix.lower() == ".tsv" else (*found, ",")[0]
            file.seek(0)
        lines = _Lines(file, number=1 if separator else 0)
        reader = csv.reader(lines, delimiter=delimiter, strict=True)
        try:
            header = [name.strip().lower() for name in next(reader, [])]
        except csv.Error as error:
            line = lines.number - len(lines.row) + 1
            raise UserError(f"{path}, line {line}: these are no names of columns ({error}); quote a whole name, or none") from error
        if not any(header):
            raise UserError(f"{path} is empty; its first line must name its columns")
        exported = is_export(header)
        if not exported:
            _check_header(path, header, needed, columns)
        while True:
            lines.row.clear()
            try:
                cells = next(reader)
                if len(lines.row) > 1 and _holds_rows(cells, delimiter, len(header)):
                    raise csv.Error
            except StopIteration:
                return
            except csv.Error as error:
                reason = "a quote opens here that does not close in its row" if len(lines.row) > 1 else str(error)
                lines.go_back()
                yield Skipped(f"{path}, line {lines.number}: this is not a row of {path.suffix} text: {reason}", "row cannot be read")
                reader = csv.reader(lines, delimiter=delimiter, strict=True)
                continue
            where = f"{path}, line {lines.number}"
            if not any(cells):
                continue
            while len(cells) > len(header) and not cells[-1].strip():  # spreadsheets write columns that are empty
                cells.pop()
            if len(cells) != len(header):
                yield Skipped(f"{where}: line 1 has {len(header)} columns and this row has {len(cells)}; quote texts", "row cannot be read")
            elif not all(map(is_utf8, cells)):
                yield Skipped(f"{where}: this is not text in UTF-8; save the file as UTF-8", "row cannot be read")
            elif exported:
                yield _checked(Row(where, plain_row(dict(zip(header, cells, strict=True)))), needed)
            else:
                yield Row(where, dict(zip(header, cells, strict=True)), parted_by_comma=delimiter == ",")


def _holds_rows(cells: Sequence[str], delimiter: str, count: int) -> bool:
    """Whether a text of several lines holds other rows, with all their columns and a picture: its quote was meant to close before."""
    lines = [line for cell in cells for line in re.split(r"[\r\n]+", cell)[1:]]
    return any(line.count(delimiter) >= count - 1 and any(map(PICTURE.search, line.split(delimiter))) for line in lines)


def _json(path: Path, needed: Needed, columns: Collection[str] | None) -> RowIterator:
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        is_list = file.read(_CHUNK).lstrip().startswith("[")
    for where, item in _json_list(path) if is_list else _json_lines(path):
        if isinstance(item, Skipped):
            yield item
        elif not isinstance(item, dict):
            yield Skipped(f"{where}: this is no JSON object", "row is no JSON object")
        else:
            yield _checked(Row(where, plain_row(item)), needed)


def _checked(row: Row, needed: Needed) -> Row | Skipped:
    """The row, or that it has none of the columns for a thing that is needed."""
    missing = next((names for names in needed if all(row.get(name) is None for name in names)), None)
    if missing is None:
        return row
    return Skipped(f"{row.where}: there is no {missing[0]!r}; it has {', '.join(row.values) or 'nothing'}", f"row has no {missing[0]}")


def _json_lines(path: Path) -> Iterator[tuple[str, object]]:
    decoder = json.JSONDecoder()
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            try:
                text, start = line.decode("utf-8-sig"), 0
                while match := _ITEM.match(text, start):  # people put several on a line
                    item, start = decoder.raw_decode(text, match.end() - 1)
                    yield where, item
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


def _parquet(path: Path, needed: Needed, columns: Collection[str] | None) -> RowIterator:
    file = open_parquet(path)
    header = file.schema_arrow.names
    _check_header(path, [name.lower() for name in header], needed, columns)
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


def _check_header(path: Path, header: Sequence[str], needed: Needed, columns: Collection[str] | None) -> None:
    for name in {name.lower() for name in (*itertools.chain(*needed), *(columns or ()))}:
        if header.count(name) > 1:
            raise UserError(f"{path} has {header.count(name)} columns {name!r}; rename those that are not meant")
    for names in needed:
        if not any(name.lower() in header for name in names):
            wanted = " or ".join(repr(name) for name in names[: 3 if len(names) <= 3 else 1])
            place = {"path": "", "score": "", "label": " in a dataset.toml", "tags": " in a dataset.toml"}.get(names[0])
            remedy = "" if place is None else f"; rename the one that is meant, or name it by {names[0]}_column{place}"
            raise UserError(f"{path} has no column {wanted}; it has {', '.join(header)}{remedy}")


RowFormat = Callable[[Path, Needed, Collection[str] | None], RowIterator]
ROW_FORMATS: Mapping[str, RowFormat] = MappingProxyType(
    {".csv": _csv, ".tsv": _csv, ".jsonl": _json, ".ndjson": _json, ".json": _json, ".parquet": _parquet}
)
