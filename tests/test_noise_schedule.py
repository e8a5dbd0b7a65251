import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, LCMScheduler

from library.diffusion.noise_schedule import (
    ABAR_FLOOR,
    NoiseSchedule,
    abar_to_sigma,
    eps_to_v,
    eps_to_x0,
    rescale_zero_terminal_snr,
    sigma_to_abar,
    v_to_eps,
)
from library.errors import UserError

STABLE_DIFFUSION = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "clip_sample": False,
}
CONFIGS = {
    "stable_diffusion": STABLE_DIFFUSION,
    "ends_at_one": STABLE_DIFFUSION | {"set_alpha_to_one": True, "steps_offset": 0},
    "linear": {"beta_schedule": "linear", "num_train_timesteps": 500},
    "trained_betas": {"trained_betas": [0.01, 0.02, 0.05], "num_train_timesteps": 3},
}
ZERO_TERMINAL_SNR = STABLE_DIFFUSION | {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "prediction_type": "v_prediction"}


@pytest.fixture
def schedule() -> NoiseSchedule:
    return NoiseSchedule.from_config(STABLE_DIFFUSION)


@pytest.mark.parametrize("name", CONFIGS)
def test_alphas_equal_diffusers_bit_by_bit(name):
    ours, theirs = NoiseSchedule.from_config(CONFIGS[name]), DDIMScheduler.from_config(CONFIGS[name])
    assert torch.equal(ours.alphas_cumprod, theirs.alphas_cumprod)
    assert ours.final_alpha_cumprod == float(theirs.final_alpha_cumprod)


def test_zero_terminal_snr_equals_diffusers_but_for_the_floor():
    ours, theirs = NoiseSchedule.from_config(ZERO_TERMINAL_SNR), DDIMScheduler.from_config(ZERO_TERMINAL_SNR)
    assert theirs.alphas_cumprod[-1] == 0
    assert ours.alphas_cumprod[-1] == ABAR_FLOOR
    # diffusers turns abar into betas and back, which costs a few float32 roundings (measured: 6e-7)
    torch.testing.assert_close(ours.alphas_cumprod[:-1], theirs.alphas_cumprod[:-1], rtol=2e-6, atol=0)
    euler = EulerDiscreteScheduler.from_config(ZERO_TERMINAL_SNR)
    assert ours.alphas_cumprod[-1] == euler.alphas_cumprod[-1]


def test_rescaling_keeps_the_first_value_and_ends_at_zero(schedule):
    rescaled = rescale_zero_terminal_snr(schedule.alphas_cumprod)
    torch.testing.assert_close(rescaled[0], schedule.alphas_cumprod[0], rtol=1e-6, atol=0)
    assert rescaled[-1] == 0
    assert (rescaled.diff() < 0).all()


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("num_steps", [1, 2, 7, 20, 30, 50, 999])
def test_inference_timesteps_equal_diffusers(spacing, offset, num_steps):
    config = STABLE_DIFFUSION | {"timestep_spacing": spacing, "steps_offset": offset}
    theirs = DDIMScheduler.from_config(config)
    theirs.set_timesteps(num_steps)
    ours = NoiseSchedule.from_config(config).inference_timesteps(num_steps)
    assert ours.tolist() == [*theirs.timesteps.tolist(), -1]
    assert NoiseSchedule.from_config(STABLE_DIFFUSION | {"steps_offset": offset}).inference_timesteps(num_steps, spacing).equal(ours)


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_every_timestep_as_a_step_stays_within_the_schedule(schedule, spacing):
    assert schedule.inference_timesteps(1000, spacing).tolist() == [*range(999, -1, -1), -1]


def test_lcm_timesteps_equal_diffusers(schedule):
    theirs = LCMScheduler.from_config(STABLE_DIFFUSION)
    for num_steps in range(1, 51):
        theirs.set_timesteps(num_steps)
        assert schedule.inference_timesteps(num_steps, "lcm").tolist() == [*theirs.timesteps.tolist(), -1]
    with pytest.raises(UserError, match="51 steps were asked for, but the timestep spacing lcm has 50"):
        schedule.inference_timesteps(51, "lcm")


