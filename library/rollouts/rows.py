"""Rows of one call of the U-Net: several predictions of a batch of trajectories side by side, without gradient."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from library.models.base import DiffusionModel
from library.types import Conditioning, RolloutBatch
from networks.lora import LoRANetwork


@dataclass(frozen=True)
class Rows:
    """R rows: latents [R, C, h, w], timesteps [R], their conditioning, and what the LoRA is multiplied with [R]."""

    latents: Tensor
    timesteps: Tensor
    cond: Conditioning
    multipliers: Tensor

    def __len__(self) -> int:
        return len(self.latents)


def rows_of(batch: RolloutBatch, cond: Conditioning, index: Tensor | None = None) -> Rows:
    """Rows of a batch with the LoRA: those at `index` [R], None all, with their conditioning among these B."""
    if index is None:
        return Rows(batch.latents, batch.timesteps, cond, batch.multipliers)
    return Rows(batch.latents[index], batch.timesteps[index], cond[index], batch.multipliers[index])


def frozen_rows_of(batch: RolloutBatch, cond: Conditioning, index: Tensor | None = None) -> Rows:
    """Rows of a batch without the LoRA: those at `index` [R], None all, with these R conditionings."""
    latents, timesteps = (batch.latents, batch.timesteps) if index is None else (batch.latents[index], batch.timesteps[index])
    return Rows(latents, timesteps, cond, batch.multipliers.new_zeros(len(latents)))


@torch.no_grad()
def predict_rows(model: DiffusionModel, network: LoRANetwork, parts: Sequence[Rows]) -> list[Tensor | None]:
    """eps of each part [R, C, h, w], all in one call; None for a part without rows. It leaves the network at these multipliers."""
    some = [part for part in parts if len(part)]
    if not some:
        return [None] * len(parts)
    network.set_multiplier(torch.cat([part.multipliers for part in some]))
    eps = model.predict_eps(
        torch.cat([part.latents for part in some]),
        torch.cat([part.timesteps for part in some]),
        Conditioning.cat([part.cond for part in some]),
    )
    found = iter(eps.split([len(part) for part in some]))
    return [next(found) if len(part) else None for part in parts]
