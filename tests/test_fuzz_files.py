"""Readers of foreign tables, texts, pictures and logs under random input: a UserError or a result, and nothing is written."""

import io
import json
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from library.prompts.files import PromptOptions, load_prompts
from library.prompts.leco_files import is_leco_file, load_leco_settings
from library.scorer_data.buckets import BucketConfig
from library.scorer_data.latent_cache import DamagedLatentsError, open_cache
from library.scorer_data.npz_cache import NpzCache
from library.scorer_data.pictures import read_picture
from library.scorer_data.readers.base import ReaderOptions
from library.scorer_data.readers.recognition import read_records
from library.scorer_data.records import FilePicture, FileState
from library.scorer_training.config import LatentScorerConfig
from library.scorer_training.dataset_config import read_dataset_config
from library.settings.cli import parse_config
from library.settings.options import options
from library.slider_training.setup import leco_score_config
from library.training.tracking import JsonLinesSink, read_metrics
from tests.helpers.fuzzing import edited_bytes, edited_json, edited_text, file_of, fuzzed, only_user_errors, values
from tests.helpers.scorers import VAE

# ---- tables ----

CELLS = st.text(max_size=30) | st.sampled_from(['"', '"a"b', "a.png", "../a.png", "\0.png", "7,5", "nan", "1e999", "\r", "[[[["])
TABLES = st.lists(st.lists(CELLS, max_size=4).map(",".join), max_size=6).map("\n".join)
WORDS = ("nan", "inf", "1e999", "../x", "/", "7,5", "9" * 400, "[[[[", '{"a":', "path", "score", "label")
REAL = {
    "x.csv": 'path,score,votes,split,weight\na.png,7.5,"[1,2,3,4,5,6,7,8,9,0]",train,2\n"b, c.png",3,,val,\n',
    "x.tsv": "path\tlabel\tTags\na.png\tcat\t1girl solo\n",
    "x.jsonl": '{"path": "a.png", "score": 7.5}\n{"path": "b.png", "tags": ["a", "b"], "votes": [0,0,0,0,0,1,0,0,0,0]}\n',
    "x.json": '[{"path": "a.png", "score": 7}, {"id": "1", "rating": "s", "tag_string": "a b", "file_ext": "png", "score": 3}]',
    "AVA.txt": "1 953619 0 1 5 17 38 36 15 6 5 1 1 22 1396\n2 953958 10 7 15 26 26 21 10 8 1 2 15 21 1396\n",
}


@fuzzed()
@given(
    start=st.sampled_from(["path,score\n", "sep=;\npath;score\n", '"path"x,score\n', "[", "", "path\tscore\r"]), rest=TABLES, data=st.data()
)
def test_a_table(start: str, rest: str, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(["x.csv", "x.tsv", "x.jsonl", "x.json"]))
    with file_of((start + rest).encode(errors="surrogatepass"), name) as path:
        only_user_errors(path.parent, lambda: list(read_records(path, "table", ReaderOptions())))


@fuzzed()
@given(name=st.sampled_from(sorted(REAL)), reader=st.sampled_from(["auto", "table", "danbooru", "ava"]), data=st.data())
def test_a_table_that_was_edited(name: str, reader: str, data: st.DataObject) -> None:
    target = data.draw(st.sampled_from(["score", "label", "votes", "tags"]))
    with file_of(data.draw(edited_text(WORDS, REAL[name])), name) as path:
        only_user_errors(path.parent, lambda: list(read_records(path, reader, ReaderOptions(target=target))))


@fuzzed(0.5)
@given(rows=edited_json([{"path": "a.png", "score": 1.5, "votes": [1] * 10}, {"path": "b.png", "score": 2}]), lines=st.booleans())
def test_rows_of_json(rows: Any, lines: bool) -> None:
    text = "\n".join(map(json.dumps, rows)) if lines and isinstance(rows, list) else json.dumps(rows)
    with file_of(text.encode(), "x.jsonl" if lines else "x.json") as path:
        for own in (ReaderOptions(), ReaderOptions(target="votes")):
            only_user_errors(path.parent, lambda own=own: list(read_records(path, "table", own)))


