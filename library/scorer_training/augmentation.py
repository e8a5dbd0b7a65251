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
from library.scorer_training.criteria.base import get_criterion
from library.scorers.heads import HeadSpec
from library.settings.options import check_at_least, option


@dataclass(frozen=True, kw_only=True)
class LatentAugmentation:
    """How clean latents are varied before noise is added, anew for every picture and epoch; all of it is off by default."""

    latent_shift: int = option(
        0,
        help="Move latents by up to so many cells (8 pixels each), mirrored at the border; not where position matters. Try 2.",
        expert=True,
    )
    latent_crop: float = option(
        1.0, help="Cut out a part with at least this share of each side; not where the framing matters. Try 0.85; 1 keeps all.", expert=True
    )

    def __post_init__(self) -> None:
        check_at_least(self, 0, "latent_shift")
        if not 0 < self.latent_crop <= 1:
            raise UserError(f"latent_crop is {self.latent_crop}, but it must be above 0 and at most 1, such as 0.85")


def augment(batch: LatentBatch, config: LatentAugmentation, generator: torch.Generator) -> LatentBatch:
    """The batch with its latents varied; the two pictures of a pair alike, so that what they are compared by stays comparable."""
    if config == LatentAugmentation():
        return batch
    seed = int(torch.randint(2**62, (), generator=generator))
    latents, second = (
        None if part is None else shift_and_crop(part, config.latent_shift, config.latent_crop, torch.Generator().manual_seed(seed))
        for part in (batch.latents, batch.second)
    )
    assert latents is not None
    return dataclasses.replace(batch, latents=latents, second=second)


def shift_and_crop(latents: Tensor, max_shift: int, min_share: float, generator: torch.Generator) -> Tensor:
    """Windows [B, C, h', w'] onto latents [B, C, h, w], continued beyond their border by reflection.

    The share of the sides that is kept is uniform in min_share..1 and one for the batch; where a window lies, and by how many cells
    up to max_shift it is moved, is drawn for each picture and side; on the CPU: the same on every device.
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


def mixup(batch: LatentBatch, alpha: float, head: HeadSpec, generator: torch.Generator) -> LatentBatch:
    """Mix every picture, and its target, with another of the batch (Zhang et al., arXiv 1710.09412); for criteria that mix.

    The picture's own share is Beta(alpha, alpha) or one minus that, whichever is larger (MixMatch, arXiv 1905.02249): it stays the
    picture that its weight and its prompt belong to.
    """
    criterion = get_criterion(head.criterion)
    assert criterion.mixes and alpha > 0, f"{criterion.name} does not mix"
    quantiles = torch.rand(len(batch), generator=generator, dtype=torch.float64)
    shares = torch.from_numpy(betaincinv(alpha, alpha, quantiles.numpy()))  # torch's Beta takes no generator
    shares = torch.maximum(shares, 1 - shares).to(batch.latents)
    partners = torch.randperm(len(batch), generator=generator).to(batch.latents.device)

    def mixed(values: Tensor) -> Tensor:
        return torch.lerp(values[partners], values, shares.to(values).view(-1, *[1] * (values.ndim - 1)))

    return dataclasses.replace(batch, latents=mixed(batch.latents), targets=mixed(criterion.mixable(batch.targets, head)))
