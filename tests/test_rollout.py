"""The belt: where trajectories stand, where they go, and that it can be put away and taken out again."""

import pytest
import torch

from library.errors import UserError
from library.models.base import DiffusionModel
from library.rollouts.belt import ROLLOUTS, Belt, RolloutConfig
from library.rollouts.sample import PromptEncoder, SamplingConfig, sample
from library.types import PromptSpec
from networks.lora import LoRANetwork, create_network
from tests.helpers.tiny_models import tiny_model

PROMPTS = [PromptSpec(prompt="a red circle"), PromptSpec(prompt="a blue square", weight=3.0)]


def lora_for(model: DiffusionModel, strength: float = 0.05) -> LoRANetwork:
    network = create_network(1.0, 2, 2.0, model.vae, [], model.unet, generator=torch.Generator().manual_seed(0))
    for lora in network.loras:
        torch.nn.init.normal_(lora.lora_up.weight, std=strength, generator=torch.Generator().manual_seed(1))
    network.apply_to([], model.unet, apply_text_encoder=False)
    model.freeze()
    return network


def make_belt(kind: str = "belt", prompts: list[PromptSpec] = PROMPTS, seed: int = 0, **settings) -> Belt:
    model = tiny_model("sd1")
    network = lora_for(model)
    config = RolloutConfig(prompts_file="-", rollout=kind, **{"train_batch_size": 4, "max_denoising_steps": 8, **settings})
    return ROLLOUTS[kind](model, network, prompts, PromptEncoder(model, network), config, torch.Generator().manual_seed(seed))


def test_trajectories_start_staggered_and_stay_so() -> None:
    belt = make_belt()
    for _ in range(10):
        batch = belt.batch()
        assert len(set(batch.timesteps.tolist())) == 4
        belt.advance(belt.predict(batch))


def test_neighbours_and_successors_alternate_the_multipliers() -> None:
    belt = make_belt(train_batch_size=3, max_denoising_steps=2)
    seen = []
    for _ in range(8):
        batch = belt.batch()
        seen.append(batch.multipliers.tolist())
        belt.advance(belt.predict(batch))
    assert set(seen[0]) == {1.0, -1.0}
    for place in range(3):
        signs = [row[place] for row in seen]
        assert set(signs) == {1.0, -1.0}


def test_a_trajectory_of_the_belt_is_a_sampled_picture() -> None:
    """What leaves the belt is what the sampler makes of the same noise, prompt and multiplier (float32: 1e-5)."""
    belt = make_belt(train_batch_size=1, prompts=PROMPTS[:1], max_denoising_steps=5)
    noise = ended = belt.batch().latents.clone()
    for _ in range(5):
        batch = belt.batch()
        eps = belt.predict(batch)
        ended, _ = belt.step(batch, eps)
        belt.advance(eps)
    model, seed = belt.model, 123

    from library.rollouts import sample as sampling

    original, sampling.initial_noise = sampling.initial_noise, lambda seeds, shape: (noise, [])
    try:
        expected = sample(
            model,
            belt.network,
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
        batch = belt.batch()
        drawn += [prompt.prompt for prompt in batch.prompts]
        belt.advance(torch.zeros_like(batch.latents))
    assert 0.68 < drawn.count("a blue square") / len(drawn) < 0.82


def test_prompts_of_two_sizes_take_turns() -> None:
    belt = make_belt(prompts=[PromptSpec(prompt="a"), PromptSpec(prompt="b", width=128)], train_batch_size=2)
    shapes = set()
    for _ in range(12):
        batch = belt.batch()
        shapes.add(tuple(batch.latents.shape[-2:]))
        belt.advance(belt.predict(batch))
    assert shapes == {(8, 8), (8, 16)}


@pytest.mark.parametrize("sampler", ["ddim", "euler_a"])
def test_a_restored_belt_goes_on_as_if_nothing_had_happened(sampler: str) -> None:
    belt = make_belt(sampler=sampler)
    for _ in range(3):
        belt.advance(belt.predict(belt.batch()))
    saved = belt.state_dict()

    def run(belt: Belt) -> list[torch.Tensor]:
        trail = []
        for _ in range(9):
            batch = belt.batch()
            trail.append(batch.latents.clone())
            belt.advance(belt.predict(batch))
        return trail

    first = run(belt)
    other = make_belt(sampler=sampler, seed=99)
    other.load_state_dict(saved)
    for one, two in zip(first, run(other), strict=True):
        assert torch.equal(one, two)


def test_a_state_of_another_batch_size_is_refused() -> None:
    with pytest.raises(UserError, match="resume with the same settings"):
        make_belt(train_batch_size=2).load_state_dict(make_belt(train_batch_size=3).state_dict())


def test_per_sample_starts_afresh_for_every_batch() -> None:
    belt = make_belt("per_sample", train_batch_size=3)
    steps = set()
    for _ in range(6):
        batch = belt.batch()
        steps |= set(batch.timesteps.tolist())
        belt.advance(torch.zeros_like(batch.latents))
    assert len(steps) > 3
    assert belt.num_unet_evaluations > 0


def test_the_rollout_carries_no_gradient() -> None:
    belt = make_belt()
    assert not belt.predict(belt.batch()).requires_grad
