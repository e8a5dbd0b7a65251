"""A scorer file's header is data: its text to a checked `ScorerSpec`, and limits on what may be built from it.

Nothing that a header names is imported, opened or fetched. What runs code or fetches files is built only where the user's own
command names it (`allow_code`); everything else is built of arguments that pass the checks here.
"""

import hashlib
import importlib.util
import json
import logging
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from library.errors import UserError
from library.models.vae import VaeFingerprint
from library.scorers.base import BackboneScorer, ScorerSpec, build_scorer
from library.scorers.heads import READOUTS, HeadSpec

logger = logging.getLogger(__name__)

LONGEST = 1 << 24  # characters of a header
LARGEST = 1 << 20  # a whole number in an architecture: a width, a depth, a size of a vocabulary
MOST_MEMBERS = 1000
PLAIN_TEXT = re.compile(r"[\w .,+-]{0,200}")  # names of layers and models; no path, no URL, no module:object
ANY_TEXT = ("id2label", "label2id")  # names for people
ONLY_OF_A_NEW_RUN = ("pretrained", "decoder_folder")  # where it took weights from; nothing reads them when a file is loaded
# Where libraries take code or files from, in the configurations of transformers, diffusers and timm.
_FORBIDDEN = """
auto_map trust_remote_code quantization_config attn_implementation backbone use_pretrained_backbone adapter use_timm_backbone checkpoint
checkpoint_path pretrained_cfg pretrained_cfg_overlay cache_dir custom_pipelines
"""
_TRANSFORMERS_TYPES = """
beit bit clip clip_text_model clip_vision_model convnext convnextv2 cvt data2vec-vision deit dinov2 dinov2_with_registers efficientnet
focalnet hiera levit mobilenet_v1 mobilenet_v2 mobilevit mobilevitv2 poolformer pvt pvt_v2 regnet resnet siglip siglip_vision_model
swiftformer swin swinv2 van vit vit_mae vit_msn
"""
FORBIDDEN, TRANSFORMERS_TYPES = tuple(_FORBIDDEN.split()), tuple(_TRANSFORMERS_TYPES.split())

# Of each family of image models that runs code or fetches files: what the user's command must name.
CODE: Mapping[str, Callable[[Mapping[str, Any]], str]] = {
    "python": lambda model: model["name"],
    "torchscript": lambda model: "torchscript",
    "pyiqa": lambda model: f"pyiqa:{model['metric']}",
    "imscore": lambda model: f"imscore:{model['name']}?from={model['source']}" if model["source"] else f"imscore:{model['name']}",
}


class BadHeader(ValueError):
    """What is wrong with a header, as a part of a sentence."""


def parse_spec(text: str) -> ScorerSpec:
    """What `ScorerSpec.to_json` wrote. Raises BadHeader where it is anything else."""
    _check(len(text) <= LONGEST, f"it has {len(text):,} characters")
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadHeader("it is not JSON, or nested too deeply") from error
    _check_keys(values, ScorerSpec, "the description")
    _check(isinstance(values["heads"], list) and values["heads"], "it has no heads")
    vae = values["vae"]
    keys = {"scaling_factor", "probe"}
    _check(isinstance(vae, dict) and set(vae) in (keys, keys | {"space"}), "vae is no fingerprint")
    _check(isinstance(vae["probe"], list) and isinstance(vae.get("space", ""), str), "vae is no fingerprint")
    _check(all(map(_is_number, [vae["scaling_factor"], *vae["probe"]])), "vae holds something that is no finite number")
    spec = ScorerSpec(**{**values, "vae": VaeFingerprint.from_dict(vae), "heads": tuple(map(_head, values["heads"]))})
    names = [head.name for head in spec.heads]
    _check(len(set(names)) == len(names), "two heads have one name")
    _check(isinstance(spec.score_head, str) and spec.score_head in names, "score_head is none of its heads")
    _check(_is_number(spec.mean) and _is_number(spec.std) and spec.std > 0, "mean and std must be finite, and std above 0")
    _check(isinstance(spec.kind, str) and isinstance(spec.training, dict), "kind must be a text and training a table")
    _check(isinstance(spec.noise_aware, bool) and isinstance(spec.uses_prompt, bool), "noise_aware and uses_prompt must be true or false")
    _check(isinstance(spec.architecture, dict), "architecture is no table")
    return spec


def _head(values: Any) -> HeadSpec:
    _check_keys(values, HeadSpec, "a head")
    _check(all(isinstance(values[key], list) for key in ("classes", "values")), "classes and values of a head must be lists")
    head = HeadSpec(**{**values, "classes": tuple(values["classes"]), "values": tuple(values["values"])})
    texts = (head.name, head.criterion, head.readout, head.target_class, *head.classes)
    _check(all(isinstance(text, str) for text in texts), "names of heads and classes must be texts")
    _check(bool(re.fullmatch(r"[^.]{1,200}", head.name)), f"a head is called {head.name[:40]!r}")
    _check(head.readout in READOUTS, f"a head's readout is {head.readout[:40]!r}; it can be {', '.join(READOUTS)}")
    sizes = {"outputs": (1, LARGEST), "members": (1, MOST_MEMBERS), "hidden": (0, LARGEST)}
    for key, (low, high) in sizes.items():
        value = getattr(head, key)
        _check(type(value) is int and low <= value <= high, f"a head's {key} must be from {low} to {high}")
    _check(
        all(map(_is_number, (head.mean, head.std, *head.values))) and head.std > 0, "a head's numbers must be finite, and its std above 0"
    )
    wanted = {"distribution": head.outputs, "ordinal": head.outputs + 1}.get(head.readout, len(head.values))
    _check(len(head.values) == wanted, f"a head of {head.outputs} outputs has {len(head.values)} values")
    _check(len(head.classes) in (0, head.outputs), f"a head of {head.outputs} outputs has {len(head.classes)} classes")
    _check(head.target_class in ("", *head.classes), "a head's target_class is none of its classes")
    _check(head.outputs >= {"gaussian": 2, "class": 2}.get(head.readout, 1), f"a {head.readout} head has two outputs or more")
    return head


