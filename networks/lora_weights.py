"""LoRA weights as they are found in files."""

from collections.abc import Mapping
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from library.errors import UserError


def read_weights(file: str | Path) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load_file(file)
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"{file} could not be read as a .safetensors LoRA ({error}); check the path") from error


def rename_weights(weights: Mapping[str, Tensor], names: Mapping[str, str]) -> dict[str, Tensor]:
    """Weights under our names, with alpha = rank where the file has none, as every client reads it."""
    renamed = {}
    for key, value in weights.items():
        module, _, suffix = key.partition(".")
        renamed[f"{names.get(module, module)}.{suffix}"] = value
    for key in [key for key in renamed if key.endswith(".lora_down.weight")]:
        renamed.setdefault(key.replace(".lora_down.weight", ".alpha"), torch.tensor(float(renamed[key].shape[0])))
    return renamed


def fit_weight(value: Tensor, shape: torch.Size, key: str, file: str | Path | None) -> Tensor:
    # (r, in) and (r, in, 1, 1) are one matrix: SD2's proj_in and proj_out are found in both shapes.
    if list(value.shape) + [1] * (len(shape) - value.ndim) != list(shape) + [1] * (value.ndim - len(shape)):
        raise UserError(
            f"{file or 'weights_sd'}: {key} has shape {tuple(value.shape)}, this network {tuple(shape)}; make the network from the file"
        )
    return value.reshape(shape).float()
