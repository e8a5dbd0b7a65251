"""The forms in which checkpoints come: without a VAE, in shards, in fp8, pickled by a trainer, from the cache; and what they predict."""

import json
import logging
import shutil
import sys
import types
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import save_file

from library.errors import UserError
from library.models.base import DiffusionModel
from library.models.hub import choose_weights
from library.models.loading import load_model
from library.models.prediction import predicts_v
from networks.lora_metadata import LoRARecord, lora_metadata
from tests.helpers.tiny_models import assert_same_weights, save_folder, save_single_file, single_file_tensors, tiny_model


@pytest.fixture(scope="module")
def model() -> DiffusionModel:
    return tiny_model("sd1", full=True)


@pytest.fixture(scope="module")
def folder(model: DiffusionModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_folder(model, tmp_path_factory.mktemp("sd1") / "model")


def assert_loads(path: str | Path, model: DiffusionModel, **options) -> None:
    loaded = load_model(path, **options)
    assert_same_weights(loaded.unet, model.unet)
    assert_same_weights(loaded.vae, model.vae)


def test_a_file_without_a_vae_takes_that_of_vae(model: DiffusionModel, folder: Path, tmp_path: Path):
    tensors = {name: tensor for name, tensor in single_file_tensors(model).items() if not name.startswith("first_stage_model.")}
    save_file(tensors, tmp_path / "model.sft")
    assert_loads(tmp_path / "model.sft", model, vae=folder / "vae")
    with pytest.raises(UserError, match="has no VAE"):
        load_model(tmp_path / "model.sft")


class ModelCheckpoint:
    """Of pytorch_lightning.callbacks, as far as a pickle knows."""

    def __init__(self) -> None:
        self.best = 3


def test_an_original_ckpt_with_its_trainers_callbacks(model: DiffusionModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    module = types.ModuleType("pytorch_lightning.callbacks")
    monkeypatch.setattr(ModelCheckpoint, "__module__", module.__name__)
    module.ModelCheckpoint = ModelCheckpoint  # type: ignore[attr-defined]
    with monkeypatch.context() as installed:  # while it is written
        for name, value in (("pytorch_lightning", types.ModuleType("pytorch_lightning")), (module.__name__, module)):
            installed.setitem(sys.modules, name, value)
        content = {"state_dict": single_file_tensors(model), "callbacks": {ModelCheckpoint: ModelCheckpoint()}}
        torch.save(content, tmp_path / "sd-v1-4-full-ema.ckpt")
    assert_loads(tmp_path / "sd-v1-4-full-ema.ckpt", model)
    assert "pytorch_lightning" not in sys.modules


def test_comfyuis_scaled_fp8(model: DiffusionModel, tmp_path: Path):
    tensors, expected = single_file_tensors(model), {}
    for name in [name for name in tensors if name.startswith("model.diffusion_model.") and "attn" in name and name.endswith("weight")]:
        scale = tensors[name].abs().max() / 448
        stored = (tensors[name] / scale).to(torch.float8_e4m3fn)
        expected[name] = stored.float() * scale
        tensors |= {name: stored, name.replace(".weight", ".scale_weight"): scale, name.replace(".weight", ".scale_input"): torch.ones(())}
    tensors["model.diffusion_model.scaled_fp8"] = torch.empty(0, dtype=torch.float8_e4m3fn)
    save_file(tensors, tmp_path / "fp8.safetensors")
    loaded = single_file_tensors(load_model(tmp_path / "fp8.safetensors"))
    assert expected and all(torch.equal(loaded[name], tensor) for name, tensor in expected.items())


def test_weights_are_chosen_whole_and_best_first():
    def chosen(*names: str) -> tuple[str, ...] | None:
        weights = choose_weights(names)
        return None if weights is None else weights.files

    name = "diffusion_pytorch_model"
    shards = [f"{name}.fp16-0000{number}-of-00002.safetensors" for number in (1, 2)]
    old_shards = [f"{name}-0000{number}-of-00002.fp16.safetensors" for number in (1, 2)]
    assert chosen(*shards, f"{name}.non_ema.safetensors", "config.json") == tuple(shards)
    assert chosen(*old_shards) == tuple(old_shards) and chosen(shards[0]) is None
    assert chosen(f"{name}.non_ema.safetensors", f"{name}.bin") == (f"{name}.bin",)
    assert chosen("model.safetensors", "pytorch_model.bin", "model.fp16.safetensors", "model.onnx") == ("model.safetensors",)
    assert chosen("pytorch_model.non_ema.bin") == ("pytorch_model.non_ema.bin",)
    assert chosen("flax_model.msgpack") is None


def test_folders_of_fp16_shards_and_of_non_ema_weights(model: DiffusionModel, folder: Path, tmp_path: Path):
    copy = shutil.copytree(folder, tmp_path / "model")
    shutil.rmtree(copy / "unet")
    model.unet.save_pretrained(copy / "unet", variant="fp16", max_shard_size="1MB")
    assert len(list((copy / "unet").glob("*fp16-*-of-*.safetensors"))) > 1
    for part in ("vae", "text_encoder"):
        (file,) = (copy / part).glob("*.safetensors")
        file.rename(file.with_name(file.name.replace(".safetensors", ".non_ema.safetensors")))
    assert_loads(copy, model)


@pytest.mark.parametrize("pipeline", ["StableDiffusionImg2ImgPipeline", "StableDiffusionPAGPipeline", "LatentConsistencyModelPipeline"])
def test_other_pipelines_of_the_same_parts(pipeline: str, model: DiffusionModel, folder: Path, tmp_path: Path):
    copy = shutil.copytree(folder, tmp_path / "model")
    index = json.loads((copy / "model_index.json").read_text()) | {"_class_name": pipeline}
    (copy / "model_index.json").write_text(json.dumps(index))
    assert_loads(copy, model)
    (copy / "model_index.json").write_text(json.dumps(index | {"text_encoder": ["transformers", "T5EncoderModel"]}))
    with pytest.raises(UserError, match=f"holds a {pipeline}; the models that can be trained are"):
        load_model(copy)


def test_a_latent_consistency_pipeline_over_sdxls_parts_is_sdxl(tmp_path: Path):
    made = save_folder(tiny_model("sdxl"), tmp_path / "model")
    index = json.loads((made / "model_index.json").read_text()) | {"_class_name": "LatentConsistencyModelPipeline"}
    (made / "model_index.json").write_text(json.dumps(index))
    assert load_model(made).spec.family == "sdxl"


def test_a_pipeline_without_a_unet_is_refused_for_what_it_is(tmp_path: Path):
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline", "transformer": ["diffusers", "X"]}))
    with pytest.raises(UserError, match="holds a FluxPipeline"):
        load_model(tmp_path)


def test_a_hub_id_is_taken_from_the_local_cache(model: DiffusionModel, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--owner--name"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("abc")
    snapshot = shutil.copytree(folder, repository / "snapshots" / "abc")
    assert_loads("owner/name", model)
    assert load_model("owner/name").spec.name == "name"
    (snapshot / "vae" / "diffusion_pytorch_model.safetensors").unlink()  # a download that was broken off
    with pytest.raises(UserError, match="cannot be fetched"):
        load_model("owner/name")


NORM = "model.diffusion_model.output_blocks.11.1.transformer_blocks.0.norm1.bias"


@pytest.mark.parametrize(
    ("name", "family", "tensors", "metadata", "is_v", "level"),
    [
        ("a", "sdxl", {"v_pred": torch.empty(0)}, {}, True, logging.INFO),
        ("a", "sdxl", {}, {}, False, logging.INFO),
        *(("a", "sdxl", {}, {"modelspec.prediction_type": value}, True, logging.INFO) for value in ("v", "v_prediction", "V-Prediction")),
        ("a", "sd2", {}, {"modelspec.architecture": "stable-diffusion-v2-768-v"}, True, logging.INFO),
        ("a", "sd2", {NORM: torch.tensor([-0.2, 0.2])}, {}, True, logging.INFO),
        ("a", "sd2", {NORM: torch.tensor([-0.05, 0.05])}, {}, False, logging.INFO),
        ("noobaiXLNAIXL_vPred10Version.safetensors", "sdxl", {}, {}, True, logging.WARNING),
        ("v2-1_768-v-ema.safetensors", "sd1", {}, {}, True, logging.WARNING),
        ("mix_vpred.safetensors", "sdxl", {}, {"modelspec.prediction_type": "epsilon"}, False, logging.WARNING),
        ("v-predator.safetensors", "sd1", {}, {}, False, logging.INFO),
    ],
)
def test_what_a_file_predicts_is_never_decided_in_silence(name, family, tensors, metadata, is_v, level, caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.INFO):
        assert predicts_v(tensors, metadata, family, name) is is_v
    (record,) = caplog.records
    assert record.levelno == level and name in record.getMessage()
    assert "v_parameterization" in record.getMessage(), "how to decide otherwise is always said"


@pytest.mark.parametrize(("tensor", "what"), [("edm_mean", "Playground v2.5"), ("edm_vpred.sigma_max", "a CosXL model")])
def test_other_noise_schedules_are_refused_by_name(tensor: str, what: str, tmp_path: Path):
    save_file({tensor: torch.zeros(4)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=what):
        load_model(tmp_path / "model.safetensors")


def test_the_mark_of_v_stays_without_metadata():
    record = LoRARecord(output_name="a", network_dim=4, network_alpha=4, started_at=0)
    kept = lora_metadata(tiny_model("sdxl_v").spec, record, no_metadata=True)
    assert kept["modelspec.prediction_type"] == "v"


def test_a_single_file_named_vpred_is_taken_for_one(model: DiffusionModel, tmp_path: Path):
    path = save_single_file(model, tmp_path / "my_vPred.safetensors")
    assert load_model(path).spec.prediction_type == "v_prediction"
    assert load_model(path, v_parameterization=False).spec.prediction_type == "epsilon"