def check_architecture(spec: ScorerSpec) -> None:
    """Raises BadHeader for arguments that would have a library open, fetch or import something, or make something absurdly large."""
    model = spec.architecture.get("image_model", {})
    _check(isinstance(model, dict) and isinstance(model.get("family", ""), str), "image_model is no table with a family")
    own = ("name", "source", "metric") if model.get("family") in CODE else ()
    for key, value in spec.architecture.items():
        if key in ONLY_OF_A_NEW_RUN:
            continue
        _check_values(key, value, own if key == "image_model" else ())
    configs = [model.get(key) for key in ("config", "tower")]
    for config in configs:
        _check(config is None or isinstance(config, dict), "a configuration is no table")
        _check(not config or config.get("model_type") in TRANSFORMERS_TYPES, "its image model is of a type that is not read from a file")


def wanted_code(spec: ScorerSpec) -> str:
    """What a scorer would run or fetch when it is built or used, as `allow_code` names it; empty for nothing. Raises BadHeader."""
    model = spec.architecture.get("image_model", {})
    try:
        wanted = CODE[model["family"]](model) if model.get("family") in CODE else ""
    except KeyError as error:
        raise BadHeader(f"image_model has no {error}") from error
    _check(isinstance(wanted, str), "image_model names its code by something that is no text")
    return wanted


def check_code(path: Path, spec: ScorerSpec, allowed: Sequence[str]) -> None:
    """Raises UserError for a scorer that runs code or fetches files which the user's command does not name; logs the hash of what runs."""
    if not (wanted := wanted_code(spec)):
        return
    if wanted not in allowed:
        raise UserError(
            f"scorer {path} wants to run or fetch {wanted!r}, and a file's own word for that is not enough; if you trust it, "
            f"give --allow_code {wanted}"
        )
    where = wanted.rpartition(":")[0]
    code = path
    if spec.architecture["image_model"]["family"] == "python":
        found = None if where.endswith(".py") else _find_module(where)
        code = Path(found or where)
    digest = hashlib.sha256(code.read_bytes()).hexdigest() if code.is_file() else "of no file"
    logger.warning("scorer %s runs %s, as allow_code says; sha256 of %s: %s", path, wanted, code.name, digest)


def _find_module(name: str) -> str | None:
    try:
        found = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        return None  # what loads it says so
    return found.origin if found else None


def build_checked(path: Path, spec: ScorerSpec, tensors: Mapping[str, Tensor]) -> BackboneScorer:
    """The scorer of a header, in memory of the order of its file. Raises UserError for whatever the parts make of a wrong header."""
    elements = sum(tensor.numel() for tensor in tensors.values())
    try:
        if wanted_code(spec):
            return build_scorer(spec)
        with _Allowance(4 * elements + (1 << 24)):
            return build_scorer(spec)
    except UserError as error:  # it speaks of scorer_args, or of a package, and of no file
        raise UserError(f"scorer {path}: {error}") from error
    except Exception as error:  # libraries raise what they like on arguments that are not theirs
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"the header of {path} describes a {spec.kind} that cannot be built ({reason}); train it again") from error


class _Allowance(TorchFunctionMode):
    """Counts the elements of tensors that are made, a thousand at least for each, and stops where there are too many."""

    def __init__(self, elements: int) -> None:
        super().__init__()
        self.left = elements

    def __torch_function__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.empty, torch.zeros, torch.ones, torch.rand, torch.randn, torch.full):
            size = kwargs.get("size", args)
            size = args[0] if args and not isinstance(args[0], int) else args[:1] if func is torch.full else size
            on_meta = torch.device(kwargs.get("device") or "cpu").type == "meta"
            self.left -= 1024 if on_meta else max(1024, math.prod(size))
            if self.left < 0:
                raise BadHeader("it is far larger than the weights in the file")
        return func(*args, **kwargs)


def _check(holds: object, problem: str) -> None:
    if not holds:
        raise BadHeader(problem)


def _check_keys(values: Any, record: Any, what: str) -> None:
    known = {field.name for field in fields(record)}
    _check(isinstance(values, dict), f"{what} is no table")
    _check(set(values) == known, f"{what} has {', '.join(sorted(set(values) ^ known))[:100]} too much or too little")


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and abs(value) < 1e300  # pyright: ignore[reportArgumentType]


def _check_values(key: str, value: Any, own: Sequence[str] = ()) -> None:
    """Values of an architecture: plain texts, numbers in bounds, lists and tables of them, under names that fetch nothing."""
    _check(not key.startswith("_") or key in ("_class_name", "_diffusers_version"), f"{key[:40]!r} is not read from a file")
    _check(key not in FORBIDDEN, f"{key!r} is not read from a file")
    if key in ANY_TEXT or key in own:
        return
    if isinstance(value, str):
        _check(PLAIN_TEXT.fullmatch(value), f"{key} is {value[:60]!r}, which is no plain name")
    elif isinstance(value, int | float):
        _check(abs(value) <= LARGEST or key == "size_in_bytes", f"{key} is absurd: {str(value)[:40]}")  # NaN, too
    elif isinstance(value, dict):
        for inner, content in value.items():
            _check_values(inner, content, own)
    elif isinstance(value, list):
        _check(len(value) <= 10_000, f"{key} is a list of {len(value)}")
        for content in value:
            _check_values(key, content)
