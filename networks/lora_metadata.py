"""What a LoRA file says about itself: the keys that A1111, Forge, ComfyUI and sd-scripts read, and the cards beside the file."""

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
        "modelspec.prediction_type": {"v_prediction": "v", "epsilon": "epsilon"}.get(spec.prediction_type),
    }
    values.update({key if key.startswith("ss_") else f"ss_{key}": value for key, value in record.training.items()})
    values.update({f"modelspec.{key}": value for key, value in record.modelspec.items() if value is not None})
    if no_metadata:
        mark_of_v = ("modelspec.prediction_type",) if spec.prediction_type == "v_prediction" else ()  # SDXL's other keys do not say it
        values = {key: values[key] for key in (*MINIMUM_KEYS, *mark_of_v)}
    return {key: _as_text(value) for key, value in values.items() if value is not None}


def hash_metadata(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, str]:
    """The hashes of a file with these tensors (contiguous, on the CPU), as A1111, AddNet and ModelSpec define them.

    sshs_model_hash is the sha256 of all bytes after the header, so editing metadata leaves it valid; modelspec.hash_sha256 is the same,
    where there are `modelspec.` keys of this kind. sshs_legacy_hash is that of 64 KiB from 1 MiB on, of the file serialised with its `ss_`
    keys only.
    """
    content = safetensors.torch.save(dict(tensors), {key: value for key, value in metadata.items() if key.startswith("ss_")})
    header_length = int.from_bytes(content[:8], "little")
    own = hashlib.sha256(memoryview(content)[8 + header_length :]).hexdigest()
    hashes = {"sshs_model_hash": own, "sshs_legacy_hash": hashlib.sha256(content[0x100000:0x110000]).hexdigest()[:8]}
    return hashes | ({"modelspec.hash_sha256": f"0x{own}"} if "modelspec.title" in metadata else {})


def model_file_hashes(file: Path) -> dict[str, str]:
    """ss_sd_model_hash and ss_new_sd_model_hash of a checkpoint: A1111's old hash (of 64 KiB from 1 MiB on) and the sha256 of it all.

    Empty where there is no such file: a folder has no hash.
    """
    try:
        with file.open("rb") as content:
            whole = hashlib.file_digest(content, "sha256").hexdigest()
            content.seek(0x100000)
            return {"sd_model_hash": hashlib.sha256(content.read(0x10000)).hexdigest()[:8], "new_sd_model_hash": whole}
    except OSError:
        return {}


@dataclass(frozen=True, kw_only=True)
class Card:
    """What a person should see of a LoRA before using it.

    Attributes:
        hint: which weights to use, in a few words.
        notes: all that is known, of any length.
        preferred_weight: what a click inserts; 0 where no weight can be recommended.
        usable: the lowest and the highest weight that may be used; None where it is not known.
    """

    hint: str = ""
    notes: str = ""
    preferred_weight: float = 1.0
    usable: tuple[float, float] | None = None


def write_cards(lora_file: str | Path, spec: BaseModel, card: Card, folder: Path | None = None) -> list[Path]:
    """Write NAME.json, which A1111 and Forge show and SD.Next reads, and NAME.metadata.json, LoRA Manager's; None: beside the LoRA."""
    file = Path(lora_file)
    webui = {
        "description": card.hint,
        "sd version": _family(spec, "SD1", "SD2", "SDXL"),
        "activation text": "",
        "preferred weight": round(card.preferred_weight, 2) or 0.01,  # 0 is "not set" there, and a click then inserts 1
        "notes": card.notes,
    }
    tips = {"strength": round(card.preferred_weight, 2)}
    if card.usable is not None:
        tips |= {"strength_min": round(card.usable[0], 2), "strength_max": round(card.usable[1], 2)}
    # It leaves out a LoRA whose card lacks one of the first eight; where the file is, it sees for itself.
    manager = {
        "file_name": file.stem,
        "model_name": file.stem,
        "file_path": file.name,
        "size": file.stat().st_size,
        "modified": file.stat().st_mtime,
        "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
        "base_model": _family(
            spec, "SD 1.5", "SD 2.1", "SDXL 1.0", z_image="ZImageTurbo" if "turbo" in spec.name.lower() else "ZImageBase", anima="Anima"
        ),
        "preview_url": f"{file.stem}.preview.png",
        "usage_tips": json.dumps(tips),
        "modelDescription": card.hint,
        "notes": card.notes,
        "from_civitai": False,
    }
    paths = [(folder or file.parent) / f"{file.stem}{ending}" for ending in (".json", ".metadata.json")]
    for path, content in zip(paths, (webui, manager), strict=True):
        atomic_write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    return paths


def _family(spec: BaseModel, sd1: str, sd2: str, sdxl: str, **others: str) -> str:
    """One of these names, as A1111 recognises the family of a file without a card; `others` by ss_base_model_version."""
    version = spec.base_model_version
    if spec.prediction_type == "flow":
        return others.get(version, "Unknown")
    return sdxl if version.startswith("sdxl") else sd2 if version.startswith("sd_v2") else sd1


def _as_text(value: Any) -> str:
    return json.dumps(value) if isinstance(value, (dict, list)) else str(value)
