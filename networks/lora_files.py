"""A LoRA file of any program -> low-rank branches by module, checked, and where each has its place in a model.

Read: kohya's names (also LyCORIS' LoCon), those of PEFT and of Diffusers, in .safetensors files and in pickles of plain tensors.
What is another function than up(down(x)) is refused by its name; LyCORIS' and DoRA's are taken as fixed changes where nothing is trained.
"""

import json
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from library.atomic_files import load_tensors
from library.errors import UserError
from networks.lora_changes import KINDS, change_of, factors_of
from networks.lora_targets import TargetModule

logger = logging.getLogger(__name__)

# The last part of a key, dots as they are, of files that hold what no weight's change expresses, or what is not read.
_OTHER_FUNCTIONS = {
    r"(oft|boft)_.+": "OFT",
    r"[ab][12]\.weight": "GLoRA",
    r"(on_input|lora_[AB](\.\w+)?\.bias|scalar|diff_b|w_norm|b_norm)": "a LoRA with weights beside down and up",
}
_FACTORS = {"lora_down": "down", "lora_A": "down", "lora.down": "down", "lora_linear_layer.down": "down"}
_FACTORS |= {"lora_up": "up", "lora_B": "up", "lora.up": "up", "lora_linear_layer.up": "up"}
_KEY = re.compile(rf"(.+?)\.({'|'.join(map(re.escape, _FACTORS))})(?:\.\w+)?\.weight|(.+?)(?:\.lora)?\.alpha")
# PEFT's patterns are regular expressions of the file's own, some of which would be matched for ever: these are not
_PLAIN_PATTERN = re.compile(r"\^?([\w-]|\\?\.|\\d\+(?!\\d))*\$?")
_PROCESSOR = re.compile(r"\.processor\.(to_[qkv]|to_out)_lora\.")  # of Diffusers before 0.21
_PARTS = (
    ("unet.", "lora_unet_"),
    ("transformer.", "lora_unet_"),
    ("diffusion_model.", "lora_unet_"),
    ("text_encoder.", "lora_te1_"),
    ("text_encoder_2.", "lora_te2_"),
    ("text_model.", "lora_te1_text_model_"),
)

_IN_CONV_BLOCK = re.compile(
    "_(resnets|downsamplers|upsamplers)_|_(in_layers|out_layers|emb_layers)_[0-9]+$|blocks?(_[0-9]+)+_(skip_connection|op|conv)$"
)


class Branch(NamedTuple):
    """down [r, in] or [r, in, kh, kw], up [out, r] or [out, r, 1, 1], float32; the weight's change is alpha / r * up @ down."""

    down: Tensor
    up: Tensor
    alpha: float


class FixedChange(NamedTuple):
    """The tensors of one module whose change of a weight is no product of two (see `networks.lora_changes.KINDS`), and their name."""

    part: Mapping[str, Tensor]
    kind: str


class Place(Protocol):
    """A module of ours that a branch may belong to: a TargetModule or a LoRAModule."""

    @property
    def name(self) -> str: ...
    @property
    def aliases(self) -> Sequence[str]: ...
    @property
    def weight_shape(self) -> Sequence[int]: ...


@dataclass(frozen=True)
class LoRAFile:
    """What a file holds.

    Attributes:
        source: what the user calls it, for messages.
        branches: by the file's name of the module, in kohya's style ("lora_unet_" and underscores).
        incomplete: modules of which the file lacks down or up.
    """

    source: str
    branches: Mapping[str, Branch | FixedChange]
    incomplete: Sequence[str]

    def place(self, places: Iterable[Place]) -> "PlacedBranches":
        """Find the module of each branch. Raises UserError where none has one, and for shapes that are another model's."""
        places = list(places)
        by_name = {name: place for place in places for name in (*place.aliases, place.name)}
        found: dict[str, Branch] = {}
        for name, branch in self.branches.items():
            if name in by_name:
                place = by_name[name]
                if place.name in found:
                    raise UserError(f"{self.source} holds {place.name} twice, in two styles of naming; give a file with one")
                found[place.name] = self._fitted(branch, name, place)
        if not found:
            raise UserError(
                f"{self.source} has no module of this network, but for example {next(iter(self.branches), 'none at all')}: it was made for "
                "another family of models, or for parts that are not trained here; give a LoRA of this model's U-Net"
            )
        found = {place.name: found[place.name] for place in places if place.name in found}  # in our order, not the file's
        return PlacedBranches(self, found, [place.name for place in places if place.name not in found], set(by_name))

    def _fitted(self, branch: Branch | FixedChange, name: str, place: Place) -> Branch:
        if isinstance(branch, FixedChange):
            assert isinstance(place, TargetModule) and isinstance(place.base.weight, Tensor), "only what is not trained has fixed changes"
            try:
                down, up = factors_of(change_of(branch.part, place.base.weight))
            except UserError as error:
                raise UserError(f"{self.source}: {name}, {branch.kind}: {error}") from error
            return Branch(down, up, float(len(down)))
        out_channels, *inside = place.weight_shape
        rank = len(branch.down)
        wanted = (rank, *inside), (out_channels, rank, *[1] * (len(inside) - 1))
        for tensor, shape in zip(branch[:2], wanted, strict=True):
            # (r, in) and (r, in, 1, 1) are one matrix: SD2's proj_in and proj_out are found in both shapes.
            if list(tensor.shape) + [1] * (len(shape) - tensor.ndim) != list(shape) + [1] * (tensor.ndim - len(shape)):
                raise UserError(
                    f"{self.source}: {name} has a factor of shape {tuple(tensor.shape)}, and this model's module takes {shape}; the file "
                    "was made for another family of models"
                )
        return Branch(branch.down.reshape(wanted[0]), branch.up.reshape(wanted[1]), branch.alpha)


