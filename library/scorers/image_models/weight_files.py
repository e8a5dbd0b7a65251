"""Weights and folders of other libraries, from local paths only."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from library.atomic_files import NoTensors, load_tensors
from library.errors import UserError
from library.scorers.image_models.preprocessing import Preprocessing

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


def read_bytes(path: str) -> bytes:
    """Raises UserError if there is no such file."""
    if not Path(path).is_file():
        raise UserError(f"image model: there is no file {path}; give a local path")
    return Path(path).read_bytes()


def read_state_dict(path: str) -> dict[str, Tensor]:
    """A state dict from .safetensors, or from a file of torch.save that holds tensors only, in float32.

    Raises:
        UserError: there is no such file, or it holds something else.
    """
    if not Path(path).is_file():
        raise UserError(f"image model: there is no file {path}; give a local path")
    try:
        tensors, _ = load_tensors(path)
    except NoTensors as error:
        raise UserError(f"image model: {path} cannot be read ({error}); download it again") from error
    if not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise UserError(f"image model: {path} holds no state dict (names and tensors); save one with torch.save(model.state_dict(), ...)")
    return {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}


def load_transformers(cls: Any, folder: str, without: str = "") -> PreTrainedModel:
    """A model of transformers from a local folder, in float32.

    Args:
        without: name of a part that may be missing; it is then None.

    Raises:
        UserError: if the folder does not hold one, or not all of it.
    """
    if not (Path(folder) / "config.json").is_file():
        raise UserError(f"image model: {folder} is not the folder of a transformers model: it has no config.json; download the model first")
    try:
        model, report = cls.from_pretrained(folder, dtype=torch.float32, local_files_only=True, output_loading_info=True)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise UserError(f"image model: {folder} cannot be loaded ({' '.join(str(error).split())[:300]})") from error
    missing = sorted(report["missing_keys"])
    if without and missing and all(key.startswith(f"{without}.") for key in missing):
        setattr(model, without, None)
    elif missing:
        raise UserError(f"image model: {folder} lacks {len(missing)} weights of {type(model).__name__}, {missing[0]} among them")
    return model


def config_values(config: PreTrainedConfig) -> dict[str, Any]:
    """A configuration as JSON values, without what only says where it came from."""
    values = json.loads(config.to_json_string(use_diff=True))
    return {key: value for key, value in values.items() if key not in ("transformers_version", "_name_or_path", "architectures", "dtype")}


def config_from_values(values: Mapping[str, Any]) -> PreTrainedConfig:
    """The inverse of `config_values`."""
    from transformers import AutoConfig

    return AutoConfig.for_model(**values)


def folder_preprocessing(folder: str, default: Preprocessing) -> Preprocessing:
    """What preprocessor_config.json says of size, mean and std; `default` where it says nothing."""
    file = Path(folder) / "preprocessor_config.json"
    if not file.is_file():
        return default
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UserError(f"image model: {file} is not valid JSON ({error})") from error
    size = values.get("crop_size") if values.get("do_center_crop", False) else None
    size = size if size is not None else values.get("size", default.size)
    if isinstance(size, Mapping):
        size = size.get("height") or size.get("shortest_edge") or default.size
    normalised = values.get("do_normalize", True)
    return Preprocessing(
        size=default.size if size is None else int(size),
        mean=tuple(values.get("image_mean", default.mean)) if normalised else (0.0,) * 3,
        std=tuple(values.get("image_std", default.std)) if normalised else (1.0,) * 3,
    )
