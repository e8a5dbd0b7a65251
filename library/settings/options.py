"""The engine of the settings: frozen dataclasses, one per concern, filled from a mapping.

A concern's fields are made with `option`, so that the help text lives on the field, and its `__post_init__` holds the checks.
A script's config is a frozen dataclass whose fields are concerns; an option's name is the leaf field's name:

    @dataclass(frozen=True, kw_only=True)
    class RolloutConfig:
        max_denoising_steps: int = option(40, help="Length of the sampler schedule.")

        def __post_init__(self) -> None:
            check_at_least(self, 1, "max_denoising_steps")

    @dataclass(frozen=True, kw_only=True)
    class ScriptConfig:
        model: ModelConfig
        rollout: RolloutConfig

    config = build(ScriptConfig, {"max_denoising_steps": 20, "pretrained_model_name_or_path": "sd15.safetensors"})

A field's type is str, int, float, bool, Path, `X | None`, or a `tuple` / `list` of one of them. A tuple of dict takes a TOML array
of tables.

A setting that is given, on the command line or in the file, and that nothing reads because of another one is named in a warning:
`only_with` says when a setting is read.
"""

import dataclasses
import logging
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, TypeVar, get_type_hints

from library.errors import UserError
from library.settings.option_values import Condition, Option, coerce, did_you_mean, parse_type
from library.settings.sd_scripts_keys import REPLACEMENTS, UNUSED, translate

logger = logging.getLogger(__name__)
ConfigT = TypeVar("ConfigT")
NOTHING: Mapping[str, Any] = MappingProxyType({})


def option(
    default: Any,
    *,
    help: str,
    choices: Iterable[str] | None = None,
    secret: bool = False,
    expert: bool = False,
    only_with: Condition | tuple[Condition, ...] = (),
    stands_for: Mapping[str, Mapping[str, Any]] | None = None,
) -> Any:
    """A field of a concern.

    Args:
        default: used when neither the command line nor the file says otherwise.
        help: one or two sentences for `--help`.
        choices: the allowed values (of each item, for a list); read when the settings are, so that a registry may still grow.
        secret: never printed, written or shown in a repr.
        expert: few need it; `--help` leaves it out and `--help all` shows it.
        only_with: when the setting is read: with a setting that is on or set ("paired_signs"), or with settings that have one of the
            values given ({"score_estimator": ("x0_renoise",)}; of a list, one item; no values: empty). A tuple: if any of them holds.
            () is always.
        stands_for: by value, settings that take the place of other options' defaults.
    """
    metadata = {
        "help": help,
        "choices": choices,
        "secret": secret,
        "expert": expert,
        "only_with": only_with if isinstance(only_with, tuple) else (only_with,),
        "stands_for": stands_for or {},
    }
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata, repr=not secret)
    return dataclasses.field(default=default, metadata=metadata, repr=not secret)


def options(config_class: type) -> dict[str, Option]:
    """The flat table of a script's options, by name, in the order of the fields."""
    table: dict[str, Option] = {}
    for section, concern in _concerns(config_class).items():
        hints = get_type_hints(concern)
        for field in dataclasses.fields(concern):
            assert field.name not in table, f"two options are called {field.name}: in {table[field.name].section} and in {section}"
            assert "help" in field.metadata, f"{concern.__name__}.{field.name} is not made with option()"
            default = field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
            item_type, container, optional = parse_type(hints[field.name])
            choices = field.metadata["choices"]
            table[field.name] = Option(
                name=field.name,
                section=section,
                item_type=item_type,
                container=container,
                optional=optional,
                default=default,
                **{**field.metadata, "choices": None if choices is None else tuple(choices)},
            )
    return table


def build_config(config_class: type[ConfigT], values: Mapping[str, object]) -> ConfigT:
    """Make a script's config from a flat mapping of option names to values; what the mapping lacks takes its default.

    Raises:
        UserError: an unknown name, a value of the wrong type or outside its choices, or a concern's own check.
    """
    values = translate(values, options(config_class))
    resolved, mistakes = resolve(config_class, values)
    if not mistakes:
        warn_unused(config_class, resolved, values)
    return construct(config_class, resolved, mistakes)


def resolve(config_class: type, values: Mapping[str, object], lines: Mapping[str, int] = NOTHING) -> tuple[dict[str, Any], dict[str, str]]:
    """Every option's value, coerced to its type and checked against its choices, and what is wrong, by name: that keeps its default.

    The concerns' own checks are not run. Options of sd-scripts that are not ours are left out; `warn_unused` names them.

    Args:
        lines: the line of each of `values` that is from a file, for messages.
    """
    table = options(config_class)
    mistakes: dict[str, str] = {}
    result = {name: entry.default for name, entry in table.items()}
    for name in values.keys() & table.keys():
        result |= table[name].stands_for.get(str(values[name]), {})
    for name, value in values.items():
        where = _line(name, lines)
        if name in table:
            try:
                result[name] = coerce(table[name], value)
            except UserError as error:
                mistakes[name] = f"{error}{where}"
        elif name not in UNUSED and name not in REPLACEMENTS:
            mistakes[name] = f"unknown option {name!r}{where}{did_you_mean(name, table)}; --help lists the options"
    return result, mistakes


