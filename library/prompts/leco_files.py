"""The prompt files of sd-scripts' train_leco.py, which run unchanged: what a slider is to do, said in words. Those of LECO and Concept
Sliders are the same in YAML.

Two formats, and one file may hold tables of both. `[[prompts]]` of the original LECO (arXiv 2303.07345) with `target`:

    [[prompts]]
    target = "a painting of a harbour"      # where the LoRA acts
    positive = "impressionism"              # the direction is positive - unconditional; default: the target
    unconditional = ""                      # also the negative prompt of the rollout
    neutral = ""                            # what it starts from; default: the unconditional
    action = "erase"                        # or "enhance"

and sliders (ai-toolkit, arXiv 2311.12092) with `target_class`, in `[[targets]]`, under `[slider]`, or as the file itself; each stands
for both directions at both signs of the multiplier:

    [[targets]]
    target_class = "a harbour"
    positive = "a harbour, stormy sea"
    negative = "a harbour, calm sea"

Keys above the tables are their defaults. An unknown key in a table is an error here (sd-scripts passes over those of a slider); one
above the tables is named in a warning (sd-scripts says nothing).
"""

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from library.errors import UserError
from library.prompts.contents import TABLE_ENDINGS, read_lines, read_tables
from library.prompts.entries import leco_keys, tables_with_defaults
from library.settings.option_values import nearest
from library.types import SIDES, is_side

logger = logging.getLogger(__name__)

ACTIONS = ("erase", "enhance")
SHARED_KEYS = ("guidance_scale", "resolution", "dynamic_resolution", "batch_size", "dynamic_crops", "multiplier", "weight")
PROMPT_KEYS = ("target", "positive", "unconditional", "neutral", "action", *SHARED_KEYS)
NEUTRAL_SOURCES = ("neutrals", "neutral_prompt_file", "prompt_file")
SLIDER_KEYS = ("target_class", "positive", "negative", "neutral", *NEUTRAL_SOURCES, "resolutions", *SHARED_KEYS)


@dataclass(frozen=True, kw_only=True)
class LecoSetting:
    """One thing to learn: on `target`, predict what the frozen model predicts for `neutral`, shifted along a direction.

    Attributes:
        target: the prompt that the LoRA acts on, and that is rolled out.
        positive, unconditional: the direction is the prediction for the one minus that for the other; the other is the rollout's negative.
        neutral: whose prediction is shifted.
        action: "enhance" shifts towards positive, "erase" away from it.
        guidance_scale: by how many times the direction. Not the guidance of the rollout.
        size: (height, width) in pixels, multiples of 8; None takes the run's resolution.
        dynamic_resolution: of a square, take sides of random multiples of 64 from half its size up to it.
        batch_size: as the file has it; None where it says nothing.
        dynamic_crops: tell the U-Net of random crops (SDXL).
        multiplier: of the LoRA; not 0.
        weight: of its loss; above 0.
    """

    target: str
    positive: str
    unconditional: str = ""
    neutral: str = ""
    action: str = "erase"
    guidance_scale: float = 1.0
    size: tuple[int, int] | None = None
    dynamic_resolution: bool = False
    batch_size: int | None = None
    dynamic_crops: bool = False
    multiplier: float = 1.0
    weight: float = 1.0

    @property
    def shift(self) -> float:
        """How many times the direction is added to neutral: below 0 to erase."""
        return self.guidance_scale if self.action == "enhance" else -self.guidance_scale


def load_leco_settings(path: str | Path) -> list[LecoSetting]:
    """Read a LECO file, in the order of its tables.

    Raises:
        UserError: no such file, nothing in it, or a key or value that cannot be understood.
    """
    path = Path(path)
    top, tables = _tables(read_tables(path, "LECO prompts file"), path)
    known = {key for table, _ in tables for key in (SLIDER_KEYS if _is_slider(table) else PROMPT_KEYS)}
    _warn_of_unknown(top, known, path)
    settings: list[LecoSetting] = []
    for table, where in tables:
        keys = SLIDER_KEYS if _is_slider(table) else PROMPT_KEYS
        _refuse_unknown(table, keys, where)
        defaults = {key: value for key, value in top.items() if key in keys}
        settings += _slider(table, defaults, path.parent, where) if _is_slider(table) else [_prompt(defaults | table, where)]
    return settings


