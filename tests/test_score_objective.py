"""The LECO-score step: what its gradient does, whom it leaves alone, where the trajectories go on."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from library.training.finite_losses import FiniteLosses
from library.types import Conditioning
from tests.helpers.objective import Stage, gradients, make_stage
from tests.helpers.scorers import ChannelScorer, CutScorer


def test_gradient_is_the_same_with_gradient_checkpointing() -> None:
    found = []
    for checkpointing in (False, True):
        stage = make_stage()
        if checkpointing:
            stage.model.enable_gradient_checkpointing()
            stage.model.unet.train()
            stage.network.enable_gradient_checkpointing()
        out = stage.loss()
        stage.network.set_multiplier(0.3)  # what happens between forward and backward must not matter
        out.loss.backward()
        found.append(gradients(stage.network))
    assert torch.equal(*found)


@pytest.mark.parametrize(("kind", "batch_size"), [("sd1", 1), ("sd1", 3), ("sd2_v", 2), ("sdxl", 2)])
def test_every_batch_size_and_family_trains(kind: str, batch_size: int) -> None:
    stage = make_stage(kind, batch_size=batch_size)
    out, eps = stage.objective(stage.rollout.next_batch())
    out.loss.backward()
    stage.rollout.advance(eps)
    assert torch.isfinite(gradients(stage.network)).all() and gradients(stage.network).abs().max() > 0
    assert out.sample_losses.shape == (batch_size,) and len(out.samples) == batch_size


@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_trajectories_go_on_along_the_rollouts_own_prediction(guidance: float) -> None:
    stage = make_stage(guidance=guidance)
    batch = stage.rollout.next_batch()
    _, eps = stage.objective(batch)
    assert not eps.requires_grad
    assert torch.allclose(eps, stage.trajectories.predict(batch), atol=1e-5)


def drive(stage: Stage, steps: int) -> float:
    """Gain of the reward in the wanted direction that training on one batch brings, all but the last step of it."""
    batch = stage.rollout.next_batch()
    optimizer = torch.optim.Adam(stage.network.parameters(), lr=2e-3)
    rewards = []
    for _ in range(steps):
        optimizer.zero_grad()
        out, eps = stage.objective(batch)
        out.loss.backward()
        optimizer.step()
        latents, _ = stage.trajectories.step(batch, eps)
        reward = stage.objective.reward(latents, stage.objective.schedule.sigmas(batch.next_timesteps), None, batch.prompts).total
        rewards.append((batch.directions * reward).mean().item())
    return rewards[-1] - rewards[0]


def test_the_reward_rises_and_with_the_gradient_cut_it_does_not() -> None:
    """The field's self-test: with preservation off and a plain score the training reward rises; with the gradient path cut it stays."""
    settings = {"reward_loss": "linear", "preserve_weight": 0.0, "strength": 0.0}
    assert drive(make_stage(scorer=ChannelScorer, **settings), 12) > 0.003
    assert drive(make_stage(scorer=ChannelScorer, **settings), 3) > 0
    assert drive(make_stage(scorer=CutScorer, **settings), 3) == 0


def test_a_prompts_direction_turns_the_push_round() -> None:
    stage = make_stage(preserve_weight=0, reward_loss="linear")
    batch = stage.rollout.next_batch()
    turned = replace(batch, prompt_directions=-batch.prompt_directions)
    assert torch.allclose(stage.gradient(turned), -stage.gradient(batch))


class Blind(ChannelScorer):
    """Has no opinion on blue squares."""

    def standardised(self, latents: Tensor, sigmas: Tensor, cond: Conditioning | None, prompts: Sequence[str] | None) -> Tensor:
        assert prompts is not None
        return super().standardised(latents, sigmas, cond, prompts) / latents.new_tensor(["blue" not in text for text in prompts])


