"""Predictions without gradient: those of the frozen model, and the unconditional ones that a guided trajectory goes along."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from library.models.base import DiffusionModel
from library.types import Conditioning, RolloutBatch
from networks.lora import LoRANetwork


@dataclass(frozen=True)
class PlainPredictions:
    """Both are eps, without gradient.

    Attributes:
        frozen: of the model without the LoRA [N, C, h, w]; None if it was not asked for.
        uncond: of the unconditional branch with the LoRA [B, C, h, w]; None if no sample is guided.
    """

    frozen: Tensor | None
    uncond: Tensor | None


@torch.no_grad()
def predict_plain(
    model: DiffusionModel,
    network: LoRANetwork,
    batch: RolloutBatch,
    frozen_cond: Conditioning | None,
    *,
    uncond: Conditioning | None = None,
    rows: Sequence[int] | None = None,
) -> PlainPredictions:
    """All in one call of the U-Net.

    Args:
        frozen_cond: conditioning of the frozen model's predictions, N rows as the plain text encoders make them; None asks for none.
        uncond: of the unconditional branch, B rows; None is the batch's own.
        rows: of the batch that the N predictions are for; None is each once.
    """
    parts: list[tuple[Tensor, Tensor, Conditioning, Tensor]] = []
    guided = bool((batch.guidance_scales != 1).any())
    if guided:
        parts.append((batch.latents, batch.timesteps, uncond or batch.uncond, batch.multipliers))
    if frozen_cond is not None:
        places = list(range(len(batch.latents)) if rows is None else rows)
        parts.append((batch.latents[places], batch.timesteps[places], frozen_cond, torch.zeros_like(batch.multipliers[places])))
    if not parts:
        return PlainPredictions(None, None)
    latents, timesteps, conds, multipliers = zip(*parts, strict=True)
    network.set_multiplier(torch.cat(multipliers))
    eps = model.predict_eps(torch.cat(latents), torch.cat(timesteps), Conditioning.cat(conds))
    outputs = list(eps.split([len(part) for part in latents]))
    return PlainPredictions(frozen=outputs[-1] if frozen_cond is not None else None, uncond=outputs[0] if guided else None)