def parquet() -> bytes:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet as writer

    buffer = io.BytesIO()
    pictures = [{"bytes": PICTURES[0], "path": "a.png"}] * 3
    writer.write_table(pyarrow.table({"score": [1.0, 2.0, 3.0], "label": ["a", "b", None], "image": pictures}), buffer)
    return buffer.getvalue()


@fuzzed()
@given(data=st.data())
def test_parquet(data: st.DataObject) -> None:
    with file_of(data.draw(edited_bytes(parquet())), "x.parquet") as path:
        only_user_errors(path.parent, lambda: list(read_records(path, "auto", ReaderOptions())))


@fuzzed()
@given(
    text=st.binary(max_size=60) | values().map(lambda value: json.dumps(value).encode()),
    name=st.text(max_size=20),
    cut=st.integers(0, 4096),
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
    with file_of(bytes(content[: len(content) - cut]), "x.tar") as path:
        only_user_errors(path.parent, lambda: list(read_records(path, "webdataset", ReaderOptions())))


# ---- prompts and settings ----

PROMPTS = {
    "x.txt": "a (red:1.2) circle --n ugly --w 512 --h 768 --d 3 --l 7 --s 20\n# note\n{a|b} __colour__ BREAK [x] \\( --direction -1\n",
    "x.toml": 'weight = 2\n[[prompts]]\nprompt = "a cat"\nwidth = 512\nseed = 4\n[[prompts]]\ntarget = "b"\nresolution = [512, 768]\n',
    "y.toml": '[[targets]]\ntarget_class = "a harbour"\npositive = "a"\nnegative = "b"\nneutrals = ["", "x"]\nresolutions = [512]\n',
    "x.tsv": "Prompt\tCategory\tChallenge\na cat\tAnimals\tBasic\n",
}
PROMPT_WORDS = (
    "--w",
    "--weight nan",
    "--d -1",
    "--l 1e999",
    "{",
    "|",
    "}",
    "2$$",
    "__a/../../x__",
    ":1e99)",
    "((((",
    "BREAK",
    "[[prompts]]",
)


@fuzzed(2)
@given(name=st.sampled_from(sorted(PROMPTS)), tags=st.booleans(), data=st.data())
def test_prompts(name: str, tags: bool, data: st.DataObject) -> None:
    own = PromptOptions(prompt_format="danbooru" if tags and name == "x.txt" else "auto")
    with file_of(data.draw(edited_text(PROMPT_WORDS, PROMPTS[name])), name) as path:
        only_user_errors(path.parent, lambda: load_prompts(path, own))
        only_user_errors(path.parent, lambda: is_leco_file(path) and load_leco_settings(path))


def toml_of(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(str(key))} = {toml_of(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(toml_of, value)) + "]"
    return '"none"' if value is None else json.dumps(value).replace("NaN", "nan").replace("Infinity", "inf")


LECO_SCORE = leco_score_config()
OPTION_NAMES = sorted(options(LECO_SCORE))
SLIDER_TOML = Path("examples/sd15_slider.toml").read_text(encoding="utf-8")
SCORER_TOML = Path("examples/sd15_scorer.toml").read_text(encoding="utf-8")
MIXTURE = (
    '[general]\nvalidation_split = 0.1\n[[datasets]]\nname = "a"\ncriterion = "emd"\n[[datasets.subsets]]\npath = "x"\nnum_repeats = 2\n'
)


@fuzzed()
@given(slider=st.booleans(), data=st.data())
def test_settings(slider: bool, data: st.DataObject) -> None:
    config, text = (LECO_SCORE, SLIDER_TOML) if slider else (LatentScorerConfig, SCORER_TOML)
    with file_of(data.draw(edited_text(("nan", "1e400", "'''", "[[x]]", "true", "9" * 400, "-1"), text)), "x.toml") as path:
        only_user_errors(path.parent, lambda: parse_config(config, ["--config_file", str(path)]))


@fuzzed()
@given(given=st.dictionaries(st.sampled_from(OPTION_NAMES), values("auto", "none", "a=b", "hold=nan"), min_size=1, max_size=4))
def test_values_of_settings(given: dict[str, Any]) -> None:
    lines = {"pretrained_model_name_or_path": '"m"', "scorer": '["s"]', "prompts_file": '"p"'} | {
        name: toml_of(value) for name, value in given.items()
    }
    with file_of("\n".join(f"{name} = {value}" for name, value in lines.items()).encode("utf-8", "replace"), "x.toml") as path:
        only_user_errors(path.parent, lambda: parse_config(LECO_SCORE, ["--config_file", str(path)]))


@fuzzed(0.5)
@given(content=edited_text(("nan", "[[datasets]]", "true", "-1", "'x'"), MIXTURE))
def test_a_mixture_of_datasets(content: bytes) -> None:
    with file_of(content, "x.toml") as path:
        only_user_errors(path.parent, lambda: read_dataset_config(path))


# ---- pictures, caches, logs ----


def picture_files() -> list[bytes]:
    files = []
    for kind, mode in (
        ("PNG", "RGB"),
        ("PNG", "RGBA"),
        ("PNG", "I;16"),
        ("JPEG", "RGB"),
        ("GIF", "P"),
        ("WEBP", "RGB"),
        ("TIFF", "F"),
        ("BMP", "1"),
    ):
        buffer = io.BytesIO()
        Image.new(mode, (9, 7)).save(buffer, format=kind)
        files.append(buffer.getvalue())
    return files


PICTURES = picture_files()


@fuzzed(2)
@given(content=edited_bytes(*PICTURES))
def test_a_picture(content: bytes) -> None:
    with file_of(content, "x.png") as path:
        only_user_errors(path.parent, lambda: read_picture(FilePicture(path)))


def cache_files() -> tuple[str, dict[str, bytes]]:
    """The folder's name and the files of a cache of one picture."""
    with tempfile.TemporaryDirectory() as folder:
        picture = FilePicture(Path(folder, "a.png"))
        picture.path.write_bytes(PICTURES[0])
        cache = open_cache(Path(folder), VAE, BucketConfig())
        cache.write((512, 512), [(picture, "")], torch.zeros(1, 4, 8, 8))
        return cache.folder.name, {path.name: path.read_bytes() for path in cache.folder.iterdir()}


CACHE_NAME, CACHE_FILES = cache_files()


def read_all(folder: Path) -> None:
    cache = open_cache(folder, VAE, BucketConfig())
    cache.verify()
    for row in cache._index.rows().tolist():
        try:
            cache.read([row])
        except DamagedLatentsError:
            continue


@fuzzed()
@given(name=st.sampled_from(sorted(CACHE_FILES)), data=st.data())
def test_a_latent_cache_is_read_as_far_as_it_is_whole(name: str, data: st.DataObject) -> None:
    """It may write: what is damaged is noted."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / CACHE_NAME).mkdir()
        for file, content in CACHE_FILES.items():
            (Path(folder) / CACHE_NAME / file).write_bytes(data.draw(edited_bytes(content)) if file == name else content)
        read_all(Path(folder))


def npz() -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, latents=np.zeros((4, 8, 8), np.float32), original_size=np.array([9, 7]), crop_ltrb=np.zeros(4))
    return buffer.getvalue()


@fuzzed()
@given(content=edited_bytes(npz()))
def test_a_cache_of_sd_scripts(content: bytes) -> None:
    with file_of(content, "a.npz") as path:
        picture = FilePicture(path.with_name("a.png"))
        picture.path.write_bytes(PICTURES[0])
        only_user_errors(path.parent, lambda: NpzCache(0.18215).find(picture, FileState(1, 0), (64, 64), ("plain",)))


METRICS = '{"step": 0, "time": 1.0, "loss": 0.5}\n{"step": 1, "time": 2.0, "loss": null, "reward": -1e3}\n{"step": 2}\n'


@fuzzed()
@given(content=edited_text(('"step": "x"', "[1]", "null", "1e999", "\n\n"), METRICS), first_step=st.integers(0, 3))
def test_metrics(content: bytes, first_step: int) -> None:
    with file_of(content, "metrics.jsonl") as path:
        only_user_errors(path.parent, lambda: read_metrics(path))
        sink = JsonLinesSink(path, first_step)  # a run that goes on
        sink.log({"loss": 1.0}, first_step)
        sink.close()
        assert [record["step"] for record in read_metrics(path)][-1] == first_step
