"""Which text encoder and which CLIP an adapter belongs to: what they make of one prompt."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from library.models.base import DiffusionModel

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
    return Fingerprint.of(model.encode_prompts([PROBE_PROMPT]).text[0, 1:16])
