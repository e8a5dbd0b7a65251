"""What a scorer is: an opinion about latents at any noise level, and the record of what it was trained for."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from library.errors import UserError
from library.models.base import DiffusionModel
from library.models.vae import Autoencoder, LatentSpace, VaeFingerprint
from library.scorers.heads import Head, HeadSpec, score_and_uncertainty
from library.settings.registry import Registry
from library.types import Conditioning


@dataclass(frozen=True, kw_only=True)
class ScorerSpec:
    """All that is needed to build a scorer again and to know what it may be used for.

    Attributes:
        kind: which backbone, a name in SCORER_KINDS.
        architecture: the keyword arguments of that backbone.
        vae: the VAE whose latents it reads.
        heads: what it puts out, one for each thing that it learned.
        score_head: name of the head whose reading is the score.
        noise_aware: whether it was trained on noisy latents; if not, only sigma 0 means something.
        uses_prompt: whether the score depends on the prompt.
        mean, std: mean and standard deviation of the score over a reference set of pictures, in the score's own units; std is above 0.
        training: how it was trained and how well it does, as plain JSON values (the per-sigma table is under "validation").
    """

    kind: str
    architecture: dict[str, Any]
    vae: VaeFingerprint
    heads: tuple[HeadSpec, ...] = (HeadSpec(),)
    score_head: str = "score"
    noise_aware: bool = True
    uses_prompt: bool = False
    mean: float = 0.0
    std: float = 1.0
    training: dict[str, Any] = field(default_factory=dict)

    def head(self, name: str | None = None) -> HeadSpec:
        """The head of that name, or the one that is the score."""
        return next(head for head in self.heads if head.name == (name or self.score_head))

    def to_json(self) -> str:
        return json.dumps({**asdict(self), "vae": self.vae.to_dict()})


@dataclass(frozen=True)
class ModelSource:
    """Where a backbone that starts from other models' weights finds them.

    Attributes:
        model: loads the diffusion model that the run was given. Raises UserError if only a VAE was given.
        vae: the run's VAE.
    """

    model: Callable[[], DiffusionModel]
    vae: Autoencoder


class Backbone(nn.Module):
    """Latents and their sigma to features: the part of a scorer that is kept when it learns another opinion.

    A backbone is built from JSON values by keyword (`ScorerSpec.architecture`) and then has random weights; those of a file
    are loaded over them. A new run calls `architecture_for` to make the JSON values and `initialise` to fill in weights that
    the backbone takes from elsewhere.

    Attributes:
        presets: arguments of each of its sizes, by the name that `scorer_size` gives.
        not_chosen: arguments that are not the user's to choose by `scorer_args`.
        feature_width: numbers that it puts out for a picture.
        features_are_given: whether ratings do not train it, so that a head is all that is learned from them.
        recomputes: whether `run` computes activations a second time in the backward pass, which saves memory.
    """

    presets: ClassVar[dict[str, dict[str, Any]]] = {}
    not_chosen: ClassVar[tuple[str, ...]] = ("in_channels",)
    features_are_given: ClassVar[bool] = False
    feature_width: int
    recomputes = False

    def forward(
        self, latents: Tensor, sigmas: Tensor, cond: Conditioning | None = None, prompts: Sequence[str] | None = None
    ) -> Tensor:  # [B, feature_width]
        raise NotImplementedError

    @classmethod
    def architecture_for(cls, size: str, source: ModelSource, **options: Any) -> dict[str, Any]:
        """The JSON values of a new backbone. `options` are those of `library.scorer_training.config.ScorerConfig.backbone_options`.

        Raises:
            UserError: there is no such size, or an option that this kind does not have.
        """
        known = [name for name in inspect.signature(cls.__init__).parameters if name not in ("self", *cls.not_chosen)]
        check_scorer_args(cls.__name__, options, known)
        return {"in_channels": LatentSpace.of(source.vae).channels, **cls.preset(size), **options}

    @classmethod
    def preset(cls, size: str) -> dict[str, Any]:
        """The arguments of one of its sizes, without `in_channels`. Raises UserError when there is no such size."""
        if size not in cls.presets:
            raise UserError(f"{cls.__name__} has no size {size!r}; scorer_size can be {', '.join(cls.presets)}")
        return dict(cls.presets[size])

    def initialise(self, source: ModelSource) -> None:
        """Take weights from the diffusion model, its VAE or a library's pretrained files. Most kinds start from random weights."""

    def check_taught(self) -> None:
        """Called before ratings are learned. Raises UserError where `features_are_given` and nothing has taught it to give them."""

    def layers(self) -> list[list[nn.Parameter]]:
        """Its parameters, part after part, each once: the order in which the gradient's norm is summed, which decides its last digit."""
        parts = [self.parameters(recurse=False), *(child.parameters() for child in self.children())]
        return [layer for part in parts if (layer := list(part))]

    def saved_state(self) -> dict[str, Tensor]:
        """What its file holds: the state dict, each tensor in the dtype that it is stored in. `load_state_dict` takes it back."""
        return self.state_dict()

    def enable_gradient_checkpointing(self) -> None:
        """Recompute the activations of what it gives to `run`."""
        self.recomputes = True

    def run(self, part: nn.Module, *args: Any) -> Any:
        """What a part of it makes of `args`, keeping its activations for the backward pass or not."""
        if self.recomputes and torch.is_grad_enabled():
            return checkpoint(part, *args, use_reentrant=False)
        return part(*args)


