"""What happens to pictures besides their score: how far they move, whether seeds still differ, the marks that a gamed score leaves.

Plain functions, no gradient. B pictures in a batch, S seeds of one prompt; `base` is the picture of the same prompt and seed without
the slider. Pixels are in 0..1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from library.models.vae import Autoencoder, LatentSpace

NYQUIST_BAND = 0.75  # of the Nyquist frequency, where the highest band begins
FEATURE_SIZE = 512  # pixels; larger pictures are shrunk to this longer side before the VAE's encoder looks at them

# ---- how far a picture is from its base ----


@torch.no_grad()
def rms_distance(pictures: Tensor, base: Tensor) -> Tensor:
    """Root mean squared difference of latents or pixels [B, ...] from their base [B, ...] -> [B]."""
    return (pictures.float() - base.float()).square().flatten(1).mean(1).sqrt()


@torch.no_grad()
def channel_statistics_distance(latents: Tensor, base: Tensor) -> Tensor:
    """How far the channels' means and spreads have moved, whatever the picture shows: colour, brightness and contrast of latents.

    sqrt(mean over channels of (mean - mean_0)^2 / std_0^2 + (log std - log std_0)^2), mean and standard deviation over positions.
    0.1 is about a tenth more contrast, or every channel shifted by a tenth of its spread.

    Args:
        latents, base: [B, C, h, w].

    Returns:
        [B], no unit.
    """
    (mean, std), (base_mean, base_std) = (
        (part.mean((2, 3)), part.std((2, 3), unbiased=False).clamp_min(1e-6)) for part in (latents.float(), base.float())
    )
    return (((mean - base_mean) / base_std).square() + (std / base_std).log().square()).mean(1).sqrt()


@torch.no_grad()
def vae_features(vae: Autoencoder, pixels: Tensor) -> list[Tensor]:
    """What the VAE's encoder sees: its activations where it has halved the picture, and the last, of length 1 over channels everywhere.

    Args:
        pixels: [B, 3, H, W] in 0..1, on any device; a picture whose longer side is above `FEATURE_SIZE` is shrunk to it.

    Returns:
        A tensor [B, c, h, w] for each, float32, on the VAE's device.
    """
    height, width = pixels.shape[-2:]
    size = _looked_at(height, width)
    with torch.autocast(vae.device.type, enabled=False):
        parts = []
        for batch in pixels.split(features_at_once(height, width)):
            batch = batch.to(vae.device, torch.float32)
            if size != (height, width):
                batch = F.interpolate(batch, size, mode="bilinear", antialias=True)
            parts.append(_encoder_taps(vae, batch))
    return [torch.cat(layer) for layer in zip(*parts, strict=True)]


def features_at_once(height: int, width: int) -> int:
    """How many pictures of this size go through the encoder at once."""
    size = _looked_at(height, width)
    return max(1, FEATURE_SIZE**2 // (size[0] * size[1]))


def _looked_at(height: int, width: int) -> tuple[int, int]:
    shrink = min(1.0, FEATURE_SIZE / max(height, width))
    return max(1, round(height * shrink)), max(1, round(width * shrink))


def _encoder_taps(vae: Autoencoder, pixels: Tensor) -> list[Tensor]:
    encoder, taps, space = vae.encoder, [], LatentSpace.of(vae)
    if hasattr(encoder, "down_blocks"):
        pixels = (pixels * 2 - 1).to(vae.dtype)
        hidden, blocks = encoder.conv_in(pixels[:, :, None] if space.has_frames else pixels), encoder.down_blocks
    else:  # a tiny one's, whose last layer makes the latents
        hidden, blocks = pixels.to(vae.dtype), encoder.layers[:-1]
    for number, block in enumerate(blocks, start=1):
        before, hidden = hidden, block(hidden)
        if hidden.shape[-1] < before.shape[-1] or number == len(blocks):
            taps.append(F.normalize((hidden[:, :, 0] if space.has_frames else hidden).float(), dim=1))
    return taps


@torch.no_grad()
def perceptual_distance(features: Sequence[Tensor], base: Sequence[Tensor]) -> Tensor:
    """LPIPS's formula without its weights (arXiv 1801.03924, equation 1): the squared distance of unit-length features, mean over
    positions, mean over layers. With `vae_features` it needs no download; it is *not* LPIPS, and its values, 0 (the same) to 4, are
    comparable only among pictures of one VAE.

    Args:
        features, base: a tensor [B, c, h, w] for each layer.

    Returns:
        [B].
    """
    layers = [(part - other).square().sum(1).mean((1, 2)) for part, other in zip(features, base, strict=True)]
    return torch.stack(layers).mean(0)


# ---- whether the seeds of a prompt still give different pictures ----


@torch.no_grad()
def rms_diversity(pictures: Tensor) -> float:
    """Mean RMS distance between two of S pictures or latents [S, ...]."""
    flat = pictures.double().flatten(1)
    return float(torch.pdist(flat).mean()) / math.sqrt(flat.shape[1])


# ---- the marks of a gamed score ----


@torch.no_grad()
def chroma(pixels: Tensor) -> Tensor:
    """How colourful: mean over pixels of the largest minus the smallest of R, G and B (HSV's chroma) -> [B], 0 (grey) to 1."""
    shown = pixels.float().clamp(0, 1)
    return (shown.amax(1) - shown.amin(1)).mean((1, 2))


@torch.no_grad()
def clipped_share(decoded: Tensor) -> Tensor:
    """Share of values at or beyond black or white, of pixels [B, 3, H, W] as decoded, not clamped -> [B]."""
    return ((decoded <= 0) | (decoded >= 1)).float().mean((1, 2, 3))


@torch.no_grad()
def edge_energy(pictures: Tensor) -> Tensor:
    """Mean length of the gradient (differences of neighbours) of pixels or latents [B, C, H, W], over channels and positions -> [B]."""
    pictures = pictures.float()
    across = pictures[..., :-1, 1:] - pictures[..., :-1, :-1]
    down = pictures[..., 1:, :-1] - pictures[..., :-1, :-1]
    return (across.square() + down.square()).sqrt().mean((1, 2, 3))


@torch.no_grad()
def nyquist_share(pictures: Tensor) -> Tensor:
    """Share of the power above `NYQUIST_BAND` of the Nyquist frequency (radially), of pixels or latents [B, C, H, W] -> [B], 0 to 1.

    Grids and fine meshes raise it. The mean is taken off and the picture is faded out towards its border (Hann window), whose jump from
    one side to the other would else count as an edge. 0 where the picture is flat.
    """
    pictures = pictures.double()
    height, width = pictures.shape[-2:]
    window = torch.outer(
        *(torch.hann_window(side, periodic=False, dtype=torch.float64, device=pictures.device) for side in (height, width))
    )
    mean = (pictures * window).sum((2, 3), keepdim=True) / window.sum()
    power = torch.fft.fft2((pictures - mean) * window).abs().square().sum(1)
    frequencies = [torch.fft.fftfreq(side, d=0.5, dtype=torch.float64, device=pictures.device) for side in (height, width)]  # 1 is Nyquist
    radius = torch.hypot(frequencies[0][:, None], frequencies[1][None, :])
    total = power.sum((1, 2))
    share = power[:, radius > NYQUIST_BAND].sum(1) / total.clamp_min(1e-300)
    return torch.where(total > 1e-20, share, 0.0).float()
