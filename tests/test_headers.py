"""What files say of a model before it is loaded."""

import json
from pathlib import Path

import pytest

from library.errors import UserError
from library.models.headers import latent_space
from library.models.loading import load_model
from library.models.vae import LatentSpace
from tests.helpers.tiny_leco_run import make_workplace
from tests.helpers.tiny_models import save_single_file


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_the_latents_of_a_folder_and_of_a_file_are_those_of_the_loaded_model(family: str, tmp_path: Path) -> None:
    folder = make_workplace(tmp_path, family) / "model"
    model = load_model(folder)
    space = latent_space(folder)
    assert space == LatentSpace.of(model.vae) and model.vae_fingerprint().may_be_of(space)
    save_single_file(model, tmp_path / "one.safetensors")
    assert latent_space(tmp_path / "one.safetensors") == space
    for weights in folder.rglob("*.safetensors"):
        weights.write_bytes(b"")
    assert latent_space(folder) == space


def test_where_only_loading_tells_nothing_is_said(tmp_path: Path) -> None:
    (tmp_path / "model.ckpt").write_bytes(b"")
    (tmp_path / "model.safetensors").write_bytes(b"")
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "config.json").write_text('{"batch_norm_eps": 1e-4}', encoding="utf-8")  # as FLUX.2's
    assert [latent_space(tmp_path / name) for name in ("model.ckpt", "model.safetensors", "", "nowhere.safetensors")] == [None] * 4


@pytest.mark.parametrize("factor", ["0.18215", None, float("nan")])
def test_a_scaling_factor_that_is_no_number_is_left_to_loading_which_refuses_it(factor: object, tmp_path: Path) -> None:
    folder = make_workplace(tmp_path, "sd1") / "model"
    config = folder / "vae" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text(encoding="utf-8")) | {"scaling_factor": factor}), encoding="utf-8")
    assert latent_space(folder) is None
    with pytest.raises(UserError, match="scaling_factor or a shift that is no finite number"):
        load_model(folder)
