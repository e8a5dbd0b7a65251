"""Whether an image scorer can be learned from: measured, since many turn their gradient off, or look at the middle only."""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from library.scorers.pixel import PixelBackbone

PROMPT = "a photo of a cat on a chair in a garden"


@dataclass(frozen=True, kw_only=True)
class GradientReport:
    """How a score's gradient is spread.

    Attributes:
        reaches_latents: whether it arrives at the latents, finite and somewhere other than 0.
        regions: its mean absolute value at the pixels of the four corners and the centre, as a multiple of the whole picture's mean.
            0 is a blind spot.
    """

    reaches_latents: bool
    regions: dict[str, float]

    @property
    def is_everywhere(self) -> bool:
        """Whether the score can be raised by every part of the picture."""
        return self.reaches_latents and min(self.regions.values()) > 0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        if not self.reaches_latents:
            return "no gradient reaches the latents: this scorer can rank pictures, but nothing can be trained with it"
        shares = ", ".join(f"{name} {share:.2f}" for name, share in self.regions.items())
        verdict = "" if self.is_everywhere else "; where it is 0, the scorer is blind"
        return f"the gradient reaches the latents; at the pixels, relative to its mean: {shares}{verdict}"


def measure_gradient(backbone: PixelBackbone, latents: Tensor) -> GradientReport:
    """The gradient of a ready-made score of one picture's clean latents [1, C, h, w], which best are not square."""
    assert len(latents) == 1
    latents = latents.detach().clone().requires_grad_()
    pixels = backbone.decode(latents)
    score = backbone.image_model(pixels, [PROMPT]).sum()
    none = GradientReport(reaches_latents=False, regions={})
    if not score.requires_grad:
        return none
    at_latents, at_pixels = torch.autograd.grad(score, [latents, pixels], allow_unused=True)
    if at_latents is None or at_pixels is None or not at_latents.isfinite().all() or not at_latents.any():
        return none
    strength = at_pixels[0].abs().sum(0)
    height, width = strength.shape
    part_height, part_width = height // 8, width // 8
    starts = {
        "top left": (0, 0),
        "top right": (0, width - part_width),
        "bottom left": (height - part_height, 0),
        "bottom right": (height - part_height, width - part_width),
        "centre": ((height - part_height) // 2, (width - part_width) // 2),
    }
    regions = {
        name: float(strength[top : top + part_height, left : left + part_width].mean() / strength.mean())
        for name, (top, left) in starts.items()
    }
    return GradientReport(reaches_latents=True, regions=regions)
