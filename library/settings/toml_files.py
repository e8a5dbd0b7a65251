"""TOML files: read, with what is wrong in them said in plain words, and written from settings."""

import json
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from library.errors import UserError
from library.settings.option_values import Option

_CURLY_QUOTES = "“”„‟‘’‚‛«»"
_ESCAPE = "a backslash in double quotes begins an escape; write the path with / or in single quotes"
# tomllib takes memory by the square of a key's parts: of 100,000, more than 12 GB
_DEEP_KEY = re.compile(r"""(?<![\w"'-])(?:(?:[\w-]+|"[^"\n]*"|'[^'\n]*')[ \t]*\.[ \t]*){100}""")
_CURLY = "curly quotes are not TOML; write \" or '"


def read_toml(path: Path, what: str) -> dict[str, Any]:
    """The content of a TOML file in UTF-8, with or without a byte order mark.

    Args:
        path: the file.
        what: what the file is to the user, e.g. "config_file": first words of the errors.

    Raises:
        UserError: a file that cannot be read or is not TOML; it names the file, the line and what is wrong there.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"{what} {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{what} {path} is not UTF-8 text; save it as UTF-8") from error
    deep = f"{what} {path} nests arrays or tables hundreds deep, which no setting does; mend its brackets and dots"
    if _DEEP_KEY.search(text):
        raise UserError(deep)
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        line, reason = _explain(str(error), re.split(r"\r?\n", text))
        raise UserError(f"{what} {path} is not valid TOML: line {line}: {reason}") from error
    except RecursionError:
        raise UserError(deep) from None


def key_lines(path: Path) -> dict[str, int]:
    """The line, from 1, of each key of a TOML file that `read_toml` can read; of one that is there twice, the last."""
    lines = re.split(r"\r?\n", path.read_text(encoding="utf-8-sig"))
    matches = ((re.match(r"""\s*["']?([\w-]+)["']?\s*=""", line), number) for number, line in enumerate(lines, start=1))
    return {match[1]: number for match, number in matches if match}


def config_path(name: str | Path) -> Path:
    path = Path(name).expanduser()
    return path if path.suffix == ".toml" else path.with_name(path.name + ".toml")


def to_toml(table: Mapping[str, Option], resolved: Mapping[str, Any]) -> str:
    """All settings but the secret ones as a TOML file: a section per concern; what is not set, or not read, as a comment."""
    lines: list[str] = []
    section = None
    for entry in table.values():
        if entry.secret:
            continue
        if entry.section != section:
            section = entry.section
            lines += [*([""] if lines else []), f"[{section}]"]
        value = resolved[entry.name]
        if value is None:
            lines.append(f"# {entry.name} =")
        elif entry.is_read(resolved):
            lines.append(f"{entry.name} = {_toml_value(value)}")
        else:
            lines.append(f"# {entry.name} = {_toml_value(value)}  # {entry.condition}")
    return "\n".join(lines) + "\n"


def write_config_file(name: str | Path, table: Mapping[str, Option], resolved: Mapping[str, Any]) -> Path:
    """Write the settings to a new file (".toml" is appended if missing). UserError when it exists or cannot be written."""
    path = config_path(name)
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(to_toml(table, resolved))
    except FileExistsError as error:
        raise UserError(f"output_config {path} exists already; give a new file name") from error
    except OSError as error:
        raise UserError(f"output_config {path} cannot be written: {error.strerror}") from error
    return path


def _explain(message: str, lines: list[str]) -> tuple[int, str]:
    """The number of the wrong line, from 1, and what is wrong in it."""
    reason = re.sub(r" \(at (line \d+, column \d+|end of document)\)$", "", message)
    position = re.search(r"\(at line (\d+), column (\d+)\)$", message)
    number = int(position[1]) if position else _last_statement(lines)
    line = lines[min(number, len(lines)) - 1]
    rest = line[int(position[2]) - 1 :] if position else line.partition("=")[2].strip()
    if reason.startswith(("Unescaped '\\'", "Invalid hex value", "Escaped character")):
        return number, _ESCAPE
    never_closed = reason.startswith(("Unterminated string", 'Expected "\'"', "Expected '\"", "Illegal character '\\n'"))
    if rest[:1] and rest[0] in _CURLY_QUOTES or never_closed and any(quote in line for quote in "“”„"):
        return number, _CURLY
    if never_closed:
        return number, "the text that begins here is never closed; a quote is missing at its end"
    if not position and rest.startswith("["):
        return number, "the array is not closed; its closing bracket is missing"
    if reason.startswith("Unclosed"):
        return number, f"the {reason.removeprefix('Unclosed ')} is not closed; a comma or its closing bracket is missing"
    if reason.startswith("Invalid value"):
        return number, _value_expected(rest)
    if reason.startswith(("Cannot overwrite", "Cannot declare", "Duplicate")):
        return number, "this key or table is in the file twice; leave one of the two out"
    return number, reason[:1].lower() + reason[1:]


def _value_expected(rest: str) -> str:
    if re.match(r"[\w-]+\s*=", rest):
        return "a setting begins inside an array; its closing bracket is missing in a line above"
    word = re.split(r"[\s,\]}#]", rest, maxsplit=1)[0]
    if not word or word == "=":
        return "a value is missing"
    if word.lower() in ("true", "false"):
        return f"{word} is not a value; write {word.lower()}"
    return f"{word} is not a value; write text in quotes"


def _last_statement(lines: list[str]) -> int:
    """The number of the line that begins the statement at which the file ends: the lines before it are valid TOML."""
    for count in range(len(lines) - 1, 0, -1):
        try:
            tomllib.loads("\n".join(lines[:count]) + "\n")
        except tomllib.TOMLDecodeError:
            continue
        return count + 1
    return 1


def _toml_value(value: object) -> str:
    # not the package toml: its writer breaks text that holds a backslash and an x, and it has no comments for what is not set
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_toml_value(item) for item in value) + "]"
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{json.dumps(key)} = {_toml_value(item)}" for key, item in value.items()) + " }"
    return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")  # a JSON string is a TOML string, but for DEL
