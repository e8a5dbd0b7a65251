"""Sampler steps as pure functions: from latents at `abar` to latents at `next_abar`, each sample of a batch at its own place.

In the variance-preserving form two steps serve four names. DDIM (eta 0) is Euler's method on the ODE in sigma, and Euler ancestral is
DDPM's ancestral step (posterior variance, any stride), which is DDIM at eta 1.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from library.errors import UserError
from library.noise_schedule import abar_to_sigma, eps_to_x0, per_sample
from library.types import History


def ddim_step(latents: Tensor, eps: Tensor, abar: Tensor, next_abar: Tensor) -> Tensor:
    """sqrt(next_abar) x0 + sqrt(1 - next_abar) eps; DDIM with eta 0, arXiv 2010.02502, eq. 12. Differentiable in latents and eps.

    Args:
        latents, eps: [B, C, h, w] float32.
        abar, next_abar: [B] float32 in (0, 1], next_abar >= abar; at next_abar = 1 the result is x0.
    """
    x0 = eps_to_x0(latents, eps, abar)
    next_abar = per_sample(next_abar, latents)
    return next_abar.sqrt() * x0 + (1 - next_abar).sqrt() * eps


def euler_ancestral_step(latents: Tensor, eps: Tensor, abar: Tensor, next_abar: Tensor, noise: Tensor) -> Tensor:
    """Euler to sigma_down = next_sigma^2 / sigma, then new noise up to next_sigma; k-diffusion's get_ancestral_step with eta 1.

    Args:
        latents, eps, noise: [B, C, h, w] float32; noise is standard normal.
        abar, next_abar: [B] float32, abar in (0, 1), next_abar in [abar, 1]; at next_abar = 1 the result is x0, without noise.
    """
    x0 = eps_to_x0(latents, eps, abar)
    kept = per_sample(abar_to_sigma(next_abar) / abar_to_sigma(abar), latents)  # the part of the noise that is not drawn anew
    next_abar = per_sample(next_abar, latents)
    return next_abar.sqrt() * x0 + (1 - next_abar).sqrt() * (kept * eps + (1 - kept**2).clamp(min=0).sqrt() * noise)


def guided_eps(uncond: Tensor, cond: Tensor, scales: Tensor) -> Tensor:
    """uncond + scale (cond - uncond): classifier-free guidance, arXiv 2207.12598. uncond, cond [B, C, h, w]; scales [B]; 1 is cond."""
    return uncond + per_sample(scales, cond) * (cond - uncond)


def _ddim(
    latents: Tensor, eps: Tensor, abar: Tensor, next_abar: Tensor, noise: Tensor | None = None, history: History | None = None
) -> Tensor:
    """`ddim_step` with the signature that every solver has."""
    return ddim_step(latents, eps, abar, next_abar)


def _euler_ancestral(
    latents: Tensor, eps: Tensor, abar: Tensor, next_abar: Tensor, noise: Tensor | None = None, history: History | None = None
) -> Tensor:
    """`euler_ancestral_step` with the signature that every solver has."""
    assert noise is not None
    return euler_ancestral_step(latents, eps, abar, next_abar, noise)


@dataclass(frozen=True)
class Solver:
    """A sampler.

    Attributes:
        step: step(latents, eps, abar, next_abar, noise, history) -> next latents; linear in latents and eps.
        needs_noise: whether step takes fresh noise [B, C, h, w]; else it is None.
        needs_history: whether step takes a `History`; else it is None.
    """

    name: str
    step: Callable[..., Tensor]
    needs_noise: bool = False
    needs_history: bool = False


SOLVERS: dict[str, Solver] = {
    solver.name: solver
    for solver in (
        Solver("ddim", _ddim),
        Solver("euler", _ddim),
        Solver("euler_a", _euler_ancestral, needs_noise=True),
        Solver("ddpm", _euler_ancestral, needs_noise=True),
    )
}


def get_solver(name: str) -> Solver:
    """The solver of that name.

    Raises:
        UserError: there is none.
    """
    if name not in SOLVERS:
        raise UserError(f"There is no solver {name!r}; use {', '.join(SOLVERS)}.")
    return SOLVERS[name]
