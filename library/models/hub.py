"""Where a model is: a local path, or a hub id (owner/name) in the local Hugging Face cache or on the hub."""

from __future__ import annotations

import json
import logging
import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from library.errors import UserError
from library.settings.shared import HUB_ID

logger = logging.getLogger(__name__)

FILE_ENDINGS = (".safetensors", ".sft", ".ckpt", ".pt", ".pth", ".bin")
_WEIGHTS = re.compile(r"(?:diffusion_pytorch_model|pytorch_model|model)(?:\.(\w+))?(?:-\d+-of-(\d+))?(?:\.(\w+))?\.(safetensors|bin)")
_PREFERRED = (None, "fp16", "bf16", "ema", "non_ema")


@dataclass(frozen=True)
class Weights:
    """The weights to take of a folder that holds one part of a model.

    Attributes:
        files: their names; several if they are in shards.
        variant: "fp16", "non_ema" and the like, as `from_pretrained` takes it.
    """

    files: tuple[str, ...]
    variant: str | None
    use_safetensors: bool


def choose_weights(names: Iterable[str]) -> Weights | None:
    """The whole set of weights among these file names that is best to take: safetensors before pickles, full precision before fp16."""
    found: dict[tuple[str | None, str], list[tuple[str, int]]] = defaultdict(list)
    for name in names:
        if match := _WEIGHTS.fullmatch(name):
            found[match[1] or match[3], match[4]].append((name, int(match[2] or 1)))
    whole = {key: files for key, files in found.items() if len(files) >= files[0][1]}
    if not whole:
        return None
    order = {variant: place for place, variant in enumerate(_PREFERRED)}
    variant, ending = min(whole, key=lambda key: (order.get(key[0], len(order)), key[1] == "bin"))
    return Weights(tuple(sorted(name for name, _ in whole[variant, ending])), variant, ending == "safetensors")


def find_model(name: str | Path) -> Path:
    """The file or folder of a model; a hub id is taken from the local Hugging Face cache, or fetched into it.

    Raises:
        UserError: there is no such path, and no such model in the cache or on the hub.
    """
    path = Path(name).expanduser()
    if path.exists():
        return path
    hub_id = Path(name).as_posix()
    if not re.fullmatch(HUB_ID, hub_id) or hub_id.endswith(FILE_ENDINGS):
        raise UserError(f"There is no file or folder {path}; give a checkpoint file, a diffusers folder, or a hub id (owner/name).")
    return _cached(hub_id) or _fetched(hub_id)


def _cached(hub_id: str) -> Path | None:
    """The folder of a model in the cache, if every part of it is there."""
    from huggingface_hub import try_to_load_from_cache

    for index in ("model_index.json", "modular_model_index.json", "config.json"):
        file = try_to_load_from_cache(hub_id, index)
        if isinstance(file, str):
            folder = Path(file).parent
            names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.exists()]
            parts = ["."] if index == "config.json" else _parts(json.loads(Path(file).read_text(encoding="utf-8")))
            return folder if all(choose_weights(_in_folder(names, part)) for part in parts) else None
    return None


def _parts(index: dict[str, object]) -> list[str]:
    """The folders of a diffusers model that hold weights which are needed here."""
    needed = [name for name in index if _holds_weights(name)]
    return [name for name in needed if index[name] != [None, None]]


def _holds_weights(folder: str) -> bool:
    return folder in ("unet", "transformer", "vae") or folder.startswith("text_")


def _in_folder(names: Iterable[str], folder: str) -> list[str]:
    return [PurePosixPath(name).name for name in names if PurePosixPath(name).parent == PurePosixPath(folder)]


def _fetched(hub_id: str) -> Path:
    from huggingface_hub import HfApi, constants

    try:
        names = [file.rfilename for file in HfApi().model_info(hub_id, timeout=10).siblings or []]
        if wanted := _wanted(names):
            logger.info("fetching %s from the hub, %d files", hub_id, len(wanted))
            return Path(HfApi().snapshot_download(hub_id, allow_patterns=wanted))
    except Exception as error:  # of the hub and of whatever HTTP client its package uses
        raise UserError(
            f"There is no file or folder {hub_id}, the Hugging Face cache ({constants.HF_HUB_CACHE}) has no such model, and it cannot be "
            f"fetched from {constants.ENDPOINT} ({reason_of(error)}); give a checkpoint file or a diffusers folder, or correct the id."
        ) from error
    raise UserError(f"{hub_id} on the hub is no diffusers model; download its checkpoint file, and give that.")


def reason_of(error: Exception, secret: str | None = None) -> str:
    """What the hub, or the HTTP client of its package, complains of: its first two lines as one, without the secret."""
    text = " ".join([line.strip() for line in str(error).splitlines() if line.strip()][:2]) or type(error).__name__
    return text.replace(secret, "***") if secret else text


def _wanted(names: list[str]) -> list[str]:
    """Those of a repository's files that a model, or a VAE alone, is loaded from; none if it is neither."""
    folders = {PurePosixPath(name).parent.as_posix() for name in names}
    whole = bool({"model_index.json", "modular_model_index.json"} & set(names))
    parts = [folder for folder in folders if _holds_weights(folder)] if whole else ["."]
    weights = [(part, choose_weights(_in_folder(names, part))) for part in parts]
    files = [f"{part}/{file}".removeprefix("./") for part, chosen in weights if chosen for file in chosen.files]
    small = [name for name in names if name.endswith((".json", ".txt", ".jinja")) and name.count("/") <= 1]
    return small + files if files else []
