"""A vision transformer over latents of any size, with the noise level as an input of every block."""

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from diffusers.models.attention import FeedForward
from torch import Tensor, nn
from torch.nn import functional as F

from library.errors import UserError
from library.scorers.base import SCORER_KINDS, Backbone
from library.scorers.conditioning import DropPath, FiLM, SigmaEmbedding, drop_path_rates
from library.types import Conditioning

LONGEST_PERIOD = 100.0  # of the rotary embedding, in half-sides of the picture; the shortest is 1 (DINOv3, arXiv 2508.10104)
SIGMA_WIDTH = 48  # a place on a line needs few numbers, and every block has weights for each of them


def grid_positions(rows: int, columns: int, device: torch.device) -> Tensor:
    """Centres (y, x) of a grid's cells [rows * columns, 2], from the picture's centre, in halves of its mean side.

    The mean is the geometric one, so that a square is [-1, 1] on both axes at every size and other shapes keep their aspect.
    """
    half = math.sqrt(rows * columns) / 2
    y = (torch.arange(rows, device=device) + 0.5 - rows / 2) / half
    x = (torch.arange(columns, device=device) + 0.5 - columns / 2) / half
    return torch.stack(torch.meshgrid(y, x, indexing="ij"), dim=-1).flatten(0, 1)


def axial_angles(positions: Tensor, num_extra: int, head_width: int) -> Tensor:
    """Angles of the axial rotary embedding (RoPE-ViT, arXiv 2403.13298) of positions [N, T, 2]: [N, 1, num_extra + T, head_width / 2].

    The first half of them belongs to y, the second to x; periods are geometric from 1 to below LONGEST_PERIOD. The extra tokens,
    which come first and belong to no patch, are in the middle of the picture.
    """
    count = head_width // 4
    periods = LONGEST_PERIOD ** (torch.arange(count, device=positions.device) / count)
    positions = F.pad(positions, (0, 0, num_extra, 0))
    return (positions.unsqueeze(-1) * (2 * math.pi / periods)).flatten(-2).unsqueeze(1)


def rotate(features: Tensor, angles: Tensor) -> Tensor:
    """Turn the pairs (i, i + d / 2) of features [B, heads, T, d] by angles broadcast to [B, 1, T, d / 2]; RoFormer, arXiv 2104.09864."""
    first, second = features.chunk(2, dim=-1)
    cos, sin = angles.cos().to(features.dtype), angles.sin().to(features.dtype)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)


def scaled_unit_rms(features: Tensor, scale: Tensor) -> Tensor:
    """features [..., d] divided by their root mean square and multiplied with scale [d]; RMSNorm, arXiv 1910.07467."""
    return F.rms_norm(features, features.shape[-1:]) * scale.to(features.dtype)


