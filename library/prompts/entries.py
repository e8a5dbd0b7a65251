"""The entries of prompt files: lines with sd-scripts' options, tables, LECO's tables and rows become `PromptSpec`s."""

import logging
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from library.errors import UserError
from library.settings.option_values import nearest
from library.types import SIDES, PromptSpec, is_side

logger = logging.getLogger(__name__)

TEXTS = ("prompt", "negative_prompt")
# Whole numbers and the least that each may be; the others are any numbers.
WHOLE = {"seed": 0, "num_steps": 1, "original_width": 1, "original_height": 1, "crop_top": 0, "crop_left": 0}
LARGEST = 2**53
KEYS = (*TEXTS, "width", "height", "guidance_scale", "weight", "direction", *WHOLE)
# Names in lines: sd-scripts' sample prompts, the size conditioning of its gen_img.py, and A1111's prompts from a file; --direction and
# --weight are ours.
LINE_OPTIONS = {
    "n": "negative_prompt",
    "w": "width",
    "h": "height",
    "d": "seed",
    "l": "guidance_scale",
    "s": "num_steps",
    "ow": "original_width",
    "oh": "original_height",
    "ct": "crop_top",
    "cl": "crop_left",
    "weight": "weight",
    "direction": "direction",
    "prompt": "prompt",
    "negative_prompt": "negative_prompt",
    "width": "width",
    "height": "height",
    "seed": "seed",
    "cfg_scale": "guidance_scale",
    "steps": "num_steps",
}
# The same in tables: sd-scripts' sample prompts and LECO files.
TABLE_NAMES = {
    "scale": "guidance_scale",
    "sample_steps": "num_steps",
    "target": "prompt",
    "target_class": "prompt",
    "unconditional": "negative_prompt",
}
# What says something of other models, of the sampler, which is the run's, or of how many pictures to make.
UNUSED_OPTIONS = ("ss", "g", "cn", "ctr", "rcfg", "fs", "am", "nl", "t", "f", "nw", "nh", "sampler_name", "batch_size", "n_iter")
UNUSED_KEYS = ("sample_sampler", "controlnet_image", "cfg_trunc_ratio", "renorm_cfg", "flow_shift", "enum")
PARTI_COLUMNS = ("category", "challenge", "note")  # of PartiPrompts, which describe a prompt
# Keys of LECO files that only LECO's own objective reads, and those of its sliders that a prompt has.
LECO_UNUSED = ("positive", "neutral", "action", "guidance_scale", "batch_size", "dynamic_resolution", "dynamic_crops", "multiplier")
SLIDER_USED = ("target_class", "resolution", "resolutions", "weight")


class Entry(NamedTuple):
    where: str  # file and line, for messages
    spec: PromptSpec


def from_lines(lines: Iterable[str], path: Path) -> list[Entry]:
    """A prompt a line; empty lines and lines that begin with # are passed over."""
    entries, unused = [], {}
    for number, line in enumerate(lines, start=1):
        if line.strip() and not line.lstrip().startswith("#"):
            where = f"{path} line {number}"
            entries.append(Entry(where, _spec(_read_line(line, where, unused), where)))
    _warn_of_unused(path, unused)
    return entries


def _read_line(line: str, where: str, unused: dict[str, None]) -> dict[str, Any]:
    """A prompt and its options as a table; those that do nothing here go into `unused`."""
    prompt, *options = re.split(r"\s--(?=[a-z_]+\b)", " " + line.strip(), flags=re.IGNORECASE)
    values: dict[str, Any] = {"prompt": prompt.strip()}
    if one_dash := re.search(r"\s-([wnhdlsg])\s", f"{prompt} "):
        raise UserError(f"{where}: options of a prompt begin with two dashes; write --{one_dash[1]} for -{one_dash[1]}")
    for option in options:
        name, _, value = option.partition(" ")
        name = name.lower()
        if name in UNUSED_OPTIONS:
            unused[f"--{name}"] = None
        elif name in LINE_OPTIONS:
            values[LINE_OPTIONS[name]] = _unquoted(value.strip()) if len(name) > 2 else value.strip()
        else:
            known = ", ".join(f"--{known}" for known in LINE_OPTIONS)
            raise UserError(f"{where}: --{name} is not an option of a prompt; known are {known}")
    return values


def _unquoted(value: str) -> str:
    """A1111 reads its lines as a shell does."""
    return value[1:-1] if len(value) > 1 and value[0] == value[-1] and value[0] in "\"'" else value


def from_rows(rows: Sequence[tuple[str, Mapping[str, Any]]], path: Path) -> list[Entry]:
    """Rows of a table by column, each with its place; columns that say nothing of a prompt are passed over, and named in a warning."""
    known = {**TABLE_NAMES, **{key: key for key in KEYS}}
    unused = dict.fromkeys(key for _, row in rows for key in row if key not in (*known, *PARTI_COLUMNS))
    if unused:
        logger.warning("%s: these columns are not read: %s; those that are: %s", path, ", ".join(unused), ", ".join(known))
    return [Entry(where, _spec({known[key]: row[key] for key in row if key in known}, where)) for where, row in rows if "prompt" in row]


def from_tables(content: dict[str, Any], path: Path) -> list[Entry]:
    """`[[prompts]]` with the fields of PromptSpec, of sd-scripts' sample prompts or of LECO (or lines), or LECO's `[[targets]]`; keys
    above the tables are their defaults."""
    unused: dict[str, None] = {}
    entries = []
    for where, values in tables_with_defaults(content, path, unused):
        if "scale" in values:  # there guidance_scale is another one, of models that were distilled with it
            values.pop("guidance_scale", None)
        unused |= dict.fromkeys(key for key in UNUSED_KEYS if key in values)
        passed_over = {*leco_keys(values), *UNUSED_KEYS}
        entries += _from_table({key: value for key, value in values.items() if key not in passed_over}, where)
    _warn_of_unused(path, unused)
    return entries


