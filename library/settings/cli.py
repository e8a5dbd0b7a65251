"""From the command line and a TOML file to a config, by sd-scripts' rules, and from a user's mistake to one line on stderr.

The command line beats the file given with --config_file, and the file beats the defaults. Section titles in the file are
decoration. No option is required by the parser: `--config_file x.toml` alone is always enough.
"""

import argparse
import contextlib
import itertools
import json
import logging
import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from tqdm import tqdm

from library.errors import UserError
from library.settings.options import Option, construct, nearest, options, resolve
from library.settings.removed import REMOVED
from library.settings.sd_scripts_keys import REPLACEMENTS, SAME, UNUSED, translate
from library.settings.toml_files import key_lines, read_toml

ConfigT = TypeVar("ConfigT")


def parse_config(config_class: type[ConfigT], argv: Sequence[str] | None = None, *, description: str | None = None) -> ConfigT:
    """Read a script's config from its command line.

    `--output_config FILE` writes the settings to a new file and `--dry_run` checks and prints them; both then end the program.
    (A file is written before the concerns' own checks, so that it can be made without a model and filled in by hand.)

    Args:
        config_class: a frozen dataclass of concerns (see `library.settings.options`).
        argv: the words after the program's name; None takes the program's own.
        description: first words of `--help`.

    Raises:
        UserError: anything wrong on the command line or in the file.
        SystemExit: with code 0, after --help, --help all, --output_config and --dry_run.
    """
    table = options(config_class)
    parser = make_parser(table, description)
    words = sys.argv[1:] if argv is None else list(argv)
    if "--help_all" in words or ("--help", "all") in itertools.pairwise(words):
        make_parser(table, description, experts=True).print_help()
        raise SystemExit(0)
    known, rest = parser.parse_known_args(words)
    on_command_line = vars(known)
    config_file = on_command_line.pop("config_file", None)
    output_config = on_command_line.pop("output_config", None)
    dry_run = on_command_line.pop("dry_run", False)
    on_command_line |= _unknown_to_argparse(rest, table)

    in_file = read_config_file(config_file, table) if config_file is not None else {}
    in_file = {name: value for name, value in in_file.items() if SAME.get(name) not in on_command_line}
    given = translate(in_file | on_command_line, table)
    lines = key_lines(config_path(config_file)) if config_file is not None else {}
    resolved = resolve(config_class, given, {name: line for name, line in lines.items() if name not in on_command_line})
    if output_config is not None:
        write_config_file(output_config, table, resolved)
        raise SystemExit(0)
    config = construct(config_class, resolved, given)
    if dry_run:
        print(to_toml(table, resolved), end="")
        raise SystemExit(0)
    return config