def is_leco_file(path: str | Path) -> bool:
    """Whether a prompt file says what to learn, and not only what to draw: tables with a target, a target_class or [[targets]].

    Raises:
        UserError: a .toml, .yaml or .json that does not exist or is not valid.
    """
    path = Path(path)
    if path.suffix.lower() not in TABLE_ENDINGS:
        return False
    content = read_tables(path)
    tables = content.get("prompts", [content])
    said = ("target", "target_class", "targets", "slider")
    return isinstance(tables, list) and any(isinstance(table, dict) and not table.keys().isdisjoint(said) for table in tables)


def unused_leco_keys(path: str | Path) -> list[str]:
    """The keys of a prompt file that only LECO's objective reads; none where it is no LECO file."""
    path = Path(path)
    tables = tables_with_defaults(read_tables(path), path, {}) if is_leco_file(path) else []
    return sorted({key for _, table in tables for key in leco_keys(table)})


def _tables(content: dict[str, Any], path: Path) -> tuple[dict[str, Any], list[tuple[dict[str, Any], str]]]:
    """The keys that are defaults, and the tables, each with its name for messages."""
    if "prompts" in content:
        kind, top = "prompts", content
    else:
        kind, top = "targets", content.get("slider", content)
        if "slider" in content:
            _warn_of_unknown(content, {"slider"}, path)
        if isinstance(top, dict) and "targets" not in top and ("target_class" in top or "target" in top):
            known = SLIDER_KEYS if _is_slider(top) else PROMPT_KEYS
            _warn_of_unknown(top, set(known), path)
            return {}, [({key: value for key, value in top.items() if key in known}, str(path))]
    tables = top.get(kind) if isinstance(top, dict) else None
    if not isinstance(tables, list) or not tables or not all(isinstance(table, dict) for table in tables):
        raise UserError(f"LECO prompts file {path} holds no [[prompts]] or [[targets]]; write one with target or positive")
    top = {key: value for key, value in top.items() if key != kind}
    if kind == "targets":  # one with neither target nor target_class is a slider of whatever is asked for, as in sd-scripts
        tables = [table if "target" in table else {"target_class": "", **table} for table in tables]
    return top, [(table, f"{path} [[{kind}]] number {number}") for number, table in enumerate(tables, start=1)]


def _is_slider(table: Mapping[str, Any]) -> bool:
    return "target_class" in table


def _warn_of_unknown(table: Mapping[str, Any], known: set[str], path: Path) -> None:
    unknown = [f"{key} (did you mean {near}?)" if (near := nearest(key, known)) else key for key in table if key not in known]
    if unknown:
        logger.warning("%s: nothing reads %s", path, ", ".join(unknown))


