"""What a LoRA file says about itself: the keys that A1111, Forge, ComfyUI and sd-scripts read, and the card beside the file."""

import datetime
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import safetensors.torch
from torch import Tensor

from library.atomic_files import atomic_write_text

# What sd-scripts keeps with --no_metadata, and the one key by which Forge knows an SD1 file.
MINIMUM_KEYS = (
    "ss_v2",
    "ss_base_model_version",
    "ss_network_module",
    "ss_network_dim",
    "ss_network_alpha",
    "ss_network_args",
    "modelspec.architecture",
)


class BaseModel(Protocol):
    """What is said of the model that a LoRA was trained on: library.models.base.ModelSpec is one."""

    @property
    def prediction_type(self) -> str: ...
    @property
    def resolution(self) -> int: ...
    @property
    def base_model_version(self) -> str: ...
    @property
    def architecture(self) -> str: ...
    @property
    def implementation(self) -> str: ...
    @property
    def name(self) -> str: ...


@dataclass(frozen=True, kw_only=True)
class LoRARecord:
    """How a LoRA was made.

    Attributes:
        network_dim, network_alpha, network_args, network_module: what the network was created with.
        started_at, finished_at: unix time in seconds.
        steps: updates made.
        resolution: width and height in pixels; None is the model's native square.
        modelspec: more of https://github.com/Stability-AI/ModelSpec, without the prefix: title, author, description, usage_hint ...
        training: more `ss_` keys, with or without the prefix (learning_rate, optimizer, seed, clip_skip ...). None is left out, a dict
            or list becomes JSON, the rest its str(): A1111 compares ss_v2 with "True", and fails on ss_dataset_dirs = "None".
    """

    output_name: str
    network_dim: int
    network_alpha: float
    network_args: Mapping[str, str] = field(default_factory=dict)
    network_module: str = "networks.lora"
    started_at: float
    finished_at: float | None = None
    steps: int | None = None
    resolution: tuple[int, int] | None = None
    modelspec: Mapping[str, str | None] = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)


def lora_metadata(spec: BaseModel, record: LoRARecord, *, no_metadata: bool = False) -> dict[str, str]:
    """The header of a LoRA file, all but the hashes, which LoRANetwork.save_weights adds.

    Args:
        spec: the base model.
        no_metadata: keep MINIMUM_KEYS only, without which A1111 and Forge hide the file or take it for another family's.
    """
    width, height = record.resolution or (spec.resolution, spec.resolution)
    date = datetime.datetime.fromtimestamp(int(record.started_at if record.finished_at is None else record.finished_at), datetime.UTC)
    values: dict[str, Any] = {
        "ss_v2": spec.base_model_version.startswith("sd_v2"),
        "ss_base_model_version": spec.base_model_version,
        "ss_network_module": record.network_module,
        "ss_network_dim": record.network_dim,
        "ss_network_alpha": record.network_alpha,
        "ss_network_args": dict(record.network_args),
        "ss_output_name": record.output_name,
        "ss_sd_model_name": spec.name,
        "ss_training_started_at": float(record.started_at),
        "ss_training_finished_at": None if record.finished_at is None else float(record.finished_at),
        "ss_steps": record.steps,
        "ss_resolution": f"({width}, {height})",
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": spec.architecture,
        "modelspec.implementation": spec.implementation,
        "modelspec.title": record.output_name,
        "modelspec.resolution": f"{width}x{height}",
        "modelspec.date": date.isoformat(),
        "modelspec.prediction_type": "v" if spec.prediction_type == "v_prediction" else spec.prediction_type,
    }
    values.update({key if key.startswith("ss_") else f"ss_{key}": value for key, value in record.training.items()})
    values.update({f"modelspec.{key}": value for key, value in record.modelspec.items() if value is not None})
    if no_metadata:
        values = {key: values[key] for key in MINIMUM_KEYS}
    return {key: _as_text(value) for key, value in values.items() if value is not None}


def hash_metadata(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, str]:
    """sshs_model_hash and sshs_legacy_hash of a file with these tensors (contiguous, on the CPU), as A1111 and AddNet define them.

    The model hash is the sha256 of all bytes after the header, so editing metadata leaves it valid. The legacy hash is that of
    64 KiB from 1 MiB on, of the file serialised with its `ss_` keys only.
    """
    content = safetensors.torch.save(dict(tensors), {key: value for key, value in metadata.items() if key.startswith("ss_")})
    header_length = int.from_bytes(content[:8], "little")
    return {
        "sshs_model_hash": hashlib.sha256(memoryview(content)[8 + header_length :]).hexdigest(),
        "sshs_legacy_hash": hashlib.sha256(content[0x100000:0x110000]).hexdigest()[:8],
    }


def write_sidecar(lora_file: str | Path, spec: BaseModel, *, preferred_weight: float, description: str = "", notes: str = "") -> Path:
    """Write NAME.json beside NAME.safetensors: A1111 and Forge show it as the file's card and insert the weight on a click."""
    path = Path(lora_file).with_suffix(".json")
    card = {
        "description": description,
        "sd version": _card_version(spec),
        "activation text": "",
        "preferred weight": preferred_weight,
        "notes": notes,
    }
    atomic_write_text(path, json.dumps(card, indent=2, ensure_ascii=False) + "\n")
    return path


def _card_version(spec: BaseModel) -> str:
    """A1111's names of the models that a card is shown for, told as A1111 tells them of a file without a card."""
    version = spec.base_model_version
    return "SDXL" if version.startswith("sdxl") else "SD2" if version.startswith("sd_v2") else "SD1"


def _as_text(value: Any) -> str:
    return json.dumps(value) if isinstance(value, (dict, list)) else str(value)