@dataclass(frozen=True)
class PlacedBranches:
    """The branches of a file by our names, our modules that the file lacks, and every name that a module of ours goes by."""

    file: LoRAFile
    branches: Mapping[str, Branch]
    missing: Sequence[str]
    known_names: set[str]

    @property
    def state(self) -> dict[str, Tensor]:
        """As LoRANetwork.load_state_dict takes it."""
        state = {}
        for name, (down, up, alpha) in self.branches.items():
            state |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": torch.tensor(alpha)}
        return state

    def warn_of_the_rest(self, *, missing_begin_at_zero: bool) -> None:
        """One warning that names and counts what of the file has no place, and what of the network the file does not have."""
        rest: dict[str, list[str]] = {"that are incomplete in the file": list(self.file.incomplete)}
        for name in self.file.branches:
            if name not in self.known_names:
                kind = "that this network does not have"
                if name.startswith("lora_te"):
                    kind = "of text encoders, which are not trained"
                elif _IN_CONV_BLOCK.search(name) and missing_begin_at_zero:
                    kind = "of convolutional blocks, which dim_from_weights would take"
                rest.setdefault(kind, []).append(name)
        sentences = [f"{len(names)} modules {kind} ({names[0]}, ...)" for kind, names in rest.items() if names]
        text = f"left out are {', '.join(sentences)}" if sentences else ""
        if missing_begin_at_zero and self.missing:
            begin = f"{len(self.missing)} modules of this network are not in the file and begin at zero ({self.missing[0]}, ...)"
            text = f"{text}; {begin}" if text else begin
        if text:
            logger.warning("%s: %d modules are taken; %s", self.file.source, len(self.branches), text)


