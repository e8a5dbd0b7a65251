"""What A1111, Forge and sd-scripts read in a LoRA's header (the keys and rules were observed by running their own loaders)."""

import datetime
import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch

from networks.lora_metadata import MINIMUM_KEYS, Card, LoRARecord, hash_metadata, lora_metadata, model_file_hashes, write_cards


@dataclass(frozen=True, kw_only=True)
class Model:
    prediction_type: str = "epsilon"
    resolution: int = 512
    base_model_version: str = "sd_v1"
    architecture: str = "stable-diffusion-v1/lora"
    implementation: str = "diffusers"
    name: str = "base.safetensors"


SD1 = Model()
SD2_V = Model(
    prediction_type="v_prediction",
    resolution=768,
    base_model_version="sd_v2_v",
    architecture="stable-diffusion-v2-768-v/lora",
)
SDXL = Model(
    resolution=1024,
    base_model_version="sdxl_base_v1-0",
    architecture="stable-diffusion-xl-v1-base/lora",
    implementation="https://github.com/Stability-AI/generative-models",
)


def _metadata(spec: Model, *, no_metadata: bool = False, **changes) -> dict[str, str]:
    given = {"output_name": "slider", "network_dim": 4, "network_alpha": 1.0, "started_at": 1.7e9, "finished_at": 1.7e9 + 60, "steps": 100}
    return lora_metadata(spec, LoRARecord(**(given | changes)), no_metadata=no_metadata)


def _a1111_version(metadata: dict[str, str]) -> str:
    if metadata.get("ss_base_model_version", "").startswith("sdxl_"):
        return "SDXL"
    return "SD2" if metadata.get("ss_v2") == "True" else "SD1"


def _forge_version(metadata: dict[str, str]) -> str:
    architecture = metadata.get("modelspec.architecture")
    if architecture == "stable-diffusion-xl-v1-base/lora" or metadata.get("ss_base_model_version", "").startswith("sdxl_"):
        return "SDXL"
    if metadata.get("ss_v2") == "True":
        return "SD2"
    return "SD1" if architecture == "stable-diffusion-v1/lora" else "Unknown"


@pytest.mark.parametrize("no_metadata", [False, True])
@pytest.mark.parametrize(("spec", "version"), [(SD1, "SD1"), (SD2_V, "SD2"), (SDXL, "SDXL")])
def test_webuis_recognise_the_family(spec: Model, version: str, no_metadata: bool) -> None:
    metadata = _metadata(spec, no_metadata=no_metadata)
    assert _a1111_version(metadata) == version
    assert _forge_version(metadata) == version


def test_values_are_the_strings_that_clients_parse() -> None:
    metadata = _metadata(
        SD2_V,
        network_args={"conv_dim": "2", "conv_alpha": "1"},
        resolution=(640, 512),
        training={"learning_rate": 1e-4, "ss_optimizer": "torch.optim.AdamW", "clip_skip": None, "dataset_dirs": None, "prompts": ["a"]},
        modelspec={"title": "Slider", "author": None, "usage_hint": "-1 to 1"},
    )
    assert all(type(key) is str and type(value) is str for key, value in metadata.items())
    assert metadata["ss_v2"] == "True"
    assert metadata["ss_base_model_version"] == "sd_v2_v"
    assert metadata["modelspec.prediction_type"] == "v"
    assert metadata["modelspec.resolution"] == "640x512"
    assert metadata["ss_resolution"] == "(640, 512)"
    assert json.loads(metadata["ss_network_args"]) == {"conv_dim": "2", "conv_alpha": "1"}
    assert float(metadata["ss_training_started_at"]) == 1.7e9
    assert datetime.datetime.fromisoformat(metadata["modelspec.date"]).timestamp() == 1.7e9 + 60
    assert metadata["ss_learning_rate"] == "0.0001"
    assert metadata["ss_optimizer"] == "torch.optim.AdamW"
    assert json.loads(metadata["ss_prompts"]) == ["a"]
    assert metadata["modelspec.title"] == "Slider"
    assert metadata["modelspec.usage_hint"] == "-1 to 1"
    assert not {"ss_clip_skip", "ss_dataset_dirs", "modelspec.author"} & metadata.keys()
    assert "None" not in metadata.values()


def test_native_resolution_is_the_default() -> None:
    assert _metadata(SDXL)["modelspec.resolution"] == "1024x1024"


