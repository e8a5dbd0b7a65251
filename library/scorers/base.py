"""What a scorer is: an opinion about latents at any noise level, and the record of what it was trained for."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from library.models.vae import VaeFingerprint
from library.types import Conditioning


@dataclass(frozen=True, kw_only=True)
class ScorerSpec:
    """All that is needed to build a scorer again and to know what it may be used for.

    Attributes:
        kind: which backbone, a key of `library.scorers.registry.BACKBONES`.
        architecture: the keyword arguments of that backbone.
        vae: the VAE whose latents it reads.
        noise_aware: whether it was trained on noisy latents; if not, only sigma 0 means something.
        uses_prompt: whether the score depends on the prompt.
        mean, std: mean and standard deviation of the score over its training pictures, in the score's own units; std is above 0.
        training: how it was trained and how well it does, as plain JSON values (the per-sigma table is under "validation").
    """

    kind: str
    architecture: dict[str, Any]
    vae: VaeFingerprint
    noise_aware: bool = True
    uses_prompt: bool = False
    mean: float = 0.0
    std: float = 1.0
    training: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        return json.dumps({**asdict(self), "vae": self.vae.to_dict()})

    @staticmethod
    def from_json(text: str) -> "ScorerSpec":
        """Raises ValueError, KeyError or TypeError when the text is not what `to_json` writes."""
        values = json.loads(text)
        return ScorerSpec(**{**values, "vae": VaeFingerprint.from_dict(values["vae"])})


class Backbone(nn.Module):
    """Latents and their sigma to features: the part of a scorer that is kept when it learns another opinion.

    A backbone is built from JSON values by keyword (`ScorerSpec.architecture`); `presets` names sets of them by size.
    """

    presets: ClassVar[dict[str, dict[str, Any]]] = {}
    feature_width: int

    def forward(
        self, latents: Tensor, sigmas: Tensor, cond: Conditioning | None = None, prompts: Sequence[str] | None = None
    ) -> Tensor:  # [B, feature_width]
        raise NotImplementedError


class Scorer(nn.Module):
    """A score of latents, in the score's own units; higher is better.

    A subclass implements `standardised`; the scale of the score is applied here, so that the same network can be trained
    on any score. Gradients flow to the latents.

    Attributes:
        spec: what it is and what it was trained for.
        name: for messages and logs; a loaded scorer has the name of its file.
    """

    score_mean: Tensor
    score_std: Tensor

    def __init__(self, spec: ScorerSpec) -> None:
        super().__init__()
        assert spec.std > 0, f"a score's standard deviation is above 0, not {spec.std}"
        self.spec = spec
        self.name = spec.kind
        self.register_buffer("score_mean", torch.tensor(float(spec.mean)), persistent=False)  # the spec is what is saved
        self.register_buffer("score_std", torch.tensor(float(spec.std)), persistent=False)

    def forward(self, latents: Tensor, sigmas: Tensor, cond: Conditioning | None = None, prompts: Sequence[str] | None = None) -> Tensor:
        """Score a batch.

        Args:
            latents: variance-preserving, scaled latents [B, C, h, w].
            sigmas: their noise level sqrt(1 - abar) / sqrt(abar) [B]; 0 is clean, infinity is pure noise.
            cond, prompts: what was asked for, B rows each; read by scorers whose spec says `uses_prompt`.

        Returns:
            Scores [B], float32.
        """
        assert latents.ndim == 4, f"latents are [B, C, h, w], not {list(latents.shape)}"
        assert sigmas.shape == latents.shape[:1], f"sigmas are [{latents.shape[0]}], not {list(sigmas.shape)}"
        assert self.spec.uses_prompt is False or cond is not None or prompts is not None, f"scorer {self.name} needs the prompts"
        scores = self.standardised(latents, sigmas, cond, prompts)
        assert scores.shape == sigmas.shape, f"a scorer returns [{sigmas.shape[0]}], not {list(scores.shape)}"
        return scores.float() * self.score_std + self.score_mean

    def standardised(self, latents: Tensor, sigmas: Tensor, cond: Conditioning | None, prompts: Sequence[str] | None) -> Tensor:
        """The score in units of its standard deviation around its mean [B]: what training compares with standardised ratings."""
        raise NotImplementedError


class BackboneScorer(Scorer):
    """A backbone and one linear layer."""

    backbone: Backbone
    head: nn.Linear

    def __init__(self, spec: ScorerSpec, backbone: Backbone) -> None:
        super().__init__(spec)
        self.backbone = backbone
        self.head = nn.Linear(backbone.feature_width, 1)

    def standardised(self, latents: Tensor, sigmas: Tensor, cond: Conditioning | None, prompts: Sequence[str] | None) -> Tensor:
        return self.head(self.backbone(latents, sigmas, cond, prompts)).squeeze(1)
