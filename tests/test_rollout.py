"""The belt: where trajectories stand, where they go, and that it can be put away and taken out again."""

import pytest
import torch

from library.errors import UserError
from library.rollouts.belt import Belt
from library.rollouts.config import RolloutConfig
from library.rollouts.rows import predict_rows, rows_of
from library.rollouts.sample import SamplingConfig, sample
from library.types import PromptSpec
from tests.helpers.context import make_context

PROMPTS = [PromptSpec(prompt="a red circle"), PromptSpec(prompt="a blue square", weight=3.0)]


def make_belt(prompts: list[PromptSpec] = PROMPTS, seed: int = 0, **settings) -> Belt:
    context = make_context(**{"train_batch_size": 4, "max_denoising_steps": 8, "leco_denoise_guidance_scale": 5.0, **settings})
    return Belt(context.trajectories(prompts, torch.Generator().manual_seed(seed)))


def test_trajectories_start_staggered_and_stay_so() -> None:
    belt = make_belt()
    for _ in range(10):
        batch = belt.next_batch()
        assert len(set(batch.timesteps.tolist())) == 4
        belt.advance(belt.trajectories.predict(batch))


def test_neighbours_and_successors_alternate_the_multipliers() -> None:
    belt = make_belt(train_batch_size=3, max_denoising_steps=2)
    seen = []
    for _ in range(8):
        batch = belt.next_batch()
        seen.append(batch.multipliers.tolist())
        belt.advance(belt.trajectories.predict(batch))
    assert set(seen[0]) == {1.0, -1.0}
    for place in range(3):
        signs = [row[place] for row in seen]
        assert set(signs) == {1.0, -1.0}


@pytest.mark.parametrize(("sign", "share", "low", "high"), [(1, 1.0, 0, 0), (-1, 1.0, 1, 1), (1, 0.5, 0.25, 0.42), (1, 0.0, 0.5, 0.5)])
def test_the_sign_that_is_ahead_gives_a_share_of_its_turns_to_the_other(sign: int, share: float, low: float, high: float) -> None:
    """Of trajectories of one step, each of which begins anew at once, the share that is at +1."""
    belt = make_belt(train_batch_size=16, max_denoising_steps=1)
    belt.trajectories.skip = (sign, share)
    belt.trajectories.start_all(belt.trajectories.pools[0])
    drawn: list[float] = []
    for _ in range(20):
        batch = belt.next_batch()
        drawn += batch.multipliers.tolist()
        belt.advance(torch.zeros_like(batch.latents))
    assert low <= drawn.count(1.0) / len(drawn) <= high


@pytest.mark.parametrize("sampler", ["ddim", "dpmpp_2m"])
def test_latents_that_are_not_finite_begin_anew(sampler: str) -> None:
    belt = make_belt(sampler=sampler)
    batch = belt.next_batch()
    spoil = torch.tensor([0.0, torch.nan, 0.0, torch.inf]).view(4, 1, 1, 1)
    belt.advance(belt.trajectories.predict(batch) + spoil)
    (pool,) = belt.trajectories.pools
    kept, steps = pool.latents.clone(), list(pool.steps)
    belt.renew_broken()
    assert pool.latents.isfinite().all() and torch.equal(pool.latents[::2], kept[::2])
    assert pool.steps == [steps[0], 0, steps[2], 0]
    for _ in range(3):
        belt.advance(belt.trajectories.predict(belt.next_batch()))
    assert pool.latents.isfinite().all()


def test_single_samples_alternate_the_multipliers_from_batch_to_batch() -> None:
    belt = make_belt(train_batch_size=1)
    signs, places = [], []
    for _ in range(20):
        batch = belt.next_batch()
        assert len(batch.latents) == 1
        signs.append(batch.strengths[0])
        places.append(batch.times[0])
        belt.advance(belt.trajectories.predict(batch))
    assert belt.trajectories.life == 16
    assert signs == [1.0, -1.0] * 8 + [-1.0, 1.0] * 2  # the two trajectories end, and change their signs
    assert places[0:16:2] == places[1:16:2] == sorted(places[0:16:2], reverse=True)  # each goes on along its own


