"""Measurements: what a training costs, what comes of it, and what only a GPU can show. See README.md in this folder."""

from collections.abc import Iterable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def markdown_table(columns: Sequence[object], rows: Iterable[Sequence[object]]) -> str:
    """A table whose cells are written as they are."""
    lines = [f"| {' | '.join(map(str, cells))} |" for cells in (columns, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(columns), *lines[1:]])
