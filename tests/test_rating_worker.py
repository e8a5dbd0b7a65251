"""The process that brings pictures into a project: the same samples every time, folders, and what it refuses."""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from PIL import Image

from library.errors import UserError
from library.rating import worker
from library.rating.space import LATENT_FEATURES
from library.rating.store import Project
from library.rating.worker import PictureMaker, PictureSource, make_samples, read_folder, work
from tests.helpers.tiny_models import tiny_model


def said(capsys: pytest.CaptureFixture[str]) -> list[dict]:
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


@pytest.mark.parametrize("kind", ["sdxl"])  # which is told sizes, and has the larger conditioning
def test_samples_are_mixed_over_prompts_and_the_same_in_every_session(kind: str, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(worker, "AHEAD", 5)
    monkeypatch.setattr(worker, "FIRST_BATCH", 2)
    monkeypatch.setattr(worker, "BATCH", 4)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat\na dog\na large house --w 128 --h 64\n")
    source = PictureSource(model="", prompts_file=str(prompts), resolution=(64, 64), num_steps=2, guidance_scale=2.0)
    found = []
    for name in ("first", "second"):
        project, enough = Project(tmp_path / name), threading.Event()
        monkeypatch.setattr(enough, "wait", lambda _, enough=enough: enough.set())  # what it does when there are enough
        make_samples(project, PictureMaker(tiny_model(kind), source), enough)
        pictures = project.pictures()
        assert len(pictures) == 6 and {p.prompt for p in pictures} == {"a cat", "a dog", "a large house"}
        assert [p.seed for p in pictures] == list(range(6))
        assert all(Image.open(project.path_of(p.file)).size == (p.width, p.height) for p in pictures)
        assert len({p.features.shape for p in pictures}) == 1 and pictures[0].features.shape[0] > LATENT_FEATURES
        found.append([p.hash for p in pictures])
    assert found[0] == found[1]
    assert [line["state"] for line in said(capsys)] == ["making", "making", "ready"] * 2


def test_a_folder_is_taken_in_and_what_cannot_be_read_is_said(tmp_path: Path, capsys) -> None:
    folder, project = tmp_path / "pictures", Project(tmp_path / "project")
    folder.mkdir()
    for number in range(3):
        Image.new("RGB", (90 + number, 70), (80 * number, 0, 99)).save(folder / f"{number}.png")
    (folder / "broken.png").write_bytes(b"\x89PNG no picture")
    (folder / "notes.txt").write_text("no picture")
    for _ in range(2):  # the second time, everything is there already
        enough = threading.Event()
        enough.wait = lambda timeout=None: True  # what it does when all are read  # pyright: ignore[reportAttributeAccessIssue]
        read_folder(project, folder, tiny_model(), 64, enough)
        lines = said(capsys)
        assert lines[-1]["state"] == "ready" and lines[-1]["pictures"] == 3 and lines[-1]["left_out"] == 2
    pictures = project.pictures()
    assert len(pictures) == 3 and all(Path(p.file).is_absolute() and p.file.startswith(str(folder)) for p in pictures)
    assert all(Image.open(project.path_of(p.shown)).format == "JPEG" for p in pictures)


def test_what_cannot_be_used_is_one_sentence(tmp_path: Path, monkeypatch, capsys) -> None:
    project, enough = Project(tmp_path / "project"), threading.Event()
    (tmp_path / "model.safetensors").write_bytes(b"not a model")
    with pytest.raises(UserError, match="model.safetensors"):
        work(project, PictureSource(model=str(tmp_path / "model.safetensors"), prompts_file="x"), enough)
    monkeypatch.setattr(worker, "load_model", lambda *args, **kwargs: tiny_model())
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="there are no pictures in"):
        work(project, PictureSource(model="", pictures=str(tmp_path / "empty")), enough)
    (tmp_path / "empty" / "broken.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match="none of the 1 pictures in .* can be read"):
        work(project, PictureSource(model="", pictures=str(tmp_path / "empty")), enough)
    with pytest.raises(UserError, match="does not exist"):
        work(project, PictureSource(model="", prompts_file=str(tmp_path / "no.txt")), enough)


def test_without_its_server_it_ends_without_a_word() -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    command = [sys.executable, "-c", "from library.rating.worker import tell_server; tell_server('making', pictures=1)"]
    with os.fdopen(write_end, "wb") as nobody:
        ended = subprocess.run(command, stdout=nobody, stderr=subprocess.PIPE, cwd=Path(__file__).parents[1])
    assert (ended.returncode, ended.stderr) == (0, b"")
