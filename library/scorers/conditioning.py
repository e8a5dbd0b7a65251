"""What the kinds of backbone share: how the noise level enters them, and stochastic depth."""

import math

import torch
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from torch import Tensor, nn


def noise_angle(sigmas: Tensor) -> Tensor:
    """sigma in 0..infinity to 0..1000, bounded and monotone: 2000/pi atan(sigma), the angle of variance-preserving noise."""
    return torch.atan(sigmas) * (2000 / math.pi)


class SigmaEmbedding(TimestepEmbedding):
    """Noise levels [B], 0 to infinity, to vectors [B, width] in the weights' precision: sinusoids of the noise angle through an MLP.

    Args:
        features: number of sinusoids, even.
        width: of the result.
    """

    def __init__(self, features: int, width: int) -> None:
        super().__init__(features, width)
        self.sinusoids = Timesteps(features, flip_sin_to_cos=True, downscale_freq_shift=0)

    def forward(self, sigmas: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride] - sigmas are embedded here
        return super().forward(self.sinusoids(noise_angle(sigmas.float())).to(self.linear_1.weight.dtype))


class FiLM(nn.Module):
    """Feature-wise linear modulation (arXiv 1709.07871): x (1 + a) + b, with a and b linear in an embedding.

    It starts close to the identity, so that pretrained features survive their first steps.

    Args:
        embedding_width: of the embedding [B, embedding_width].
        channels: of x.
        channel_dim: which dimension of x they are: 1 for maps [B, C, h, w] and vectors [B, C], -1 for tokens [B, N, C].
    """

    def __init__(self, embedding_width: int, channels: int, channel_dim: int = 1) -> None:
        super().__init__()
        self.channel_dim = channel_dim
        self.projection = nn.Linear(embedding_width, 2 * channels)
        nn.init.normal_(self.projection.weight, std=0.02)
        nn.init.zeros_(self.projection.bias)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        shape = [1] * x.ndim
        shape[0], shape[self.channel_dim] = x.shape[0], x.shape[self.channel_dim]
        scale, shift = self.projection(nn.functional.silu(embedding)).to(x.dtype).chunk(2, dim=1)
        return x * (1 + scale.view(shape)) + shift.view(shape)


class DropPath(nn.Module):
    """Stochastic depth (arXiv 1603.09382): in training, leaves a residual branch out for a share of the pictures and scales up the others.

    Args:
        rate: that share, 0 to below 1.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        assert 0 <= rate < 1, f"stochastic depth leaves out a share of 0 to below 1, not {rate}"
        self.rate = rate

    def forward(self, branch: Tensor) -> Tensor:  # [B, ...]
        if not self.training or self.rate == 0:
            return branch
        kept = torch.rand(branch.shape[0], *[1] * (branch.ndim - 1), device=branch.device) >= self.rate
        return branch * kept / (1 - self.rate)


def drop_path_rates(highest: float, blocks: int) -> list[float]:
    """Rates of stochastic depth that rise linearly from 0 at the first block to `highest` at the last."""
    return [highest * block / max(blocks - 1, 1) for block in range(blocks)]
