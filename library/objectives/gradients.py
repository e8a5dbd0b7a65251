"""How each score changes with the latents, at the latents themselves or on their worse side."""

from collections.abc import Sequence

import torch
from torch import Tensor

from library.objectives.rewards import Goal, Reward
from library.types import Conditioning, PromptSpec


def score_gradients(
    reward: Reward,
    latents: Tensor,
    sigmas: Tensor,
    cond: Conditioning | None,
    prompts: Sequence[PromptSpec],
    ascent: Tensor | None = None,
    smoothing: float = 0.0,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Every goal's value and its gradient in the latents. Scorers are differentiated one by one: memory is that of the largest.

    Args:
        latents: variance-preserving [N, C, h, w]; they need not require a gradient, and get none.
        sigmas: their noise levels [N]. cond, prompts: N of each.
        ascent: +1 where the reward is to rise, -1 where it is to fall [N]; makes the scores pessimistic (`Goal.value`).
        smoothing: rho of the adversarially smoothed reward of RSA-FT (arXiv 2603.21175): gradients are those at
            z - ascent rho rms(z) g / rms(g), the worst point at that distance. Needs `ascent`; held scores are not smoothed.

    Returns:
        By goal's name: values [N] at the latents themselves, and gradients d value / d latents [N, C, h, w], both float32.
    """
    assert smoothing == 0 or ascent is not None, "which side is the worse one depends on the wanted direction"
    latents = latents.detach().float()
    values, gradients = {}, {}
    for goal in reward.goals:
        values[goal.name], gradient = _value_and_gradient(goal, latents, sigmas, cond, prompts, ascent)
        if smoothing and ascent is not None and goal.sign:
            distance = ascent * goal.sign * smoothing * rms(latents)
            worst = latents - distance.view(-1, 1, 1, 1) * unit_rms(gradient)
            _, gradient = _value_and_gradient(goal, worst, sigmas, cond, prompts, ascent)
        gradients[goal.name] = gradient
    return values, gradients


def rms(x: Tensor) -> Tensor:
    """Root mean square of each sample of [B, C, h, w]: [B]."""
    return x.square().mean((1, 2, 3)).sqrt()


def unit_rms(x: Tensor) -> Tensor:
    """Each sample of [B, C, h, w] scaled to RMS 1; one of zeros stays so."""
    return x / rms(x).clamp_min(1e-12).view(-1, 1, 1, 1)


def _value_and_gradient(
    goal: Goal, latents: Tensor, sigmas: Tensor, cond: Conditioning | None, prompts: Sequence[PromptSpec], ascent: Tensor | None
) -> tuple[Tensor, Tensor]:
    with torch.enable_grad():
        latents = latents.detach().requires_grad_()
        value = goal.value(latents, sigmas, cond, prompts, ascent)
        (gradient,) = torch.autograd.grad(value.sum(), latents)
    return value.detach(), gradient