def read_lora(file: str | Path, *, fixed: bool = False) -> LoRAFile:
    """See `parse_lora`. Raises UserError: cannot be read, malformed, or another function than a LoRA's."""
    path = Path(file)
    try:
        tensors, metadata = load_tensors(path)
        config = path.with_name("adapter_config.json")  # PEFT's own files have their alpha there
        peft = dict(json.loads(metadata.get("lora_adapter_metadata", "{}")))
        if not peft and path.stem == "adapter_model" and config.is_file():
            peft = {f"unet.{key}": value for key, value in dict(json.loads(config.read_text(encoding="utf-8"))).items()}
    except (OSError, ValueError, TypeError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{file} could not be read as a LoRA ({reason}); give a .safetensors file, or a .pt of plain tensors") from error
    return parse_lora(tensors, str(file), peft, fixed=fixed)


def parse_lora(
    tensors: Mapping[str, Any], source: str = "weights_sd", peft: Mapping[str, Any] | None = None, *, fixed: bool = False
) -> LoRAFile:
    """The checked record of a file's tensors.

    Args:
        fixed: take LyCORIS' functions and DoRA, too, as changes that are not trained.
        peft: settings of PEFT by "unet.lora_alpha" and the like, for files whose alphas are no tensors. Without either, alpha is
            the rank, as every client reads it.
    """
    parts: dict[str, dict[str, Tensor]] = {}
    dotted: dict[str, str] = {}
    for key, tensor in tensors.items():
        if str(key).startswith("bundle_emb."):  # LyCORIS' way to put an embedding into the file: it works by its own word
            continue
        path, role = _split(str(key), source, fixed)
        name = _kohya_name(path)
        dotted[name] = path
        if role in parts.setdefault(name, {}):
            raise UserError(f"{source} holds {role} of {name} twice; give a file with one adapter")
        parts[name][role] = _checked(
            tensor, f"{source}: {key}", is_alpha=role == "alpha", ranks=(1, 2, 4) if _kind(role) == "DoRA" else (2, 4)
        )
    incomplete, branches = [], {}
    for name, part in parts.items():
        kinds = [_kind(role) for role in part if role not in ("down", "up", "alpha")]
        if kinds:
            branches[name] = FixedChange(_with_peft_alpha(part, peft, dotted[name], source), str(kinds[-1]))
            continue
        if not {"down", "up"} <= part.keys():
            incomplete.append(name)
            continue
        down, up = part["down"], part["up"]
        if not 0 < len(down) == up.shape[1] or up.shape[2:].numel() != 1:
            raise UserError(f"{source}: the factors of {name} do not fit, down has shape {tuple(down.shape)} and up {tuple(up.shape)}")
        alpha = part["alpha"].item() if "alpha" in part else _peft_alpha(peft or {}, dotted[name], len(down), source)
        branches[name] = Branch(down.float(), up.float(), float(alpha))
    return LoRAFile(source, branches, incomplete)


def _kind(role: str) -> str | None:
    """What the function of a key's last part is called; None of a LoRA's own."""
    return next((kind for pattern, kind in KINDS.items() if re.fullmatch(pattern, role)), None)


def _split(key: str, source: str, fixed: bool) -> tuple[str, str]:
    """The module's path in a key, and "down", "up", "alpha" or the last part of a fixed change's."""
    key = _PROCESSOR.sub(lambda match: f".{match[1].replace('to_out', 'to_out.0')}.lora.", key)
    if match := _KEY.fullmatch(key):
        return (match[1], _FACTORS[match[2]]) if match[2] else (match[3], "alpha")
    for pattern, kind in KINDS.items():
        if match := re.fullmatch(rf"(.+?)\.({pattern})", key):
            if fixed:
                return match[1], match[2]
            raise UserError(
                f"{source} is {kind} (see {key}), which is another function than a LoRA's; give it as base_weights, which are merged into "
                "the model before training"
            )
    for pattern, name in _OTHER_FUNCTIONS.items():
        if re.fullmatch(rf".+\.{pattern}", key):
            raise UserError(
                f"{source} is {name} (see {key}), which is another function than a LoRA's; merge it into the checkpoint instead"
            )
    raise UserError(f"{source} has {key[:100]}, which is no tensor of a LoRA (lora_down, lora_up and alpha per module); give a LoRA file")


def _kohya_name(path: str) -> str:
    path = path.removeprefix("base_model.model.")
    if path.startswith("lora_"):
        return path.replace(".", "_")
    prefix, kohya = next(((prefix, kohya) for prefix, kohya in _PARTS if path.startswith(prefix)), ("", "lora_unet_"))
    return kohya + path.removeprefix(prefix).replace(".", "_")


def _checked(tensor: Any, what: str, *, is_alpha: bool, ranks: Sequence[int]) -> Tensor:
    if not isinstance(tensor, Tensor):
        raise UserError(f"{what} is no tensor; give a LoRA file")
    shape_is_right = tensor.numel() == 1 if is_alpha else tensor.ndim in ranks and tensor.is_floating_point()
    if not shape_is_right:
        wanted = "one number" if is_alpha else "a matrix or the kernel of a convolution"
        raise UserError(f"{what} has shape {tuple(tensor.shape)} and type {tensor.dtype}, and it must be {wanted}; the file is malformed")
    if not tensor.float().isfinite().all():
        raise UserError(f"{what} holds values that are not finite; the file is broken, give an earlier one")
    return tensor


def _with_peft_alpha(part: dict[str, Tensor], peft: Mapping[str, Any] | None, path: str, source: str) -> dict[str, Tensor]:
    if "down" not in part or "alpha" in part:
        return part
    return part | {"alpha": torch.tensor(_peft_alpha(peft or {}, path, len(part["down"]), source, dora=True))}


def _peft_alpha(peft: Mapping[str, Any], path: str, rank: int, source: str, *, dora: bool = False) -> float:
    part, _, inside = path.partition(".")
    if f"{part}.lora_alpha" not in peft:
        part, inside = "unet", path
    if peft.get(f"{part}.use_dora") and not dora:
        raise UserError(f"{source} is DoRA (see use_dora in its settings of PEFT), which is another function than a LoRA's")
    try:
        patterns = peft.get(f"{part}.alpha_pattern") or {}
        if strange := next((pattern for pattern in patterns if not _PLAIN_PATTERN.fullmatch(pattern)), None):
            raise ValueError(f"alpha_pattern has {strange[:100]!r}, and names of modules alone are read, with \\d+ for numbers")
        own = (alpha for pattern, alpha in patterns.items() if re.fullmatch(rf"(.*\.)?({pattern})", inside))
        alpha = float(next(own, peft.get(f"{part}.lora_alpha", rank)))
    except (AttributeError, TypeError, ValueError, re.error) as error:
        raise UserError(f"{source}: its settings of PEFT give no alpha for {path} ({error}); give a file that is whole") from error
    return alpha * rank**0.5 if peft.get(f"{part}.use_rslora") else alpha
