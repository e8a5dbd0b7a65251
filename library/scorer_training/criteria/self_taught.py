"""What a backbone can learn from pictures that nobody has rated, for pretraining."""

from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from library.scorer_training.criteria.base import Criterion
from library.scorers.base import Backbone
from library.scorers.heads import HeadSpec


class SelfTaught(nn.Module):
    """A backbone with what it needs to teach itself. Its call gives the loss of each picture [B]."""

    @abstractmethod
    def forward(self, latents: Tensor, sigmas: Tensor, clean: Tensor, visible: Tensor | None) -> Tensor:
        """From noisy latents [B, C, h, w], their noise levels [B], the same latents without noise, and what is not hidden."""

    def draw_visible(self, latents: Tensor, generator: torch.Generator) -> Tensor | None:
        """What is not hidden of latents [B, C, h, w], on the CPU; None where nothing is."""
        return None


class FromPictures(Criterion):
    """A criterion that needs no ratings. The losses are computed by a `SelfTaught`; the outputs [B, 1] are they.

    Metrics: `closeness`, minus the mean error.
    """

    target = "picture"
    selection = "closeness"
    gives_score = False

    @abstractmethod
    def pretraining(self, backbone: Backbone, decode: Callable[[Tensor], Tensor]) -> SelfTaught:
        """What trains this backbone; `decode` makes pixels [B, 3, H, W] in 0..1 of clean latents. Raises UserError if it cannot."""

    def make_head(self, name: str, targets: Tensor, classes: tuple[str, ...], options: Mapping[str, Any]) -> HeadSpec:
        return HeadSpec(name=name, criterion=self.name)

    def losses(self, outputs: Tensor, targets: Tensor, head: HeadSpec) -> Tensor:
        return outputs[:, 0]

    def metrics(self, outputs: Tensor, targets: Tensor, head: HeadSpec) -> dict[str, float]:
        return {"closeness": -outputs.double().mean().item()}