def _refuse_unknown(table: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    for key in table:
        if key not in known:
            hint = f"did you mean {near}?" if (near := nearest(key, known)) else f"known are {', '.join(known)}"
            raise UserError(f"{where}: unknown key {key!r}; {hint}")


def _prompt(values: Mapping[str, Any], where: str) -> LecoSetting:
    if "target" not in values:
        raise UserError(f"{where}: target is missing; write the prompt that the LoRA is to act on")
    target = _text(values, "target", where)
    unconditional = _text(values, "unconditional", where)
    action = _text(values, "action", where, "erase")
    if action not in ACTIONS:
        raise UserError(f"{where}: action is {action!r}; it must be erase or enhance")
    return LecoSetting(
        target=target,
        positive=_text(values, "positive", where, target),
        unconditional=unconditional,
        neutral=_text(values, "neutral", where, unconditional),
        action=action,
        size=_size(values["resolution"], where) if "resolution" in values else None,
        **_shared(values, where),
    )


def _slider(table: Mapping[str, Any], defaults: Mapping[str, Any], folder: Path, where: str) -> list[LecoSetting]:
    """Both directions at both signs, for each size and each neutral prompt: 4 settings each, or 2 where one end is not named."""
    values = {**defaults, **table}
    target, positive, negative = (_text(values, key, where) for key in ("target_class", "positive", "negative"))
    shared = _shared(values, where)
    multiplier = shared.pop("multiplier")
    directions: list[tuple[str, str, str, float]]  # positive, unconditional, action, multiplier
    if positive.strip() and negative.strip():
        directions = [
            (negative, positive, "erase", multiplier),
            (positive, negative, "enhance", multiplier),
            (positive, negative, "erase", -multiplier),
            (negative, positive, "enhance", -multiplier),
        ]
    elif negative.strip():
        directions = [(negative, "", "erase", multiplier), (negative, "", "enhance", -multiplier)]
    elif positive.strip():
        directions = [(positive, "", "enhance", multiplier), (positive, "", "erase", -multiplier)]
    else:
        raise UserError(f"{where}: positive and negative are both empty; name at least one end of the slider")
    return [
        LecoSetting(
            target=target, positive=ahead, unconditional=behind, neutral=neutral, action=action, size=size, multiplier=signed, **shared
        )
        for neutral in _neutrals(table, defaults, folder, where)
        for size in _sizes(values, where)
        for ahead, behind, action, signed in directions
    ]


def _neutrals(table: Mapping[str, Any], defaults: Mapping[str, Any], folder: Path, where: str) -> list[str]:
    """The table's own, from the first key that names some; else all that the file's top names; else its one neutral prompt."""
    for key in NEUTRAL_SOURCES:
        if key in table and (own := _listed(table[key], key, folder, where)):
            return own
    if "neutral" in table:
        return [_text(table, "neutral", where)]
    common = [neutral for key in NEUTRAL_SOURCES if key in defaults for neutral in _listed(defaults[key], key, folder, where)]
    return common or [_text(defaults, "neutral", where)]


def _listed(value: Any, key: str, folder: Path, where: str) -> list[str]:
    if key == "neutrals":
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise UserError(f'{where}: neutrals is {value!r}; it must be a list of prompts, such as ["", "a photo"]')
        return value
    lines = read_lines(folder / str(value), f"{where}: {key}")
    return [line.strip() for line in lines if line.strip()]


def _shared(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """What both formats say alike; the resolution is apart."""
    shared: dict[str, Any] = {
        "guidance_scale": _number(values, "guidance_scale", where, 1.0),
        "dynamic_resolution": _flag(values, "dynamic_resolution", where),
        "dynamic_crops": _flag(values, "dynamic_crops", where),
        "multiplier": _number(values, "multiplier", where, 1.0),
        "weight": _number(values, "weight", where, 1.0),
        "batch_size": None,
    }
    if shared["multiplier"] == 0:
        raise UserError(f"{where}: multiplier is 0, at which the LoRA is off and learns nothing; give another, such as 1 or -1")
    if shared["weight"] <= 0:
        raise UserError(f"{where}: weight is {shared['weight']:g}; it must be above 0 (leave the table out to not train on it)")
    if "batch_size" in values:
        batch_size = _number(values, "batch_size", where, 1.0)
        if batch_size < 1 or batch_size != int(batch_size):
            raise UserError(f"{where}: batch_size is {values['batch_size']}; it must be a whole number from 1")
        shared["batch_size"] = int(batch_size)
    return shared


def _sizes(values: Mapping[str, Any], where: str) -> Iterable[tuple[int, int] | None]:
    wanted = values.get("resolutions", values.get("resolution"))
    if wanted is None:
        return [None]
    several = isinstance(wanted, list) and wanted and isinstance(wanted[0], list)
    return [_size(one, where) for one in (wanted if several else [wanted])]


def _size(resolution: Any, where: str) -> tuple[int, int]:
    """(height, width) of a number of pixels or [height, width]."""
    sides = resolution if isinstance(resolution, list) else [resolution, resolution]
    if len(sides) != 2 or not all(_is_number(side) and is_side(side) for side in sides):
        raise UserError(f"{where}: resolution is {resolution!r}; it must be a size or [height, width], {SIDES}")
    return int(sides[0]), int(sides[1])


def _text(values: Mapping[str, Any], key: str, where: str, default: str = "") -> str:
    value = values.get(key, default)
    if not isinstance(value, str):
        raise UserError(f"{where}: {key} is {value!r}; it must be text in quotes")
    return value


def _flag(values: Mapping[str, Any], key: str, where: str) -> bool:
    value = values.get(key, False)
    if not isinstance(value, bool):
        raise UserError(f"{where}: {key} is {value!r}; it must be true or false")
    return value


def _number(values: Mapping[str, Any], key: str, where: str, default: float) -> float:
    value = values.get(key, default)
    if not _is_number(value):
        raise UserError(f"{where}: {key} is {value!r}, which is not a number")
    return float(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