def tables_with_defaults(content: dict[str, Any], path: Path, unused: dict[str, None]) -> list[tuple[str, dict[str, Any]]]:
    """The tables of a prompt file, each with its place and with the keys above them. `unused` as in `_read_line`."""
    if isinstance(slider := content.get("slider"), dict):
        content = {**content, **slider}
        del content["slider"]
    kind = "prompts" if "prompts" in content else "targets"
    common = {key: value for key, value in content.items() if key != kind}
    tables = content.get(kind, [{}] if "target_class" in content else [])
    if not isinstance(tables, list) or not all(isinstance(table, (dict, str)) for table in tables):
        raise UserError(f"prompts file {path}: `{kind}` must be a list of [[{kind}]] tables")
    result = []
    for number, table in enumerate(tables, start=1):
        where = f"{path} [[{kind}]] number {number}"
        values = common | (_read_line(table, where, unused) if isinstance(table, str) else table)
        if kind == "targets" and "target" not in values:  # a slider of whatever is asked for, as in sd-scripts
            values.setdefault("target_class", "")
        result.append((where, values))
    return result


def leco_keys(table: Mapping[str, Any]) -> set[str]:
    """The keys of a table that only LECO's objective reads; none if it is not one of LECO's."""
    if "target_class" in table:
        return set(table) - set(SLIDER_USED)
    return set(table) & set(LECO_UNUSED) if "target" in table else set()


def _warn_of_unused(path: Path, unused: Iterable[str]) -> None:
    if names := ", ".join(unused):
        logger.warning("%s: these do nothing here, where all prompts have the run's sampler: %s", path, names)


def _from_table(table: Mapping[str, Any], where: str) -> list[Entry]:
    """An entry for each of its resolutions, which share the weight."""
    values = {TABLE_NAMES.get(key, key): value for key, value in table.items() if key not in ("resolution", "resolutions")}
    if "resolution" not in table and "resolutions" not in table:
        return [Entry(where, _spec(values, where))]
    given = table.get("resolutions", table.get("resolution"))
    several = given if isinstance(given, list) and given and isinstance(given[0], list) else [given]
    entries = []
    for resolution in several:
        height, width = _height_and_width(resolution, where)
        share = _number(values.get("weight", 1.0), "weight", where) / len(several)
        entries.append(Entry(where, _spec({**values, "height": height, "width": width, "weight": share}, where)))
    return entries


def _height_and_width(resolution: Any, where: str) -> tuple[Any, Any]:
    if not isinstance(resolution, list):
        return resolution, resolution
    if len(resolution) != 2:
        raise UserError(f"{where}: resolution is {resolution}; it must be one number of pixels or [height, width]")
    return resolution[0], resolution[1]


def _spec(values: Mapping[str, Any], where: str) -> PromptSpec:
    for key in values:
        if key not in KEYS:
            hint = f"did you mean {near}?" if (near := nearest(key, KEYS)) else f"known are {', '.join(KEYS)}"
            raise UserError(f"{where}: unknown key {key!r}; {hint}")
    if "prompt" not in values:
        raise UserError(f"{where}: `prompt` is missing or is not text")
    for key in TEXTS:
        if not isinstance(values.get(key, ""), str):
            raise UserError(f"{where}: `{key}` is missing or is not text")
    numbers = {key: _number(value, key, where) for key, value in values.items() if key not in TEXTS}
    if numbers.get("seed") == -1:  # any, in A1111 and its descendants
        del numbers["seed"]
    for key in numbers.keys() & {"width", "height"}:
        if not is_side(numbers[key]):
            raise UserError(f"{where}: {key} is {values[key]}; sides are {SIDES}")
    for key in numbers.keys() & WHOLE.keys():
        if not WHOLE[key] <= numbers[key] <= LARGEST or numbers[key] % 1:
            raise UserError(f"{where}: {key} is {values[key]}; it must be a whole number from {WHOLE[key]} to {LARGEST}")
    for key in numbers.keys() & {"weight", "guidance_scale"}:
        if numbers[key] <= 0:
            remedy = "leave the prompt out to never draw it" if key == "weight" else "1 is no guidance"
            raise UserError(f"{where}: {key} is {values[key]}; it must be above 0 ({remedy})")
    if numbers.get("direction", 1.0) not in (1.0, -1.0):
        raise UserError(
            f"{where}: direction is {numbers['direction']}; it must be 1 (raise the score at a positive multiplier) or -1 (lower it)"
        )
    whole = {key: int(numbers[key]) for key in numbers.keys() & {"width", "height", *WHOLE}}
    return PromptSpec(**{key: values[key] for key in TEXTS if key in values}, **{**numbers, **whole})


def _number(value: Any, key: str, where: str) -> Any:
    """A finite number: an int where it is one, so that a long seed keeps its last digits."""
    try:
        if isinstance(value, bool):
            raise ValueError
        number = int(value) if re.fullmatch(r"[+-]?\d+", str(value).strip()) else float(value)
        if not math.isfinite(number):
            raise ValueError
    except (TypeError, ValueError, OverflowError):
        raise UserError(f"{where}: {key} is {value!r}, which is not a number") from None
    return number
