"""Scorers as files: one .safetensors with the weights and, in its header, all that is needed to use them."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from library.atomic_files import atomic_save_safetensors
from library.errors import UserError
from library.models.vae import VaeFingerprint
from library.scorers.base import Backbone, Scorer, ScorerSpec
from library.scorers.registry import BACKBONES, build_scorer

FORMAT_KEY = "leco_score.format"
SCORER_FORMAT, BACKBONE_FORMAT = "scorer/2", "backbone/2"
SPEC_KEY = "leco_score.spec"


def save_scorer(path: str | Path, scorer: Scorer, metadata: Mapping[str, str] | None = None) -> None:
    """Write a scorer, its spec and, if given, more metadata (strings) to one file."""
    header = {FORMAT_KEY: SCORER_FORMAT, SPEC_KEY: scorer.spec.to_json(), "torch": torch.__version__, **(metadata or {})}
    atomic_save_safetensors(scorer.state_dict(), path, header)


def load_scorer(path: str | Path) -> Scorer:
    """Read a scorer: on the CPU, in evaluation mode, its weights frozen (gradients still reach the latents).

    Raises:
        UserError: if the file is missing, damaged, not a scorer, or of a kind that this version does not know.
    """
    path = Path(path)
    file_format, spec, tensors = _read(path)
    if file_format != SCORER_FORMAT:
        raise UserError(f"{path} is not a scorer; give a file that train_latent_scorer.py wrote")
    scorer = build_scorer(spec)
    try:
        scorer.load_state_dict(tensors)
    except RuntimeError as error:
        raise UserError(f"{path} does not hold the weights of the {spec.kind} that its header describes; train it again") from error
    scorer.name = path.stem
    return scorer.eval().requires_grad_(False)


def save_backbone(path: str | Path, backbone: nn.Module, spec: ScorerSpec, metadata: Mapping[str, str] | None = None) -> None:
    """Write a backbone alone, for scorers to start from. Of `spec`, the kind, the architecture and the VAE are what counts."""
    header = {FORMAT_KEY: BACKBONE_FORMAT, SPEC_KEY: spec.to_json(), "torch": torch.__version__, **(metadata or {})}
    atomic_save_safetensors(backbone.state_dict(), path, header)


def load_backbone_weights(path: str | Path, backbone: Backbone, spec: ScorerSpec) -> None:
    """Fill a backbone from a backbone file, or from the backbone of a scorer file.

    Raises:
        UserError: as `load_scorer` does, and if the file's backbone is another one than `spec` asks for, or reads another VAE.
    """
    path = Path(path)
    _, stored, tensors = _read(path)
    if (stored.kind, stored.architecture) != (spec.kind, spec.architecture):
        raise UserError(
            f"{path} holds a {stored.kind} of {json.dumps(stored.architecture)} and this run builds a {spec.kind} of "
            f"{json.dumps(spec.architecture)}; give the same scorer_kind and scorer_size to both"
        )
    if not stored.vae.matches(spec.vae):
        raise UserError(f"backbone {path} was trained for another VAE; train it on latents of this VAE")
    prefix = "backbone."
    backbone.load_state_dict({key.removeprefix(prefix): tensor for key, tensor in tensors.items() if not key.startswith("heads.")})


def check_scorer_fits(scorer: Scorer, vae: VaeFingerprint) -> None:
    """Raises UserError if the scorer was trained on another VAE's latents: its opinion of these would mean nothing."""
    if not scorer.spec.vae.matches(vae):
        raise UserError(
            f"scorer {scorer.name} was trained for another VAE (scaling factor {scorer.spec.vae.scaling_factor:g}) than this model's "
            f"({vae.scaling_factor:g}); train a scorer with this model, or take a model that shares the scorer's VAE"
        )


def _read(path: Path) -> tuple[str, ScorerSpec, dict[str, Tensor]]:
    """Format, spec and tensors of a file that this module wrote."""
    if not path.is_file():
        raise UserError(f"there is no scorer file {path}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - safe_open is no mapping
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is not a readable .safetensors file ({error}); it may be truncated: copy or train it again") from error
    file_format = metadata.get(FORMAT_KEY, "")
    if file_format not in (SCORER_FORMAT, BACKBONE_FORMAT):
        raise UserError(f"{path} is not a scorer; give a file that train_latent_scorer.py wrote")
    try:
        spec = ScorerSpec.from_json(metadata[SPEC_KEY])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"the description of the scorer in {path} cannot be read; it may be of another version: train it") from error
    if spec.kind not in BACKBONES:
        raise UserError(f"{path} is a scorer of kind {spec.kind!r}, which this version does not know; it knows {', '.join(BACKBONES)}")
    return file_format, spec, tensors