class _Parser(argparse.ArgumentParser):
    """argparse's own complaints as a UserError."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"command line: {message}")


def make_parser(table: Mapping[str, Option], description: str | None = None, *, experts: bool = False) -> argparse.ArgumentParser:
    """A parser for the options and the engine's own. Values stay text, and options that were not given are left out.

    Args:
        experts: whether its help shows the expert settings; they are accepted either way.
    """
    hidden = 0 if experts else sum(entry.expert for entry in table.values())
    more = f"--help all shows {hidden} more settings." if hidden else None
    parser = _Parser(description=description, epilog=more, argument_default=argparse.SUPPRESS, allow_abbrev=False, add_help=False)
    files = parser.add_argument_group("config file")
    files.add_argument("-h", "--help", action="help", help="Show this and exit; --help all, or --help_all: with the expert settings.")
    files.add_argument("--config_file", metavar="FILE", help="TOML file to take settings from; .toml is appended if missing.")
    files.add_argument("--output_config", metavar="FILE", help="Write the settings to this new TOML file and exit.")
    files.add_argument("--dry_run", action="store_true", help="Check the settings, print them as TOML and exit.")
    groups: dict[str, Any] = {}
    for entry in table.values():
        if entry.item_type is dict:
            continue  # an array of tables has no form on the command line
        if entry.section not in groups:
            groups[entry.section] = parser.add_argument_group(entry.section)
        arguments: dict[str, Any] = {"help": argparse.SUPPRESS if entry.expert and not experts else _help(entry)}
        if entry.item_type is bool and entry.container is None:
            arguments["action"] = argparse.BooleanOptionalAction
        else:
            arguments["metavar"] = "{" + ",".join(entry.choices) + "}" if entry.choices is not None else entry.item_type.__name__.upper()
            if entry.container is not None:
                arguments["nargs"] = "*"
        groups[entry.section].add_argument(f"--{entry.name}", **arguments)
    return parser


def config_path(name: str | Path) -> Path:
    path = Path(name).expanduser()
    return path if path.suffix == ".toml" else path.with_name(path.name + ".toml")


def read_config_file(name: str | Path, table: Mapping[str, Option]) -> dict[str, Any]:
    """A TOML file's settings, with its sections flattened one level. Names and values are not checked here.

    Args:
        name: the file; ".toml" is appended if missing.
        table: the script's options; a table or an array of tables is only allowed as the value of one of them.

    Raises:
        UserError: no such file, broken TOML, a section in a section, or a key that two sections give different values.
    """
    path = config_path(name)
    content = read_toml(path, "config_file")
    values: dict[str, Any] = {}
    section_of: dict[str, str] = {}
    for title, part in content.items():
        is_section = isinstance(part, dict) and not (title in table and table[title].item_type is dict)
        for key, value in part.items() if is_section else [(title, part)]:
            where = f"[{title}]" if is_section else "the top of the file"
            _refuse_tables(path, f"{title}.{key}" if is_section else key, value, table.get(key))
            if key in values and values[key] != value:
                raise UserError(f"config_file {path} gives {key} twice: {values[key]!r} in {section_of[key]} and {value!r} in {where}")
            values[key], section_of[key] = value, where
    return values


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


def run_main(main: Callable[[], None]) -> None:
    """Run a script's main function; end with one line and code 2 on a UserError, with code 130 on Ctrl-C.

    Anything unexpected is one line too (code 1), with its traceback in a file; with LECO_SCORE_DEBUG=1 it is shown.
    """
    setup_logging()
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None
    except Exception as error:
        if os.environ.get("LECO_SCORE_DEBUG"):
            raise
        print(f"error: {_unexpected(error)}", file=sys.stderr)
        raise SystemExit(1) from None


def _unexpected(error: Exception) -> str:
    """What a user is told of a mistake that is ours; its traceback goes into a file."""
    first_line, *_ = str(error).splitlines() or [""]
    said = f"{type(error).__name__}: {first_line[:300]}" if first_line else type(error).__name__
    where = "run it again with LECO_SCORE_DEBUG=1, and report what it shows"
    with contextlib.suppress(OSError):
        with tempfile.NamedTemporaryFile("w", prefix="leco_score_", suffix=".log", delete=False, encoding="utf-8") as log:
            log.write("".join(traceback.format_exception(error)))
        where = f"please report it with {log.name}"
    return f"something unexpected happened ({said}), which is a mistake of this program; {where}"


def setup_logging(level: int | str = logging.INFO) -> None:
    """Log to stderr without tearing a progress bar. Does nothing when logging is set up already."""
    handler = _TqdmHandler()
    handler.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
    logging.basicConfig(level=level, handlers=[handler])


class _TqdmHandler(logging.Handler):
    """Writes above any open progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            tqdm.write(self.format(record), file=sys.stderr)
        except Exception:
            self.handleError(record)


def _unknown_to_argparse(words: Sequence[str], table: Mapping[str, Option]) -> dict[str, list[str]]:
    """What argparse left over, as {name: its words}; UserError unless each is an option of sd-scripts."""
    result: dict[str, list[str]] = {}
    current: list[str] | None = None
    for word in words:
        if word.startswith("--"):
            flag, _, value = word.partition("=")
            name = flag[2:]
            if name in table:
                raise UserError(f"{flag} has no form on the command line; write it in the config file as [[{name}]]")
            if name not in UNUSED and name not in REPLACEMENTS and name not in REMOVED:
                match = nearest(name, [*table, "help", "help_all", "config_file", "output_config", "dry_run"])
                did_you_mean = "" if match is None else f" (did you mean --{match}?)"
                raise UserError(f"unknown option {flag}{did_you_mean}; --help lists the options")
            current = result.setdefault(name, [value] if value else [])
        elif current is None:
            raise UserError(f"the word {word!r} belongs to no option; a switch takes no value (write --name or --no-name)")
        else:
            current.append(word)
    return result


def _refuse_tables(path: Path, key: str, value: object, entry: Option | None) -> None:
    if entry is not None and entry.item_type is dict:
        return
    if isinstance(value, dict):
        raise UserError(f"config_file {path}: [{key}] is a section in a section; sections go one level deep")
    if isinstance(value, list) and any(isinstance(item, dict) for item in value):
        raise UserError(f"config_file {path}: [[{key}]] is an array of tables, and no option takes one under that name")


def _help(entry: Option) -> str:
    default = ""
    if entry.default not in (None, "", (), []) and not entry.secret:
        default = f" (default: {str(entry.default).lower() if isinstance(entry.default, bool) else entry.default})"
    return (entry.help + default).replace("%", "%%")


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
