"""The noise that a scorer is trained on."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from library.diffusion import noise_schedule
from library.diffusion.noise_schedule import NoiseSchedule
from library.scorer_data.batches import LatentBatch
from library.training.runtime import upload

DrawVisible = Callable[[Tensor, torch.Generator], Tensor | None]  # (latents, generator) -> `NoisyBatch.visible`


def standard_schedule() -> NoiseSchedule:
    """The schedule that SD1, SD2 and SDXL share: sigma from 0.03 to 14.6."""
    return NoiseSchedule.from_config({"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"})


def draw_sigmas(count: int, clean_fraction: float, schedule: NoiseSchedule, generator: torch.Generator) -> Tensor:
    """Noise levels [count]: a share of zeros, the others at uniform timesteps; stratified, so that every batch has its share of each."""
    place = (torch.randperm(count, generator=generator) + torch.rand(count, generator=generator)) / count  # each in a slot of its own, 0..1
    noisy = (place - clean_fraction) / max(1 - clean_fraction, 1e-6)
    timesteps = (noisy * len(schedule)).long().clamp(0, len(schedule) - 1)
    return torch.where(place < clean_fraction, torch.zeros(()), schedule.sigmas(timesteps))


def add_noise_at(latents: Tensor, sigmas: Tensor, noise: Tensor) -> Tensor:
    """Latents and noise [B, C, h, w] at noise levels [B]."""
    return noise_schedule.add_noise(latents, noise, noise_schedule.sigma_to_abar(sigmas))


@dataclass(frozen=True)
class NoisyBatch:
    """A clean batch, and the noise that it is to be seen through: drawn for the whole batch on the CPU, the same however it is parted.

    Attributes:
        sigmas: [B].
        noise, second_noise: as the batch's latents and second latents.
        visible: for filling in hidden cells, the patches that are not hidden [B, T].
    """

    batch: LatentBatch
    sigmas: Tensor
    noise: Tensor
    second_noise: Tensor | None = None
    visible: Tensor | None = None

    @classmethod
    def of(cls, batch: LatentBatch, sigmas: Tensor, rng: torch.Generator, draw_visible: DrawVisible | None = None) -> NoisyBatch:
        """With noise drawn, and with `draw_visible` what is not hidden."""
        noise = torch.randn(batch.latents.shape, generator=rng)
        second = None if batch.second is None else torch.randn(batch.second.shape, generator=rng)
        return cls(batch, sigmas, noise, second, None if draw_visible is None else draw_visible(batch.latents, rng))

    def __len__(self) -> int:
        return len(self.batch)

    def __getitem__(self, rows: slice | Tensor) -> NoisyBatch:
        """These rows of it."""
        return self._each(self.batch[rows], lambda tensor: tensor[rows])

    def to(self, device: torch.device | str) -> NoisyBatch:
        return self._each(self.batch.to(device), lambda tensor: upload(tensor, device))

    @property
    def latents(self) -> Tensor:
        """Noisy latents [B, C, h, w]."""
        return add_noise_at(self.batch.latents, self.sigmas, self.noise)

    @property
    def second(self) -> Tensor | None:
        """Noisy latents of the second pictures of pairs."""
        if self.batch.second is None or self.second_noise is None:
            return None
        return add_noise_at(self.batch.second, self.sigmas, self.second_noise)

    def _each(self, batch: LatentBatch, change: Callable[[Tensor], Tensor]) -> NoisyBatch:
        changed = {name: change(value) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return dataclasses.replace(self, batch=batch, **changed)
