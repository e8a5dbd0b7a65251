"""Every step against diffusers' schedulers, over whole schedules, and against what it must be by definition."""

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, EulerAncestralDiscreteScheduler, EulerDiscreteScheduler
from torch import Tensor

from library.errors import UserError
from library.noise_schedule import NoiseSchedule, abar_to_sigma, eps_to_x0, sigma_to_abar, v_to_eps
from library.solvers import SOLVERS, ddim_step, euler_ancestral_step, get_solver

CONFIG = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False, "steps_offset": 1}
SPACINGS = ["leading", "trailing", "linspace"]
PREDICTIONS = ["epsilon", "v_prediction"]
SHAPE = (2, 4, 8, 8)


def network(latents: Tensor, timestep: Tensor) -> Tensor:
    """Stands for a U-Net: any bounded function of latents and time."""
    return torch.tanh(latents.roll(1, dims=-1)) * 0.8 + torch.cos(timestep.float() / 300)


def to_eps(latents: Tensor, output: Tensor, abar: Tensor, prediction_type: str) -> Tensor:
    return output if prediction_type == "epsilon" else v_to_eps(latents, output, abar)


def start() -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(3))


def our_ddim(config: dict, num_steps: int) -> list[Tensor]:
    schedule = NoiseSchedule.from_config(config)
    timesteps = schedule.inference_timesteps(num_steps)
    latents, path = start(), []
    for timestep, next_timestep in zip(timesteps, timesteps[1:], strict=False):
        abar, next_abar = schedule.abar(timestep.repeat(2)), schedule.abar(next_timestep.repeat(2))
        eps = to_eps(latents, network(latents, timestep), abar, schedule.prediction_type)
        latents = ddim_step(latents, eps, abar, next_abar)
        path.append(latents)
    return path


def their_ddim(config: dict, num_steps: int) -> list[Tensor]:
    scheduler = DDIMScheduler.from_config(config)
    scheduler.set_timesteps(num_steps)
    latents, path = start(), []
    for timestep in scheduler.timesteps:
        latents = scheduler.step(network(latents, timestep), int(timestep), latents, eta=0.0).prev_sample
        path.append(latents)
    return path