class Attention(nn.Module):
    """Multi-head self-attention with normalised queries and keys (ViT-22B, arXiv 2302.05442), in memory linear in the tokens."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_qkv = nn.Linear(width, 3 * width)
        self.query_scale = nn.Parameter(torch.ones(width // heads))
        self.key_scale = nn.Parameter(torch.ones(width // heads))
        self.to_out = nn.Linear(width, width)

    def forward(self, tokens: Tensor, angles: Tensor) -> Tensor:  # [B, T, width], [B or 1, 1, T, head width / 2]
        query, key, value = self.to_qkv(tokens).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # [B, heads, T, d] each
        query, key = scaled_unit_rms(query, self.query_scale), scaled_unit_rms(key, self.key_scale)
        query, key = rotate(query, angles), rotate(key, angles)
        mixed = F.scaled_dot_product_attention(query, key, value)
        return self.to_out(mixed.transpose(1, 2).flatten(2))


class TransformerBlock(nn.Module):
    """Attention and feed-forward over tokens [B, T, width], each normalised before and, given a `sigma_width`, modulated by sigma."""

    def __init__(self, width: int, heads: int, sigma_width: int = 0, dropout: float = 0.0, drop_path: float = 0.0) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention_film = FiLM(sigma_width, width, channel_dim=-1) if sigma_width else None
        self.attention = Attention(width, heads)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp_film = FiLM(sigma_width, width, channel_dim=-1) if sigma_width else None
        self.mlp = FeedForward(width, mult=4, activation_fn="gelu", dropout=dropout)
        self.drop_path = DropPath(drop_path)

    def forward(self, tokens: Tensor, sigma_embedding: Tensor | None, angles: Tensor) -> Tensor:
        hidden = self.attention_norm(tokens)
        if self.attention_film is not None and sigma_embedding is not None:
            hidden = self.attention_film(hidden, sigma_embedding)
        tokens = tokens + self.drop_path(self.attention(hidden, angles))
        hidden = self.mlp_norm(tokens)
        if self.mlp_film is not None and sigma_embedding is not None:
            hidden = self.mlp_film(hidden, sigma_embedding)
        return tokens + self.drop_path(self.mlp(hidden))


class AttentionPooling(nn.Module):
    """One learned query over all tokens; their keys are rotated, so what it gathers may depend on the place."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Parameter(torch.randn(heads, 1, width // heads))
        self.norm = nn.LayerNorm(width)
        self.to_key_value = nn.Linear(width, 2 * width)
        self.key_scale = nn.Parameter(torch.ones(width // heads))

    def forward(self, tokens: Tensor, angles: Tensor) -> Tensor:  # [B, T, width] -> [B, width]
        key, value = self.to_key_value(self.norm(tokens)).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        key = rotate(scaled_unit_rms(key, self.key_scale), angles)
        query = self.query.to(key.dtype).expand(len(tokens), -1, -1, -1)
        return F.scaled_dot_product_attention(query, key, value).flatten(1)


@SCORER_KINDS.register("latent_vit")
class LatentViT(Backbone):
    """Features of latents of any size, from a transformer over their patches.

    Args:
        in_channels: latent channels.
        width: of the tokens; a multiple of 4 * heads.
        depth: transformer blocks.
        heads: of each attention.
        patch: latent cells a side of a token. A picture's last row and column are repeated where they do not fill a patch.
        stem: 3x3 convolutions before the patches are cut (arXiv 2106.14881); 0 for none.
        registers: tokens of no place, for what concerns the whole picture (arXiv 2309.16588).
        dropout: inside the feed-forwards and on the features.
        drop_path: highest rate of stochastic depth.

    Raises:
        UserError: width is no multiple of 4 * heads.
    """

    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "tiny": {"width": 96, "depth": 4, "heads": 3, "patch": 2},  # 0.6 M parameters
        "small": {"width": 256, "depth": 8, "heads": 4, "patch": 2},  # 7 M
        "base": {"width": 384, "depth": 12, "heads": 6, "patch": 2},  # 23 M, the shape of ViT-S
    }

    def __init__(
        self,
        *,
        in_channels: int,
        width: int,
        depth: int,
        heads: int,
        patch: int = 1,
        stem: int = 2,
        registers: int = 4,
        dropout: float = 0.0,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        if width % (4 * heads) != 0:
            raise UserError(f"latent_vit: width is {width} and heads is {heads}, but width must be a multiple of 4 * heads")
        self.in_channels, self.width, self.heads, self.patch = in_channels, width, heads, patch
        self.sigma_embedding = SigmaEmbedding(64, SIGMA_WIDTH)

        channels, layers = in_channels, []
        for _ in range(stem):
            layers += [nn.Conv2d(channels, width // 2, kernel_size=3, padding=1), nn.SiLU()]
            channels = width // 2
        self.stem = nn.Sequential(*layers)
        self.to_tokens = nn.Conv2d(channels, width, kernel_size=patch, stride=patch)
        for layer in [*self.stem, self.to_tokens]:  # torch's own start shrinks the pictures' part of a token to 7 % after two convolutions
            if isinstance(layer, nn.Conv2d) and layer.bias is not None:
                nn.init.kaiming_normal_(layer.weight, nonlinearity="linear" if layer is self.to_tokens else "relu")
                nn.init.zeros_(layer.bias)
        self.registers = nn.Parameter(0.02 * torch.randn(registers, width))
        self.blocks = nn.ModuleList(
            TransformerBlock(width, heads, SIGMA_WIDTH, dropout, rate) for rate in drop_path_rates(drop_path, depth)
        )
        self.pooling = AttentionPooling(width, heads)
        self.feature_width = 2 * width
        self.norm = nn.LayerNorm(self.feature_width)
        self.dropout = nn.Dropout(dropout)

    def fill_patches(self, latents: Tensor) -> Tensor:
        """Repeat the last row and column until patches cover everything: [B, C, h, w] to multiples of the patch."""
        missing_rows, missing_columns = -latents.shape[2] % self.patch, -latents.shape[3] % self.patch
        if missing_rows == 0 and missing_columns == 0:
            return latents
        return F.pad(latents, (0, missing_columns, 0, missing_rows), mode="replicate")

    def encode(self, latents: Tensor, sigmas: Tensor, visible: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Run the transformer.

        Args:
            latents: [B, C, h, w], multiples of the patch. sigmas: [B].
            visible: the patches that it is given [B, T], counted row by row; None for all.

        Returns:
            Tokens [B, extra + T, width], first those that belong to no patch; and their angles.
        """
        emb = self.sigma_embedding(sigmas)
        patches = self.to_tokens(self.stem(latents.to(self.to_tokens.weight.dtype)))  # [B, width, rows, columns]
        rows, columns = patches.shape[2:]
        tokens = patches.flatten(2).transpose(1, 2)  # [B, T, width]
        positions = grid_positions(rows, columns, latents.device).unsqueeze(0)  # [1, T, 2]
        if visible is not None:
            tokens = tokens.gather(1, visible.unsqueeze(-1).expand(-1, -1, self.width))
            positions = positions.expand(len(tokens), -1, -1).gather(1, visible.unsqueeze(-1).expand(-1, -1, 2))

        extra = self.registers.to(tokens.dtype).expand(len(tokens), -1, -1)
        tokens = torch.cat([extra, tokens], dim=1)
        angles = axial_angles(positions, extra.shape[1], self.width // self.heads)
        for block in self.blocks:
            tokens = self.run(block, tokens, emb, angles)
        return tokens, angles

    def forward(self, latents: Tensor, sigmas: Tensor, cond: Conditioning | None = None, prompts: Sequence[str] | None = None) -> Tensor:
        latents = self.fill_patches(latents)
        tokens, angles = self.encode(latents, sigmas)
        num_patches = latents.shape[2] * latents.shape[3] // self.patch**2
        pooled = torch.cat([tokens[:, -num_patches:].mean(1), self.pooling(tokens, angles)], dim=1)  # [B, feature_width]
        return self.dropout(self.norm(pooled))
