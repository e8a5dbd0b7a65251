"""A run's files on a Hugging Face hub (a stub on the loopback), a state and a model from there."""

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, load_file

from library.errors import UserError
from library.models.hub import find_model
from library.settings.shared import RunFilesConfig
from library.training.hub_files import Uploads, fetch_state
from tests.helpers.hub_server import Hub, hub_on_loopback
from tests.helpers.tiny_leco_run import run
from tests.helpers.tiny_models import save_folder, tiny_model

SECRET = "hf_secretsecret"
TO_HUB = {"huggingface_repo_id": "owner/sliders", "huggingface_token": SECRET}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with hub_on_loopback(tmp_path / "cache", monkeypatch, SECRET) as hub:
        yield hub


def test_a_run_puts_its_files_there_and_another_goes_on_from_them(
    hub: Hub, workplace: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    often = {"save_every_n_steps": 1, "save_state": True, "max_train_steps": 2}
    there = {**TO_HUB, "huggingface_path_in_repo": "/runs/", "async_upload": True, "save_state_to_huggingface": True}
    with caplog.at_level(logging.DEBUG):
        slider = run(workplace, tmp_path / "out", **often, **there)
    files = hub.repositories["owner/sliders"]
    states = [
        f"runs/tiny{name}-state/{file}" for name in ("", "-step00000001", "-step00000002") for file in ("sha256sums", "training_state.pt")
    ]
    assert sorted(files) == sorted([*states, *(f"runs/tiny{name}.safetensors" for name in ("", "-step00000001", "-step00000002"))])
    assert files["runs/tiny.safetensors"] == slider.read_bytes()
    assert hub.made["owner/sliders"].get("private") or hub.made["owner/sliders"].get("visibility") == "private"

    step = "owner/sliders/runs/tiny-step00000001-state"
    resumed = {"resume": step, "resume_from_huggingface": True, "huggingface_token": SECRET, "max_train_steps": 2}
    again = load_file(run(workplace, tmp_path / "again", **resumed))
    assert all(torch.equal(tensor, again[name]) for name, tensor in load(files["runs/tiny.safetensors"]).items())
    assert SECRET not in caplog.text + "".join(capfd.readouterr())
    written = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert not any(SECRET.encode() in path.read_bytes() for path in written)


def test_what_does_not_arrive_costs_a_line_without_the_token(hub: Hub, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    saving = RunFilesConfig(**TO_HUB, huggingface_repo_type="dataset", huggingface_repo_visibility="public")
    (tmp_path / "a.safetensors").write_bytes(b"weights")
    hub.refuses = f"the quota of {SECRET} is used up"
    uploads = Uploads(saving)
    uploads.check()
    uploads.send(tmp_path / "a.safetensors")
    assert "a.safetensors was not put into owner/sliders (" in caplog.text and SECRET not in caplog.text + repr(saving)
    hub.refuses = None
    uploads.send(tmp_path / "a.safetensors")
    assert hub.repositories == {"owner/sliders": {"a.safetensors": b"weights"}}
    assert hub.made["owner/sliders"]["type"] == "dataset" and hub.made["owner/sliders"].get("private") is not True


def test_mistakes_are_found_before_the_training(hub: Hub, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nothing can be put into owner/sliders"):
        Uploads(RunFilesConfig(huggingface_repo_id="owner/sliders", huggingface_token="hf_other")).check()
    with pytest.raises(UserError, match="huggingface_repo_id is 'sliders', but it must be OWNER/NAME"):
        RunFilesConfig(huggingface_repo_id="sliders")
    with pytest.raises(UserError, match="resume is auto, but with resume_from_huggingface"):
        fetch_state(RunFilesConfig(resume=Path("auto"), resume_from_huggingface=True))
    for name in ("owner/none/a-state", "owner/none/a-state:main:dataset"):
        with pytest.raises(UserError, match="a-state cannot be fetched from owner/none"):
            fetch_state(RunFilesConfig(resume=Path(name), resume_from_huggingface=True))


def test_a_model_is_fetched_once_and_taken_from_the_cache_then(hub: Hub, tmp_path: Path) -> None:
    hub.add_folder("owner/tiny", save_folder(tiny_model(), tmp_path / "model"))
    hub.repositories["owner/tiny"] |= {"unet/diffusion_pytorch_model.bin": b"a pickle", "sample.png": b"a picture"}
    folder = find_model("owner/tiny")
    kept = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert kept == hub.repositories["owner/tiny"].keys() - {"unet/diffusion_pytorch_model.bin", "sample.png"}
    hub.repositories.clear()
    assert find_model("owner/tiny") == folder
    with pytest.raises(UserError, match="cannot be fetched from http://127.0.0.1"):
        find_model("owner/other")
