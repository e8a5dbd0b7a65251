"""What holds a slider to its model: drift, latent statistics, symmetry of the two signs."""

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from library.errors import UserError
from library.objectives.preservation import asymmetry, eps_drift, statistics_drift
from library.objectives.score_config import ESTIMATORS, ScoreConfig
from library.types import Conditioning, RolloutBatch
from tests.helpers.objective import Stage, make_stage
from tests.helpers.scorers import StandardisedScorer


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_drift_is_the_mean_square_per_sample() -> None:
    eps = noise(2, 4, 8, 8)
    offsets = torch.tensor([0.5, -2.0]).view(2, 1, 1, 1)
    assert torch.allclose(eps_drift(eps + offsets, eps), torch.tensor([0.25, 4.0]))


def test_statistics_drift_sees_shifts_and_contrast_but_not_what_moves_around() -> None:
    x0, abar = noise(3, 4, 8, 8), torch.tensor([1.0, 0.5, 0.25])
    shifted = x0 + torch.tensor([0.2, 0, 0, 0]).view(1, 4, 1, 1)
    assert torch.allclose(statistics_drift(shifted, x0, abar), 0.01 * abar, rtol=1e-4)
    means = x0.mean((2, 3), keepdim=True)
    assert torch.allclose(statistics_drift(means + 1.5 * (x0 - means), x0, abar), math.log(1.5) ** 2 * abar, rtol=1e-3)
    assert torch.allclose(statistics_drift(x0.flip(2).roll(3, 3), x0, abar), torch.zeros(3), atol=1e-9)
    assert torch.isfinite(statistics_drift(torch.zeros(1, 4, 8, 8), x0[:1], abar[:1])).all()


def test_asymmetry_is_zero_for_an_odd_network_only() -> None:
    frozen, odd, even = noise(2, 4, 8, 8), noise(2, 4, 8, 8, seed=1), noise(2, 4, 8, 8, seed=2)
    assert asymmetry(frozen + odd, frozen - odd, frozen).abs().max() < 1e-12
    assert torch.allclose(asymmetry(frozen + odd + even, frozen - odd + even, frozen), even.square().mean((1, 2, 3)), rtol=1e-4)


def train(stage: Stage, batch: RolloutBatch, steps: int = 10, learning_rate: float = 1e-3) -> list[dict]:
    """The metrics before every step and after the last."""
    optimizer = torch.optim.Adam(stage.network.parameters(), lr=learning_rate)
    found = []
    for _ in range(steps):
        optimizer.zero_grad()
        out = stage.loss(batch)
        out.loss.backward()
        optimizer.step()
        found.append(out.metrics)
    return [*found, stage.loss(batch).metrics]


def test_preservation_alone_pulls_back() -> None:
    stage = make_stage(reward_weight=0.0)
    metrics = train(stage, stage.belt.batch())
    assert metrics[-1]["eps_drift"] < 0.8 * metrics[0]["eps_drift"]


def test_every_step_of_a_draft_is_held() -> None:
    """The drift is that of all the steps that carry gradient, each measured at the latents that the LoRA's own step led to."""
    stage = make_stage(score_estimator="draft", draft_steps=3, num_steps=4, guidance=1.0, reward_weight=0.0, preserve_weight=2.0)
    batch = stage.belt.batch()
    assert batch.tail_timesteps is not None
    out = stage.loss(batch)
    pool, drifts = stage.belt.pools[0], []
    for step in range(1, 4):
        eps = stage.belt.predict(batch)
        with torch.no_grad(), stage.network.disabled():
            drifts.append(eps_drift(eps, stage.model.predict_eps(batch.latents, batch.timesteps, batch.cond)))
        pool.latents, _ = stage.belt.step(batch, eps)
        pool.steps = [min(step + 1, 3)] * 3
        batch = stage.belt._batch_of(pool)
    assert torch.allclose(out.sample_losses, 2.0 * torch.stack(drifts).sum(0), rtol=1e-4)
    assert out.metrics["eps_drift"] == pytest.approx(torch.stack(drifts).mean().sqrt().item(), rel=1e-4)


