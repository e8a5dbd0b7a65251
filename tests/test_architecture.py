"""The imports of the project, read from its syntax trees, go the way that the table in docs/architecture.md says."""

import ast
import graphlib
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
Place = tuple[int, int, int]  # row, group in the row, position in the group


def read_table(text: str) -> dict[str, Place]:
    """Where every module, or `package.*`, stands."""
    places: dict[str, Place] = {}
    for row, cell in re.findall(r"^\| (\d+) \| (.+) \|$", text, re.MULTILINE):
        for group, names in enumerate(cell.split(";")):
            for position, name in enumerate(re.findall(r"`([\w.*]+)`", names)):
                assert name not in places, f"{name} stands twice in the table"
                places[name] = (int(row), group, position)
    return places


def entries_of(module: str, places: Iterable[str]) -> list[str]:
    """The entries of the table that a module, or a package itself, belongs to."""
    return [entry for entry in places if entry == module or (entry.endswith(".*") and f"{module}.".startswith(entry[:-1]))]


def complaint(importer: str, imported: str, places: dict[str, Place]) -> str | None:
    """Why `importer` may not import `imported`, or None if it may."""
    [own], [other] = entries_of(importer, places), entries_of(imported, places)
    (row, group, position), (other_row, other_group, other_position) = places[own], places[other]
    if own == other or other_row < row or (other_row == row and other_group == group and other_position < position):
        return None
    return f"{importer} (row {row}) imports {imported} (row {other_row})"


def project_modules() -> dict[str, Path]:
    """Every module of the project by its dotted name; packages of no code are left out."""
    files = [*ROOT.glob("*.py")]
    for package in ("library", "networks", "tools", "examples", "benchmarks"):
        files += (ROOT / package).rglob("*.py")
    modules = {}
    for file in files:
        parts = file.relative_to(ROOT).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        if parts[-1] != "__init__" or ast.parse(file.read_text(encoding="utf-8")).body[1:]:  # more than a docstring
            modules[name] = file
    return modules


def imports(name: str, source: str, modules: Iterable[str], *, is_package: bool = False) -> Iterator[str]:
    """The modules of the project that a source imports, wherever in it the import stands."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in modules)
        elif isinstance(node, ast.ImportFrom):
            start = node.module or ""
            if node.level:
                parts = name.split(".")[: len(name.split(".")) - node.level + is_package]
                start = ".".join([*parts, *start.split(".")] if start else parts)
            if start in modules:
                yield start
            yield from (f"{start}.{alias.name}" for alias in node.names if f"{start}.{alias.name}" in modules)


MODULES = project_modules()
PLACES = read_table((ROOT / "docs" / "architecture.md").read_text(encoding="utf-8"))
GRAPH = {
    name: sorted(set(imports(name, file.read_text(encoding="utf-8"), MODULES, is_package=file.name == "__init__.py")))
    for name, file in MODULES.items()
}


@pytest.mark.parametrize("module", sorted(MODULES))
def test_every_module_has_one_place_in_the_table(module: str) -> None:
    assert len(entries_of(module, PLACES)) == 1, f"docs/architecture.md must name {module} in exactly one place"


def test_the_table_names_no_module_that_is_gone() -> None:
    planned = {"benchmarks.*"} - {f"{name.split('.')[0]}.*" for name in MODULES}
    named = {entry for module in MODULES for entry in entries_of(module, PLACES)}
    assert set(PLACES) - named == planned


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_run_one_way(module: str) -> None:
    assert [words for imported in GRAPH[module] if (words := complaint(module, imported, PLACES))] == []


def test_no_import_comes_back_to_where_it_started() -> None:
    graphlib.TopologicalSorter(GRAPH).prepare()  # raises CycleError, which names the circle


def test_the_graph_is_not_empty() -> None:
    assert "library.errors" in GRAPH["library.config"]  # or the tests above would pass on nothing
    assert sum(map(len, GRAPH.values())) > 100


TABLE = read_table("| 1 | `a`, `b`; `c` |\n| 2 | `pkg.*`, `d` |\n")


@pytest.mark.parametrize(
    ("importer", "imported", "allowed"),
    [
        ("d", "a", True),  # from a row above
        ("a", "d", False),  # from a row below
        ("b", "a", True),  # from before it in its group
        ("a", "b", False),
        ("c", "a", False),  # from another group of its row
        ("pkg.x", "pkg.y", True),
        ("pkg.x.deep", "pkg.y", True),
        ("d", "pkg.x", True),
        ("pkg.x", "d", False),
    ],
)
def test_the_rules(importer: str, imported: str, allowed: bool) -> None:
    assert (complaint(importer, imported, TABLE) is None) is allowed


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import pkg.x", {"pkg.x"}),
        ("from pkg import x", {"pkg.x"}),
        ("from pkg.x import name", {"pkg.x"}),
        ("from . import x", {"pkg.x"}),
        ("from .x import name", {"pkg.x"}),
        ("def late():\n    import a as b", {"a"}),
        ("import torch", set()),
    ],
)
def test_imports_are_found_in_all_their_forms(source: str, found: set[str]) -> None:
    assert set(imports("pkg.y", source, {"a", "pkg.x", "pkg.y"})) == found
