"""The imports of the project, read from its syntax trees, go the way that the table of rooms in docs/architecture.md says."""

import ast
import graphlib
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def read_table(text: str) -> dict[str, int]:
    """In which row of the table every room stands."""
    rows = re.findall(r"^\| ((?:`[\w.]+`(?:, )?)+) \|", text, re.MULTILINE)
    return {room: row for row, cell in enumerate(rows) for room in re.findall(r"`([\w.]+)`", cell)}


def room_of(module: str, rooms: Iterable[str], packages: Iterable[str]) -> str | None:
    """The room that a module stands in: its package (of `library`, the package below), or itself if it is a script."""
    parts = module.split(".")
    name = ".".join(parts[:2]) if parts[0] == "library" and (len(parts) > 2 or module in packages) else parts[0]
    return name if name in rooms else None


def complaint(importer: str, imported: str, rooms: dict[str, int], packages: Iterable[str] = ()) -> str | None:
    """Why `importer` may not import `imported`, or None if it may. Scripts, the last row, know each other."""
    own, other = room_of(importer, rooms, packages), room_of(imported, rooms, packages)
    if own is None or other is None:
        return f"{importer if own is None else imported} stands in no room of the table"
    if own == other or rooms[other] < rooms[own] or rooms[own] == rooms[other] == max(rooms.values()):
        return None
    return f"{importer} imports {imported}, which stands below it"


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
PACKAGES = {f"library.{folder.name}" for folder in (ROOT / "library").iterdir() if (folder / "__init__.py").exists()}
ROOMS = read_table((ROOT / "docs" / "architecture.md").read_text(encoding="utf-8"))
GRAPH = {
    name: sorted(set(imports(name, file.read_text(encoding="utf-8"), MODULES, is_package=file.name == "__init__.py")))
    for name, file in MODULES.items()
}


def test_every_module_has_a_room_and_every_room_a_module() -> None:
    homeless = [module for module in MODULES if room_of(module, ROOMS, PACKAGES) is None]
    assert homeless == [], "docs/architecture.md must name the room of each"
    assert {room_of(module, ROOMS, PACKAGES) for module in MODULES} == set(ROOMS)


def test_the_top_of_the_library_holds_three_modules() -> None:
    assert {module for module in MODULES if room_of(module, ROOMS, PACKAGES) == "library"} - {"library"} == {
        "library.types",
        "library.errors",
        "library.atomic_files",
    }


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_from_the_rooms_above_it(room: str) -> None:
    own = [module for module in MODULES if room_of(module, ROOMS, PACKAGES) == room]
    assert [words for module in own for imported in GRAPH[module] if (words := complaint(module, imported, ROOMS, PACKAGES))] == []


def test_no_import_comes_back_to_where_it_started() -> None:
    graphlib.TopologicalSorter(GRAPH).prepare()  # raises CycleError, which names the circle


def test_a_name_is_given_to_one_class_or_function() -> None:
    """Of the library and the networks; what begins with _ is its module's own."""
    owners: dict[str, list[str]] = {}
    for module, file in MODULES.items():
        if module.startswith(("library.", "networks.")):
            for node in ast.parse(file.read_text(encoding="utf-8")).body:
                if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and not node.name.startswith("_"):
                    owners.setdefault(node.name, []).append(module)
    assert {name: modules for name, modules in owners.items() if len(modules) > 1} == {}
    assert len(owners) > 500


def test_the_graph_is_not_empty() -> None:
    assert "library.errors" in GRAPH["library.settings.options"]  # or the tests above would pass on nothing
    assert sum(map(len, GRAPH.values())) > 100


TABLE = read_table("| room | holds |\n|---|---|\n| `library` | a |\n| `library.top` | b |\n| `networks` | c |\n| `tools`, `script` | d |\n")


@pytest.mark.parametrize(
    ("importer", "imported", "allowed"),
    [
        ("library.top.a", "library.errors", True),
        ("library.errors", "library.top.a", False),
        ("networks.lora", "library.top.a", True),
        ("library.top.a", "networks.lora", False),
        ("library.top.a", "library.top.deep.b", True),
        ("script", "networks.lora", True),
        ("tools.a", "script", True),
        ("library.other.a", "library.errors", False),  # a room that is not in the table
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
