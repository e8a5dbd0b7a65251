"""What a model's files say of it before its weights are read."""

from pathlib import Path

from library.atomic_files import load_tensors
from library.errors import UserError
from library.models.folder_parts import read_json
from library.models.hub import find_model
from library.models.single_file import detect_family
from library.models.vae import LatentSpace


def latent_space(path: str | Path) -> LatentSpace | None:
    """The latents of a model with its own VAE: a folder's by its VAE's configuration, a .safetensors file's by what family it is of. None
    where only loading tells, or says what is wrong."""
    try:
        path = find_model(path)
        if path.is_dir():
            config = read_json(path / "vae" / "config.json", "the diffusers model is not complete")
        elif path.suffix.lower() in (".safetensors", ".sft"):
            tensors, _ = load_tensors(path, shapes_only=True)
            config = detect_family(tensors, path).config["vae"]
        else:
            return None
        # FLUX.2's statistics are among its weights
        return None if "batch_norm_eps" in config else LatentSpace.of_config(config)
    except (UserError, LookupError, TypeError, ValueError, OSError):
        return None
