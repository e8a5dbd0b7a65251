"""One part of a diffusers folder: its weights, or what its configuration says."""

import json
from pathlib import Path
from typing import Any

import torch

from library.errors import UserError
from library.models.hub import choose_weights

LARGEST_SIZE = 1 << 20  # a width, a vocabulary, a side of a picture
MOST_LAYERS = 200  # of one kind, in one place


def component(cls: Any, folder: Path, dtype: torch.dtype) -> Any:
    """One part of a diffusers folder, from the weights that are best to take."""
    weights = choose_weights(file.name for file in folder.glob("*"))
    if weights is None:
        raise UserError(
            f"{folder} has no weights (*.safetensors or *.bin), or not all of their parts; the diffusers model is not complete."
        )
    _check_sizes(read_json(folder / "config.json", "the diffusers model is not complete"), folder / "config.json")
    try:
        options = {"variant": weights.variant, "use_safetensors": weights.use_safetensors}
        return cls.from_pretrained(folder, torch_dtype=dtype, local_files_only=True, **options)
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        if "weights_only" in reason:  # torch's own words advise to turn its guard off
            reason = "its .bin holds more than tensors, or is not whole"
        raise UserError(f"{folder} cannot be loaded ({reason}); download or copy it again.") from error


def _check_sizes(value: Any, path: Path, name: str = "") -> None:
    """Refuse a config that would build for hours, or more than fits into memory, before its weights are compared with it."""
    if isinstance(value, dict):
        for key, inner in value.items():
            _check_sizes(inner, path, key)
    elif isinstance(value, list):
        for inner in value:
            _check_sizes(inner, path, name)
    elif isinstance(value, int | float) and abs(value) > (MOST_LAYERS if "layers" in name else LARGEST_SIZE):
        raise UserError(f"{path} has {name} = {str(value)[:40]}, which no model has; download it again.")


def component_without_values(cls: Any, folder: Path, dtype: torch.dtype) -> Any:
    """The same on the device "meta", from its config alone."""
    _check_sizes(read_json(folder / "config.json", "the diffusers model is not complete"), folder / "config.json")
    try:
        with torch.device("meta"):
            if hasattr(cls, "load_config"):  # diffusers
                return cls.from_config(cls.load_config(folder, local_files_only=True))
            return cls(cls.config_class.from_pretrained(folder, local_files_only=True))
    except (OSError, ValueError) as error:
        raise UserError(f"{folder} cannot be read ({' '.join(str(error).split())[:300]}); download or copy it again.") from error


def read_json(path: Path, advice: str) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f"{path.parent} has no {path.name}; {advice}.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON ({str(error)[:100]}); {advice}.") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__} where a table of settings is expected; {advice}.")
    return content