def _line(name: str, lines: Mapping[str, int]) -> str:
    return f" (line {lines[name]})" if name in lines else ""


def warn_unused(config_class: type, resolved: Mapping[str, Any], given: Mapping[str, object]) -> None:
    """Name in one warning all that was given and does nothing: options of sd-scripts that are not ours, and what nothing reads."""
    table = options(config_class)
    foreign = [name for name, value in given.items() if name not in table and value not in (None, "")]
    unused = [f"{name} ({REPLACEMENTS[name]})" if name in REPLACEMENTS else name for name in foreign]
    unused += [f"{entry.name} ({entry.condition})" for entry in _unread(table, resolved, given)]
    if unused:
        logger.warning("these settings do nothing here: %s", ", ".join(unused))


def construct(
    config_class: type[ConfigT], resolved: Mapping[str, Any], mistakes: Mapping[str, str] = NOTHING, lines: Mapping[str, int] = NOTHING
) -> ConfigT:
    """Fill the concerns with what `resolve` returned, which runs their checks.

    Raises:
        UserError: the mistakes that `resolve` found, and the first of each other concern that is about a line of the file; without
            any, the first of all.
    """
    sections, wrong = {}, list(mistakes.values())
    for section, concern in _concerns(config_class).items():
        values = {field.name: resolved[field.name] for field in dataclasses.fields(concern)}
        if not mistakes.keys().isdisjoint(values):
            continue
        try:
            sections[section] = concern(**values)
        except UserError as error:
            where = _line(str(error).partition(" ")[0], lines)
            if where or not wrong:
                wrong.append(f"{error}{where}")
    if wrong:
        raise UserError(wrong[0] if len(wrong) == 1 else "\n  ".join([f"{len(wrong)} settings are wrong:", *wrong]))
    return config_class(**sections)


def settings_as_text(config: object, without: Collection[str]) -> dict[str, str]:
    """What every setting of a script's config is, by name. The secret ones are left out, and the concerns and settings `without`."""
    concerns = [getattr(config, name) for name in _concerns(type(config)) if name not in without]
    settings = [(field, getattr(concern, field.name)) for concern in concerns for field in dataclasses.fields(concern)]
    return {
        field.name: "not set" if value is None else str(value)
        for field, value in settings
        if field.name not in without and not field.metadata["secret"]
    }


def key_value_pairs(name: str, pairs: Sequence[str]) -> dict[str, str]:
    """Split the "key=value" words of the option `name`; the values stay text.

    Raises:
        UserError: a word without "=" or without a key.
    """
    result = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key.strip():
            raise UserError(f'{name} has {pair!r}, but every entry must be "key=value"')
        result[key.strip()] = value.strip()
    return result


def check_at_least(config: object, minimum: float, *names: str) -> None:
    """Refuse values below `minimum` (None passes)."""
    _check_numbers(config, names, lambda value: value >= minimum, f"at least {minimum}")


def check_above(config: object, bound: float, *names: str) -> None:
    """Refuse values of `bound` and below (None passes)."""
    _check_numbers(config, names, lambda value: value > bound, f"above {bound}")


def check_not_set(config: object, reason: str, *names: str) -> None:
    """Refuse those of these settings that are set, where `reason` is why they would do nothing."""
    for name in names:
        if getattr(config, name) not in (None, ()):
            raise UserError(f"{name} is set, but {reason}; leave it out")


def _unread(table: Mapping[str, Option], resolved: Mapping[str, Any], given: Collection[str]) -> list[Option]:
    """Those given a value, even their default, that have no effect with the values of the others."""
    return [
        entry for name, entry in table.items() if name in given and resolved[name] not in (None, (), []) and not entry.is_read(resolved)
    ]


def _concerns(config_class: type) -> dict[str, type]:
    hints = get_type_hints(config_class)
    sections = {field.name: hints[field.name] for field in dataclasses.fields(config_class)}
    for section, concern in sections.items():
        assert dataclasses.is_dataclass(concern), f"{config_class.__name__}.{section} is not a concern (a dataclass)"
    return sections


def _check_numbers(config: object, names: Iterable[str], accepts: Callable[[float], bool], rule: str) -> None:
    for name in names:
        value = getattr(config, name)
        if value is not None and not accepts(value):
            raise UserError(f"{name} is {value}, but it must be {rule}")