def test_no_metadata_keeps_what_the_file_cannot_do_without() -> None:
    metadata = _metadata(replace(SD1, name="secret"), no_metadata=True, training={"training_comment": "secret"})
    assert set(metadata) == set(MINIMUM_KEYS)
    assert "secret" not in "".join(metadata.values())


def test_hashes_are_those_that_clients_compute(tmp_path: Path) -> None:
    tensors = {
        "lora_unet_x.lora_down.weight": torch.randn(600, 600, generator=torch.Generator().manual_seed(0)),
        "lora_unet_x.alpha": torch.tensor(1.0),
    }
    metadata = _metadata(SD1)
    hashes = hash_metadata(tensors, metadata)
    safetensors.torch.save_file(tensors, tmp_path / "x.safetensors", metadata | hashes)
    content = (tmp_path / "x.safetensors").read_bytes()
    # A1111 (network_on_disk) and Forge: sha256 of what follows the header.
    assert hashes["sshs_model_hash"] == hashlib.sha256(content[8 + int.from_bytes(content[:8], "little") :]).hexdigest()
    assert hashes["modelspec.hash_sha256"] == f"0x{hashes['sshs_model_hash']}"
    assert "modelspec.hash_sha256" not in hash_metadata(tensors, _metadata(SD1, no_metadata=True))
    # AddNet: from 1 MiB on, of the file with its ss_ keys only.
    own = {key: value for key, value in metadata.items() if key.startswith("ss_")}
    safetensors.torch.save_file(tensors, tmp_path / "y.safetensors", own)
    with (tmp_path / "y.safetensors").open("rb") as file:
        file.seek(0x100000)
        assert hashes["sshs_legacy_hash"] == hashlib.sha256(file.read(0x10000)).hexdigest()[:8]


@pytest.mark.parametrize(("spec", "version", "base"), [(SD1, "SD1", "SD 1.5"), (SD2_V, "SD2", "SD 2.1"), (SDXL, "SDXL", "SDXL 1.0")])
def test_cards_are_those_of_a1111_and_of_lora_manager(tmp_path: Path, spec: Model, version: str, base: str) -> None:
    file = tmp_path / "my.slider.safetensors"
    file.write_bytes(b"weights")
    webui, manager = write_cards(file, spec, Card(hint="\u00e4", notes="n", preferred_weight=0.8, usable=(-2.0, 0.8)))
    assert (webui.name, manager.name) == ("my.slider.json", "my.slider.metadata.json")
    assert json.loads(webui.read_text(encoding="utf-8")) == {
        "sd version": version,
        "preferred weight": 0.8,
        "description": "\u00e4",
        "notes": "n",
        "activation text": "",
    }
    card = json.loads(manager.read_text(encoding="utf-8"))
    assert json.loads(card["usage_tips"]) == {"strength": 0.8, "strength_min": -2.0, "strength_max": 0.8}
    assert card["base_model"] == base and card["sha256"] == hashlib.sha256(b"weights").hexdigest() and card["size"] == 7
    required = {"file_name", "model_name", "file_path", "size", "modified", "sha256", "base_model", "preview_url"}
    assert required <= card.keys() and str(tmp_path) not in manager.read_text(encoding="utf-8")


def test_a_card_of_a_slider_that_is_usable_nowhere_never_says_1(tmp_path: Path) -> None:
    """A1111 and Forge take a preferred weight of 0 for "not set", and a click then inserts their default, 1."""
    (tmp_path / "x.safetensors").touch()
    webui, manager = write_cards(tmp_path / "x.safetensors", SD1, Card(preferred_weight=0.0, usable=(0.0, 0.0)))
    assert json.loads(webui.read_text(encoding="utf-8"))["preferred weight"] == 0.01
    assert json.loads(json.loads(manager.read_text(encoding="utf-8"))["usage_tips"])["strength"] == 0


def test_hashes_of_the_checkpoint_are_those_of_a1111(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    content = bytes(range(256)) * 4352  # 64 KiB beyond 1 MiB
    file.write_bytes(content)
    old = hashlib.sha256(content[0x100000:0x110000]).hexdigest()[:8]
    assert model_file_hashes(file) == {"sd_model_hash": old, "new_sd_model_hash": hashlib.sha256(content).hexdigest()}
    assert model_file_hashes(tmp_path) == model_file_hashes(tmp_path / "missing") == {}
