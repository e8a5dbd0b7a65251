"""From a point in CLIP's space to what a diffusion model is given for a prompt: learned from text alone, used with pictures.

arXiv 2403.14944 (CLIP-VQDiffusion), after Lafite (arXiv 2111.13792), trains a generator on CLIP embeddings of pictures and uses it
with those of texts. A diffusion model that was trained on token encodings cannot take an embedding, so an adapter is put
between, trained the other way round: on embeddings of texts, whose token encodings are known, and used with those of pictures.
Either way text and picture must lie together in the space. They do not quite (arXiv 2203.02053, the modality gap); what helps is
to take each modality's mean away and to train with noise (arXiv 2401.08567).
"""

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from library.atomic_files import NoTensors, atomic_save_safetensors, load_tensors
from library.errors import UserError
from library.models.base import DiffusionModel
from library.models.unet_model import check_unet
from library.types import Conditioning

FORMAT_KEY, FORMAT, SPEC_KEY = "leco_score.format", "image_prompt_adapter/1", "leco_score.spec"
PROBE_PROMPT = "a photograph of a small red circle on the left of a grey wall"
NUM_VALUES = 256
TOLERANCE = 0.05  # relative RMS; half precision stays below 0.02, another clip_skip or another encoder is far above


@dataclass(frozen=True)
class Fingerprint:
    """At most NUM_VALUES numbers of an encoding, rounded to 4 decimals: encoders agree in them, or are not the same."""

    values: tuple[float, ...]

    @classmethod
    def of(cls, encoding: Tensor) -> "Fingerprint":
        flat = encoding.detach().float().cpu().flatten()
        return cls(tuple(round(value, 4) for value in flat[:: max(1, len(flat) // NUM_VALUES)][:NUM_VALUES].tolist()))

    def matches(self, other: "Fingerprint") -> bool:
        if len(self.values) != len(other.values):
            return False
        return math.dist(self.values, other.values) <= TOLERANCE * max(math.hypot(*self.values), math.hypot(*other.values))


@torch.no_grad()
def text_encoder_fingerprint(model: DiffusionModel) -> Fingerprint:
    """Of what a diffusion model's text encoders, at their clip_skip, make of a prompt's first words.

    The first token is left out: it says nothing of the prompt and is so large in CLIP that it would hide the rest.
    """
    check_unet(model, "image_prompts")
    return Fingerprint.of(model.encode_prompts([PROBE_PROMPT]).text[0, 1:16])


@dataclass(frozen=True, kw_only=True)
class AdapterSpec:
    """What an adapter is, in the header of its file.

    Attributes:
        embedding_dim: P, of CLIP's space. num_tokens, token_dim: T and D of the model's text encoding. pooled_dim: SDXL's, or 0.
        width: of the network that corrects points.
        text_encoder, clip: what it was trained for.
        training: how, for people.
    """

    embedding_dim: int
    num_tokens: int
    token_dim: int
    pooled_dim: int
    width: int
    text_encoder: Fingerprint
    clip: Fingerprint
    training: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> "AdapterSpec":
        """Raises ValueError, KeyError or TypeError if it is not what `to_json` writes."""
        values = json.loads(text)
        prints = {name: Fingerprint(tuple(values[name]["values"])) for name in ("text_encoder", "clip")}
        return AdapterSpec(**{**values, **prints})


class ImagePromptAdapter(nn.Module):
    """Points [B, P] -> token encodings [B, T, D], and pooled ones for SDXL.

    A small residual network corrects the point, and a linear map turns it into the whole encoding. The map begins as the least-squares
    answer and the correction as nothing, so that an adapter is of use before its first step (see `adapter_training.new_adapter`).
    """

    text_mean: Tensor  # [P]: of the prompts' embeddings
    image_mean: Tensor  # [P]: of pictures of all kinds, or zeros where none were given

    def __init__(self, spec: AdapterSpec) -> None:
        super().__init__()
        self.spec = spec
        self.correction = nn.Sequential(
            nn.Linear(spec.embedding_dim, spec.width),
            nn.GELU(),
            nn.Linear(spec.width, spec.width),
            nn.GELU(),
            nn.Linear(spec.width, spec.embedding_dim),
        )
        for parameter in self.correction[-1].parameters():
            nn.init.zeros_(parameter)
        self.decode = nn.Linear(spec.embedding_dim, spec.num_tokens * spec.token_dim + spec.pooled_dim)
        self.register_buffer("text_mean", torch.zeros(spec.embedding_dim))
        self.register_buffer("image_mean", torch.zeros(spec.embedding_dim))

    def forward(self, points: Tensor) -> Conditioning:
        """Points [B, P] that `of_texts` or `of_pictures` made -> conditioning without time_ids. Float32."""
        # A unit vector's coordinates are about 1 / sqrt(P); the network is given them at about 1.
        encoding = self.decode(points + self.correction(points * self.spec.embedding_dim**0.5))
        text, pooled = encoding.split([self.spec.num_tokens * self.spec.token_dim, self.spec.pooled_dim], dim=1)
        return Conditioning(text.unflatten(1, (self.spec.num_tokens, self.spec.token_dim)), pooled if self.spec.pooled_dim else None)

    def of_texts(self, embeddings: Tensor) -> Tensor:
        """Embeddings of texts [B, P] as points: unit vectors from the texts' mean."""
        return F.normalize(embeddings - self.text_mean, dim=-1)

    def of_pictures(self, embeddings: Tensor) -> Tensor:
        """Embeddings of pictures [B, P] as points: unit vectors from the mean of pictures."""
        return F.normalize(embeddings - self.image_mean, dim=-1)

    @property
    def knows_pictures(self) -> bool:
        """Whether it was given the mean of pictures."""
        return bool(self.image_mean.any())


def perturb(points: Tensor, amount: float, generator: torch.Generator) -> Tensor:
    """Unit vectors [B, P] pushed by `amount` in a random direction, and back onto the sphere: Lafite, arXiv 2111.13792, equation 5."""
    noise = torch.randn(points.shape, generator=generator).to(points)
    return F.normalize(points + amount * F.normalize(noise, dim=-1), dim=-1)


def save_adapter(path: str | Path, adapter: ImagePromptAdapter) -> None:
    """Write weights, in half precision, and spec to one .safetensors file."""
    weights = {name: tensor.half() for name, tensor in adapter.state_dict().items()}
    atomic_save_safetensors(weights, path, {FORMAT_KEY: FORMAT, SPEC_KEY: adapter.spec.to_json()})


def load_adapter(path: str | Path) -> ImagePromptAdapter:
    """Read an adapter: on the CPU, frozen, in evaluation mode.

    Raises:
        UserError: the file is missing, damaged, or not an adapter.
    """
    if not Path(path).is_file():
        raise UserError(f"there is no image_prompt_adapter {path}; tools/train_image_prompt_adapter.py makes one")
    try:
        tensors, metadata = load_tensors(path)
    except NoTensors as error:
        raise UserError(f"image_prompt_adapter {path} is not a readable .safetensors file ({error}); copy or train it again") from error
    if metadata.get(FORMAT_KEY) != FORMAT:
        raise UserError(f"{path} is not an image prompt adapter; give a file that tools/train_image_prompt_adapter.py wrote")
    try:
        adapter = ImagePromptAdapter(AdapterSpec.from_json(metadata[SPEC_KEY]))
        adapter.load_state_dict(tensors)
    except Exception as error:  # whatever a header that is not ours makes of the parts
        raise UserError(f"image_prompt_adapter {path} is damaged or of another version; train it again") from error
    return adapter.eval().requires_grad_(False)


def check_adapter_fits(adapter: ImagePromptAdapter, text_encoder: Fingerprint, clip: Fingerprint) -> None:
    """Raises UserError if the adapter was trained for another text encoder, or with another CLIP."""
    if not adapter.spec.text_encoder.matches(text_encoder):
        raise UserError(
            "image_prompt_adapter was trained for another text encoder (or another clip_skip) than this model's; "
            "train one with this model (tools/train_image_prompt_adapter.py)"
        )
    if not adapter.spec.clip.matches(clip):
        raise UserError("image_prompt_adapter was trained with another CLIP than clip_model; give the folder that it was trained with")
