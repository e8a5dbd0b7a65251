"""Scorer files: what is said of those that do not fit. That a scorer survives its file is in test_scorers.py."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from library.errors import UserError
from library.models.vae import VaeFingerprint
from library.scorers.base import BackboneScorer, ScorerSpec, build_scorer
from library.scorers.io import FORMAT_KEY, SPEC_KEY, load_backbone_weights, load_scorer, save_backbone, save_scorer
from library.scorers.kinds.latent_resnet import LatentResNet
from tests.helpers.unet_encoders import make_scorer

SPEC = ScorerSpec(
    kind="latent_resnet",
    architecture={"in_channels": 4, "channels": [8, 16], "blocks": 1, "norm_groups": 4},
    vae=VaeFingerprint(scaling_factor=0.18215, probe=(0.1, -0.4, 0.9)),
)


def written(path: Path, **header: str) -> Path:
    """A scorer's file with another header."""
    save_scorer(path, build_scorer(SPEC))
    save_file(load_file(path), path, {FORMAT_KEY: "scorer/2", SPEC_KEY: SPEC.to_json(), **header})
    return path


def test_a_scorer_in_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written(tmp_path / "mine.safetensors")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load_scorer("~/mine.safetensors").name == "mine"


@pytest.mark.parametrize("file_format", ["scorer/1", "backbone/1"])
def test_a_file_of_an_older_version_is_to_be_trained_again(file_format: str, tmp_path: Path) -> None:
    path = written(tmp_path / "old.safetensors", **{FORMAT_KEY: file_format})
    with pytest.raises(UserError, match=rf"older version \({file_format}.*train it again"):
        load_scorer(path)
    with pytest.raises(UserError, match="train it again"):
        load_backbone_weights(path, build_scorer(SPEC).backbone, SPEC)


def test_another_backbone_is_told_by_what_differs(tmp_path: Path) -> None:
    path = written(tmp_path / "scorer.safetensors")
    wide = dataclasses.replace(SPEC, architecture={**SPEC.architecture, "channels": [16, 32], "long": "word " * 1000})
    with pytest.raises(UserError, match=r"channels is \[8, 16\] there and \[16, 32\] here") as caught:
        load_backbone_weights(path, build_scorer(SPEC).backbone, wide)
    assert "blocks" not in str(caught.value) and len(str(caught.value)) < 500
    with pytest.raises(UserError, match="a latent_resnet there, a latent_vit here"):
        load_backbone_weights(path, build_scorer(SPEC).backbone, dataclasses.replace(SPEC, kind="latent_vit"))


def test_a_backbone_that_lacks_weights_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path / "scorer.safetensors")
    tensors = load_file(path)
    del tensors["backbone.stem.weight"]
    save_file(tensors, path, {FORMAT_KEY: "scorer/2", SPEC_KEY: SPEC.to_json()})
    with pytest.raises(UserError, match="does not hold the weights"):
        load_backbone_weights(path, build_scorer(SPEC).backbone, SPEC)


def test_a_backbone_says_in_which_dtype_it_is_stored(tmp_path: Path) -> None:
    class Half(LatentResNet):
        def saved_state(self) -> dict[str, Tensor]:
            return {name: tensor.half() for name, tensor in self.state_dict().items()}

    backbone = Half(**SPEC.architecture)
    scorer = BackboneScorer(SPEC, backbone)
    save_scorer(tmp_path / "scorer.safetensors", scorer)
    save_backbone(tmp_path / "backbone.safetensors", backbone, SPEC)
    stored = load_file(tmp_path / "scorer.safetensors")
    assert {tensor.dtype for name, tensor in stored.items() if name.startswith("backbone.")} == {torch.float16}
    assert {tensor.dtype for name, tensor in stored.items() if name.startswith("heads.")} == {torch.float32}
    assert {tensor.dtype for tensor in load_file(tmp_path / "backbone.safetensors").values()} == {torch.float16}
    loaded = load_scorer(tmp_path / "scorer.safetensors")
    for name, parameter in loaded.state_dict().items():
        assert torch.equal(parameter, stored[name].float()), name


@pytest.mark.parametrize(
    ("removed", "says"),
    [
        ({"pool": "attention"}, "cannot be built .*'pool'.*train it again"),
        ({"taps": ["down_blocks.0"]}, "taps is .'down_blocks.0'.; it can be all or first_third"),
    ],
)
def test_a_scorer_of_an_option_that_is_no_more_is_named(removed: dict[str, Any], says: str, tmp_path: Path) -> None:
    scorer, path = make_scorer(), tmp_path / "old.safetensors"
    save_scorer(path, scorer)
    assert load_scorer(path).spec == scorer.spec
    header = dataclasses.replace(scorer.spec, architecture={**scorer.spec.architecture, **removed}).to_json()
    save_file(load_file(path), path, {FORMAT_KEY: "scorer/2", SPEC_KEY: header})
    with pytest.raises(UserError, match=f"old.safetensors.*{says}"):
        load_scorer(path)
