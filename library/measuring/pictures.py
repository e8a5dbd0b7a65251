"""The pictures that a measurement makes, those of the base model among them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor


@dataclass(frozen=True)
class Part:
    """Some of a measurer's pictures: prompts by their rows, and a range of each one's seeds."""

    rows: Sequence[int]
    places: slice


@dataclass(frozen=True, kw_only=True)
class BasePictures:
    """What the base model makes of the prompts, on the CPU; lists have an entry for each prompt.

    Attributes:
        scores: by name [P, S].
        statistics: those of the pictures alone, in their own units.
        latents: clean, [S, C, h, w].
        shown: pixels as a picture file holds them, uint8 [S, 3, H, W]; empty where no pixels are needed.
    """

    scores: Mapping[str, np.ndarray]
    statistics: Sequence[Mapping[str, float]]
    latents: Sequence[Tensor]
    shown: Sequence[Tensor]

    def part(self, rows: Sequence[int], places: slice) -> "BasePictures":
        """Those of these prompts and seeds; statistics stay those of all seeds."""
        return BasePictures(
            scores={name: table[np.array(rows)][:, places] for name, table in self.scores.items()},
            statistics=[self.statistics[row] for row in rows],
            latents=[self.latents[row][places] for row in rows],
            shown=[self.shown[row][places] for row in rows] if self.shown else (),
        )


@dataclass(frozen=True)
class PromptPictures:
    """The pictures of one prompt, on the CPU: clean latents [S, K, C, h, w], pixels as decoded (not clamped) [S, K, 3, H, W] or None,
    scores [S, K] by name. `row` is its place among the prompts that were asked for."""

    row: int
    latents: Tensor
    decoded: Tensor | None
    scores: Mapping[str, Tensor]
