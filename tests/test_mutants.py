"""What `benchmarks.mutants` changes, and which tests it takes."""

import pytest

mutants = pytest.importorskip("benchmarks.mutants", exc_type=ImportError)  # which needs POSIX

SOURCE = """def f(x: int | None, *, y: float = 2.5) -> int | None:
    logger.info("%d steps", x + 1)
    if x < 3:
        raise ValueError(2 * x)
    return f"{x + 4}" if y else (
        x - 5
    )
"""


def test_a_mutant_changes_more_than_words() -> None:
    def is_left_out(text: str) -> bool:
        before = SOURCE.partition(text)[0]
        place = before.count("\n") + 1, len(before) - before.rfind("\n") - 1
        return any(first <= place < last for first, last in mutants.words(SOURCE))

    assert [is_left_out(text) for text in ("| None,", "x + 1", "2 * x", "x + 4", "| None:")] == [True] * 5
    assert [is_left_out(text) for text in ("2.5", "x < 3", "y else", "x - 5")] == [False] * 4


def test_the_tests_of_a_mutant_are_those_that_reach_its_statement() -> None:
    assert [list(mutants.statement(SOURCE, line)) for line in (1, 3, 4, 6)] == [[1], [3], [4], [5, 6, 7]]
    lines = mutants.Lines({"file"})
    lines.seconds |= {"test.py::slow": 2.0, "test.py::quick": 1.0, "test.py::other": 0.5, "else.py::other": 0.1}
    lines.reached |= {"test.py::slow": {("file", 5)}, "test.py::quick": {("file", 6), ("file", 9)}, "test.py::other": {("file", 1)}}
    assert lines.tests_of("file", range(5, 8)) == ["test.py::quick", "test.py::slow"]
    assert lines.tests_of("file", range(20, 21)) == ["test.py::other", "test.py::quick", "test.py::slow"]  # it ran at import
    lines.reached["else.py"].add(("file", 5))  # by a fixture
    assert lines.tests_of("file", range(5, 8)) == ["else.py::other", "test.py::quick", "test.py::slow"]
