"""Prompt files as lines, rows and tables, whatever their form: .yaml and .json have what a .toml has."""

import csv
import json
import math
import re
from pathlib import Path
from typing import Any

import yaml

from library.errors import UserError
from library.scorer_data.readers.rows import Row, read_rows
from library.settings.toml_files import read_toml

TABLE_ENDINGS = (".toml", ".yaml", ".yml", ".json")
ROW_ENDINGS = (".csv", ".tsv")
LINE_ENDINGS = (".txt", "")
MOST_VALUES = 1_000_000  # of a YAML file with all aliases written out; without any, a value takes a character at least
GIVE_PROMPTS = "give a .txt, .toml, .yaml, .json, .csv or .tsv file of prompts"
# What a text that is no list of prompts begins with, and what it is.
_OTHER_CONTENT = {
    "TOML; let its name end in .toml": r"\[\[?\s*(prompts?|targets|slider)(\.\w+)?\s*\]\]?\s*$",
    "JSON; let its name end in .json": r'\[\s*(\{|$)|\{\s*("|$)',
    "YAML; let its name end in .yaml": r"-\s+(target|target_class|prompt|positive)\s*:",
    "a web page; download the file itself": r"<(!doctype|html|\?xml)",
}


def read_text(path: Path, what: str = "prompts file") -> str:
    r"""The text of a file in UTF-8, with \n for every line end (\r\n, \r). Raises UserError."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (UnicodeDecodeError, OSError) as error:
        raise UserError(f"{what} {path} cannot be read as UTF-8 text ({error}); save it as UTF-8") from error
    if "\0" in text:
        raise UserError(f"{what} {path} is no text; give a file of prompts")
    return text


def read_lines(path: Path, what: str = "prompts file") -> list[str]:
    r"""The lines of a text: only \n, \r\n and \r end one, and not U+2028, U+0085 or a form feed, which prompts are pasted with."""
    return read_text(path, what).split("\n")


def read_prompt_lines(path: Path) -> list[str]:
    """The lines of a list of prompts. Raises UserError for a text that is something else."""
    lines = read_lines(path)
    first = next((line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")), "")
    for what, beginning in _OTHER_CONTENT.items():
        if re.match(beginning, first, re.IGNORECASE):
            raise UserError(f"prompts file {path} is no list of prompts, but {what}")
    return lines


def read_tables(path: Path, what: str = "prompts file") -> dict[str, Any]:
    """The content of a .toml, or of a .yaml or .json as a .toml would have it: a list is the [[prompts]].

    sd-scripts' [prompt] with [[prompt.subset]] is the [[prompts]] and their defaults, too.

    Raises:
        UserError: no such file, or one that is not what its ending says; it names the line.
    """
    if not path.is_file():
        raise UserError(f"{what} {path} does not exist; give a .toml, .yaml or .json file of prompts")
    if path.suffix.lower() not in TABLE_ENDINGS:
        raise UserError(f"{what} {path} ends in {path.suffix!r}; tables of prompts end in {', '.join(TABLE_ENDINGS)}")
    match path.suffix.lower():
        case ".toml":
            content = read_toml(path, what)
        case ".json":
            content = _parsed(path, what, "JSON", json.loads)
        case _:
            content = _parsed(path, what, "YAML", _unfolded)
    if isinstance(content, list):
        content = {"prompts": content}
    if not isinstance(content, dict):
        raise UserError(f"{what} {path} is neither a list of prompts nor a table with one")
    if isinstance(common := content.get("prompt"), dict):
        others = {key: value for key, value in content.items() if key != "prompt"}
        own = {key: value for key, value in common.items() if key != "subset"}
        content = {**others, **own, "prompts": common.get("subset", [{}])}
    return _without_empty(content)


def read_prompt_rows(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """The rows of a .csv or .tsv, each with its place: by column, in lower case, without empty cells. Raises UserError."""
    if path.suffix.lower() == ".tsv":  # Parti's prompts hold unpaired quotes, so quoting is off
        try:
            header, *rows = csv.reader(read_text(path).split("\n"), delimiter="\t", quoting=csv.QUOTE_NONE)
        except csv.Error as error:
            raise UserError(f"prompts file {path} cannot be read as a .tsv: {error}") from error
        names = [name.strip().lower() for name in header]
        found = [(f"{path} line {line}", dict(zip(names, cells, strict=False))) for line, cells in enumerate(rows, start=2)]
    else:
        found = []
        for row in read_rows(path):
            if not isinstance(row, Row):
                raise UserError(row.reason)
            found.append((row.where, dict(row.values)))
        names = list(found[0][1]) if found else []
    if names and "prompt" not in names:
        advice = "; a list of one prompt a line ends in .txt" if path.suffix.lower() == ".csv" else ""
        raise UserError(f"prompts file {path} has the columns {', '.join(names)}; it needs a column prompt{advice}")
    return [(where, {name: cell for name, cell in cells.items() if cell.strip()}) for where, cells in found if any(cells.values())]


def _without_empty(content: dict[str, Any]) -> dict[str, Any]:
    """Without what YAML and JSON give as null, in the tables as well: a key without a value is not set."""
    return {
        key: [_without_empty(item) if isinstance(item, dict) else item for item in value] if isinstance(value, list) else value
        for key, value in content.items()
        if value is not None
    }


def _unfolded(text: str) -> Any:
    """YAML, whose aliases (`*name`) may make a file of a few hundred bytes larger than any memory. Raises ValueError for such a one."""
    sizes: dict[int, float] = {}  # by id, of what the aliases stand for; infinite while a value is looked into: it would be inside itself

    def size(value: Any) -> float:
        if not isinstance(value, list | dict):
            return 1
        if id(value) not in sizes:
            sizes[id(value)] = math.inf
            sizes[id(value)] = 1 + sum(map(size, value.values() if isinstance(value, dict) else value))
        return sizes[id(value)]

    content = yaml.safe_load(text)
    if size(content) > max(MOST_VALUES, len(text)):
        raise ValueError("its aliases (*name) repeat more than any list of prompts has; write them out")
    return content


def _parsed(path: Path, what: str, form: str, parse: Any) -> Any:
    text = read_text(path, what)
    try:
        return parse(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f"line {mark.line + 1}: " if mark else ""
        reason = f"{line}{getattr(error, 'problem', None) or str(error).splitlines()[0]}"
    except json.JSONDecodeError as error:
        reason = f"line {error.lineno}: {error.msg}"
    except ValueError as error:  # a number of more digits than Python converts, a date that is none
        reason = str(error)
    except RecursionError:
        reason = "it nests hundreds deep, which no list of prompts does"
    raise UserError(f"{what} {path} is not valid {form}: {reason}")
