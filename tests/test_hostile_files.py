"""One hostile file of every format that is read: nothing in it runs, nothing outside of its folder is opened, nothing is fetched."""

import csv
import io
import json
import pickle
import sys
import tarfile
import tracemalloc
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin

from library.atomic_files import NoTensors, load_tensors
from library.errors import UserError
from library.models.loading import load_model, load_vae
from library.models.textual_inversion import load_embeddings
from library.prompts.files import PromptOptions, load_prompts
from library.prompts.leco_files import load_leco_settings
from library.prompts.wildcards import Wildcards
from library.scorer_data.npz_cache import NpzCache
from library.scorer_data.pictures import read_picture
from library.scorer_data.readers.base import ReaderOptions
from library.scorer_data.readers.recognition import read_records
from library.scorer_data.records import FilePicture, FileState, Skipped
from library.scorer_training.dataset_config import read_dataset_config
from library.scorers.image_models.weight_files import read_state_dict
from library.settings.toml_files import read_toml
from library.training.checkpoints import STATE_FILE, load_state, save_state
from library.training.tracking import read_metrics
from networks.lora_files import read_lora
from tests.helpers.tiny_models import save_folder, tiny_model

SECRET = "secret"  # in the names of the files outside
DOORS = ("os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "socket.connect", "socket.getaddrinfo", "urllib.Request")
watched: list[str] | None = None


def _watch(event: str, arguments: tuple[Any, ...]) -> None:
    if watched is not None and (event in DOORS or (event == "open" and SECRET in Path(str(arguments[0])).name)):
        watched.append(f"{event} {arguments[0]}")


sys.addaudithook(_watch)


@contextmanager
def watching() -> Iterator[list[str]]:
    """What runs a program, connects, or opens a file outside."""
    global watched
    watched = found = []
    try:
        yield found
    finally:
        watched = None


class Evil:
    def __reduce__(self) -> tuple[Any, tuple[str, str]]:
        return open, ("../secret.txt", "a")


def test_the_watch_sees_what_hostile_files_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "inside").mkdir()
    monkeypatch.chdir(tmp_path / "inside")
    with watching() as found:
        pickle.loads(pickle.dumps(Evil())).close()
    assert found == ["open ../secret.txt"]


def pickled(read: Callable[[Path], Any]) -> Callable[[Path], Any]:
    """A reader of a file of torch.save that holds an object, as a new and as an old file, then as a bare pickle."""

    def read_all(path: Path) -> None:
        for write in (
            lambda: torch.save({"state_dict": {"a": torch.zeros(1)}, "callback": Evil()}, path),
            lambda: torch.save({"a": Evil()}, path, _use_new_zipfile_serialization=False),
            lambda: path.write_bytes(pickle.dumps(Evil())),
        ):
            write()
            with pytest.raises(UserError) as caught:
                read(path)
            assert "weights_only" not in str(caught.value)

    return read_all


def compressed(path: Path) -> None:
    """A LoRA of torch.save of a few kB, which needs 40 MB."""
    torch.save({"lora_unet_mid_block.lora_down.weight": torch.zeros(10, 1_000_000)}, path.with_suffix(".whole"))
    with zipfile.ZipFile(path.with_suffix(".whole")) as whole, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as small:
        for part in whole.infolist():
            small.writestr(part.filename, whole.read(part))
    with pytest.raises(UserError, match="its parts are compressed"):
        read_lora(path)


def larger_than_its_file(path: Path) -> None:
    """Tensors of torch.save that repeat one number, or hold no others: of a few hundred bytes, 40 GB."""
    for tensor in (torch.ones(1).expand(100_000, 100_000), torch.sparse_coo_tensor([[0], [0]], [1.0], (100_000, 100_000))):
        for content in ({"lora_unet_mid_block.lora_down.weight": tensor}, {"string_to_param": {"*": tensor}}):
            torch.save(content, path)
            with pytest.raises(NoTensors, match="of which the file holds less"):
                load_tensors(path)


def text(content: str, read: Callable[[Path], Any]) -> Callable[[Path], Any]:
    def read_it(path: Path) -> None:
        path.write_text(content, encoding="utf-8")
        read(path)

    return read_it


def table(path: Path) -> list[Any]:
    return list(read_records(path, "auto", ReaderOptions()))


def folder_with(name: str) -> Callable[[Path], Any]:
    """A reader of a diffusers folder of which one file of weights is hostile."""

    def read(path: Path) -> None:
        save_folder(tiny_model("sd1", full=True), path)
        for file in (path / name).parent.glob("*.safetensors"):
            file.unlink()
        pickled(lambda _: load_model(path))(path / name)

    return read