def test_the_unconditional_branch_is_evaluated_at_every_third_step_and_its_distance_stands_in() -> None:
    belt = make_belt(uncond_every_n_steps=3)
    own, known = belt.trajectories, {}
    for _ in range(8):
        steps = list(own.pools[0].steps)
        batch = belt.next_batch()
        cond, uncond = predict_rows(own.model, own.network, [rows_of(batch, batch.cond), rows_of(batch, batch.uncond)])
        before = own.model.num_unet_evaluations
        eps = own.predict(batch)
        due = [place for place, step in enumerate(steps) if step % 3 == 0]
        assert own.model.num_unet_evaluations - before == 4 + len(due)
        known |= {place: (cond - uncond)[place] for place in due}
        for place, distance in known.items():
            assert torch.allclose(eps[place], cond[place] + 4.0 * distance, atol=1e-5)
        belt.advance(eps)
    assert set(known) == {0, 1, 2, 3}


def test_a_trajectory_of_the_belt_is_a_sampled_picture() -> None:
    """What leaves the belt is what the sampler makes of the same noise, prompt and multiplier (float32: 1e-5)."""
    belt = make_belt(train_batch_size=1, prompts=PROMPTS[:1], max_denoising_steps=5)
    noise = ended = belt.trajectories.pools[0].latents[:1].clone()
    for _ in range(5):
        batch = belt.next_batch()
        eps = belt.trajectories.predict(batch)
        ended, _ = belt.trajectories.step(batch, eps)
        belt.advance(eps)
        belt.next_batch()  # of the trajectory at the other multiplier, which stays
    model, seed = belt.trajectories.model, 123

    from library.rollouts import sample as sampling

    original, sampling.initial_noise = sampling.initial_noise, lambda seeds, shape: (noise, [])
    try:
        expected = sample(
            model,
            belt.trajectories.network,
            PROMPTS[:1],
            [seed],
            1.0,
            sampling=SamplingConfig(num_steps=5, guidance_scale=5.0, size=(64, 64), batch_size=1),
        )
    finally:
        sampling.initial_noise = original
    assert torch.allclose(ended, expected, atol=1e-5)


def test_prompts_are_drawn_by_weight() -> None:
    belt = make_belt(train_batch_size=16, max_denoising_steps=1)
    drawn = []
    for _ in range(40):
        batch = belt.next_batch()
        drawn += [prompt.prompt for prompt in batch.prompts]
        belt.advance(torch.zeros_like(batch.latents))
    assert 0.68 < drawn.count("a blue square") / len(drawn) < 0.82


def test_prompts_of_two_sizes_take_turns() -> None:
    belt = make_belt(prompts=[PromptSpec(prompt="a"), PromptSpec(prompt="b", width=128)], train_batch_size=2)
    assert belt.trajectories.life == 2 * 8
    shapes = set()
    for _ in range(12):
        batch = belt.next_batch()
        shapes.add(tuple(batch.latents.shape[-2:]))
        belt.advance(belt.trajectories.predict(batch))
    assert shapes == {(8, 8), (8, 16)}


@pytest.mark.parametrize(("sampler", "batch_size", "every"), [("ddim", 4, 1), ("euler_a", 4, 3), ("dpmpp_2m", 1, 2)])
def test_a_restored_belt_goes_on_as_if_nothing_had_happened(sampler: str, batch_size: int, every: int) -> None:
    settings = {"sampler": sampler, "train_batch_size": batch_size, "uncond_every_n_steps": every}
    belt = make_belt(**settings)
    for _ in range(3):
        belt.advance(belt.trajectories.predict(belt.next_batch()))
    saved = belt.state_dict()

    def run(belt: Belt) -> list[torch.Tensor]:
        trail = []
        for _ in range(9):
            batch = belt.next_batch()
            trail.append(batch.latents.clone())
            belt.advance(belt.trajectories.predict(batch))
        return trail

    first = run(belt)
    other = make_belt(**settings, seed=99)
    other.load_state_dict(saved)
    for one, two in zip(first, run(other), strict=True):
        assert torch.equal(one, two)


def test_a_state_of_another_batch_size_is_refused() -> None:
    with pytest.raises(UserError, match="resume with the same settings"):
        make_belt(train_batch_size=2).load_state_dict(make_belt(train_batch_size=3).state_dict())


def test_the_rollout_carries_no_gradient() -> None:
    belt = make_belt()
    assert not belt.trajectories.predict(belt.next_batch()).requires_grad


@pytest.mark.parametrize(("resolution", "size"), [((), (512, 512)), ((64,), (64, 64)), ((64, 96), (96, 64))])
def test_a_resolution_is_one_side_or_width_and_height(resolution: tuple[int, ...], size: tuple[int, int]) -> None:
    assert RolloutConfig(resolution=resolution).size(512) == size  # height, width
