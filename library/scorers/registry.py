"""The kinds of scorer there are. To add one: write a `Backbone` in a file of its own and add its row here."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from library.errors import UserError
from library.scorers.base import Backbone, BackboneScorer, ScorerSpec
from library.scorers.latent_resnet import LatentResNet
from library.scorers.latent_vit import LatentViT
from library.scorers.pixel import PixelBackbone
from library.scorers.timm_backbone import TimmBackbone
from library.scorers.transformers_cnn import TransformersCnn
from library.scorers.unet_encoder import UNetEncoder

BACKBONES: Mapping[str, type[Backbone]] = MappingProxyType(
    {
        "latent_resnet": LatentResNet,
        "transformers_cnn": TransformersCnn,
        "timm": TimmBackbone,
        "latent_vit": LatentViT,
        "unet_encoder": UNetEncoder,
        "pixel": PixelBackbone,
    }
)


def get_backbone(kind: str) -> type[Backbone]:
    """Raises UserError when there is no such kind."""
    if kind not in BACKBONES:
        raise UserError(f"there is no scorer kind {kind!r}; it can be {', '.join(BACKBONES)}")
    return BACKBONES[kind]


def preset_architecture(kind: str, size: str) -> dict[str, Any]:
    """The architecture of a kind in one of its sizes, without `in_channels`. Raises UserError when there is no such kind or size."""
    presets = get_backbone(kind).presets
    if size not in presets:
        raise UserError(f"scorer kind {kind} has no size {size!r}; it can be {', '.join(presets)}")
    return dict(presets[size])


def build_scorer(spec: ScorerSpec) -> BackboneScorer:
    """A scorer with random weights, drawn from torch's global generator as all of torch's layers are."""
    return BackboneScorer(spec, get_backbone(spec.kind)(**spec.architecture))
