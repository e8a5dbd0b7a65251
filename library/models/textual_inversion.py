"""Textual inversion (arXiv 2208.01618): words of one's own, whose embeddings come from files, as in A1111's folder embeddings."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from library.atomic_files import NoTensors, load_tensors
from library.errors import UserError
from library.models.base import DiffusionModel
from library.models.unet_model import UNetModel

ENDINGS = (".safetensors", ".pt", ".bin")
SDXL_NAMES = ("clip_l", "clip_g")
MOST_VECTORS = 75  # a chunk of a prompt


def load_embeddings(model: DiffusionModel, paths: Sequence[Path]) -> None:
    """Teach a model the words of these files: the name of a file without its ending is the word, in any case.

    Args:
        paths: files, or folders of them: A1111's (.pt, .safetensors), kohya's and diffusers' (one tensor), SDXL's (clip_l and clip_g).

    Raises:
        UserError: no such file, no embedding in it, or one that was made for another family.
    """
    if paths and not isinstance(model, UNetModel):
        raise UserError(f"textual_inversion_embeddings are for CLIP, which {model.spec.name} has not; leave them out")
    for file in (file for path in paths for file in _files(path)):
        tables: list[Any] = [encoder.get_input_embeddings() for encoder in model.text_encoders]
        vectors = _vectors(file, [table.weight.shape[1] for table in tables])
        offset = sum(map(len, model.embeddings.values()))
        model.embeddings[file.stem.lower()] = range(offset, offset + len(vectors[0]))
        for table, added in zip(tables, vectors, strict=True):
            joined = torch.cat([table.weight.detach(), added.to(table.weight)])
            table.weight = nn.Parameter(joined, requires_grad=table.weight.requires_grad)
            table.num_embeddings = len(joined)
    if not paths:
        return
    modules: list[Any] = [module for encoder in model.text_encoders for module in encoder.modules()]
    for module in modules:
        if getattr(module, "eos_token_id", None) == 2:  # transformers' sign to pool at the highest id, which is now an embedding's
            module.eos_token_id = model.tokenizers[0].eos_token_id


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    files = sorted(file for file in path.iterdir() if file.suffix.lower() in ENDINGS)
    if not files:
        raise UserError(f"textual_inversion_embeddings has {path}, a folder without embeddings ({', '.join(ENDINGS)})")
    return files


def _vectors(path: Path, widths: Sequence[int]) -> list[Tensor]:
    """The vectors [V, D] of a file for each text encoder, whose embeddings are `widths` wide."""
    tensors = {name: value.reshape(-1, value.shape[-1]) for name, value in _tensors(path).items() if value.dim() in (1, 2)}
    found = [tensors[name] for name in SDXL_NAMES if name in tensors] or list(tensors.values())
    if len(found) == 0 or len({len(vectors) for vectors in found}) > 1:
        raise UserError(f"{path} is no textual-inversion embedding: it has {', '.join(list(tensors)[:5]) or 'no vectors'}; leave it out")
    if [vectors.shape[1] for vectors in found] != list(widths):
        own, wanted = (" and ".join(map(str, sizes)) for sizes in ([vectors.shape[1] for vectors in found], widths))
        raise UserError(f"the embedding {path} is {own} wide and the model's text encoders {wanted}: it was made for another family")
    if not all(vectors.isfinite().all() for vectors in found):
        raise UserError(f"the embedding {path} holds values that are not finite; the file is broken, leave it out")
    if len(found[0]) > MOST_VECTORS:
        raise UserError(f"the embedding {path} has {len(found[0])} vectors, more than the {MOST_VECTORS} tokens of a prompt; leave it out")
    return found


def _tensors(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise UserError(f"textual_inversion_embeddings has {path}, but there is no such file; give an embedding ({', '.join(ENDINGS)})")
    try:
        content, _ = load_tensors(path)
    except NoTensors as error:
        raise UserError(f"{path} is no embedding of plain tensors ({error}); convert it to safetensors") from error
    content = content.get("string_to_param", content)  # A1111's
    return {name: value for name, value in content.items() if isinstance(value, Tensor)} if isinstance(content, dict) else {}
