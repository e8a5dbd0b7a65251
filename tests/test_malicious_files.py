"""Files that try to run, open or fetch something, one of every kind that a reader accepts: none does, and each is named in one sentence."""

import dataclasses
import math
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from library.errors import UserError
from library.scorer_data.npz_cache import NpzCache
from library.scorer_data.pictures import read_picture
from library.scorer_data.records import FilePicture, FileState
from library.scorers.base import build_scorer
from library.scorers.image_models.weight_files import read_state_dict
from library.scorers.io import FORMAT_KEY, SPEC_KEY, load_scorer, save_scorer
from tests.helpers.scorer_headers import REACHING, SPEC, TRANSFORMER, edited, file_with, head, pixel
from tests.helpers.tiny_models import tiny_vae
from tools import make_pixel_scorer

MALFORMED = {
    "std 0": edited(std=0),
    "std NaN": edited(std=math.nan),
    "mean a text": edited(mean="0"),
    "std true": edited(std=True),
    "an unknown key": edited(surprise=1),
    "no heads": edited(heads=[]),
    "heads a number": edited(heads=3),
    "a list": "[1]",
    "nothing": "",
    "deep": "[" * 200_000,
    "deep in a value": SPEC.to_json()[:-1] + ', "training": ' + '{"a":' * 100_000,
    "kind a list": edited(kind=["latent_resnet"]),
    "training a list": edited(training=[]),
    "no vae": edited(vae=None),
    "probe of texts": edited(vae={"scaling_factor": 1, "probe": ["x"]}),
    "probe of infinity": edited(vae={"scaling_factor": 1, "probe": [math.inf]}),
    "an unknown readout": head(readout="exec"),
    "a readout that is a list": head(readout=[]),
    "more values than bins": head(readout="distribution", outputs=3, values=[1, 2]),
    "head std 0": head(std=0),
    "half an output": head(outputs=1.5),
    "absurd outputs": head(outputs=10**12),
    "absurd members": head(members=10**9),
    "a dot in a head's name": head(name="a.b"),
    "score_head missing": edited(score_head="other"),
    "a target_class missing": head(target_class="x"),
    "an architecture of nothing": edited(architecture={}),
    "an unknown argument": edited(architecture={**SPEC.architecture, "eval": "x"}),
    "absurd width": edited(architecture={**SPEC.architecture, "channels": [10**12]}),
    "far too wide": edited(architecture={**SPEC.architecture, "channels": [2**18, 2**18]}),
    "far too deep": edited(architecture={**SPEC.architecture, "blocks": 2**20}),
    "channels of texts": edited(architecture={**SPEC.architecture, "channels": ["8"]}),
    "no groups": edited(architecture={**SPEC.architecture, "norm_groups": 0}),
    "negative channels": edited(architecture={**SPEC.architecture, "in_channels": -4}),
    "image model a text": pixel("python:evil.py:score"),
    "image model without a family": pixel({}),
    "an unknown family": pixel({"family": "exec"}),
    "a decoder of other latents": edited(
        kind="pixel", architecture={"in_channels": 3, "decoder": {"latent_channels": 4}, "image_model": {}}
    ),
    "absurd labels": pixel({**TRANSFORMER, "config": {"model_type": "vit", "num_labels": 10**9}}),
    "python without a name": pixel({"family": "python"}),
}


@pytest.mark.parametrize("text", MALFORMED.values(), ids=MALFORMED)
def test_a_malformed_header_is_one_sentence(text: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        load_scorer(file_with(tmp_path / "x.safetensors", text))
    assert len(str(caught.value)) < 1000 and "\n" not in str(caught.value)
    assert [file.name for file in tmp_path.iterdir()] == ["x.safetensors"]


@pytest.mark.parametrize("image_model", REACHING.values(), ids=REACHING)
def test_nothing_that_a_header_names_runs_or_is_opened(image_model: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    evil = tmp_path / "evil.py"
    evil.write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\ndef score(pixels): return pixels.mean((1, 2, 3))\n")
    text = pixel(image_model).replace("EVIL", str(evil))
    path = file_with(tmp_path / "x.safetensors", text)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="allow_code|not read from a file|no plain name"):
        load_scorer(path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["evil.py", "x.safetensors"]


@pytest.mark.parametrize(
    "options", [{"checkpoint_path": "evil.pth"}, {"pretrained": True}, {"pretrained_cfg_overlay": {"url": "http://x"}}]
)
def test_timm_is_given_shapes_and_layers_only(options: dict, tmp_path: Path) -> None:
    architecture = {"in_channels": 4, "model": "resnet18", "model_args": options}
    with pytest.raises(UserError, match="model_args|not read from a file"):
        load_scorer(file_with(tmp_path / "x.safetensors", edited(kind="timm", architecture=architecture)))


def own_scorer(tmp_path: Path) -> tuple[Path, str]:
    """A scorer file that asks for the user's own code, and how it asks."""
    name = f"{tmp_path / 'own.py'}:score"
    (tmp_path / "own.py").write_text("def score(pixels): return pixels.mean((1, 2, 3))\n")
    settings = make_pixel_scorer.PixelScorerConfig(image_model=f"python:{name}", resolution=64)
    save_scorer(tmp_path / "own.safetensors", make_pixel_scorer.make_scorer(tiny_vae(), settings, 64))
    return tmp_path / "own.safetensors", name


def test_the_users_own_word_runs_it_and_its_hash_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path, name = own_scorer(tmp_path)
    with pytest.raises(UserError, match=r"allow_code .*own\.py:score"):
        load_scorer(path, [name.replace("score", "other")])
    assert load_scorer(path, [name])(torch.zeros(1, 4, 8, 8), torch.zeros(1)).shape == (1,)
    assert "sha256" in caplog.text


class Evil:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, ("ran",)


@pytest.mark.parametrize("name", ["head.pt", "head.pth", "head.bin", "head.ckpt"])
def test_a_pickle_is_read_as_weights_alone(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for write in (lambda path: torch.save({"weight": Evil()}, path), lambda path: Path(path).write_bytes(pickle.dumps(Evil()))):
        write(name)
        with pytest.raises(UserError, match="not a file of weights alone|cannot be read") as caught:
            read_state_dict(name)
        assert not Path("ran").exists() and "weights_only" not in str(caught.value)


def test_a_pickled_npz_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (64, 64)).save("a.png")
    np.savez("a.npz", latents=np.array([Evil()], dtype=object), original_size=np.array([64, 64]))
    picture = FilePicture(tmp_path / "a.png")
    assert NpzCache(0.18215).find(picture, FileState(1, 0), (64, 64), ("plain",)) == {}
    assert not Path("ran").exists()


def test_a_small_file_of_many_pixels_is_not_decoded(tmp_path: Path) -> None:
    Image.new("1", (13000, 13000)).save(tmp_path / "bomb.png")
    with pytest.raises(UserError, match="13000 x 13000 pixels"):
        read_picture(FilePicture(tmp_path / "bomb.png"))


def test_weights_of_another_header_are_refused(tmp_path: Path) -> None:
    save_scorer(tmp_path / "x.safetensors", build_scorer(SPEC))
    other = dataclasses.replace(SPEC, architecture={**SPEC.architecture, "in_channels": 9})
    save_file(load_file(tmp_path / "x.safetensors"), tmp_path / "x.safetensors", {FORMAT_KEY: "scorer/2", SPEC_KEY: other.to_json()})
    with pytest.raises(UserError, match="does not hold the weights"):
        load_scorer(tmp_path / "x.safetensors")
