"""One option: its type, when it is read, and how the value of a TOML file or of the command line becomes its own."""

import difflib
import math
import types
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Union, get_args, get_origin

from library.errors import UserError

Condition = str | Mapping[str, Collection[Any]]


@dataclass(frozen=True, kw_only=True)
class Option:
    """One leaf of a script's config.

    Attributes:
        name: as in the file and, after `--`, on the command line.
        section: the name of the concern's field in the script's config.
        item_type: str, int, float, bool, Path or dict; the value's type, or each item's when `container` is set.
        container: tuple or list for an option of several values, else None.
        optional: whether None is allowed.
    """

    name: str
    section: str
    item_type: type
    container: type | None
    optional: bool
    default: Any
    help: str
    choices: Collection[str] | None
    secret: bool
    expert: bool
    only_with: tuple[Condition, ...]
    stands_for: Mapping[str, Mapping[str, Any]]

    def is_read(self, resolved: Mapping[str, Any]) -> bool:
        """Whether `only_with` holds for the script's settings; one that the script does not have is no condition."""
        return not self.only_with or any(_holds(condition, resolved) for condition in self.only_with)

    @property
    def condition(self) -> str:
        """`only_with` in words: "only with lr_scheduler polynomial"; "" if the setting is always read."""
        return " or ".join(_in_words(condition) for condition in self.only_with)


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name that `name` looks most like, whatever the case, or None."""
    by_lower_case = {candidate.lower(): candidate for candidate in known}
    matches = difflib.get_close_matches(name.lower(), by_lower_case, n=1, cutoff=0.6)
    return by_lower_case[matches[0]] if matches else None


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A hint behind a name that nobody knows: " (did you mean 'x'?)", or ""."""
    match = nearest(name, known)
    return "" if match is None else f" (did you mean {match!r}?)"


def coerce(entry: Option, value: object) -> Any:
    """The value as the option's type: from a TOML value or from the words of the command line.

    Raises:
        UserError: naming the option, the value and what is expected.
    """
    if value is None or value == "" or (value is False and entry.optional and entry.item_type is not bool):  # "resume = false"
        if entry.optional:
            return None
        if entry.container is None and entry.item_type is not str:
            raise UserError(f"{entry.name} is empty, but it must be {_EXPECTED[entry.item_type]}")
    if entry.container is None:
        return _coerce_item(entry, value)
    items = value if isinstance(value, (list, tuple)) else [value]
    if entry.item_type in (int, float):  # "512,768"
        items = [part for item in items for part in (item.split(",") if isinstance(item, str) else [item])]
    return entry.container(_coerce_item(entry, item) for item in items)


def _holds(condition: Condition, resolved: Mapping[str, Any]) -> bool:
    if isinstance(condition, str):
        return condition not in resolved or resolved[condition] not in (None, False, "", (), [])
    return all(_has(resolved[name], values) for name, values in condition.items() if name in resolved)


def _has(value: Any, allowed: Collection[Any]) -> bool:
    if not allowed:
        return value in (None, "", (), [])
    items = value if isinstance(value, (tuple, list)) else [value]
    return any((item.lower() if isinstance(item, str) else item) in allowed for item in items)  # names of schedules have no case


def _in_words(condition: Condition) -> str:
    if isinstance(condition, str):
        return f"only with {condition}"
    return " and ".join(
        f"not with {name}" if set(values) <= {None, False} else f"only with {name} {' or '.join(map(str, values))}"
        for name, values in condition.items()
    )


_EXPECTED: Mapping[type, str] = {
    str: "text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    Path: "a path",
    dict: "a table",
}


def parse_type(hint: Any) -> tuple[type, type | None, bool]:
    """A field's type as (type of an item, tuple | list | None, whether None is allowed)."""
    optional = False
    if get_origin(hint) in (Union, types.UnionType):
        members = [member for member in get_args(hint) if member is not type(None)]
        assert len(members) == 1 and len(get_args(hint)) == 2, f"an option cannot be {hint}"
        hint, optional = members[0], True
    container = get_origin(hint) if get_origin(hint) in (tuple, list) else None
    if container is not None:
        hint = get_args(hint)[0]
    hint = get_origin(hint) or hint  # dict[str, Any] -> dict
    assert hint in _EXPECTED, f"an option cannot be {hint}"
    return hint, container, optional


def _coerce_item(entry: Option, value: object) -> Any:
    try:
        item = _convert(entry.item_type, value)
    except (ValueError, OverflowError):
        shown = "not usable" if entry.secret else repr(value)
        raise UserError(f"{entry.name} is {shown}, but it must be {_EXPECTED[entry.item_type]}") from None
    if entry.choices is not None and item not in entry.choices:
        allowed = ", ".join(entry.choices)
        raise UserError(f"{entry.name} is {value!r}, but it must be one of {allowed}{did_you_mean(str(item), entry.choices)}")
    return item


def _convert(target: type, value: Any) -> Any:
    """`value` as `target`; ValueError when it is not one. A bool is never taken for a number, nor a number for a bool."""
    if target is bool and isinstance(value, str) and value.lower() in ("true", "false"):
        return value.lower() == "true"
    if target in (bool, dict) or isinstance(value, bool):
        if not isinstance(value, target):
            raise ValueError
        return value
    if isinstance(value, Path):
        value = str(value)
    if not isinstance(value, (str, int, float)):
        raise ValueError
    if target is float:
        number = float(value)
        if not math.isfinite(number):
            raise ValueError
        return number
    if target is int:
        if isinstance(value, str):
            value = int(value) if value.strip().lstrip("+-").isdigit() else float(value)
        if value != int(value) or abs(int(value)) >= 2**63:  # a seed above is refused by torch, and nothing else is so large
            raise ValueError
        return int(value)
    return Path(str(value)).expanduser() if target is Path else str(value)
