"""What the documents and docstrings name exists: links, files, modules and their contents, settings."""

import re
from pathlib import Path

import pytest

from tests.helpers.documents import (
    FENCE,
    LOG,
    OF_SD_SCRIPTS,
    PAGES,
    ROOT,
    SOURCES,
    anchors,
    broken_links,
    docstrings,
    missing_files,
    missing_modules,
    missing_names,
    missing_options,
    missing_settings,
    problems,
)


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_links_of_a_page_lead_somewhere(path: Path) -> None:
    assert broken_links(path.read_text(encoding="utf-8"), path.parent) == []


@pytest.mark.parametrize("path", [page for page in PAGES if page not in (LOG, OF_SD_SCRIPTS)], ids=name_of)
def test_what_a_page_names_exists(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    checks = [missing_files(text), missing_modules(text), missing_options(text), missing_settings(text)]
    assert problems(zip(("file", "module", "option", "setting"), checks, strict=True)) == []


def test_tables_are_tables() -> None:
    """Rows that were joined to one line, as a program that breaks text anew does, are no table on the page."""
    lines = [(name_of(path), line) for path in PAGES for line in FENCE.sub("", path.read_text(encoding="utf-8")).splitlines()]
    assert [(page, line) for page, line in lines if re.search(r"\|:?-{3,}", line) and not re.fullmatch(r" *\|(:?-{3,}:?\|)+", line)] == []


def test_the_log_names_the_commit_of_modules_that_are_gone() -> None:
    """An entry that names a module which is no longer there says which commit has it."""
    entries = LOG.read_text(encoding="utf-8").split("\n## ")
    lost = {entry.partition("\n")[0]: missing_modules(entry) for entry in entries if "s of commit " not in entry}
    assert {title: names for title, names in lost.items() if names} == {}


def test_what_docstrings_name_exists() -> None:
    found = {}
    for path in SOURCES:
        text = "\n\n".join(docstrings(path))
        checks = [missing_files(text), missing_modules(text), missing_options(text), missing_names(text)]
        found[name_of(path)] = problems(zip(("file", "module", "option", "name"), checks, strict=True))
    assert {path: names for path, names in found.items() if names} == {}


def test_pages_that_the_code_names_exist() -> None:
    """In messages, help texts and comments, too."""
    names = {name for path in SOURCES for name in missing_files(path.read_text(encoding="utf-8")) if name.startswith("docs/")}
    assert names == set()


def test_the_picture_of_the_rooms_is_true() -> None:
    """Each arrow of docs/architecture.md is an import, from the room at its head of the room at its tail."""
    arrows = re.findall(r"^ +(\w+) --> (\w+)$", (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert arrows
    for used, user in arrows:
        package = "networks" if used == "networks" else f"library.{used}"
        folder = ROOT / ("networks" if user == "networks" else f"library/{user}")
        sources = [path.read_text(encoding="utf-8") for path in folder.rglob("*.py")]
        assert any(re.search(rf"^ *from {package}[. ]", source, re.MULTILINE) for source in sources), f"{user} imports nothing of {used}"


def test_what_does_not_exist_is_found() -> None:
    assert broken_links("[a](README.md) [b](gone.md) [c](README.md#gone) [d](#here) [e](#gone)\n# Here\n", ROOT) == [
        "gone.md",
        "README.md#gone",
        "#gone",
    ]
    assert missing_files("`library/types.py`, library/gone.py and docs/gone.md") == ["library/gone.py", "docs/gone.md"]
    assert missing_modules("`library.types`, `library.errors.UserError`; library.types.Gone, python -m benchmarks.gone --x 1.") == [
        "library.types.Gone",
        "benchmarks.gone",
    ]
    assert missing_options("train --learning_rate 1 --no-xformers --learning_rat 2") == ["learning_rat"]
    assert missing_settings(
        "`learning_rate`, `network_dim = 4`, `network_dims`, `network_dims = 4`, `word`\n```toml\nlearning_rat = 1\n```"
    ) == [
        "network_dims",
        "network_dims",
        "learning_rat",
    ]
    assert missing_names("`UserError`, `Gone`, `UserError.gone_too`, `not a name`") == ["Gone", "UserError.gone_too"]


def test_anchors_are_those_of_github() -> None:
    assert anchors("## Reward shapes (`--reward_loss`)\n```\n# no heading\n```\n") == {"reward-shapes---reward_loss"}
