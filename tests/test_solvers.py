"""Every step against diffusers' schedulers, over whole schedules, and against what it must be by definition."""

from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
)
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg
from torch import Tensor

from library.diffusion.noise_schedule import (
    NoiseSchedule,
    abar_to_sigma,
    eps_to_v,
    eps_to_x0,
    per_sample,
    sigma_to_abar,
    v_to_eps,
)
from library.diffusion.solvers import SOLVERS, ddim_step, guided_eps, rescale_guidance, rescale_guided_eps
from library.errors import UserError
from library.types import History

CONFIG = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False, "steps_offset": 1}
SPACINGS = ["leading", "trailing", "linspace"]
PREDICTIONS = ["epsilon", "v_prediction"]
SHAPE = (2, 4, 8, 8)
OWN_NAMES = [name for name, solver in SOLVERS.items() if solver.name == name]  # without the names that other programs have for them


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


@pytest.mark.parametrize(
    ("name", "scheduler_class", "tolerance"),
    [("euler", EulerDiscreteScheduler, 2e-5), ("euler_a", EulerAncestralDiscreteScheduler, 5e-5)],
)
@pytest.mark.parametrize("prediction_type", PREDICTIONS)
@pytest.mark.parametrize("spacing", SPACINGS)
def test_euler_in_sigma_equals_diffusers(spacing, prediction_type, name, scheduler_class, tolerance):
    scheduler = scheduler_class.from_config(CONFIG | {"timestep_spacing": spacing, "prediction_type": prediction_type})
    scheduler.set_timesteps(20)
    latents = start()
    exploding = latents * (scheduler.sigmas[0] ** 2 + 1).sqrt()  # diffusers' Euler holds x0 + sigma eps
    ours, theirs = torch.Generator().manual_seed(4), torch.Generator().manual_seed(4)
    for index, timestep in enumerate(scheduler.timesteps):
        abar, next_abar = sigma_space_abars(scheduler, index)
        eps = to_eps(latents, network(latents, timestep), abar, prediction_type)
        latents = SOLVERS[name].step(latents, eps, abar, next_abar, torch.randn(SHAPE, generator=ours))
        output = network(scheduler.scale_model_input(exploding, timestep), timestep)
        exploding = scheduler.step(output, timestep, exploding, generator=theirs).prev_sample
        torch.testing.assert_close(latents, exploding * next_abar[0].sqrt(), rtol=tolerance, atol=tolerance)
    assert next_abar[0] == 1  # the last step ends at sigma 0


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
        latents = SOLVERS["ddpm"].step(latents, eps, abar, next_abar, noise)
        reference = scheduler.step(network(reference, timestep), int(timestep), reference, generator=theirs).prev_sample
        # at neighbouring timesteps diffusers' own beta = 1 - alpha_t loses digits in float32
        torch.testing.assert_close(latents, reference, rtol=2e-4, atol=2e-4)


def our_trajectory(name: str, schedule: NoiseSchedule, timesteps: Tensor, generator: torch.Generator) -> list[Tensor]:
    """As `sample` does it, with `network` for the U-Net."""
    solver = SOLVERS[name]
    schedule = solver.schedule(schedule)
    latents, history, path = start(), None, []
    for timestep, next_timestep in zip(timesteps, timesteps[1:], strict=False):
        abar, next_abar = schedule.abar(timestep.repeat(2)), schedule.abar(next_timestep.repeat(2))
        eps = to_eps(latents, network(latents, timestep), abar, schedule.prediction_type)
        noise = torch.randn(SHAPE, generator=generator) if solver.needs_noise else None
        moved = solver.step(latents, eps, abar, next_abar, noise, history)
        latents, history = moved, solver.remember(latents, eps, abar)
        path.append(latents)
    return path


