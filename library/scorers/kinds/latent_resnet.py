"""A residual network over latents, with the noise level as an input of every block."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from library.scorers.base import SCORER_KINDS, Backbone
from library.scorers.conditioning import DropPath, SigmaEmbedding, drop_path_rates
from library.types import Conditioning


class StochasticResnetBlock(ResnetBlock2D):
    """diffusers' residual block; in training it lets a share of the pictures pass unchanged, where its width does not change.

    Args:
        drop_path: that share. Further arguments are those of `ResnetBlock2D`.
    """

    def __init__(self, *, drop_path: float, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.drop_path = DropPath(drop_path if self.in_channels == self.out_channels else 0.0)

    def forward(self, input_tensor: Tensor, temb: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride] - always with one
        hidden = super().forward(input_tensor, temb)
        if self.drop_path.rate == 0:
            return hidden
        return input_tensor + self.drop_path(hidden - input_tensor)


@SCORER_KINDS.register("latent_resnet")
class LatentResNet(Backbone):
    """Features of latents of any size, from diffusers' U-Net blocks.

    The first convolution keeps the resolution, since latents may be only 8 x 8, and each later stage halves it. Every
    block is GroupNorm - SiLU - convolution twice, scaled and shifted by an embedding of sigma; SiLU keeps the gradient
    towards the latents smooth. Absolute level, which GroupNorm hides from a block, lives on in the residual stream, so
    the stream is pooled as it is (mean and maximum over space) and normalised only after that.

    Args:
        in_channels: latent channels.
        channels: width of each stage, multiples of `norm_groups`.
        blocks: residual blocks in each stage.
        norm_groups: groups of the group norms.
        dropout: inside the blocks, and on the features.
        drop_path: highest rate of stochastic depth.
    """

    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "tiny": {"channels": [48, 96], "blocks": 2, "norm_groups": 8},  # 0.5 M parameters
        "small": {"channels": [64, 128, 256], "blocks": 2, "norm_groups": 16},  # 3.5 M
        "base": {"channels": [128, 256, 512], "blocks": 2, "norm_groups": 32},  # 13 M
    }

    def __init__(
        self, *, in_channels: int, channels: Sequence[int], blocks: int, norm_groups: int, dropout: float = 0.0, drop_path: float = 0.0
    ) -> None:
        super().__init__()
        sigma_width = 4 * channels[0]
        self.sigma_embedding = SigmaEmbedding(channels[0], sigma_width)
        self.stem = nn.Conv2d(in_channels, channels[0], kernel_size=3, padding=1)

        rates = iter(drop_path_rates(drop_path, blocks * len(channels)))
        self.stages = nn.ModuleList()
        self.downsamplers = nn.ModuleList()  # before each stage but the first
        width = channels[0]
        for stage, next_width in enumerate(channels):
            if stage > 0:
                self.downsamplers.append(Downsample2D(width, use_conv=True, name="op"))
            stage_blocks = nn.ModuleList()
            for _ in range(blocks):
                block = StochasticResnetBlock(
                    in_channels=width,
                    out_channels=next_width,
                    temb_channels=sigma_width,
                    groups=norm_groups,
                    dropout=dropout,
                    time_embedding_norm="scale_shift",
                    drop_path=next(rates),
                )
                stage_blocks.append(block)
                width = next_width
            self.stages.append(stage_blocks)

        self.feature_width = 2 * width
        self.norm = nn.LayerNorm(self.feature_width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, latents: Tensor, sigmas: Tensor, cond: Conditioning | None = None, prompts: Sequence[str] | None = None) -> Tensor:
        embedding = self.sigma_embedding(sigmas)
        hidden = self.stem(latents.to(self.stem.weight.dtype))
        for stage, stage_blocks in enumerate(self.stages):
            if stage > 0:
                hidden = self.downsamplers[stage - 1](hidden)
            for block in stage_blocks:  # pyright: ignore[reportGeneralTypeIssues]
                hidden = self.run(block, hidden, embedding)
        pooled = torch.cat([hidden.mean((2, 3)), hidden.amax((2, 3))], dim=1)  # [B, feature_width]
        return self.dropout(self.norm(pooled))

    def layers(self) -> list[list[nn.Parameter]]:
        stages = [[self.stages[0]], *([down, stage] for down, stage in zip(self.downsamplers, self.stages[1:], strict=True))]
        groups = [[self.sigma_embedding, self.stem], *stages, [self.norm]]
        return [[parameter for module in group for parameter in module.parameters()] for group in groups]
