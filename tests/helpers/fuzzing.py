"""Random input for readers of foreign files: values, edited JSON documents, edited bytes; and what a reader may do with it."""

import copy
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from library.errors import UserError

CASES = int(os.environ.get("FUZZ_CASES", "150"))


def fuzzed(share: float = 1.0) -> settings:
    """FUZZ_CASES cases (default 150), or a share of them for a slow reader; the same ones every time; 10 seconds for each."""
    count = max(1, int(CASES * share))
    return settings(max_examples=count, deadline=10_000, derandomize=True, database=None, suppress_health_check=list(HealthCheck))


def values(*words: str) -> st.SearchStrategy[Any]:
    """Whatever JSON can hold, with these words among its texts."""
    numbers = st.integers() | st.sampled_from([-1, 0, 1, 2, 2**31, 2**63, 10**30, 0.5, float("nan"), float("inf"), -1e-9])
    leaves = st.none() | st.booleans() | numbers | st.floats() | st.text(max_size=20)
    if words:
        leaves |= st.sampled_from(words)
    return st.recursive(
        leaves, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4), max_leaves=8
    )


@st.composite
def edited_json(draw: st.DrawFn, document: Any, *words: str) -> Any:
    """A document of which one to three values, at any depth, have become others or are gone."""
    holder = [copy.deepcopy(document)]
    for _ in range(draw(st.integers(1, 3))):
        container, key = draw(st.sampled_from(list(_places(holder))))
        if isinstance(container, dict) and draw(st.integers(0, 4)) == 0:
            del container[key]
        else:
            container[key] = draw(values(*words))
    return holder[0]


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    keys = value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in list(keys):
        yield value, key
        yield from _places(value[key])


@st.composite
def edited_bytes(draw: st.DrawFn, *contents: bytes) -> bytes:
    """One of these files, with bytes changed, put in, taken out, doubled, or cut off."""
    content = bytearray(draw(st.sampled_from(contents)))
    for _ in range(draw(st.integers(1, 4))):
        # half of the edits at the front, where headers are
        place = draw(st.integers(0, min(len(content), 200) if draw(st.booleans()) else len(content)))
        length = draw(st.sampled_from([1, 2, 4, 8, 100, 1 << 30]))
        match draw(st.sampled_from(["change", "insert", "remove", "double", "flip"])):
            case "change":
                content[place : place + length] = draw(st.binary(min_size=1, max_size=8))
            case "insert":
                content[place:place] = draw(st.binary(min_size=1, max_size=8) | st.just(b"\0" * 8) | st.just(b"\xff" * 8))
            case "remove":
                del content[place : place + length]
            case "double":
                content[place:place] = content[place : place + min(length, 100)]
            case "flip" if place < len(content):
                content[place] ^= 1 << draw(st.integers(0, 7))
    return bytes(content)


@st.composite
def edited_text(draw: st.DrawFn, words: Sequence[str], *texts: str) -> bytes:
    """One of these texts, with words put in and pieces taken out or doubled; at times it is no UTF-8 any more."""
    text = draw(st.sampled_from(texts))
    for _ in range(draw(st.integers(1, 4))):
        place, length = draw(st.integers(0, len(text))), draw(st.integers(0, 20))
        piece = draw(
            st.sampled_from([*words, "", "\0", "\r", "\n", '"', "[", "{", "=", "\ufeff", "\u2028", "\ud800", "\u0301"])
            | st.text(max_size=8)
        )
        match draw(st.sampled_from(["replace", "insert", "double"])):
            case "replace":
                text = text[:place] + piece + text[place + length :]
            case "insert":
                text = text[:place] + piece + text[place:]
            case "double":
                text = text[:place] + text[place : place + length] + text[place:]
    return text.encode("utf-8", draw(st.sampled_from(["replace", "surrogatepass"])))


def only_user_errors(folder: str | Path, read: Callable[[], Any]) -> None:
    """A sentence or a result; never another exception; nothing is written or removed."""
    before = sorted(str(path) for path in Path(folder).rglob("*"))
    try:
        read()
    except UserError as error:
        assert len(str(error)) < 5000 and not re.search(r"Traceback|weights_only", str(error))
    assert sorted(str(path) for path in Path(folder).rglob("*")) == before


@contextmanager
def file_of(content: bytes, name: str) -> Iterator[Path]:
    """A file of that name, alone in a folder that is gone afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, name)
        path.write_bytes(content)
        yield path