SCORER_KINDS: Registry[type[Backbone]] = Registry("scorer_kind", "library.scorers.kinds", named_after_modules=True)


def check_scorer_args(kind: str, options: Iterable[str], known: Sequence[str]) -> None:
    """Raises UserError when `scorer_args` names something that a kind does not know."""
    for name in options:
        if name not in known:
            raise UserError(f"scorer_args: {kind} has no {name!r}; it has {', '.join(known)}")


class Scorer(nn.Module):
    """A score of latents, in the score's own units; higher is better. A subclass implements `score`. Gradients flow to the latents.

    Attributes:
        spec: what it is and what it was trained for.
        name: for messages and logs; a loaded scorer has the name of its file.
    """

    def __init__(self, spec: ScorerSpec) -> None:
        super().__init__()
        assert spec.std > 0, f"a score's standard deviation is above 0, not {spec.std}"
        self.spec = spec
        self.name = spec.kind

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
        scores = self.score(latents, sigmas, cond, prompts)
        assert scores.shape == sigmas.shape, f"a scorer returns [{sigmas.shape[0]}], not {list(scores.shape)}"
        return scores.float()

    def score(self, latents: Tensor, sigmas: Tensor, cond: Conditioning | None, prompts: Sequence[str] | None) -> Tensor:
        """The score [B] in its own units."""
        raise NotImplementedError

    def saved_state(self) -> dict[str, Tensor]:
        """What its file holds; see `Backbone.saved_state`."""
        return self.state_dict()

    def enable_gradient_checkpointing(self) -> None:
        """Recompute activations in the backward pass, where the scorer is large enough to need it."""

    def score_and_uncertainty(
        self, latents: Tensor, sigmas: Tensor, cond: Conditioning | None = None, prompts: Sequence[str] | None = None
    ) -> tuple[Tensor, Tensor]:
        """The score [B] and the standard deviation that the scorer itself gives it [B], both in the score's units; 0 if it gives none."""
        scores = self(latents, sigmas, cond, prompts)
        return scores, torch.zeros_like(scores)


class BackboneScorer(Scorer):
    """A backbone with a head for each thing that it learned."""

    backbone: Backbone

    def __init__(self, spec: ScorerSpec, backbone: Backbone) -> None:
        super().__init__(spec)
        self.backbone = backbone
        self.heads = nn.ModuleDict({head.name: Head(backbone.feature_width, head) for head in spec.heads})

    def outputs(
        self, head: str, latents: Tensor, sigmas: Tensor, cond: Conditioning | None = None, prompts: Sequence[str] | None = None
    ) -> Tensor:  # [B, members, K]
        """What a criterion learns: the outputs of one head, before they are read."""
        return self.heads[head](self.backbone(latents, sigmas, cond, prompts))

    def saved_state(self) -> dict[str, Tensor]:
        return self.state_dict() | {f"backbone.{name}": tensor for name, tensor in self.backbone.saved_state().items()}

    def enable_gradient_checkpointing(self) -> None:
        self.backbone.enable_gradient_checkpointing()

    def score(self, latents: Tensor, sigmas: Tensor, cond: Conditioning | None, prompts: Sequence[str] | None) -> Tensor:
        return self.score_and_uncertainty(latents, sigmas, cond, prompts)[0]

    def score_and_uncertainty(
        self, latents: Tensor, sigmas: Tensor, cond: Conditioning | None = None, prompts: Sequence[str] | None = None
    ) -> tuple[Tensor, Tensor]:
        return score_and_uncertainty(self.outputs(self.spec.score_head, latents, sigmas, cond, prompts), self.spec.head())


def build_scorer(spec: ScorerSpec) -> BackboneScorer:
    """A scorer with random weights, drawn from torch's global generator. Raises UserError for an unknown kind."""
    return BackboneScorer(spec, SCORER_KINDS[spec.kind](**spec.architecture))