def test_what_a_scorer_cannot_judge_does_not_count_and_the_rest_does(caplog: pytest.LogCaptureFixture) -> None:
    for settings in ({"preserve_weight": 0, "reward_loss": "linear"}, {}):
        blind, seeing = make_stage(scorer=Blind, batch_size=4, **settings), make_stage(scorer=ChannelScorer, batch_size=4, **settings)
        batch = seeing.rollout.next_batch()
        judged = torch.tensor(["blue" not in prompt.prompt for prompt in batch.prompts])
        assert 0 < judged.sum() < 4
        out, eps = blind.objective(batch)
        assert out.loss.isfinite() and eps.isfinite().all() and torch.equal(out.sample_losses.isfinite(), judged)
        assert all(torch.as_tensor(value).isfinite() for name, value in out.metrics.items() if name != "gain_per_step" or not settings)
        losses = FiniteLosses(100)
        assert losses.check(out, 0, "score") and "blue square" in losses.found[0] and "(scorer Blind)" in losses.found[0]
        assert not losses.check(replace(out, sample_losses=out.sample_losses * torch.nan), 1, "score")
        if settings:  # without the preservation, a sample that is to go nowhere counts for nothing
            assert torch.equal(blind.gradient(batch), seeing.gradient(replace(batch, prompt_directions=judged.float())))


def test_steps_outside_the_timestep_range_only_move_on() -> None:
    stage, free = make_stage(min_timestep=400, max_timestep=800), make_stage()
    batch = stage.rollout.next_batch()
    inside = (batch.timesteps >= 400) & (batch.timesteps < 800)
    count = int(inside.sum())
    assert 0 < count < 3
    before = stage.model.num_unet_evaluations
    out, eps = stage.objective(batch)
    assert stage.model.num_unet_evaluations - before == 3 + (3 - count) + 4 * count  # uncond; cond; frozen, graded and its gradient
    expected, expected_eps = free.objective(free.rollout.next_batch())
    assert torch.allclose(out.sample_losses, expected.sample_losses[inside], atol=1e-5)
    assert torch.allclose(out.loss, expected.sample_losses[inside].sum() / 3, atol=1e-5)
    assert torch.allclose(eps, expected_eps, atol=1e-5)


def test_the_units_of_the_score_do_not_matter() -> None:
    """A scorer whose numbers and standard deviation are a thousand times as large is the same opinion."""
    found = [make_stage(std=std).gradient() for std in (1.0, 1000.0)]
    assert torch.allclose(*found, rtol=1e-3, atol=1e-6 * float(found[0].abs().max()))


class LoudScorer(ChannelScorer):
    """The same opinion, called a thousand times as strong although its standard deviation is the same."""

    def standardised(self, latents: Tensor, sigmas: Tensor, cond: Conditioning | None, prompts: Sequence[str] | None) -> Tensor:
        return 1000 * super().standardised(latents, sigmas, cond, prompts)


def test_the_scale_of_the_score_does_not_matter() -> None:
    settings = {"reward_loss": "linear", "preserve_weight": 0.0}
    quiet, loud = (make_stage(scorer=kind, **settings).gradient() for kind in (ChannelScorer, LoudScorer))
    assert torch.allclose(quiet, loud, rtol=1e-3, atol=1e-6 * float(quiet.abs().max()))


def test_preservation_alone_pulls_back() -> None:
    """The loss is preserve_weight times the mean squared distance from the frozen model's prediction, and training shortens it."""
    stage = make_stage(scorer=CutScorer, preserve_weight=2.0, guidance=1.0)
    batch = stage.rollout.next_batch()
    out = stage.loss(batch)
    with torch.no_grad(), stage.network.disabled():
        frozen = stage.model.predict_eps(batch.latents, batch.timesteps, batch.cond)
    expected = 2.0 * (stage.trajectories.predict(batch) - frozen).square().mean((1, 2, 3))
    assert torch.allclose(out.sample_losses, expected, rtol=1e-4)
    optimizer = torch.optim.Adam(stage.network.parameters(), lr=1e-3)
    for _ in range(10):
        optimizer.zero_grad()
        stage.loss(batch).loss.backward()
        optimizer.step()
    assert stage.loss(batch).metrics["eps_drift"] < 0.8 * out.metrics["eps_drift"]
