"""Headers of scorer files, as they are and changed."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from library.models.vae import VaeFingerprint
from library.scorers.base import ScorerSpec
from library.scorers.io import FORMAT_KEY, SPEC_KEY

SPEC = ScorerSpec(
    kind="latent_resnet",
    architecture={"in_channels": 4, "channels": [8, 16], "blocks": 1, "norm_groups": 4},
    vae=VaeFingerprint(scaling_factor=0.18215, probe=(0.1, -0.4, 0.9)),
)
HEADER = json.loads(SPEC.to_json())
TRANSFORMER = {"family": "backbone", "preprocessing": {"mean": [0.5] * 3, "std": [0.5] * 3}}


def file_with(path: Path, text: str) -> Path:
    """A scorer file with this text for its description."""
    save_file({"x": torch.zeros(2)}, path, {FORMAT_KEY: "scorer/2", SPEC_KEY: text})
    return path


def edited(**changes: Any) -> str:
    return json.dumps({**HEADER, **changes})


def head(**changes: Any) -> str:
    return edited(heads=[{**HEADER["heads"][0], **changes}])


def pixel(image_model: Any) -> str:
    decoder = {"_class_name": "AutoencoderTiny", "latent_channels": 4}
    return edited(kind="pixel", architecture={"in_channels": 4, "decoder": decoder, "image_model": image_model})


# Image models that would run code, or open or fetch something.
REACHING = {
    "python": {"family": "python", "name": "EVIL:score", "preprocessing": TRANSFORMER["preprocessing"]},
    "a module": {"family": "python", "name": "os:system", "preprocessing": TRANSFORMER["preprocessing"]},
    "torchscript": {"family": "torchscript", "size_in_bytes": 9},
    "pyiqa": {"family": "pyiqa", "metric": "musiq"},
    "imscore": {"family": "imscore", "name": "x.Y", "source": "evil/repository", "class_index": 0},
    "auto_map": {**TRANSFORMER, "config": {"model_type": "vit", "auto_map": {"AutoModel": "evil--x.Y"}}},
    "another's backbone": {**TRANSFORMER, "config": {"model_type": "vit", "backbone": "evil", "use_pretrained_backbone": True}},
    "timm within transformers": {**TRANSFORMER, "config": {"model_type": "timm_wrapper", "architecture": "resnet18"}},
    "a kernel": {**TRANSFORMER, "config": {"model_type": "vit", "_attn_implementation": "evil/kernel"}},
    "a kernel, spelled out": {**TRANSFORMER, "config": {"model_type": "vit", "attn_implementation": "evil"}},
    "a path": {**TRANSFORMER, "config": {"model_type": "vit", "hidden_act": "/etc/passwd"}},
    "timm from the hub": {"family": "timm", "name": "hf-hub:evil/model", "classes": 2, "class_index": 0, "score": "features"},
    "timm from a folder": {"family": "timm", "name": "local-dir:evil", "classes": 2, "class_index": 0, "score": "features"},
    "timm with a checkpoint": {"family": "timm", "name": "resnet18", "model_args": {"checkpoint_path": "evil.pth"}},
    "timm with an overlay": {"family": "timm", "name": "resnet18", "model_args": {"pretrained_cfg_overlay": {"file": "evil.pth"}}},
}
