"""Variations of cached latents while training, and mixtures of them.

What changes a picture must change its latents in the same way, which leaves out flips: a mirrored latent is not the latent of the
mirrored picture, so flips come from the cache. Moving and cutting a latent by whole cells is nearly what it is on the picture.
"""

import dataclasses
from dataclasses import dataclass

import torch
from scipy.special import betaincinv
from torch import Tensor

from library.errors import UserError
from library.scorer_data.batches import LatentBatch
from library.scorer_training.criteria.registry import CRITERIA
from library.scorers.heads import HeadSpec
from library.settings.options import check_at_least, option


@dataclass(frozen=True, kw_only=True)
class LatentAugmentation:
    """How clean latents are varied before noise is added, anew for every picture and epoch; all of it is off by default."""

    latent_shift: int = option(
        0, help="Move latents by up to so many cells (8 pixels each), mirrored at the border; not where position matters. Try 2."
    )
    latent_crop: float = option(
        1.0, help="Cut out a part with at least this share of each side; not where the framing matters. Try 0.85; 1 keeps all."
    )
    latent_jitter: float = option(
        0.0, help="Vary mean and spread of each channel by about this much: brightness and contrast, if they do not matter. Try 0.05."
    )
    latent_noise: float = option(0.0, help="Standard deviation of noise that the scorer is not told of. Try 0.05.")
    latent_cutout: float = option(0.0, help="Blank out a square of this share of the shorter side. Try 0.25.")

    def __post_init__(self) -> None:
        check_at_least(self, 0, "latent_shift", "latent_jitter", "latent_noise", "latent_cutout")
        if not 0 < self.latent_crop <= 1:
            raise UserError(f"latent_crop is {self.latent_crop}, but it must be above 0 and at most 1, such as 0.85")
        if self.latent_cutout >= 1:
            raise UserError(f"latent_cutout is {self.latent_cutout}, but it must be below 1, such as 0.25")


def augment(batch: LatentBatch, config: LatentAugmentation, generator: torch.Generator) -> LatentBatch:
    """The batch with its latents varied; the two pictures of a pair alike, so that what they are compared by stays comparable."""
    if config == LatentAugmentation():
        return batch
    seed = int(torch.randint(2**62, (), generator=generator))
    latents, second = (
        None if part is None else vary(part, config, torch.Generator().manual_seed(seed)) for part in (batch.latents, batch.second)
    )
    assert latents is not None
    return dataclasses.replace(batch, latents=latents, second=second)


def vary(latents: Tensor, config: LatentAugmentation, generator: torch.Generator) -> Tensor:
    """Clean latents [B, C, h, w] varied picture by picture. The size may shrink by `latent_crop`, alike for the whole batch.

    All is drawn on the CPU: the same on every device.
    """
    if config.latent_shift or config.latent_crop < 1:
        latents = shift_and_crop(latents, config.latent_shift, config.latent_crop, generator)
    if config.latent_jitter:
        latents = jitter(latents, config.latent_jitter, generator)
    if config.latent_noise:
        latents = latents + config.latent_noise * torch.randn(latents.shape, generator=generator).to(latents)
    if config.latent_cutout:
        latents = cutout(latents, config.latent_cutout, generator)
    return latents


def shift_and_crop(latents: Tensor, max_shift: int, min_share: float, generator: torch.Generator) -> Tensor:
    """Windows [B, C, h', w'] onto latents [B, C, h, w], continued beyond their border by reflection.

    The share of the sides that is kept is uniform in min_share..1 and one for the batch; where a window lies, and by how many cells
    up to max_shift it is moved, is drawn for each picture and side.
    """
    kept = min_share + (1 - min_share) * torch.rand((), generator=generator).item()
    rows, columns = (
        _window(size, max(1, round(kept * size)), len(latents), max_shift, generator).to(latents.device) for size in latents.shape[2:]
    )
    pictures = torch.arange(len(latents), device=latents.device).view(-1, 1, 1)
    return latents.permute(0, 2, 3, 1)[pictures, rows.unsqueeze(2), columns.unsqueeze(1)].permute(0, 3, 1, 2).contiguous()


def _window(size: int, kept: int, count: int, max_shift: int, generator: torch.Generator) -> Tensor:
    """Which of `size` places each of `count` windows shows [count, kept]."""
    start = (torch.rand(count, generator=generator) * (size - kept + 1)).long()
    shift = torch.randint(-max_shift, max_shift + 1, (count,), generator=generator)
    places = (start + shift).unsqueeze(1) + torch.arange(kept)
    period = max(1, 2 * (size - 1))  # reflection that does not repeat the border itself: 0 1 2 1 0 1 2 ...
    return torch.minimum(places % period, -places % period)


def jitter(latents: Tensor, amount: float, generator: torch.Generator) -> Tensor:
    """Scale each picture's channels around their mean by 1 + amount n, and move the mean by amount n', n and n' standard normal."""
    scale, offset = (amount * torch.randn(2, *latents.shape[:2], 1, 1, generator=generator)).to(latents)
    mean = latents.mean((2, 3), keepdim=True)
    return (latents - mean) * (1 + scale) + mean + offset


def cutout(latents: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """Replace a square by the channels' means (DeVries and Taylor, arXiv 1708.04552); its centre is anywhere, so it may be cut off."""
    side = max(1, round(share * min(latents.shape[2:])))
    inside = []
    for size in latents.shape[2:]:
        start = (torch.rand(len(latents), 1, generator=generator) * size).long() - side // 2
        inside.append(((torch.arange(size) >= start) & (torch.arange(size) < start + side)).to(latents.device))
    mask = inside[0].unsqueeze(2) & inside[1].unsqueeze(1)  # [B, h, w]
    return torch.where(mask.unsqueeze(1), latents.mean((2, 3), keepdim=True), latents)


def mixup(batch: LatentBatch, alpha: float, head: HeadSpec, generator: torch.Generator) -> LatentBatch:
    """Mix every picture, and its target, with another of the batch (Zhang et al., arXiv 1710.09412); for criteria that mix.

    The picture's own share is Beta(alpha, alpha) or one minus that, whichever is larger (MixMatch, arXiv 1905.02249): it stays the
    picture that its weight and its prompt belong to.
    """
    criterion = CRITERIA[head.criterion]
    assert criterion.mixes and alpha > 0, f"{criterion.name} does not mix"
    quantiles = torch.rand(len(batch), generator=generator, dtype=torch.float64)
    shares = torch.from_numpy(betaincinv(alpha, alpha, quantiles.numpy()))  # torch's Beta takes no generator
    shares = torch.maximum(shares, 1 - shares).to(batch.latents)
    partners = torch.randperm(len(batch), generator=generator).to(batch.latents.device)

    def mixed(values: Tensor) -> Tensor:
        return torch.lerp(values[partners], values, shares.to(values).view(-1, *[1] * (values.ndim - 1)))

    return dataclasses.replace(batch, latents=mixed(batch.latents), targets=mixed(criterion.mixable(batch.targets, head)))
