"""Which settings of a config are read by code that uses them, and which are only checked or copied."""

import ast
import dataclasses
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import get_type_hints

from library.settings.option_values import Option
from library.settings.options import options

ROOT = Path(__file__).resolve().parents[2]
CODE = [*ROOT.glob("train_*.py"), *(ROOT / "library").rglob("*.py"), *(ROOT / "tools").glob("*.py")]


@contextmanager
def recorded_reads(config_class: type) -> Iterator[set[str]]:
    """A set that fills with the names of the settings that are read meanwhile, but not by a concern's checks or by a copy of it."""
    reads: set[str] = set()
    concerns = {get_type_hints(config_class)[field.name] for field in dataclasses.fields(config_class)}

    def recording(names: frozenset[str]):
        def getattribute(self: object, name: str) -> object:
            if name in names and name not in reads and _is_use():
                reads.add(name)
            return object.__getattribute__(self, name)

        return getattribute

    for concern in concerns:
        concern.__getattribute__ = recording(frozenset(field.name for field in dataclasses.fields(concern)))
    try:
        yield reads
    finally:
        for concern in concerns:
            del concern.__getattribute__


def unread_settings(config_class: type, reads: set[str], resolved: Mapping[str, object]) -> list[str]:
    """The settings that were not read with the values of `resolved`, and of which `only_with` does not say so.

    A setting that `only_with` excuses must be read as an attribute somewhere in the project's code.
    """
    table = options(config_class)
    return [name for name, entry in table.items() if name not in reads and not _is_excused(entry, resolved)]


def _is_excused(entry: Option, resolved: Mapping[str, object]) -> bool:
    return not entry.is_read(resolved) and entry.name in ATTRIBUTES


def _is_use() -> bool:
    """Whether the attribute is read by neither `__post_init__`, however deep, nor the module `dataclasses`."""
    frame = sys._getframe(2)
    if frame.f_code.co_filename == dataclasses.__file__:
        return False
    while frame is not None:
        if frame.f_code.co_name == "__post_init__":
            return False
        frame = frame.f_back
    return True


def _attributes() -> set[str]:
    """The names that the project's code reads as attributes, by a dot or by getattr, outside of `__post_init__`."""
    names = set()
    for file in CODE:
        tree = ast.parse(file.read_text(encoding="utf-8"))
        checks = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == "__post_init__"]
        checked = {inner for node in checks for inner in ast.walk(node)}
        for node in set(ast.walk(tree)) - checked:
            match node:
                case ast.Attribute(attr=name) | ast.Call(func=ast.Name(id="getattr"), args=[_, ast.Constant(value=str(name)), *_]):
                    names.add(name)
    return names


ATTRIBUTES = _attributes()
