"""The LECO-score step: its gradient, its guards, its bookkeeping."""

from dataclasses import replace

import pytest
import torch

from library.models.base import DiffusionModel
from library.objectives.score import ESTIMATORS, ScoreConfig, ScoreObjective
from library.rewards import Goal, Reward
from library.rollout import Belt, RolloutConfig
from library.sampling import PromptEncoder
from library.scorers.base import Scorer
from library.types import PromptSpec, RolloutBatch
from networks.lora import LoRANetwork
from tests.scorers_for_tests import ChannelScorer, CutScorer, WavyScorer, scorer_for
from tests.test_rollout import lora_for
from tests.tiny_models import tiny_model

PROMPTS = [PromptSpec(prompt="a red circle"), PromptSpec(prompt="a blue square")]


def setup(
    kind: str = "sd1",
    scorer: type[Scorer] = WavyScorer,
    guidance: float = 5.0,
    batch_size: int = 3,
    strength: float = 0.05,
    resolution: int = 64,
    **settings,
) -> tuple[DiffusionModel, LoRANetwork, Belt, ScoreObjective]:
    model = tiny_model(kind)
    network = lora_for(model, strength)
    rollout = RolloutConfig(
        prompts_file="-",
        train_batch_size=batch_size,
        max_denoising_steps=6,
        leco_denoise_guidance_scale=guidance,
        resolution=(resolution,),
    )
    belt = Belt(model, network, PROMPTS, PromptEncoder(model, network), rollout, torch.Generator().manual_seed(0))
    config = ScoreConfig(scorer=("-",), **settings)
    objective = ScoreObjective(model, network, Reward([Goal(scorer=scorer_for(model, scorer))]), config, belt.solver, 6)
    return model, network, belt, objective


def gradients(network: LoRANetwork) -> torch.Tensor:
    return torch.cat([parameter.grad.flatten() for parameter in network.parameters() if parameter.grad is not None])


@pytest.mark.parametrize("estimator", list(ESTIMATORS))
@pytest.mark.parametrize("kind", ["sd1", "sd2_v"])
def test_gradient_equals_a_finite_difference(estimator: str, kind: str) -> None:
    """The loss's gradient is that of minus the mean reward in the wanted direction, along the gradient (1e-4)."""
    model, network, belt, objective = setup(
        kind,
        guidance=1.0,
        batch_size=2,
        resolution=128,  # at 64 the tiny model's deepest norms have one position and two channels a group, and jump
        score_estimator=estimator,
        reward_loss="linear",
        preserve_weight=0,
        normalize_gradient=False,
    )
    model.unet.double()
    network.double()
    batch = belt.batch()
    objective(batch).loss.backward()
    parameters = list(network.parameters())
    norm = gradients(network).norm()
    direction = [parameter.grad / norm for parameter in parameters]
    analytic = sum((parameter.grad * step).sum() for parameter, step in zip(parameters, direction, strict=True))

    @torch.no_grad()
    def loss_at(distance: float) -> torch.Tensor:
        for parameter, step in zip(parameters, direction, strict=True):
            parameter.add_(distance * step)
        abar, next_abar = model.schedule.abar(batch.timesteps), model.schedule.abar(batch.next_timesteps)
        network.set_multiplier(batch.multipliers)
        eps = model.predict_eps(batch.latents, batch.timesteps, batch.cond).double()
        wide = replace(batch, latents=batch.latents.double())
        scored = objective.estimate(wide, eps, abar.double(), next_abar.double(), belt.solver)
        scorer = objective.reward.scorers[0]
        loss = -(batch.directions * scorer.score(scored.latents, scored.sigmas, None, None)).mean()
        for parameter, step in zip(parameters, direction, strict=True):
            parameter.sub_(distance * step)
        return loss

    numeric = (loss_at(1e-3) - loss_at(-1e-3)) / 2e-3
    assert abs(analytic) > 1e-6
    assert analytic.item() == pytest.approx(numeric.item(), rel=1e-4)


def test_gradient_is_the_same_with_gradient_checkpointing() -> None:
    found = []
    for checkpointing in (False, True):
        model, network, belt, objective = setup()
        if checkpointing:
            model.enable_gradient_checkpointing()
            model.unet.train()
            network.enable_gradient_checkpointing()
        out = objective(belt.batch())
        network.set_multiplier(0.3)  # what happens between forward and backward must not matter
        out.loss.backward()
        found.append(gradients(network))
    assert torch.equal(*found)


