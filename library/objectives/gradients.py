"""How each score changes with the latents."""

from collections.abc import Sequence

import torch
from torch import Tensor

from library.objectives.rewards import Reward
from library.types import Conditioning, PromptSpec


def score_gradients(
    reward: Reward,
    latents: Tensor,
    sigmas: Tensor,
    cond: Conditioning | None,
    prompts: Sequence[PromptSpec],
    ascent: Tensor | None = None,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Every goal's value and its gradient in the latents. Scorers are differentiated one by one: memory is that of the largest.

    Args:
        latents: variance-preserving [N, C, h, w]; they need not require a gradient, and get none.
        sigmas: their noise levels [N]. cond, prompts: N of each.
        ascent: +1 where the reward is to rise, -1 where it is to fall [N]; makes the scores pessimistic (`Goal.value`).

    Returns:
        By goal's name: values [N] and gradients d value / d latents [N, C, h, w], both float32.
    """
    latents = latents.detach().float()
    values, gradients = {}, {}
    for goal in reward.goals:
        with torch.enable_grad():
            own = latents.clone().requires_grad_()
            value = goal.value(own, sigmas, cond, prompts, ascent)
            (gradients[goal.name],) = torch.autograd.grad(value.sum(), own)
        values[goal.name] = value.detach()
    return values, gradients


def rms(x: Tensor) -> Tensor:
    """Root mean square of each sample of [B, C, h, w]: [B]."""
    return x.square().mean((1, 2, 3)).sqrt()


def unit_rms(x: Tensor) -> Tensor:
    """Each sample of [B, C, h, w] scaled to RMS 1; one of zeros stays so."""
    return x / rms(x).clamp_min(1e-12).view(-1, 1, 1, 1)
