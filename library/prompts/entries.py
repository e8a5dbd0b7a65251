"""The entries of prompt files: lines with sd-scripts' options, TOML tables, LECO's tables and rows of PartiPrompts become `PromptSpec`s."""

import csv
import logging
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from library.errors import UserError
from library.settings.options import nearest
from library.types import PromptSpec

logger = logging.getLogger(__name__)

PIXELS_PER_LATENT = 8
TEXTS = ("prompt", "negative_prompt")
SIDES = ("width", "height")
# Whole numbers and the least that each may be; the others are any numbers.
WHOLE = {"seed": 0, "num_steps": 1, "original_width": 1, "original_height": 1, "crop_top": 0, "crop_left": 0}
LARGEST = 2**53
KEYS = (*TEXTS, *SIDES, "guidance_scale", "weight", "direction", *WHOLE)
# sd-scripts' sample prompts, and the size conditioning of its gen_img.py; --direction and --weight are ours.
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
}
SAMPLER_OPTION = "ss"
# Keys of sd-scripts' LECO files that say the same in other words, and those that only LECO's own objective reads.
LECO_NAMES = {"target": "prompt", "target_class": "prompt", "unconditional": "negative_prompt"}
LECO_UNUSED = ("positive", "neutral", "action", "guidance_scale", "batch_size", "dynamic_resolution", "dynamic_crops", "multiplier")
SLIDER_USED = ("target_class", "resolution", "resolutions", "weight")


class Entry(NamedTuple):
    where: str  # file and line, for messages
    spec: PromptSpec


def from_lines(lines: Iterable[str], path: Path) -> list[Entry]:
    """A prompt a line; empty lines and lines that begin with # are passed over."""
    entries, own_samplers = [], False
    for number, line in enumerate(lines, start=1):
        line = line.strip()
        if line and not line.startswith("#"):
            where = f"{path} line {number}"
            values = _read_line(line, where)
            own_samplers |= values.pop(SAMPLER_OPTION, None) is not None
            entries.append(Entry(where, _spec(values, where)))
    if own_samplers:
        logger.warning("%s: --ss does nothing here: all prompts have the run's sampler", path)
    return entries


def _read_line(line: str, where: str) -> dict[str, Any]:
    prompt, *options = re.split(r"\s--(?=[a-z]+\b)", " " + line)
    values: dict[str, Any] = {"prompt": prompt.strip()}
    for option in options:
        name, _, value = option.partition(" ")
        if name not in LINE_OPTIONS and name != SAMPLER_OPTION:
            known = ", ".join(f"--{known}" for known in (*LINE_OPTIONS, SAMPLER_OPTION))
            raise UserError(f"{where}: --{name} is not an option of a prompt; known are {known}")
        values[LINE_OPTIONS.get(name, name)] = value.strip()
    return values


def from_tsv(text: str, path: Path) -> list[PromptSpec]:
    """PartiPrompts: column Prompt."""
    # Parti's prompts hold unpaired quotes, so quoting is off.
    try:
        rows = list(csv.DictReader(text.splitlines(), delimiter="\t", quoting=csv.QUOTE_NONE))
    except csv.Error as error:
        raise UserError(f"prompts file {path} cannot be read as a .tsv: {error}") from error
    if rows and "Prompt" not in rows[0]:
        raise UserError(f"prompts file {path} has the columns {', '.join(filter(None, rows[0]))}; a .tsv needs a column Prompt")
    return [PromptSpec(prompt=prompt) for row in rows if (prompt := (row["Prompt"] or "").strip())]


def from_toml(content: dict[str, Any], path: Path) -> list[Entry]:
    """`[[prompts]]` with the fields of PromptSpec or of LECO, or LECO's `[[targets]]`; keys above the tables are their defaults."""
    if isinstance(slider := content.get("slider"), dict):
        content = {**content, **slider}
        del content["slider"]
    kind = "prompts" if "prompts" in content else "targets"
    tables = content.pop(kind, [{}] if "target_class" in content else [])
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        raise UserError(f"prompts file {path}: `{kind}` must be a list of [[{kind}]] tables")
    unused: set[str] = set()
    entries = []
    for number, table in enumerate(tables, start=1):
        where = f"{path} [[{kind}]] number {number}"
        values = content | table
        if kind == "targets" and "target" not in values:  # a slider of whatever is asked for, as in sd-scripts
            values.setdefault("target_class", "")
        passed_over = _unused_keys(values)
        unused |= passed_over
        entries += _from_table({key: value for key, value in values.items() if key not in passed_over}, where)
    if unused:
        logger.warning("%s: %s are for objective leco; a score does not use them", path, ", ".join(sorted(unused)))
    return entries


def _unused_keys(table: Mapping[str, Any]) -> set[str]:
    if "target_class" in table:
        return set(table) - set(SLIDER_USED)
    return set(table) & set(LECO_UNUSED) if "target" in table else set()


def _from_table(table: Mapping[str, Any], where: str) -> list[Entry]:
    """An entry for each of its resolutions, which share the weight."""
    values = {LECO_NAMES.get(key, key): value for key, value in table.items() if key not in ("resolution", "resolutions")}
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
    for key in numbers.keys() & set(SIDES):
        if numbers[key] <= 0 or numbers[key] % PIXELS_PER_LATENT:
            raise UserError(f"{where}: {key} is {values[key]}; it must be a positive multiple of {PIXELS_PER_LATENT} pixels")
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
    whole = {key: int(numbers[key]) for key in numbers.keys() & {*SIDES, *WHOLE}}
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
