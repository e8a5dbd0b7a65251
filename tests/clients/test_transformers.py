"""ComfyUI's own loader code on LoRA files for Z-Image and Anima: every key is taken at full size, and changes of small models are right."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from library.models.registry import FAMILIES
from networks.lora import create_network, create_network_from_weights
from tests.helpers.tiny_flow_models import PIPELINES, original_names

FOLDER = os.environ.get("LECO_SCORE_COMFYUI")
CLASSES = {"z_image": "Lumina2", "anima": "Anima"}


def taken_by_comfyui(folder: Path, kind: str, transformer: Any, tensors: dict[str, torch.Tensor], values: bool) -> list[str]:
    """The keys of folder/lora.safetensors that ComfyUI leaves; what it adds stands in folder/changes.safetensors."""
    config = transformer.config
    about = {"class": CLASSES[kind], "values": values, "shapes": {name: list(tensor.shape) for name, tensor in tensors.items()}}
    about["unet_config"] = {"n_layers": config["n_layers"], "dim": config["dim"], "n_refiner_layers": 2} if kind == "z_image" else {}
    (folder / "job.json").write_text(json.dumps(about), encoding="utf-8")
    python = os.environ.get("LECO_SCORE_CLIENTS_PYTHON", sys.executable)
    paths = [Path(str(FOLDER)).resolve(), *(folder / name for name in ("job.json", "lora.safetensors", "changes.safetensors"))]
    script = Path(__file__).with_name("comfy_transformers.py")
    done = subprocess.run([python, str(script), *map(str, paths)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.skipif(not FOLDER, reason="LECO_SCORE_COMFYUI names no folder")
@pytest.mark.parametrize("kind", CLASSES)
def test_comfyui_takes_every_key_at_full_size(kind, tmp_path):
    import diffusers

    family = FAMILIES[kind]
    with torch.device("meta"):
        transformer = getattr(diffusers, family.denoiser_class)(**family.config["transformer"])
    create_network(1.0, 1, 1.0, None, None, transformer).save_weights(tmp_path / "lora.safetensors")
    pipeline: Any = PIPELINES[kind]()
    pipeline.transformer = transformer
    assert taken_by_comfyui(tmp_path, kind, transformer, original_names(kind, pipeline), values=False) == []


@pytest.mark.slow
@pytest.mark.skipif(not FOLDER, reason="LECO_SCORE_COMFYUI names no folder")
@pytest.mark.parametrize("kind", CLASSES)
@torch.no_grad()
def test_comfyui_adds_what_we_mean(kind, tmp_path):
    """To weights of zeros; a millionth of the largest change."""
    pipeline: Any = PIPELINES[kind]()
    transformer = pipeline.transformer
    for tensor in transformer.state_dict().values():
        tensor.zero_()
    network = create_network(1.0, 4, 2.0, None, None, transformer)
    for lora in network.loras:
        nn.init.normal_(lora.lora_up.weight, std=0.2)
    network.save_weights(tmp_path / "lora.safetensors", torch.float16)
    assert taken_by_comfyui(tmp_path, kind, transformer, original_names(kind, pipeline), values=True) == []
    merged, _ = create_network_from_weights(1.0, tmp_path / "lora.safetensors", None, None, transformer, for_inference=True)
    merged.merge_to(None, transformer)
    expected = {name: tensor for name, tensor in original_names(kind, pipeline).items() if tensor.any() and "llm_adapter" not in name}
    found = load_file(tmp_path / "changes.safetensors")
    assert found.keys() == expected.keys()
    peak = max(tensor.abs().max().item() for tensor in expected.values())
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, atol=1e-6 * peak, rtol=0)