@pytest.mark.parametrize("batch_size", [1, 2, 3])
@pytest.mark.parametrize("kind", ["sd1", "sd2_v", "sdxl"])
def test_every_batch_size_and_family_trains(batch_size: int, kind: str) -> None:
    _, network, belt, objective = setup(kind, batch_size=batch_size)
    out = objective(belt.batch())
    out.loss.backward()
    belt.advance(out.next_latents)
    assert torch.isfinite(gradients(network)).all() and gradients(network).abs().max() > 0
    assert out.sample_losses.shape == (batch_size,)


def test_the_next_latents_are_those_of_the_sampler() -> None:
    _, _, belt, objective = setup()
    batch = belt.batch()
    assert torch.allclose(objective(batch).next_latents, belt.denoise(batch), atol=1e-5)


def drive(objective: ScoreObjective, network: LoRANetwork, batch: RolloutBatch, steps: int = 12) -> float:
    """Gain of the reward in the wanted direction that training on one batch brings."""
    optimizer = torch.optim.Adam(network.parameters(), lr=2e-3)
    rewards = []
    for _ in range(steps):
        optimizer.zero_grad()
        out = objective(batch)
        out.loss.backward()
        optimizer.step()
        rewards.append((batch.directions * objective.reward(out.next_latents, batch.next_sigmas, None, batch.prompts).total).mean().item())
    return rewards[-1] - rewards[0]


def test_the_reward_rises_and_with_the_gradient_cut_it_does_not() -> None:
    """The field's self-test: with preservation off and a plain score the training reward rises; with the gradient path cut it stays."""
    settings = {"reward_loss": "linear", "preserve_weight": 0, "strength": 0.0}
    _, network, belt, objective = setup(scorer=ChannelScorer, **settings)
    risen = drive(objective, network, belt.batch())
    _, network, belt, objective = setup(scorer=CutScorer, **settings)
    assert drive(objective, network, belt.batch()) == 0
    assert risen > 0.01


def test_hinge_lets_a_sample_rest_that_is_far_enough() -> None:
    _, _, belt, objective = setup(scorer=ChannelScorer, hinge_margin=2.0)
    batch = belt.batch()
    assert objective(batch).metrics["pushed"] == 1
    objective.step_margin = -1e6
    assert objective(batch).metrics["pushed"] == 0


def test_a_prompts_direction_turns_the_push_round() -> None:
    _, network, belt, objective = setup(preserve_weight=0, reward_loss="linear")
    batch = belt.batch()
    objective(batch).loss.backward()
    forth = gradients(network)
    network.zero_grad()
    turned = replace(batch, prompts=[replace(prompt, direction=-1.0) for prompt in batch.prompts])
    objective(turned).loss.backward()
    assert torch.allclose(gradients(network), -forth)


def test_preservation_alone_pulls_back() -> None:
    _, network, belt, objective = setup(reward_weight=0)
    batch = belt.batch()
    before = objective(batch).metrics["eps_drift"]
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    for _ in range(10):
        optimizer.zero_grad()
        objective(batch).loss.backward()
        optimizer.step()
    assert objective(batch).metrics["eps_drift"] < 0.8 * before


def test_steps_outside_the_timestep_range_are_not_trained() -> None:
    _, _, belt, objective = setup(min_timestep=400)
    batch = belt.batch()
    losses = objective(batch).sample_losses
    assert torch.equal(losses == 0, batch.timesteps < 400)
    assert (batch.timesteps < 400).any()


@pytest.mark.parametrize(
    ("guidance", "settings", "per_sample"),
    [(5.0, {}, 5), (5.0, {"reward_loss": "linear", "preserve_weight": 0}, 4), (1.0, {"reward_loss": "linear", "preserve_weight": 0}, 3)],
)
def test_unet_evaluations_are_counted(guidance: float, settings: dict, per_sample: int) -> None:
    model, _, belt, objective = setup(guidance=guidance, **settings)
    rows = []
    model.unet.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    out = objective(belt.batch())
    assert out.num_unet_evaluations == per_sample * 3
    assert sum(rows) + 2 * 3 == out.num_unet_evaluations  # the backward of the graded call counts twice
