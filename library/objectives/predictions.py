"""Predictions without gradient: those of the frozen model, and the unconditional ones that a guided trajectory goes along."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from library.models.base import DiffusionModel
from library.rollouts.rows import Rows, frozen_rows_of, predict_rows, rows_of
from library.training.runtime import upload
from library.types import Conditioning, RolloutBatch
from networks.lora import LoRANetwork


@dataclass(frozen=True)
class PlainPredictions:
    """All are eps, without gradient.

    Attributes:
        frozen: of the model without the LoRA [N, C, h, w]; None if it was not asked for.
        uncond: of the unconditional branch with the LoRA, where it is due [R, C, h, w]; None if that is nowhere.
        passing: of the conditional branch with the LoRA, for rows that no gradient is taken of; None if there are none.
        rows, passing_rows: where in the batch the other rows and these are; None is all, and none.
    """

    frozen: Tensor | None
    uncond: Tensor | None
    passing: Tensor | None = None
    rows: Tensor | None = None
    passing_rows: Tensor | None = None

    def with_passing(self, eps: Tensor) -> Tensor:
        """The conditional prediction of all B rows, from that of `rows`."""
        if self.rows is None or self.passing is None or self.passing_rows is None:
            return eps
        whole = eps.new_empty(len(eps) + len(self.passing), *eps.shape[1:])
        return whole.index_copy(0, self.rows, eps).index_copy(0, self.passing_rows, self.passing)


def predict_plain(
    model: DiffusionModel,
    network: LoRANetwork,
    batch: RolloutBatch,
    frozen_cond: Conditioning | None,
    *,
    uncond: Conditioning | None = None,
    rows: Sequence[int] | None = None,
    frozen_rows: Sequence[int] | None = None,
) -> PlainPredictions:
    """All in one call of the U-Net.

    Args:
        frozen_cond: conditioning of the frozen model's predictions, N rows as the plain text encoders make them; None asks for none.
        uncond: of the unconditional branch, B rows; None is the batch's own.
        rows: of the batch that are trained, ascending; None is all. The conditional prediction of the others, which only move on, is made
            here.
        frozen_rows: of the batch that the N predictions are for; None is `rows`.
    """
    device = batch.latents.device
    index = passing_index = None
    asked: dict[str, Rows] = {}
    if batch.sparse_uncond is not None:
        asked["uncond"] = rows_of(batch, uncond or batch.uncond, batch.sparse_uncond.due)
    if rows is not None:
        index, passing_index = (_index(part, device) for part in (rows, sorted(set(range(len(batch.latents))) - set(rows))))
        asked["passing"] = rows_of(batch, batch.cond, passing_index)
    if frozen_cond is not None:
        places = index if frozen_rows is None else _index(frozen_rows, device)
        asked["frozen"] = frozen_rows_of(batch, frozen_cond, places)
    made = dict(zip(asked, predict_rows(model, network, list(asked.values())), strict=True))
    return PlainPredictions(made.get("frozen"), made.get("uncond"), made.get("passing"), index, passing_index)


def _index(rows: Sequence[int], device: torch.device) -> Tensor:
    return upload(torch.tensor(rows, dtype=torch.long), device)