def test_the_scheduler_of_a_latent_consistency_model_has_its_own_timesteps():
    config = STABLE_DIFFUSION | {"_class_name": "LCMScheduler", "original_inference_steps": 100, "timestep_spacing": "leading"}
    theirs = LCMScheduler.from_config(config)
    theirs.set_timesteps(4)
    assert NoiseSchedule.from_config(config).inference_timesteps(4).tolist() == [*theirs.timesteps.tolist(), -1]


@pytest.mark.parametrize("num_steps", [2, 10, 100])
def test_karras_sigmas_equal_diffusers(schedule, num_steps):
    """At timesteps between the training timesteps; float32 timesteps cost 2e-5 of sigma."""
    theirs = EulerDiscreteScheduler.from_config(STABLE_DIFFUSION, use_karras_sigmas=True)
    theirs.set_timesteps(num_steps)
    timesteps = schedule.inference_timesteps(num_steps, "karras")
    assert timesteps.dtype == torch.float32 and timesteps[-1] == -1 and (timesteps.diff() < 0).all()
    torch.testing.assert_close(schedule.sigmas(timesteps)[:-1], theirs.sigmas[:-1], rtol=2e-5, atol=0)


def test_zero_terminal_snr_on_request():
    plain = {key: value for key, value in ZERO_TERMINAL_SNR.items() if key not in ("rescale_betas_zero_snr", "timestep_spacing")}
    forced, expected = NoiseSchedule.from_config(plain).with_zero_terminal_snr(), NoiseSchedule.from_config(ZERO_TERMINAL_SNR)
    assert torch.equal(forced.alphas_cumprod, expected.alphas_cumprod)
    assert forced.final_alpha_cumprod == pytest.approx(expected.final_alpha_cumprod, rel=1e-6)
    assert forced.inference_timesteps(7).equal(expected.inference_timesteps(7)) and forced.inference_timesteps(7)[0] == 999
    assert forced.with_zero_terminal_snr() is forced
    assert NoiseSchedule.from_config(plain).alphas_cumprod[-1] > 0.004


def test_zero_terminal_snr_needs_v_prediction(schedule):
    with pytest.raises(UserError, match="zero_terminal_snr was asked for, but the model predicts eps"):
        schedule.with_zero_terminal_snr()


@pytest.mark.parametrize("num_steps", [0, 1001])
def test_too_few_or_too_many_steps(schedule, num_steps):
    with pytest.raises(UserError, match=f"1 to 1000 steps, not {num_steps}"):
        schedule.inference_timesteps(num_steps)


@pytest.mark.parametrize(
    ("key", "value"), [("beta_schedule", "squaredcos_cap_v2"), ("prediction_type", "sample"), ("timestep_spacing", "karras")]
)
def test_what_is_not_supported_is_said(key, value):
    with pytest.raises(UserError, match=value):
        NoiseSchedule.from_config(STABLE_DIFFUSION | {key: value})


@pytest.mark.parametrize("betas", [[0.1, 1.5], [-0.1, 0.2], [0.0, 0.0], [[0.1, 0.2]]])
def test_betas_that_are_no_noise_schedule(betas):
    with pytest.raises(UserError, match="from 0 to 1, and rise"):
        NoiseSchedule.from_config(STABLE_DIFFUSION | {"trained_betas": betas, "num_train_timesteps": len(betas)})


@pytest.mark.parametrize("num_steps", [1, 100_001, 10.0])
def test_a_number_of_timesteps_that_is_none(num_steps):
    with pytest.raises(UserError, match=f"num_train_timesteps {num_steps}; it must be from 2 to 100000"):
        NoiseSchedule.from_config(STABLE_DIFFUSION | {"num_train_timesteps": num_steps})
    assert [len(NoiseSchedule.from_config({"num_train_timesteps": number})) for number in (2, 100_000)] == [2, 100_000]


def test_abar_of_integer_and_final_timesteps(schedule):
    timesteps = torch.tensor([0, 999, -1, 500])
    expected = schedule.alphas_cumprod[torch.tensor([0, 999, 0, 500])]
    assert torch.equal(schedule.abar(timesteps), expected)
    torch.testing.assert_close(schedule.abar(timesteps.float()), expected, rtol=1e-6, atol=0)
    assert NoiseSchedule.from_config(CONFIGS["ends_at_one"]).abar(torch.tensor([-1])).item() == 1.0
    assert NoiseSchedule.from_config(CONFIGS["ends_at_one"]).sigmas(torch.tensor([-1.0])).item() == 0.0


