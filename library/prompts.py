"""Prompt lists: TOML, plain text with sd-scripts' options, and PartiPrompts' TSV become `PromptSpec`s."""

import csv
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import toml

from library.config import nearest
from library.errors import UserError
from library.types import PromptSpec

logger = logging.getLogger(__name__)

PIXELS_PER_LATENT = 8
KEYS = ("prompt", "negative_prompt", "width", "height", "guidance_scale", "weight", "direction")
# Keys of sd-scripts' LECO files that say the same in other words, and those that only its own objective reads.
LECO_NAMES = {"target": "prompt", "unconditional": "negative_prompt"}
LECO_UNUSED = ("positive", "neutral", "action", "guidance_scale", "batch_size", "dynamic_resolution", "dynamic_crops", "multiplier")
# --n negative, --w width, --h height, --l guidance; --d seed, --s steps and --ss sampler belong to sample prompts, the run has its own.
LINE_OPTIONS = {"n": "negative_prompt", "w": "width", "h": "height", "l": "guidance_scale", "d": None, "s": None, "ss": None}


def load_prompts(path: str | Path, categories: Sequence[str] | None = None) -> list[PromptSpec]:
    """Read a prompt list; its kind is told by the file's ending.

    `.toml`: `[[prompts]]` tables with the fields of `PromptSpec` (or the `target`, `unconditional` and `resolution` of an
    sd-scripts LECO file); top-level keys are defaults for every table. `.tsv`: PartiPrompts, column `Prompt`.
    Anything else: a prompt a line, `#` begins a comment line, with sd-scripts' `--n --w --h --l` options.

    Args:
        categories: of a TSV, keep only rows of these (column `Category`).

    Raises:
        UserError: no such file, nothing in it, or a line or key that cannot be understood.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"prompts file {path} does not exist; give a .toml, .txt or .tsv file of prompts")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (UnicodeDecodeError, OSError) as error:
        raise UserError(f"prompts file {path} cannot be read as UTF-8 text: {error}") from error
    if categories and path.suffix != ".tsv":
        raise UserError(f"prompt_categories choose rows of a PartiPrompts .tsv, but the prompts file is {path}; leave them out")
    match path.suffix:
        case ".toml":
            prompts = _from_toml(text, path)
        case ".tsv":
            prompts = _from_tsv(text, path, categories)
        case _:
            prompts = _from_lines(text.splitlines(), path)
    if not prompts:
        raise UserError(f"prompts file {path} holds no prompts; write one a line")
    return prompts


def _from_lines(lines: Iterable[str], path: Path) -> list[PromptSpec]:
    prompts = []
    for number, line in enumerate(lines, start=1):
        line = line.strip()
        if line and not line.startswith("#"):
            prompts.append(_parse_line(line, f"{path} line {number}"))
    return prompts


def _parse_line(line: str, where: str) -> PromptSpec:
    prompt, *options = re.split(r"\s--(?=[a-z]+\b)", line)
    values: dict[str, Any] = {"prompt": prompt.strip()}
    for option in options:
        name, _, value = option.partition(" ")
        if name not in LINE_OPTIONS:
            raise UserError(
                f"{where}: --{name} is not an option of a prompt; known are {', '.join('--' + known for known in LINE_OPTIONS)}"
            )
        if (field := LINE_OPTIONS[name]) is not None:
            values[field] = value.strip()
    return _spec(values, where)


def _from_tsv(text: str, path: Path, categories: Sequence[str] | None) -> list[PromptSpec]:
    # Parti's prompts hold unpaired quotes, so quoting is off.
    rows = list(csv.DictReader(text.splitlines(), delimiter="\t", quoting=csv.QUOTE_NONE))
    if rows and "Prompt" not in rows[0]:
        raise UserError(f"prompts file {path} has the columns {', '.join(rows[0])}; a .tsv needs a column Prompt")
    if categories:
        known = sorted({row.get("Category") or "" for row in rows})
        for category in categories:
            if category not in known:
                raise UserError(f"prompt_categories: {path} has no category {category!r}; it has {', '.join(known)}")
        rows = [row for row in rows if row["Category"] in categories]
    return [PromptSpec(prompt=prompt) for row in rows if (prompt := (row["Prompt"] or "").strip())]


def _from_toml(text: str, path: Path) -> list[PromptSpec]:
    try:
        content = toml.loads(text)
    except (toml.TomlDecodeError, IndexError) as error:  # toml raises IndexError on some broken tables
        raise UserError(f"prompts file {path} is not valid TOML: {error}") from error
    tables = content.pop("prompts", [])
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        raise UserError(f"prompts file {path}: `prompts` must be a list of [[prompts]] tables")
    if "targets" in content or "slider" in content:
        raise UserError(f"prompts file {path} has LECO [[targets]], which describe a slider in words; give [[prompts]] for a score")
    unused: set[str] = set()
    prompts = []
    for number, table in enumerate(tables, start=1):
        leco, where = "target" in table, f"{path} [[prompts]] number {number}"
        values: dict[str, Any] = {}
        for key, value in (content | table).items():
            if leco and key in LECO_UNUSED:
                unused.add(key)
            elif key == "resolution":
                values["height"], values["width"] = _height_and_width(value, where)
            else:
                values[LECO_NAMES.get(key) or key] = value
        prompts.append(_spec(values, where))
    if unused:
        logger.warning("%s: %s belong to LECO's own objective; a score does not use them", path, ", ".join(sorted(unused)))
    return prompts


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
    if not isinstance(values.get("prompt"), str):
        raise UserError(f"{where}: `prompt` is missing or is not text")
    numbers = {key: _number(values[key], key, where) for key in values if key not in ("prompt", "negative_prompt")}
    for key in ("width", "height"):
        if key in numbers:
            pixels = numbers[key]
            if pixels <= 0 or pixels % PIXELS_PER_LATENT:
                raise UserError(f"{where}: {key} is {values[key]}; it must be a positive multiple of {PIXELS_PER_LATENT} pixels")
            numbers[key] = int(pixels)
    spec = PromptSpec(prompt=values["prompt"], negative_prompt=str(values.get("negative_prompt", "")), **numbers)
    if not spec.weight > 0:
        raise UserError(f"{where}: weight is {spec.weight}; it must be above 0 (leave the prompt out to never draw it)")
    if spec.direction not in (1.0, -1.0):
        raise UserError(f"{where}: direction is {spec.direction}; it must be 1 (raise the score at a positive weight) or -1 (lower it)")
    return spec


def _number(value: Any, key: str, where: str) -> Any:
    try:
        return float(value)
    except (TypeError, ValueError):
        raise UserError(f"{where}: {key} is {value!r}, which is not a number") from None


def spread(prompts: Sequence[PromptSpec], count: int) -> list[PromptSpec]:
    """`count` prompts, evenly over the list (all of them if there are fewer), ordered by size so that equal sizes stand together."""
    count = min(count, len(prompts))
    chosen = [prompts[index * len(prompts) // count] for index in range(count)]
    return sorted(chosen, key=lambda prompt: (prompt.height or 0, prompt.width or 0))