@pytest.mark.parametrize(
    ("spacing", "prediction_type", "num_steps", "euler_at_final"),
    [
        ("leading", "epsilon", 1, True),
        ("trailing", "epsilon", 2, False),
        ("linspace", "epsilon", 5, True),
        ("leading", "v_prediction", 20, False),
        ("trailing", "v_prediction", 20, True),
        ("linspace", "v_prediction", 2, False),
    ],
)
def test_dpmpp_2m_trajectories_equal_diffusers(spacing, prediction_type, num_steps, euler_at_final):
    """At DDIM's timesteps, where DPMSolverMultistepScheduler has its own. It ends at sigma 0 whatever set_alpha_to_one says."""
    config = CONFIG | {"timestep_spacing": spacing, "prediction_type": prediction_type}
    schedule = NoiseSchedule.from_config(config | {"set_alpha_to_one": False})
    timesteps = schedule.inference_timesteps(num_steps)
    scheduler = DPMSolverMultistepScheduler.from_config(config, final_sigmas_type="zero", euler_at_final=euler_at_final)
    scheduler.set_timesteps(timesteps=timesteps[:-1].tolist())
    latents = start()
    for ours, timestep in zip(our_trajectory("dpmpp_2m", schedule, timesteps, torch.Generator()), scheduler.timesteps, strict=True):
        latents = scheduler.step(network(latents, timestep), timestep, latents).prev_sample
        torch.testing.assert_close(ours, latents, rtol=2e-5, atol=2e-5)


