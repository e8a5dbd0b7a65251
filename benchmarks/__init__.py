"""Measurements: what a training costs, what comes of it, and what only a GPU can show. See README.md in this folder."""

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def argument_parser(description: str | None) -> argparse.ArgumentParser:
    """Of a command whose docstring is its help; half a name is no option's, since some hand on words that they do not know."""
    return argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)


def markdown_table(columns: Sequence[object], rows: Iterable[Sequence[object]]) -> str:
    """A table whose cells are written as they are."""
    lines = [f"| {' | '.join(map(str, cells))} |" for cells in (columns, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(columns), *lines[1:]])