@pytest.mark.parametrize("set_alpha_to_one", [True, False])
@pytest.mark.parametrize("prediction_type", PREDICTIONS)
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_ddim_trajectories_equal_diffusers(spacing, prediction_type, set_alpha_to_one):
    config = CONFIG | {"timestep_spacing": spacing, "prediction_type": prediction_type, "set_alpha_to_one": set_alpha_to_one}
    for ours, theirs in zip(our_ddim(config, 20), their_ddim(config, 20), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_ddim_at_zero_terminal_snr_equals_diffusers():
    """diffusers computes x0 from v where abar is 0; through eps at the floor it is within 1e-3 at every step, the last one included."""
    config = CONFIG | {"timestep_spacing": "trailing", "prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    for ours, theirs in zip(our_ddim(config, 20), their_ddim(config, 20), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-3)


def sigma_space_abars(scheduler, index: int) -> tuple[Tensor, Tensor]:
    return sigma_to_abar(scheduler.sigmas[index].repeat(2)), sigma_to_abar(scheduler.sigmas[index + 1].repeat(2))


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
@pytest.mark.parametrize("spacing", SPACINGS)
def test_ddim_is_euler_in_sigma(spacing, prediction_type):
    scheduler = EulerDiscreteScheduler.from_config(CONFIG | {"timestep_spacing": spacing, "prediction_type": prediction_type})
    scheduler.set_timesteps(20)
    latents = start()
    exploding = latents * (scheduler.sigmas[0] ** 2 + 1).sqrt()  # diffusers' Euler holds x0 + sigma eps
    for index, timestep in enumerate(scheduler.timesteps):
        abar, next_abar = sigma_space_abars(scheduler, index)
        eps = to_eps(latents, network(latents, timestep), abar, prediction_type)
        latents = get_solver("euler").step(latents, eps, abar, next_abar, None)
        output = network(scheduler.scale_model_input(exploding, timestep), timestep)
        exploding = scheduler.step(output, timestep, exploding).prev_sample
        torch.testing.assert_close(latents, exploding * next_abar[0].sqrt(), rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(latents, exploding, rtol=2e-5, atol=2e-5)  # the last step ends at sigma 0


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
@pytest.mark.parametrize("spacing", SPACINGS)
def test_euler_ancestral_equals_diffusers(spacing, prediction_type):
    scheduler = EulerAncestralDiscreteScheduler.from_config(CONFIG | {"timestep_spacing": spacing, "prediction_type": prediction_type})
    scheduler.set_timesteps(20)
    latents = start()
    exploding = latents * (scheduler.sigmas[0] ** 2 + 1).sqrt()
    ours, theirs = torch.Generator().manual_seed(4), torch.Generator().manual_seed(4)
    for index, timestep in enumerate(scheduler.timesteps):
        abar, next_abar = sigma_space_abars(scheduler, index)
        eps = to_eps(latents, network(latents, timestep), abar, prediction_type)
        latents = get_solver("euler_a").step(latents, eps, abar, next_abar, torch.randn(SHAPE, generator=ours))
        output = network(scheduler.scale_model_input(exploding, timestep), timestep)
        exploding = scheduler.step(output, timestep, exploding, generator=theirs).prev_sample
        torch.testing.assert_close(latents, exploding * next_abar[0].sqrt(), rtol=5e-5, atol=5e-5)


@pytest.mark.parametrize("num_steps", [10, 50, 1000])
@pytest.mark.parametrize("prediction_type", PREDICTIONS)
def test_ddpm_equals_diffusers_on_a_stride(prediction_type, num_steps):
    config = CONFIG | {"timestep_spacing": "leading", "prediction_type": prediction_type, "steps_offset": 0}
    scheduler = DDPMScheduler.from_config(config | {"variance_type": "fixed_small"})
    scheduler.set_timesteps(num_steps)
    schedule = NoiseSchedule.from_config(config)
    timesteps = schedule.inference_timesteps(num_steps)
    assert scheduler.timesteps.equal(timesteps[:-1])
    ours, theirs = torch.Generator().manual_seed(5), torch.Generator().manual_seed(5)
    latents = reference = start()
    for timestep, next_timestep in list(zip(timesteps, timesteps[1:], strict=False))[-50:]:
        abar, next_abar = schedule.abar(timestep.repeat(2)), schedule.abar(next_timestep.repeat(2))
        eps = to_eps(latents, network(latents, timestep), abar, prediction_type)
        noise = torch.randn(SHAPE, generator=ours) if timestep > 0 else torch.zeros(SHAPE)
        latents = get_solver("ddpm").step(latents, eps, abar, next_abar, noise)
        reference = scheduler.step(network(reference, timestep), int(timestep), reference, generator=theirs).prev_sample
        # at neighbouring timesteps diffusers' own beta = 1 - alpha_t loses digits in float32
        torch.testing.assert_close(latents, reference, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("name", SOLVERS)
def test_perfect_eps_and_the_end_of_the_schedule_give_x0(name):
    x0, eps, noise = torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(6))
    abar = torch.tensor([0.3, 0.9])
    latents = abar.sqrt()[:, None, None, None] * x0 + (1 - abar).sqrt()[:, None, None, None] * eps
    torch.testing.assert_close(get_solver(name).step(latents, eps, abar, torch.ones(2), noise), x0, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", [name for name, solver in SOLVERS.items() if solver.needs_noise])
def test_ancestral_steps_keep_the_noise_level(name):
    """With perfect eps and x0 = 0, latents at next_abar are noise of variance 1 - next_abar."""
    eps, noise = torch.randn(2, 1, 4, 128, 128, generator=torch.Generator().manual_seed(7))
    abar, next_abar = torch.tensor([0.2]), torch.tensor([0.6])
    latents = get_solver(name).step((1 - abar).sqrt() * eps, eps, abar, next_abar, noise)
    assert latents.var().item() == pytest.approx(0.4, rel=0.02)
    assert not torch.equal(latents, get_solver(name).step((1 - abar).sqrt() * eps, eps, abar, next_abar, -noise))


def test_each_sample_of_a_batch_takes_its_own_step():
    latents, eps, noise = torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(8))
    abar, next_abar = torch.tensor([0.1, 0.7]), torch.tensor([0.4, 1.0])
    together = euler_ancestral_step(latents, eps, abar, next_abar, noise)
    for row in range(2):
        one = slice(row, row + 1)
        torch.testing.assert_close(together[one], euler_ancestral_step(latents[one], eps[one], abar[one], next_abar[one], noise[one]))


def test_ddim_gradient():
    generator = torch.Generator().manual_seed(9)
    latents, eps = torch.randn(2, 2, 1, 2, 2, generator=generator, dtype=torch.float64).requires_grad_(True)
    abar, next_abar = torch.tensor([0.2, 0.8], dtype=torch.float64), torch.tensor([0.5, 1.0], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda latents, eps: ddim_step(latents, eps, abar, next_abar), (latents, eps))


def test_standing_still_changes_nothing():
    """A schedule with set_alpha_to_one = false ends at the abar of timestep 0: from there the last step is the identity."""
    latents, eps = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(10))
    abar = torch.tensor([0.9991, 0.5])
    torch.testing.assert_close(ddim_step(latents, eps, abar, abar), latents, rtol=0, atol=1e-6)
    assert abar_to_sigma(abar).isfinite().all()
    assert eps_to_x0(latents, eps, abar).isfinite().all()


def test_unknown_solver():
    with pytest.raises(UserError, match="no solver 'dpm'; use ddim, euler, euler_a, ddpm"):
        get_solver("dpm")