def tar_of(*members: tuple[tarfile.TarInfo, bytes]) -> Callable[[Path], Any]:
    def read(path: Path) -> None:
        with tarfile.open(path, "w") as tar:
            for member, content in members:
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
        for rated in table(path):
            if not isinstance(rated, Skipped):
                read_picture(rated.picture)  # from where it stands in the tar, whatever it is called

    return read


def link(name: str, target: str, kind: bytes) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    return member


def parquet(path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    writer = pytest.importorskip("pyarrow.parquet")

    writer.write_table(pyarrow.table({"path": ["../secret.png"], "score": [1.0]}), path)
    table(path)


def npz(path: Path) -> None:
    Image.new("RGB", (64, 64)).save(path.with_suffix(".png"))
    np.savez(path, latents=np.array([Evil()], dtype=object), original_size=np.array([64, 64]))
    NpzCache(0.18215).find(FilePicture(path.with_suffix(".png")), FileState(1, 0), (64, 64), ("plain",))


def large_npz(path: Path) -> None:
    """140 kB, and 144 MB unfolded."""
    Image.new("RGB", (64, 64)).save(path.with_suffix(".png"))
    np.savez_compressed(path, latents=np.zeros((4, 3000, 3000), np.float32), original_size=np.array([64, 64]))
    tracemalloc.start()
    assert NpzCache(0.18215).find(FilePicture(path.with_suffix(".png")), FileState(1, 0), (64, 64), ("plain",)) == {}
    assert tracemalloc.get_traced_memory()[1] < 10_000_000
    tracemalloc.stop()


def bomb(path: Path) -> None:
    notes = PngImagePlugin.PngInfo()
    notes.add_text("parameters", "x" * 10_000_000, zip=True)
    Image.new("1", (13000, 13000)).save(path, pnginfo=notes)
    read_picture(FilePicture(path))


def picture(content: bytes) -> Callable[[Path], Any]:
    def read(path: Path) -> None:
        path.write_bytes(content)
        read_picture(FilePicture(path))

    return read


def state(path: Path) -> None:
    save_state(path, {"step": 1})
    (path / "sha256sums").unlink()
    pickled(lambda _: load_state(path))(path / STATE_FILE)


def linked_state(path: Path) -> None:
    path.mkdir()
    (path / STATE_FILE).symlink_to(path.parent.parent / "secret.pt")
    load_state(path)


WILD = "a __../secret__ cat\n"
ROW = {"path": "../secret.png", "score": 1}
STUDIO = [
    {"data": {"image": "/data/local-files/?d=../secret.png"}, "annotations": [{"result": [{"type": "rating", "value": {"rating": 3}}]}]}
]
XML = '<?xml version="1.0"?><!DOCTYPE x [<!ENTITY y SYSTEM "file:../secret.txt">]><svg xmlns="http://www.w3.org/2000/svg">&y;</svg>'
POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(../secret.txt) (r) file\n"
FOLDED = "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [{f'*a{i - 1}, ' * 9}]\n" for i in range(1, 12))  # 9 ** 11 times x, once unfolded
FILES: dict[str, Callable[[Path], Any]] = {
    "checkpoint.ckpt": pickled(load_model),
    "checkpoint.pt": pickled(load_model),
    "vae.ckpt": pickled(load_vae),
    "vae.pt": pickled(load_vae),
    "unet/unet/diffusion_pytorch_model.bin": folder_with("unet/diffusion_pytorch_model.bin"),
    "vae/vae/diffusion_pytorch_model.bin": folder_with("vae/diffusion_pytorch_model.bin"),
    "text/text_encoder/pytorch_model.bin": folder_with("text_encoder/pytorch_model.bin"),
    "lora.pt": pickled(read_lora),
    "lora.ckpt": pickled(read_lora),
    "lora.bin": pickled(read_lora),
    "compressed.pt": compressed,
    "large.pt": larger_than_its_file,
    "base_weights.pt": pickled(lambda path: read_lora(path, fixed=True)),
    "embedding.pt": pickled(lambda path: load_embeddings(tiny_model("sd1"), [path])),
    "embedding.bin": pickled(lambda path: load_embeddings(tiny_model("sd1"), [path])),
    "head.pt": pickled(lambda path: read_state_dict(str(path))),
    "head.pth": pickled(lambda path: read_state_dict(str(path))),
    "x-state": state,
    "linked-state": linked_state,
    "cache.npz": npz,
    "large.npz": large_npz,
    "code.yaml": text("!!python/object/apply:os.system ['touch ../secret.txt']\n", load_prompts),
    "new.yml": text("- target: !!python/object/new:subprocess.Popen [['touch', '../secret.txt']]\n", load_prompts),
    "aliases.yaml": text(FOLDED, load_prompts),
    "folded.yaml": text(FOLDED + "targets: [{target_class: *a11, positive: a}]\n", load_leco_settings),
    "endless.yaml": text("targets: [{target_class: &a [*a], positive: a}]\n", load_leco_settings),
    "leco.yaml": text("- target: !!python/name:os.system\n", load_leco_settings),
    "wild.txt": text(WILD, lambda path: load_prompts(path, PromptOptions(wildcards_dir=path.parent))),
    "wild.toml": text(f"[[prompts]]\nprompt = {WILD!r}\n", lambda path: load_prompts(path, PromptOptions(wildcards_dir=path.parent))),
    "listed.txt": text(WILD, lambda path: Wildcards(path.parent).expand(["__listed__"], 9, torch.Generator(), "here")),
    "star.txt": text("x", lambda path: Wildcards(path.parent).expand(["__../*__"], 9, torch.Generator(), "here")),
    "prompts.json": text(json.dumps([{"prompt": WILD}]), lambda path: load_prompts(path, PromptOptions(wildcards_dir=path.parent))),
    "prompts.csv": text(f"prompt\n{WILD}", lambda path: load_prompts(path, PromptOptions(wildcards_dir=path.parent))),
    "settings.toml": text('a = """' + "\\" * 100_000, lambda path: read_toml(path, "settings")),
    "deep.toml": text("a = " + "[" * 100_000, lambda path: read_toml(path, "settings")),
    "datasets.toml": text("[[datasets]]\n" + "x = {" * 50_000, read_dataset_config),
    "table.csv": text("path,score\n../secret.png,1\nhttp://evil.example/a.png,2\n", table),
    "table.tsv": text("path\tscore\n..\\secret.png\t1\n", table),
    "table.jsonl": text(json.dumps(ROW) + "\n", table),
    "table.json": text(json.dumps([ROW, {**ROW, "path": "file:///../secret.png"}]), table),
    "deep.json": text("[" * 100_000, table),
    "metadata.jsonl": text(json.dumps({"file_name": "../secret.png", "score": 1}) + "\n", table),
    "metadata.csv": text("file_name,score\n../secret.png,1\n", table),
    "studio.json": text(json.dumps(STUDIO), table),
    "idealo.json": text(json.dumps([{"image_id": "../secret", "label": [0, 1, 0, 0, 0, 0, 0, 0, 0, 0]}]), table),
    "danbooru.json": text(
        json.dumps({"id": 1, "md5": "../secret", "file_ext": "png", "score": 3, "tag_string": "a", "rating": "s"}), table
    ),
    "AVA.txt": text("1 ../secret 0 1 5 17 38 36 15 6 5 1 1 22 1396\n", table),
    "field.csv": text("path,score\n" + "a" * (csv.field_size_limit() + 10) + ",1\n", table),
    "paths.parquet": parquet,
    "up.tar": tar_of((tarfile.TarInfo("../secret.png"), b"x"), (tarfile.TarInfo("../secret.json"), b'{"score": 1}')),
    "linked.tar": tar_of((link("a.png", "../secret.png", tarfile.SYMTYPE), b""), (tarfile.TarInfo("a.json"), b'{"score": 1}')),
    "hard.tar": tar_of((link("a.png", "../secret.png", tarfile.LNKTYPE), b""), (tarfile.TarInfo("a.json"), b'{"score": 1}')),
    "device.tar": tar_of((link("a.png", "", tarfile.CHRTYPE), b""), (tarfile.TarInfo("a.json"), b'{"score": 1}')),
    "bomb.png": bomb,
    "program.png": picture(POSTSCRIPT),
    "outside.png": picture(XML.encode()),
    "metrics.jsonl": text('{"step": 1' + "0" * 100_000 + "}\n" + "[" * 100_000 + "\n", lambda path: list(read_metrics(path))),
}


@pytest.mark.parametrize("name", FILES)
def test_a_hostile_file_runs_and_opens_nothing(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "inside" / name.partition("/")[0]
    path.parent.mkdir()
    outside = [tmp_path / f"secret{ending}" for ending in (".txt", ".png", ".pt")]
    for file in outside:
        file.write_text("what nobody else may read\n")
    monkeypatch.chdir(path.parent)
    with watching() as found:
        try:
            FILES[name](path)
        except UserError as error:
            assert "\n" not in str(error) and len(str(error)) < 1500
    assert found == []
    assert [file.read_text() for file in outside] == ["what nobody else may read\n"] * 3