class SaturatedScorer(StandardisedScorer):
    """Likes contrast: the hack that every slider finds first."""

    def standardised(self, latents: Tensor, sigmas: Tensor, cond: Conditioning | None, prompts: Sequence[str] | None) -> Tensor:
        return (latents - latents.mean((2, 3), keepdim=True)).square().mean((1, 2, 3))


def test_stat_guard_lowers_a_saturating_hack() -> None:
    ends = {}
    for guard in (0.0, 1e-6, 1000.0):
        settings = {"scorer": SaturatedScorer, "score_estimator": "x0", "reward_loss": "linear", "preserve_weight": 1e-3}
        stage = make_stage(strength=0.0, guidance=1.0, stat_guard=guard, max_timestep=700, **settings)
        batch = stage.belt.batch()
        batch = replace(batch, multipliers=torch.ones(3))
        ends[guard] = train(stage, batch, steps=20, learning_rate=1e-2)[-1]
    assert "statistics_drift" not in ends[0.0]
    assert ends[1e-6]["statistics_drift"] > 1e-3 and ends[1e-6]["gain_per_step"] > 0
    assert ends[1000.0]["statistics_drift"] < 0.5 * ends[1e-6]["statistics_drift"]


# -- both signs in one batch -----------------------------------------------------------------------------------------------

PAIRABLE = [name for name in ESTIMATORS if name not in ("draft", "draft_lv")]


@pytest.mark.parametrize("estimator", PAIRABLE)
@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_paired_signs_give_the_gradient_of_a_batch_of_each_sign(estimator: str, guidance: float) -> None:
    settings = {"score_estimator": estimator, "guidance": guidance, "batch_size": 2, "num_steps": 4, "stat_guard": 0.1}
    single, paired = make_stage(**settings), make_stage(paired_signs=True, **settings)
    batch = single.belt.batch()
    both = [single.gradient(turned) for turned in (batch, replace(batch, multipliers=-batch.multipliers))]
    wanted = (both[0] + both[1]) / 2
    assert torch.allclose(paired.gradient(batch), wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max()))
    assert len(paired.loss(batch).sample_losses) == len(paired.loss(batch).samples) == 4


@pytest.mark.parametrize("estimator", ["draft", "draft_lv"])
def test_paired_signs_are_refused_where_the_place_on_the_schedule_depends_on_the_sign(estimator: str) -> None:
    with pytest.raises(UserError, match="paired_signs"):
        ScoreConfig(score_estimator=estimator, paired_signs=True)


def with_prediction(stage: Stage, odd: float, even: torch.nn.Parameter | float) -> Stage:
    """The model predicts latents + multiplier odd + even, with the frozen model's multiplier 0 meaning neither."""

    def predict(latents: Tensor, timesteps: Tensor, cond: Conditioning) -> Tensor:
        strength = torch.as_tensor(stage.network.multiplier).view(-1, 1, 1, 1)
        return latents + strength * odd + (strength != 0) * even

    stage.model.predict_eps = predict
    return stage


def test_odd_weight_asks_nothing_of_an_odd_network_and_pulls_an_even_one() -> None:
    settings = {"paired_signs": True, "odd_weight": 1.0, "reward_weight": 0.0, "preserve_weight": 0.0, "guidance": 1.0, "resolution": 64}
    odd = with_prediction(make_stage(**settings), odd=0.3, even=0.0)
    out = odd.loss()
    assert out.metrics["asymmetry"] < 1e-6 and out.loss.abs() < 1e-12
    even = torch.nn.Parameter(torch.tensor(0.2))
    out = with_prediction(make_stage(**settings), odd=0.3, even=even).loss()
    out.loss.backward()
    assert out.metrics["asymmetry"] == pytest.approx(0.2, rel=1e-4)
    assert even.grad is not None and even.grad == pytest.approx(0.4, rel=1e-4)  # of even^2


def test_odd_weight_makes_a_lora_more_symmetric() -> None:
    stage = make_stage(paired_signs=True, odd_weight=10.0, reward_weight=0.0, preserve_weight=0.0, guidance=1.0, strength=0.2, batch_size=2)
    metrics = train(stage, stage.belt.batch(), steps=15)
    assert metrics[-1]["asymmetry"] < 0.8 * metrics[0]["asymmetry"]
