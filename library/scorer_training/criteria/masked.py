"""Masked pretraining: a transformer learns to see from pictures that nobody has rated."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from library.errors import UserError
from library.scorer_training.criteria.base import CRITERIA
from library.scorer_training.criteria.self_taught import FromPictures, SelfTaught
from library.scorers.base import Backbone

MASKED = 0.6  # share of the patches that the backbone does not see


@CRITERIA.register("masked")
class MaskedCells(FromPictures):
    """Filling in hidden cells; `MaskedLatentPretraining` computes the error."""

    def pretraining(self, backbone: Backbone, decode: Callable[[Tensor], Tensor]) -> "MaskedLatentPretraining":
        return MaskedLatentPretraining(backbone)


def draw_visible(count: int, num_patches: int, masked_fraction: float, generator: torch.Generator) -> Tensor:
    """The patches that stay visible in each of `count` pictures: indices [count, T], at least one, without repetition."""
    num_visible = max(1, round(num_patches * (1 - masked_fraction)))
    return torch.rand(count, num_patches, generator=generator).argsort(dim=1)[:, :num_visible]


class MaskedLatentPretraining(SelfTaught):
    """A masked autoencoder (arXiv 2111.06377) of noisy latents: the backbone sees some patches, a small decoder fills in the others.

    Hidden cells are 0 before the convolutions of the stem, which would see across the border of a patch. The target is clean
    latents, so that the backbone learns to look through noise as well.

    Args:
        backbone: what is trained and kept.

    Raises:
        UserError: the backbone has no patches to hide.
    """

    def __init__(self, backbone: Backbone) -> None:
        from library.scorers.kinds.latent_vit import LatentViT, TransformerBlock

        super().__init__()
        if not isinstance(backbone, LatentViT):
            raise UserError(f"masked pretraining hides tokens, which a {type(backbone).__name__} has not; set scorer_kind to latent_vit")
        self.backbone = backbone
        self.mask_token = nn.Parameter(0.02 * torch.randn(backbone.width))
        self.decoder = TransformerBlock(backbone.width, backbone.heads)  # which is not kept
        self.norm = nn.LayerNorm(backbone.width)
        self.to_latents = nn.Linear(backbone.width, backbone.in_channels * backbone.patch**2)

    def draw_visible(self, latents: Tensor, generator: torch.Generator) -> Tensor:
        """What is not hidden of latents [B, C, h, w]: patches [B, V], on the CPU."""
        rows, columns = (math.ceil(side / self.backbone.patch) for side in latents.shape[2:])
        return draw_visible(len(latents), rows * columns, MASKED, generator)

    def forward(self, latents: Tensor, sigmas: Tensor, clean: Tensor, visible: Tensor | None) -> Tensor:
        """The loss of each picture.

        Args:
            latents: noisy, variance-preserving latents [B, C, h, w]. sigmas: their noise levels [B].
            clean: the same pictures without noise [B, C, h, w].
            visible: the patches that are not hidden [B, V].

        Returns:
            Mean squared error over the hidden cells [B].
        """
        from library.scorers.kinds.latent_vit import axial_angles, grid_positions

        assert visible is not None
        backbone, patch = self.backbone, self.backbone.patch
        latents, clean = backbone.fill_patches(latents), backbone.fill_patches(clean)
        rows, columns = latents.shape[2] // patch, latents.shape[3] // patch
        hidden = torch.ones(len(latents), rows * columns, device=latents.device).scatter(1, visible, 0.0)  # [B, T], 1 where hidden
        mask = hidden.view(-1, 1, rows, columns).repeat_interleave(patch, 2).repeat_interleave(patch, 3)  # [B, 1, h, w]

        seen, _ = backbone.encode(latents * (1 - mask), sigmas, visible)
        num_extra = seen.shape[1] - visible.shape[1]
        patches = self.mask_token.to(seen.dtype).expand(len(seen), rows * columns, -1)
        patches = patches.scatter(1, visible.unsqueeze(-1).expand(-1, -1, seen.shape[2]), seen[:, num_extra:])
        tokens = torch.cat([seen[:, :num_extra], patches], dim=1)
        angles = axial_angles(grid_positions(rows, columns, latents.device).unsqueeze(0), num_extra, backbone.width // backbone.heads)
        predicted = self.to_latents(self.norm(self.decoder(tokens, None, angles)[:, num_extra:]))  # [B, T, C * patch * patch]
        predicted = nn.functional.fold(predicted.transpose(1, 2), clean.shape[2:], kernel_size=patch, stride=patch)
        errors = (predicted.float() - clean.float()).square().mean(1, keepdim=True)  # [B, 1, h, w]
        return (errors * mask).sum((1, 2, 3)) / mask.sum((1, 2, 3))