def test_dpmpp_2m_at_zero_terminal_snr_equals_diffusers():
    """From v diffusers computes x0 directly; through eps at the floor it is within 2e-3 at every step (float32)."""
    config = CONFIG | {"timestep_spacing": "trailing", "prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    schedule = NoiseSchedule.from_config(config)
    timesteps = schedule.inference_timesteps(20)
    scheduler = DPMSolverMultistepScheduler.from_config(config)
    scheduler.set_timesteps(20)
    assert scheduler.timesteps.equal(timesteps[:-1])
    latents = start()
    for ours, timestep in zip(our_trajectory("dpmpp_2m", schedule, timesteps, torch.Generator()), scheduler.timesteps, strict=True):
        latents = scheduler.step(network(latents, timestep), timestep, latents).prev_sample
        torch.testing.assert_close(ours, latents, rtol=0, atol=2e-3)


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
def test_dpmpp_2m_karras_equals_diffusers(prediction_type):
    """The sigmas are the same; diffusers then gives the U-Net the nearest training timestep, so `network` here is given that, too."""
    config = CONFIG | {"prediction_type": prediction_type}
    schedule = NoiseSchedule.from_config(config)
    timesteps = schedule.inference_timesteps(12, "karras")
    scheduler = DPMSolverMultistepScheduler.from_config(config, use_karras_sigmas=True)
    scheduler.set_timesteps(12)
    torch.testing.assert_close(schedule.sigmas(timesteps), scheduler.sigmas, rtol=2e-5, atol=0)
    latents, ours, history = start(), start(), None
    for index, timestep in enumerate(scheduler.timesteps):
        abar, next_abar = schedule.abar(timesteps[index : index + 2]).repeat(2, 1).T
        eps = to_eps(ours, network(ours, timestep), abar, prediction_type)
        moved = SOLVERS["dpmpp_2m"].step(ours, eps, abar, next_abar, None, history)
        ours, history = moved, History(eps_to_x0(ours, eps, abar), abar)
        latents = scheduler.step(network(latents, timestep), timestep, latents).prev_sample
        torch.testing.assert_close(ours, latents, rtol=5e-5, atol=5e-5)


def test_dpmpp_2m_equals_k_diffusions_formula():
    """sample_dpmpp_2m, in its variance-exploding form and in float64, from the paper's equations as k-diffusion arranges them."""
    sigmas = torch.tensor([14.6, 6.0, 2.5, 0.9, 0.2, 0.0], dtype=torch.float64)
    exploding = 14.6 * start().double()
    latents = exploding * sigma_to_abar(sigmas[0]).sqrt()
    old, history = None, None
    for index in range(5):
        sigma, next_sigma = sigmas[index], sigmas[index + 1]
        denoised = exploding - sigma * network(exploding / (1 + sigma**2).sqrt(), sigma)
        h = (sigma / next_sigma).log()
        if old is None or next_sigma == 0:
            target = denoised
        else:
            r = (sigmas[index - 1] / sigma).log() / h
            target = (1 + 1 / (2 * r)) * denoised - old / (2 * r)
        exploding = next_sigma / sigma * exploding - (-h).expm1() * target
        old = denoised

        abar, next_abar = sigma_to_abar(sigma.repeat(2)), sigma_to_abar(next_sigma.repeat(2))
        eps = network(latents, sigma)
        moved = SOLVERS["dpmpp_2m"].step(latents, eps, abar, next_abar, None, history)
        latents, history = moved, History(eps_to_x0(latents, eps, abar), abar)
        torch.testing.assert_close(latents, exploding * next_abar[0].sqrt(), rtol=1e-10, atol=1e-10)


def test_dpmpp_2m_is_of_second_order():
    """For data N(0, 1/4) the ODE's solution is known: x grows as the standard deviation. Twice the steps, a quarter of the error."""
    errors = {}
    for name in ("ddim", "dpmpp_2m"):
        for num_steps in (40, 80):
            solver, latents, history = SOLVERS[name], torch.ones(1, 1, 1, 1, dtype=torch.float64), None
            abars = sigma_to_abar(torch.linspace(2.0, -3.0, num_steps + 1, dtype=torch.float64).exp())
            for abar, next_abar in zip(abars[:-1, None], abars[1:, None], strict=True):
                eps = (1 - abar).sqrt() * latents / (abar / 4 + 1 - abar)
                moved = solver.step(latents, eps, abar, next_abar, None, history)
                latents, history = moved, solver.remember(latents, eps, abar)
            exact = ((abars[-1] / 4 + 1 - abars[-1]) / (abars[0] / 4 + 1 - abars[0])).sqrt()
            errors[name, num_steps] = abs(latents.item() - exact.item())
    assert errors["ddim", 40] / errors["ddim", 80] == pytest.approx(2, rel=0.1)
    assert errors["dpmpp_2m", 40] / errors["dpmpp_2m", 80] == pytest.approx(4, rel=0.15)
    assert errors["dpmpp_2m", 40] < errors["ddim", 40] / 10


@pytest.mark.parametrize(("prediction_type", "num_steps"), [("epsilon", 1), ("epsilon", 8), ("v_prediction", 4), ("v_prediction", 50)])
def test_lcm_equals_diffusers(prediction_type, num_steps):
    """diffusers has the consistency function's c_skip and c_out, which we take to be 0 and 1."""
    config = CONFIG | {"prediction_type": prediction_type, "set_alpha_to_one": False}
    schedule = NoiseSchedule.from_config(config)
    timesteps = schedule.inference_timesteps(num_steps, "lcm")
    scheduler = LCMScheduler.from_config(config)
    scheduler.set_timesteps(num_steps)
    assert scheduler.timesteps.equal(timesteps[:-1])
    path = our_trajectory("lcm", schedule, timesteps, torch.Generator().manual_seed(4))
    theirs, latents = torch.Generator().manual_seed(4), start()
    for ours, timestep in zip(path, scheduler.timesteps, strict=True):
        latents = scheduler.step(network(latents, timestep), timestep, latents, generator=theirs).prev_sample
        torch.testing.assert_close(ours, latents, rtol=5e-5, atol=5e-5)


def test_the_boundary_conditions_that_lcm_leaves_out():
    scheduler = LCMScheduler.from_config(CONFIG)
    scheduler.set_timesteps(50)
    scalings = [scheduler.get_scalings_for_boundary_condition_discrete(int(timestep)) for timestep in scheduler.timesteps]
    assert max(c_skip for c_skip, _ in scalings) < 7e-6
    assert max(1 - c_out for _, c_out in scalings) < 4e-6


@pytest.mark.parametrize("ending", ["euler", "euler_a", "ddpm"])
def test_all_but_ddim_end_clean(ending):
    """EulerDiscreteScheduler and the like end at sigma 0, also for a model with set_alpha_to_one = false, as SD1 and SDXL are."""
    schedule = NoiseSchedule.from_config(CONFIG | {"set_alpha_to_one": False})
    assert schedule.final_alpha_cumprod < 1
    assert SOLVERS["ddim"].schedule(schedule) is schedule
    timesteps = schedule.inference_timesteps(8)
    *_, before, last = our_trajectory(ending, schedule, timesteps, torch.Generator().manual_seed(4))
    abar = schedule.abar(timesteps[-2].repeat(2))
    torch.testing.assert_close(last, eps_to_x0(before, network(before, timesteps[-2]), abar), rtol=0, atol=1e-5)


@pytest.mark.parametrize("num_steps", [1, 3, 20])
@pytest.mark.parametrize("name", OWN_NAMES)
def test_a_known_x0_comes_back_whatever_the_way(name, num_steps):
    """Whole trajectories with the eps of one x0: every solver's last step ends there, also one that extrapolates from a false history."""
    x0 = torch.randn(SHAPE, generator=torch.Generator().manual_seed(6))
    solver, generator = SOLVERS[name], torch.Generator().manual_seed(7)
    schedule = NoiseSchedule.from_config(CONFIG)
    timesteps = schedule.inference_timesteps(num_steps, "trailing")
    latents = schedule.add_noise(x0, start(), timesteps[:1].repeat(2))
    history = History(torch.full(SHAPE, 1e3), torch.full((2,), schedule.abar(timesteps[:1]).item() / 2)) if num_steps == 1 else None
    for timestep, next_timestep in zip(timesteps, timesteps[1:], strict=False):
        abar, next_abar = schedule.abar(timestep.repeat(2)), schedule.abar(next_timestep.repeat(2))
        eps = (latents - per_sample(abar.sqrt(), x0) * x0) / per_sample((1 - abar).sqrt(), x0)
        noise = torch.randn(SHAPE, generator=generator) if solver.needs_noise else None
        moved = solver.step(latents, eps, abar, next_abar, noise, history)
        latents, history = moved, solver.remember(latents, eps, abar)
    torch.testing.assert_close(latents, x0, rtol=0, atol=5e-5)


def a_step() -> dict[str, Any]:
    """Arguments of a step: a sample that has a history, one that has none, and one that ends clean."""
    latents, eps, noise, x0 = torch.randn(4, 3, 4, 8, 8, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
    abar, next_abar = torch.tensor([0.3, 0.1, 0.7]).double(), torch.tensor([0.6, 0.4, 1.0]).double()
    history = History(x0, torch.tensor([0.1, 0.0, 0.5]).double())
    return {"latents": latents, "eps": eps, "abar": abar, "next_abar": next_abar, "noise": noise, "history": history}


@pytest.mark.parametrize("name", OWN_NAMES)
def test_each_sample_of_a_batch_takes_its_own_step(name):
    arguments = a_step()
    together = SOLVERS[name].step(**arguments)
    for row in range(3):
        one = slice(row, row + 1)
        history = arguments["history"]
        own = {key: value[one] for key, value in arguments.items() if key != "history"}
        alone = SOLVERS[name].step(**own, history=History(history.x0[one], history.abar[one]))
        torch.testing.assert_close(together[one], alone)


@pytest.mark.parametrize("name", OWN_NAMES)
def test_a_step_is_linear_given_its_history(name):
    """What `objectives` rely on: a mixture of latents and predictions leads to the mixture of where they lead."""
    first, second = a_step(), a_step()
    second["latents"], second["eps"] = -0.5 * first["eps"] + 1, first["latents"] * 2
    mixed = first | {key: 0.3 * first[key] + 0.7 * second[key] for key in ("latents", "eps")}
    step = SOLVERS[name].step
    torch.testing.assert_close(step(**mixed), 0.3 * step(**first) + 0.7 * step(**second), rtol=1e-9, atol=1e-9)


def test_without_a_history_dpmpp_2m_is_ddim():
    arguments = a_step()
    latents, eps, abar, next_abar = (arguments[key] for key in ("latents", "eps", "abar", "next_abar"))
    plain = ddim_step(latents, eps, abar, next_abar)
    step = SOLVERS["dpmpp_2m"].step
    torch.testing.assert_close(step(latents, eps, abar, next_abar), plain)
    empty = History(torch.full_like(latents, torch.nan), torch.zeros(3).double())
    torch.testing.assert_close(step(latents, eps, abar, next_abar, None, empty), plain)
    moved = step(latents, eps, abar, next_abar, None, arguments["history"])
    assert (moved - plain).abs().amax((1, 2, 3)).gt(1e-3).tolist() == [True, False, False]


def test_dpmpp_2m_gradient():
    arguments = a_step()
    history, abar, next_abar = (arguments[key] for key in ("history", "abar", "next_abar"))
    inputs = [arguments[key][:, :1, :2, :2].contiguous().requires_grad_(True) for key in ("latents", "eps")]
    short = History(history.x0[:, :1, :2, :2], history.abar)
    assert torch.autograd.gradcheck(lambda latents, eps: SOLVERS["dpmpp_2m"].step(latents, eps, abar, next_abar, None, short), inputs)


@pytest.mark.parametrize("name", [name for name in OWN_NAMES if SOLVERS[name].needs_noise])
def test_ancestral_steps_keep_the_noise_level(name):
    """With perfect eps and x0 = 0, latents at next_abar are noise of variance 1 - next_abar."""
    eps, noise = torch.randn(2, 1, 4, 128, 128, generator=torch.Generator().manual_seed(7))
    abar, next_abar = torch.tensor([0.2]), torch.tensor([0.6])
    latents = SOLVERS[name].step((1 - abar).sqrt() * eps, eps, abar, next_abar, noise)
    assert latents.var().item() == pytest.approx(0.4, rel=0.02)
    assert not torch.equal(latents, SOLVERS[name].step((1 - abar).sqrt() * eps, eps, abar, next_abar, -noise))


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


@pytest.mark.parametrize(("alias", "name"), [("k_euler", "euler"), ("k_euler_a", "euler_a"), ("dpmsolver++", "dpmpp_2m")])
def test_names_of_sd_scripts(alias, name):
    assert SOLVERS[alias] is SOLVERS[name]


def test_unknown_solver():
    with pytest.raises(UserError, match="no sampler 'heun'; sampler is one of ddim, euler, euler_a, ddpm, dpmpp_2m, lcm"):
        SOLVERS["heun"]


@pytest.mark.parametrize("phi", [0.0, 0.7, 1.0])
def test_rescaled_guidance_equals_diffusers(phi):
    uncond, cond = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(11))
    guided = guided_eps(uncond, cond, torch.tensor([7.5, 1.0]))
    ours = rescale_guidance(guided, cond, phi)
    torch.testing.assert_close(ours, rescale_noise_cfg(guided, cond, phi), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours[1], cond[1])  # at scale 1 there is nothing to rescale
    assert guided[0].std() > 4 * cond[0].std()
    if phi == 1:
        assert ours[0].std().item() == pytest.approx(cond[0].std().item(), rel=1e-4)


@pytest.mark.parametrize("at", [0.001, 0.4])
def test_guidance_of_a_v_model_is_rescaled_in_v(at):
    latents, v, uncond = torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(12))
    abar = torch.full((2,), at)
    guided_v = uncond + 7.5 * (v - uncond)
    arguments = {"latents": latents, "abar": abar, "prediction_type": "v_prediction"}
    ours = rescale_guided_eps(v_to_eps(latents, guided_v, abar), v_to_eps(latents, v, abar), 0.7, **arguments)
    expected = rescale_noise_cfg(guided_v, v, 0.7)
    torch.testing.assert_close(eps_to_v(latents, ours, abar), expected, rtol=1e-3, atol=1e-3)
    as_eps = rescale_guidance(v_to_eps(latents, guided_v, abar), v_to_eps(latents, v, abar), 0.7)
    assert (1 - at) ** 0.5 * (eps_to_v(latents, as_eps, abar) - expected).abs().max() > 1  # in x0
