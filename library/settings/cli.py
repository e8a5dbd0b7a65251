"""From the command line and a TOML file to a config, by sd-scripts' rules, and from a user's mistake to one line on stderr.

The command line beats the file given with --config_file, and the file beats the defaults. Section titles in the file are
decoration. No option is required by the parser: `--config_file x.toml` alone is always enough.
"""

import argparse
import contextlib
import gc
import itertools
import logging
import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn, TypeVar

from tqdm import tqdm

from library.errors import UserError
from library.settings.option_values import Option, nearest
from library.settings.options import construct, options, resolve, warn_unused
from library.settings.sd_scripts_keys import REPLACEMENTS, SAME, SEVERAL_WORDS, UNUSED, translate
from library.settings.toml_files import config_path, key_lines, read_toml, to_toml, write_config_file

ConfigT = TypeVar("ConfigT")


def parse_config(
    config_class: type[ConfigT],
    argv: Sequence[str] | None = None,
    *,
    description: str | None = None,
    defaults: Mapping[str, Mapping[str, Any]] = MappingProxyType({}),
    check: Callable[[ConfigT], object] | None = None,
) -> ConfigT:
    """Read a script's config from its command line.

    `--output_config FILE` writes the settings to a new file and `--dry_run` checks and prints them; both then end the program.
    (A file is written before the concerns' own checks, so that it can be made without a model and filled in by hand.)

    Args:
        config_class: a frozen dataclass of concerns (see `library.settings.options`).
        argv: the words after the program's name; None takes the program's own.
        description: first words of `--help`.
        defaults: other sets of defaults, for `--defaults NAME`.
        check: what `--dry_run` does after printing: all that a run does before it trains.

    Raises:
        UserError: anything wrong on the command line or in the file, or what `check` finds.
        SystemExit: with code 0, after --help, --help all, --output_config and --dry_run.
    """
    table = options(config_class)
    parser = make_parser(table, description, sets=defaults)
    words = sys.argv[1:] if argv is None else list(argv)
    if "--help_all" in words or ("--help", "all") in itertools.pairwise(words):
        make_parser(table, description, experts=True, sets=defaults).print_help()
        raise SystemExit(0)
    known, rest = parser.parse_known_args(words)
    on_command_line = vars(known)
    config_file = on_command_line.pop("config_file", None)
    output_config = on_command_line.pop("output_config", None)
    dry_run = on_command_line.pop("dry_run", False)
    if output_config == "":  # the switch of sd-scripts, which writes the config file
        if config_file is None:
            raise UserError("--output_config names no file: write --output_config FILE, or --config_file FILE --output_config")
        output_config, config_file = config_file, None
    on_command_line |= _unknown_to_argparse(rest, table)

    in_file = read_config_file(config_file, table) if config_file is not None else {}
    in_file = {name: value for name, value in in_file.items() if SAME.get(name) not in on_command_line}
    base = _chosen(on_command_line.pop("defaults", in_file.pop("defaults", None)), defaults)
    given = translate(in_file | on_command_line, table)
    lines = key_lines(config_path(config_file)) if config_file is not None else {}
    lines = {name: line for name, line in lines.items() if name not in on_command_line}
    resolved, mistakes = resolve(config_class, {**base, **given}, lines)
    if not mistakes:
        warn_unused(config_class, resolved, given)
        if output_config is not None:
            write_config_file(output_config, table, resolved)
            raise SystemExit(0)
    config = construct(config_class, resolved, mistakes, lines)
    if dry_run:
        print(to_toml(table, resolved), end="", flush=True)
        if check is not None:
            check(config)
        raise SystemExit(0)
    return config


def _chosen(name: object, sets: Mapping[str, Mapping[str, Any]]) -> Mapping[str, Any]:
    if name is None:
        return {}
    if name not in sets:
        known = f"it must be one of {', '.join(sets)}" if sets else "this script has one set of them"
        raise UserError(f"defaults is {name!r}, but {known}")
    return sets[str(name)]


class _Parser(argparse.ArgumentParser):
    """argparse's own complaints as a UserError."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"command line: {message}")


def make_parser(
    table: Mapping[str, Option],
    description: str | None = None,
    *,
    experts: bool = False,
    sets: Mapping[str, Mapping[str, Any]] = MappingProxyType({}),
) -> argparse.ArgumentParser:
    """A parser for the options and the engine's own. Values stay text, and options that were not given are left out.

    Args:
        experts: whether its help shows the expert settings; they are accepted either way.
        sets: other sets of defaults, by name.
    """
    hidden = 0 if experts else sum(entry.expert for entry in table.values())
    more = f"--help all shows {hidden} more {'setting' if hidden == 1 else 'settings'}." if hidden else None
    as_written = argparse.RawDescriptionHelpFormatter  # a description holds commands, a line each
    parser = _Parser(
        description=description,
        epilog=more,
        formatter_class=as_written,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
        add_help=False,
    )
    files = parser.add_argument_group("config file")
    files.add_argument("-h", "--help", action="help", help="Show this and exit; --help all, or --help_all: with the expert settings.")
    files.add_argument("--config_file", metavar="FILE", help="TOML file to take settings from; .toml is appended if missing.")
    files.add_argument(
        "--output_config",
        metavar="FILE",
        nargs="?",
        const="",
        help="Write the settings to this new TOML file, or to config_file, and exit.",
    )
    files.add_argument(
        "--dry_run", action="store_true", help="Print the settings as TOML, check them (train_leco_score.py: all but train), and exit."
    )
    if sets:
        choices = "{" + ",".join(sets) + "}"
        files.add_argument("--defaults", metavar=choices, help="Other defaults for what is not set; also a key of the file.")
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
            if entry.container is not None or entry.name in SEVERAL_WORDS:
                arguments["nargs"] = "*"
        groups[entry.section].add_argument(f"--{entry.name}", **arguments)
    return parser


def read_config_file(name: str | Path, table: Mapping[str, Option]) -> dict[str, Any]:
    """A TOML file's settings, with its sections flattened one level. Names and values are not checked here.

    Args:
        name: the file; ".toml" is appended if missing.
        table: the script's options; a table or an array of tables is only allowed as the value of one of them.

    Raises:
        UserError: no such file, broken TOML, a section in a section, or a key that two sections give different values.
    """
    path = config_path(name)
    if Path(name).suffix == ".json" and not path.exists():
        raise UserError(
            f"config_file {name} is JSON; give the settings as TOML, which kohya_ss writes to its output folder when it prints the "
            "training command, as config_lora-....toml"
        )
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


def run_main(main: Callable[[], None]) -> None:
    """Run a script's main function; end with one line and code 2 on a UserError, with code 130 on Ctrl-C.

    Anything unexpected is one line too (code 1), with its traceback in a file; with LECO_SCORE_DEBUG=1 it is shown.
    """
    gc.freeze()  # what is imported stays, so that no collection walks through it
    gc.enable()
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
    for name in ("httpx", "httpx2"):  # of the hub's client, which tells of every request
        logging.getLogger(name).setLevel(logging.WARNING)


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
            if name not in UNUSED and name not in REPLACEMENTS:
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
