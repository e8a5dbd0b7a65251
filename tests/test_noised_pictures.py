"""Rollouts that train on finished pictures, noised anew."""

import pytest
import torch

from library.diffusion.noise_schedule import per_sample
from library.rollouts.noised import NoisedRollout, given_pictures
from library.rollouts.sample import SamplingConfig, initial_noise, sample
from library.types import PromptSpec, RolloutBatch
from tests.helpers.context import make_context
from tests.helpers.objective import PROMPTS


def make_rollout(seed: int = 0, source: list | None = None, **settings) -> NoisedRollout:
    """Of prompts, or of pictures with their prompts."""
    context = make_context(
        **{"train_batch_size": 4, "max_denoising_steps": 6, "leco_denoise_guidance_scale": 5.0, "resolution": (64,), **settings}
    )
    generator = torch.Generator().manual_seed(seed)
    if source is None or isinstance(source[0], PromptSpec):
        return NoisedRollout(context.trajectories(source or PROMPTS, generator))
    prompts, pictures = given_pictures(source, 8)
    return NoisedRollout(context.trajectories(prompts, generator), pictures=pictures)


def clean_of(rollout: NoisedRollout, batch: RolloutBatch) -> torch.Tensor:
    """The pictures that were noised, from the noise that is known."""
    assert batch.added_noise is not None
    abar = per_sample(rollout.trajectories.schedule.abar(batch.timesteps), batch.latents)
    return (batch.latents - (1 - abar).sqrt() * batch.added_noise) / abar.sqrt()


def test_a_picture_is_used_several_times_and_then_another_is_made() -> None:
    rollout = make_rollout()
    seen, costs, places = [], [], set()
    for _ in range(9):
        before = rollout.trajectories.model.num_unet_evaluations
        batch = rollout.next_batch()
        seen.append(clean_of(rollout, batch))
        costs.append(rollout.trajectories.model.num_unet_evaluations - before)
        places |= set(batch.timesteps.tolist())
        assert torch.equal(batch.next_timesteps == -1, batch.timesteps == rollout.trajectories.pools[0].timesteps[-2])
        rollout.advance(torch.zeros_like(batch.latents))
    assert costs == [2 * 4 * 6, 0, 0, 0, 2 * 4 * 6, 0, 0, 0, 2 * 4 * 6]
    assert len(places) > 3
    for first, second in ((0, 1), (1, 3), (4, 5), (5, 7)):
        assert torch.allclose(seen[first], seen[second], atol=1e-3)
    assert (seen[3] - seen[4]).abs().mean() > 0.1


def test_the_noise_is_new_every_time() -> None:
    rollout = make_rollout()
    noises = [rollout.next_batch().added_noise for _ in range(3)]
    assert noises[0] is not None and noises[1] is not None
    assert (noises[0] - noises[1]).abs().mean() > 0.5
    assert noises[0].std().item() == pytest.approx(1, abs=0.1)


def test_the_pictures_are_the_samplers(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is noised is what the sampler makes of the same noise, prompts and multipliers (float32: 1e-4)."""
    rollout = make_rollout(train_batch_size=2, resolution=(128,))
    started = []
    own = rollout.trajectories
    monkeypatch.setattr(own, "start_all", lambda pool: (type(own).start_all(own, pool), started.append(pool.latents.clone())))
    batch = rollout.next_batch()
    monkeypatch.setattr("library.rollouts.sample.initial_noise", lambda seeds, shape: (started[0], initial_noise(seeds, shape)[1]))
    sampling = SamplingConfig(num_steps=6, guidance_scale=5.0, size=(128, 128), batch_size=2)
    expected = sample(own.model, own.network, batch.prompts, [0, 1], batch.multipliers, sampling=sampling)
    assert set(batch.multipliers.tolist()) == {1, -1}
    assert torch.allclose(clean_of(rollout, batch), expected, atol=1e-3)


# -- pictures from elsewhere -----------------------------------------------------------------------------------------------

PICTURES = [
    (torch.full((4, 8, 8), 1.0), PromptSpec(prompt="a red circle")),
    (torch.full((4, 8, 16), 2.0), PromptSpec(prompt="a blue square", weight=4.0)),
    (torch.full((4, 8, 8), 3.0), PromptSpec(prompt="a red circle")),
]


def test_pictures_cost_no_trajectory_and_come_with_their_prompts_and_sizes() -> None:
    rollout = make_rollout(source=PICTURES)
    seen = set()
    for _ in range(120):
        batch = rollout.next_batch()
        for picture, prompt in zip(clean_of(rollout, batch), batch.prompts, strict=True):
            value = round(picture.mean().item())
            assert torch.allclose(picture, torch.full_like(picture, value), atol=1e-3)
            seen.add((value, prompt.prompt, tuple(picture.shape)))
    assert rollout.trajectories.model.num_unet_evaluations == 0
    wanted = {(1, "a red circle", (4, 8, 8)), (2, "a blue square", (4, 8, 16)), (3, "a red circle", (4, 8, 8))}
    assert seen == wanted


def test_pictures_are_drawn_by_weight() -> None:
    rollout = make_rollout(source=PICTURES)
    drawn = [prompt.prompt for _ in range(240) for prompt in rollout.next_batch().prompts]
    assert 0.52 < drawn.count("a blue square") / len(drawn) < 0.82  # 4 of 6


# -- put away and taken out again ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "sampler", "count"),
    [*((False, "euler_a", count) for count in (0, 2, 4)), (False, "dpmpp_2m", 2), (True, "ddim", 2), (True, "ddim", 4)],
)
def test_a_restored_rollout_goes_on_as_if_nothing_had_happened(given: bool, sampler: str, count: int) -> None:
    """In the middle of a picture's uses, at their end, and before the first."""
    source = PICTURES if given else [PromptSpec(prompt="a"), PromptSpec(prompt="b", width=128)]
    first, other = (make_rollout(seed, source, sampler=sampler, train_batch_size=2, max_denoising_steps=3) for seed in (0, 9))
    for _ in range(count):
        first.next_batch()
    other.next_batch()
    other.load_state_dict(first.state_dict())
    for _ in range(5):
        one, two = first.next_batch(), other.next_batch()
        assert torch.equal(one.latents, two.latents) and torch.equal(one.multipliers, two.multipliers)
        assert one.prompts == two.prompts and torch.equal(one.timesteps, two.timesteps)
        assert one.noise is None or (two.noise is not None and torch.equal(one.noise, two.noise))
