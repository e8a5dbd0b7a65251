"""Marks of a gamed score in the pictures of an evaluation; the other sentences are tested with the report (test_report.py)."""

from dataclasses import replace

import pytest

from library.measuring.findings import text_table, warnings_of
from tests.test_report import evaluation_of


@pytest.mark.parametrize(
    ("field", "values", "words"),
    [
        ("saturation", (1.0, 1.0, 1.9), "At weight +1 the colours are 1.9 times as strong as without the slider"),
        ("nyquist", (4.0, 1.0, 1.1), "At weight -1 the finest detail is 4.0 times as strong as without the slider: a grid"),
    ],
)
def test_marks_of_a_gamed_score(field: str, values: tuple[float, ...], words: str) -> None:
    evaluation = evaluation_of()
    marked = replace(evaluation, statistics=replace(evaluation.statistics, **{field: values}))
    assert [line for line in warnings_of(marked) if line.startswith(words)] and warnings_of(evaluation) == []
    assert f"{max(values):.2f}" in text_table(marked)


def test_small_changes_of_colour_and_detail_are_no_news() -> None:
    evaluation = evaluation_of()
    statistics = replace(evaluation.statistics, saturation=(0.8, 1.0, 1.3), nyquist=(0.9, 1.0, 1.5))
    assert warnings_of(replace(evaluation, statistics=statistics)) == []
