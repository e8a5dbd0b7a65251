"""How much a sample is pushed, by the gain that it already has over the frozen model.

A reward's shape enters the training only through its slope: a sample's loss is minus its push times the move along the
score's gradient. gain and margin [B] are in standard deviations of the score, in the wanted direction; the push is in -1..1.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from library.settings.registry import Registry

KNEE = 0.25  # of the margin: nearer to the target than this, the push fades
SOFTNESS = 0.25  # of the margin: over how much gain softplus goes from pushing to resting

SHAPES: Registry[Callable[[Tensor, Tensor], Tensor]] = Registry("reward_loss")


@SHAPES.register("hinge")
def hinge(gain: Tensor, margin: Tensor) -> Tensor:
    """relu(margin - gain): pushes until the gain is there, then rests; ReFL (arXiv 2304.05977), here relative to the frozen model."""
    return (gain < margin).float()


@SHAPES.register("target")
def target(gain: Tensor, margin: Tensor) -> Tensor:
    """Huber's loss of gain - margin: pushes back, too, where a sample is beyond its target, for a calibrated, linear slider."""
    return ((margin - gain) / (KNEE * margin).clamp_min(1e-12)).clamp(-1, 1)


@SHAPES.register("linear")
def linear(gain: Tensor, margin: Tensor) -> Tensor:
    """-gain: never rests."""
    return torch.ones_like(margin)


@SHAPES.register("softplus")
def softplus(gain: Tensor, margin: Tensor) -> Tensor:
    """softplus(margin - gain): a hinge with a round corner."""
    return torch.sigmoid((margin - gain) / (SOFTNESS * margin).clamp_min(1e-12))
