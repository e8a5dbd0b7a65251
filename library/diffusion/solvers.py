"""Sampler steps as pure functions: from latents at `abar` to latents at `next_abar`, each sample of a batch at its own place.

In the variance-preserving form two steps serve four names. DDIM (eta 0) is Euler's method on the ODE in sigma, and Euler ancestral is
DDPM's ancestral step (posterior variance, any stride), which is DDIM at eta 1. Also here: classifier-free guidance.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from library.diffusion.noise_schedule import (
    NoiseSchedule,
    PredictionType,
    abar_to_sigma,
    eps_to_output,
    eps_to_x0,
    output_to_eps,
    per_sample,
)
from library.settings.registry import Registry
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


def dpmpp_2m_step(latents: Tensor, eps: Tensor, abar: Tensor, next_abar: Tensor, history: History | None) -> Tensor:
    """DPM-Solver++(2M), arXiv 2211.01095, algorithm 2: DDIM's step to x0 extrapolated along the line from the last step's x0 to this one's.

    Linear in latents and eps, given the history. Samples without a last step, and those that end at next_abar = 1, take DDIM's step,
    as in k-diffusion and diffusers.

    Args:
        latents, eps: [B, C, h, w] float32.
        abar, next_abar: [B] float32, abar in (0, 1), next_abar in [abar, 1].
        history: what the last step foresaw; None where no sample has made one.
    """
    moved = ddim_step(latents, eps, abar, next_abar)
    if history is None:
        return moved
    sigma, next_sigma, last_sigma = (abar_to_sigma(at) for at in (abar, next_abar, history.abar))
    known = (history.abar > 0) & (last_sigma > sigma) & (next_sigma > 0)
    step, last_step = (sigma / next_sigma).log(), (last_sigma / sigma).log()  # in lambda = -log sigma
    ahead = torch.where(known, step / (2 * last_step), 0)
    x0 = eps_to_x0(latents, eps, abar)
    change = torch.where(per_sample(known, x0), x0 - history.x0, 0)
    weight = next_abar.sqrt() * (1 - next_sigma / sigma) * ahead
    return moved + per_sample(weight, x0) * change


def lcm_step(latents: Tensor, eps: Tensor, abar: Tensor, next_abar: Tensor, noise: Tensor) -> Tensor:
    """To x0, then back to next_abar with all noise new: multistep consistency sampling, arXiv 2310.04378, algorithm 3.

    x0 stands for the consistency function c_skip x + c_out x0: at LCM's own timesteps (19 and above), with diffusers' timestep_scaling
    of 10, c_skip <= 7e-6 and 1 - c_out <= 4e-6. Arguments as of `euler_ancestral_step`.
    """
    next_abar = per_sample(next_abar, latents)
    return next_abar.sqrt() * eps_to_x0(latents, eps, abar) + (1 - next_abar).sqrt() * noise


def guided_eps(uncond: Tensor, cond: Tensor, scales: Tensor) -> Tensor:
    """uncond + scale (cond - uncond): classifier-free guidance, arXiv 2207.12598. uncond, cond [B, C, h, w]; scales [B]; 1 is cond."""
    return uncond + per_sample(scales, cond) * (cond - uncond)


def rescale_guidance(guided: Tensor, cond: Tensor, phi: float) -> Tensor:
    """Bring a guided prediction's standard deviation to that of the conditional one, by the part phi; arXiv 2305.08891, eqs. 15 and 16.

    Args:
        guided, cond: [B, C, h, w], what the U-Net puts out (v or eps), with and without guidance.
        phi: 0 leaves it as it is, 1 goes all the way; the paper takes 0.7.
    """
    axes = tuple(range(1, guided.ndim))
    ratio = cond.std(axes, keepdim=True) / guided.std(axes, keepdim=True)
    return guided * (1 + phi * (ratio - 1))


def rescale_guided_eps(
    guided: Tensor, cond: Tensor, phi: float, *, latents: Tensor, abar: Tensor, prediction_type: PredictionType
) -> Tensor:
    """`rescale_guidance` for predictions as eps [B, C, h, w] at latents [B, C, h, w] and abar [B].

    The rescaling is done on what the network puts out. Of a v-prediction model that makes the difference: at zero terminal SNR eps is the
    latents, whatever was guided, and has nothing to rescale.
    """
    output, cond_output = (eps_to_output(latents, eps, abar, prediction_type) for eps in (guided, cond))
    return output_to_eps(latents, rescale_guidance(output, cond_output, phi), abar, prediction_type)


@dataclass(frozen=True)
class Solver:
    """A sampler.

    Attributes:
        update: update(latents, eps, abar, next_abar[, noise][, history]) -> next latents; linear in latents and eps.
        needs_noise: whether update takes fresh noise [B, C, h, w].
        needs_history: whether update takes a `History` or None.
        ends_clean: whether sampling ends at abar = 1 whatever the model's set_alpha_to_one says, as it does in diffusers for all but DDIM.
    """

    name: str
    update: Callable[..., Tensor]
    needs_noise: bool = False
    needs_history: bool = False
    ends_clean: bool = True

    def step(
        self, latents: Tensor, eps: Tensor, abar: Tensor, next_abar: Tensor, noise: Tensor | None = None, history: History | None = None
    ) -> Tensor:
        """The latents [B, C, h, w] at next_abar [B]; noise and history are handed on where the sampler needs them."""
        assert noise is not None or not self.needs_noise, f"{self.name} draws noise"
        needed = [value for value, is_needed in ((noise, self.needs_noise), (history, self.needs_history)) if is_needed]
        return self.update(latents, eps, abar, next_abar, *needed)

    def schedule(self, schedule: NoiseSchedule) -> NoiseSchedule:
        """The model's schedule as this sampler runs it; see `ends_clean`."""
        return replace(schedule, final_alpha_cumprod=1.0) if self.ends_clean else schedule

    def remember(self, latents: Tensor, eps: Tensor, abar: Tensor) -> History | None:
        """The history for the step that follows the one from these latents [B, C, h, w]; None if the solver needs none."""
        return History(eps_to_x0(latents, eps, abar), abar) if self.needs_history else None


SOLVERS: Registry[Solver] = Registry("sampler")
SOLVERS.register("ddim")(Solver("ddim", ddim_step, ends_clean=False))
SOLVERS.register("euler")(Solver("euler", ddim_step))
SOLVERS.register("euler_a")(Solver("euler_a", euler_ancestral_step, needs_noise=True))
SOLVERS.register("ddpm")(Solver("ddpm", euler_ancestral_step, needs_noise=True))
SOLVERS.register("dpmpp_2m")(Solver("dpmpp_2m", dpmpp_2m_step, needs_history=True))
SOLVERS.register("lcm")(Solver("lcm", lcm_step, needs_noise=True))
# sd-scripts' names (--sample_sampler) for the same samplers
SOLVERS.register("k_euler")(SOLVERS["euler"])
SOLVERS.register("k_euler_a")(SOLVERS["euler_a"])
SOLVERS.register("dpmsolver++")(SOLVERS["dpmpp_2m"])
