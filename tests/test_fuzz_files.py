"""Readers of foreign files under random input: a UserError, or a result; never another exception, and nothing is written."""

import io
import json
import os
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from library.errors import UserError
from library.scorer_data.readers.base import ReaderOptions
from library.scorer_data.readers.recognition import read_records
from library.scorers.io import FORMAT_KEY, SPEC_KEY, load_scorer
from tests.test_malicious_files import HEADER, REACHING, SPEC

CASES = int(os.environ.get("FUZZ_CASES", "300"))
fuzzed = settings(max_examples=CASES, deadline=10_000, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
LEAVES = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.sampled_from(["pixel", "timm", *HEADER, *REACHING])
)
VALUES = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4), max_leaves=8
)
PLACES = [(key,) for key in HEADER] + [("heads", 0, key) for key in HEADER["heads"][0]]
PLACES += [("architecture", key) for key in (*SPEC.architecture, "image_model", "decoder")] + [("vae", key) for key in HEADER["vae"]]


def only_user_errors(folder: str, read: Any) -> None:
    before = sorted(os.listdir(folder))
    try:
        read()
    except UserError as error:
        assert len(str(error)) < 5000
    assert sorted(os.listdir(folder)) == before


@fuzzed
@given(changes=st.lists(st.tuples(st.sampled_from(PLACES), VALUES), min_size=1, max_size=3))
def test_a_scorers_header(changes: list[tuple[tuple[Any, ...], Any]]) -> None:
    header = json.loads(SPEC.to_json())
    for (*outer, key), value in changes:
        place: Any = header
        try:
            for step in outer:
                place = place[step]
            place[key] = value
        except (TypeError, LookupError):
            continue  # an earlier change has put something else there
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "x.safetensors")
        save_file({"x": torch.zeros(2)}, path, {FORMAT_KEY: "scorer/2", SPEC_KEY: json.dumps(header)})
        only_user_errors(folder, lambda: load_scorer(path))


CELLS = st.text(max_size=30) | st.sampled_from(['"', '"a"b', "a.png", "../a.png", "\0.png", "7,5", "nan", "1e999", "\r", "[[[["])
TABLES = st.lists(st.lists(CELLS, max_size=4).map(",".join), max_size=6).map("\n".join)


@fuzzed
@given(
    start=st.sampled_from(["path,score\n", "sep=;\npath;score\n", '"path"x,score\n', "[", "", "path\tscore\r"]), rest=TABLES, data=st.data()
)
def test_a_table(start: str, rest: str, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(["x.csv", "x.tsv", "x.jsonl", "x.json"]))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, name)
        path.write_bytes((start + rest).encode(errors="surrogatepass"))
        only_user_errors(folder, lambda: list(read_records(path, "table", ReaderOptions())))


@fuzzed
@given(
    text=st.binary(max_size=60) | VALUES.map(lambda value: json.dumps(value).encode()), name=st.text(max_size=20), cut=st.integers(0, 4096)
)
def test_a_tar(text: bytes, name: str, cut: int) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for member in ("../../a.json", "../../a.png", f"/{name}.json".replace("\0", ""), "b.png"):
            info = tarfile.TarInfo(member.encode(errors="replace").decode())
            info.size = len(text)
            tar.addfile(info, io.BytesIO(text))
    content = bytearray(buffer.getvalue())
    content[cut % len(content)] ^= 0x55
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "x.tar")
        path.write_bytes(content[: len(content) - cut])
        only_user_errors(folder, lambda: list(read_records(path, "webdataset", ReaderOptions())))
