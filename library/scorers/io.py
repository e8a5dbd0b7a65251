"""Scorers as files: one .safetensors with the weights and, in its header, all that is needed to use them."""

import json
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from library.atomic_files import NoTensors, atomic_save_safetensors, load_tensors
from library.errors import UserError
from library.models.vae import LatentSpace, VaeFingerprint
from library.scorers.base import SCORER_KINDS, Backbone, Scorer, ScorerSpec
from library.scorers.header import BadHeader, build_checked, check_architecture, check_code, parse_spec, wanted_code

FORMAT_KEY = "leco_score.format"
SCORER_FORMAT, BACKBONE_FORMAT = "scorer/2", "backbone/2"
OLDER_FORMATS = ("scorer/1", "backbone/1")  # one score and no heads
SPEC_KEY = "leco_score.spec"


# Values of an architecture that make no difference to what its weights are.
SAME_WEIGHTS = ("dropout", "drop_path", "pretrained", "decoder_folder")


def save_scorer(path: str | Path, scorer: Scorer, metadata: Mapping[str, str] | None = None) -> None:
    """Write a scorer, its spec and, if given, more metadata (strings) to one file."""
    header = {FORMAT_KEY: SCORER_FORMAT, SPEC_KEY: scorer.spec.to_json(), "torch": torch.__version__, **(metadata or {})}
    atomic_save_safetensors(scorer.saved_state(), path, header)


def load_scorer(path: str | Path, allow_code: Sequence[str] = ()) -> Scorer:
    """Read a scorer: on the CPU, in evaluation mode, its weights frozen (gradients still reach the latents).

    Args:
        allow_code: what a scorer may run or fetch, in the words in which its header asks for it.

    Raises:
        UserError: if the file is missing, damaged, not a scorer, of a kind that this version does not know, or asks for code that is not
            allowed.
    """
    path = Path(path).expanduser()
    file_format, spec, tensors = _read(path)
    if file_format != SCORER_FORMAT:
        raise UserError(f"{path} is not a scorer; give a file that train_latent_scorer.py wrote")
    check_code(path, spec, allow_code)
    scorer = build_checked(path, spec, tensors)
    try:
        scorer.load_state_dict(tensors)
    except RuntimeError as error:
        raise UserError(f"{path} does not hold the weights of the {spec.kind} that its header describes; train it again") from error
    scorer.name = path.stem
    return scorer.eval().requires_grad_(False)


def save_backbone(path: str | Path, backbone: Backbone, spec: ScorerSpec) -> None:
    """Write a backbone alone, for scorers to start from. Of `spec`, the kind, the architecture and the VAE are what counts."""
    header = {FORMAT_KEY: BACKBONE_FORMAT, SPEC_KEY: spec.to_json(), "torch": torch.__version__}
    atomic_save_safetensors(backbone.saved_state(), path, header)


def load_backbone_weights(path: str | Path, backbone: Backbone, spec: ScorerSpec) -> None:
    """Fill a backbone from a backbone file, or from the backbone of a scorer file.

    Raises:
        UserError: as `load_scorer` does, and if the file's backbone is another one than `spec` asks for, or reads another VAE.
    """
    path = Path(path)
    _, stored, tensors = _read(path)
    if differences := _differences(stored, spec):
        raise UserError(f"backbone {path} is not what this run builds: {differences}; give the same scorer_kind and scorer_size to both")
    if not stored.vae.matches(spec.vae):
        raise UserError(f"backbone {path} reads {stored.vae.name}, of another VAE than this one's {spec.vae.name}; train it on those")
    prefix = "backbone."
    try:
        backbone.load_state_dict({key.removeprefix(prefix): tensor for key, tensor in tensors.items() if not key.startswith("heads.")})
    except RuntimeError as error:
        raise UserError(f"{path} does not hold the weights of the {spec.kind} that its header describes; train it again") from error


def check_scorer_fits(scorer: Scorer, vae: VaeFingerprint | LatentSpace) -> None:
    """Raises UserError if the scorer was trained on another VAE's latents: its opinion of these would mean nothing. Of a latent space
    it says what that can tell."""
    own = scorer.spec.vae
    if not (own.may_be_of(vae) if isinstance(vae, LatentSpace) else own.matches(vae)):
        raise UserError(
            f"scorer {scorer.name} reads {scorer.spec.vae.name}, and this model makes {vae.name}"
            + (" with another encoder" if scorer.spec.vae.name == vae.name else "")
            + ": it was trained for another VAE; train a scorer with this model, or take a model that shares the scorer's VAE"
        )


def _differences(stored: ScorerSpec, wanted: ScorerSpec) -> str:
    """What tells two backbones apart, for people; empty if nothing does."""
    if stored.kind != wanted.kind:
        return f"a {stored.kind} there, a {wanted.kind} here"
    there, here = stored.architecture, wanted.architecture
    return ", ".join(
        f"{key} is {_brief(there.get(key))} there and {_brief(here.get(key))} here"
        for key in {**there, **here}
        if there.get(key) != here.get(key) and key not in SAME_WEIGHTS
    )


def _brief(value: Any) -> str:
    """As JSON, cut where it is long: an architecture may hold the whole configuration of a U-Net."""
    return textwrap.shorten(json.dumps(value), 80, placeholder=" ...")


def _read(path: Path) -> tuple[str, ScorerSpec, dict[str, Tensor]]:
    """Format, spec and tensors of a file that this module wrote."""
    if not path.is_file():
        raise UserError(f"there is no scorer file {path}")
    try:
        tensors, metadata = load_tensors(path)
    except NoTensors as error:
        raise UserError(f"{path} is not a readable .safetensors file ({error}); it may be truncated: copy or train it again") from error
    file_format = metadata.get(FORMAT_KEY, "")
    if file_format not in (SCORER_FORMAT, BACKBONE_FORMAT):
        if file_format in OLDER_FORMATS:
            raise UserError(f"{path} was written by an older version ({file_format}; this one reads {SCORER_FORMAT}): train it again")
        raise UserError(f"{path} is not a scorer; give a file that train_latent_scorer.py wrote")
    try:
        spec = parse_spec(metadata.get(SPEC_KEY, ""))
        check_architecture(spec)
        wanted_code(spec)
    except BadHeader as error:
        raise UserError(f"the description of the scorer in {path} cannot be read: {error}; train it again") from error
    if spec.kind not in SCORER_KINDS:
        raise UserError(f"{path} is a scorer of kind {spec.kind!r}, which this version does not know; it knows {', '.join(SCORER_KINDS)}")
    return file_format, spec, tensors