def test_float_timesteps_interpolate_log_sigma(schedule):
    low, middle, high = schedule.sigmas(torch.tensor([300.0, 300.25, 301.0])).log().tolist()
    assert middle == pytest.approx(0.75 * low + 0.25 * high, abs=1e-6)
    beyond = torch.tensor([999.2, 1000.0, 5000.0])  # where noise is most, too
    torch.testing.assert_close(schedule.sigmas(beyond), schedule.sigmas(torch.tensor([999] * 3)), rtol=1e-5, atol=0)


def test_timesteps_of_sigmas_is_the_inverse(schedule):
    timesteps = torch.tensor([0.0, 0.5, 17.25, 500.0, 998.9, 999.0])
    torch.testing.assert_close(schedule.timesteps_of(schedule.sigmas(timesteps)), timesteps, rtol=0, atol=2e-3)
    assert schedule.timesteps_of(torch.tensor([0.0, 1e6])).tolist() == [0.0, 999.0]


@pytest.mark.parametrize("abar", [ABAR_FLOOR, 0.0047, 0.3, 0.9991])
def test_conversions_agree_with_their_definitions(abar):
    generator = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(2, 3, 4, 8, 8, generator=generator, dtype=torch.float64)
    abar = torch.full((3,), abar, dtype=torch.float64)
    a, s = abar[0].sqrt(), (1 - abar[0]).sqrt()
    latents, v = a * x0 + s * eps, a * eps - s * x0
    close = {"rtol": 1e-8, "atol": 1e-8}
    torch.testing.assert_close(eps_to_x0(latents, eps, abar), x0, **close)
    torch.testing.assert_close(v_to_eps(latents, v, abar), eps, **close)
    torch.testing.assert_close(eps_to_v(latents, eps, abar), v, **close)
    torch.testing.assert_close(sigma_to_abar(abar_to_sigma(abar)), abar, **close)
    torch.testing.assert_close(abar_to_sigma(abar), s / a[None].expand(3), **close)


def test_add_noise_and_velocity_equal_diffusers(schedule):
    theirs = DDIMScheduler.from_config(STABLE_DIFFUSION)
    generator = torch.Generator().manual_seed(1)
    x0, noise = torch.randn(2, 3, 4, 8, 8, generator=generator)
    timesteps = torch.tensor([0, 400, 999])
    latents = schedule.add_noise(x0, noise, timesteps)
    torch.testing.assert_close(latents, theirs.add_noise(x0, noise, timesteps), rtol=0, atol=1e-6)
    velocity = theirs.get_velocity(x0, noise, timesteps)
    torch.testing.assert_close(eps_to_v(latents, noise, schedule.abar(timesteps)), velocity, rtol=0, atol=2e-5)


def test_at_the_floor_v_goes_through_eps_to_x0_with_a_stated_error():
    """Through eps in float32, x0 at zero terminal SNR is within 3e-3 of -v, and its gradient with respect to v is -1 within 1e-3."""
    schedule = NoiseSchedule.from_config(ZERO_TERMINAL_SNR)
    latents, v = torch.randn(2, 64, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    v.requires_grad_(True)
    abar = schedule.abar(torch.full((64,), 999))
    x0 = eps_to_x0(latents, v_to_eps(latents, v, abar), abar)
    torch.testing.assert_close(x0, -v, rtol=0, atol=3e-3)
    (gradient,) = torch.autograd.grad(x0.sum(), v)
    torch.testing.assert_close(gradient, -torch.ones_like(v), rtol=0, atol=1e-3)


@pytest.mark.parametrize("name", ["steps_offset", "original_inference_steps"])
def test_numbers_of_steps_are_whole(name):
    with pytest.raises(UserError, match=f"has {name} '1'; it must be a whole number"):
        NoiseSchedule.from_config(STABLE_DIFFUSION | {name: "1"})
