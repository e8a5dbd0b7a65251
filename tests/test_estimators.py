"""Every estimator: its gradient against finite differences, its sensitivity against autograd, and the latents that it scores."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from library.diffusion.noise_schedule import abar_to_sigma, per_sample, v_to_eps
from library.diffusion.solvers import SOLVERS
from library.objectives.estimator import ESTIMATORS, StepState, step_sensitivity
from library.objectives.estimators.x0_renoise import X0Renoise
from library.types import Conditioning, History, RolloutBatch
from tests.helpers.context import part_settings
from tests.helpers.objective import Stage, make_stage
from tests.helpers.scorers import ChannelScorer

PLAIN = {"reward_loss": "linear", "preserve_weight": 0.0}


# -- gradients ---------------------------------------------------------------------------------------------------------------


class Differences:
    """The mean reward in the wanted direction as a function of the LoRA's weights, in float64, from the U-Net itself.

    What the objective means to hold still stays as it was at the first call: the unconditional branch, and by how much each sample's
    reward is divided: the RMS of its gradient in the latents, and how far eps moves them.
    """

    def __init__(self, stage: Stage, batch: RolloutBatch) -> None:
        self.stage, self.batch = stage, replace(batch, latents=batch.latents.double())
        self.uncond: Tensor | None = None
        self.units: Tensor | None = None  # [B]
        stage.model.unet.double()
        stage.network.double()

    def _eps(self, cond: Conditioning) -> Tensor:
        self.stage.network.set_multiplier(self.batch.multipliers)
        output = self.stage.model.unet(self.batch.latents, self.batch.timesteps, cond.text.double(), return_dict=False)[0]
        if self.stage.model.spec.prediction_type == "v_prediction":
            return v_to_eps(self.batch.latents, output, self.stage.model.schedule.abar(self.batch.timesteps).double())
        return output

    @torch.no_grad()
    def reward(self) -> float:
        objective, batch = self.stage.objective, self.batch
        eps = self._eps(batch.cond)
        if bool((batch.guidance_scales != 1).any()):
            self.uncond = self._eps(batch.uncond) if self.uncond is None else self.uncond
            eps = self.uncond + per_sample(batch.guidance_scales, eps) * (eps - self.uncond)
        predicted = objective.estimator.predict_latents(self.stage.state(batch), eps)
        noise = torch.randn(objective.estimator.num_views, *batch.latents.shape, generator=torch.Generator().manual_seed(0))

        def scores(latents: Tensor) -> Tensor:
            seen, sigmas, _ = objective.estimator.views(replace(predicted, latents=latents), noise)
            return objective.reward.scorers[0].score(seen, sigmas, None, None).view(-1, len(latents)).mean(0)

        if self.units is None:
            with torch.enable_grad():
                leaf = predicted.latents.clone().requires_grad_()
                (slope,) = torch.autograd.grad(scores(leaf).sum(), leaf)
            self.units = slope.square().mean((1, 2, 3)).sqrt() * leaf[0].numel() * (predicted.sensitivity * batch.guidance_scales).abs()
        return (batch.directions * scores(predicted.latents) / self.units).mean().item()

    def along(self, direction: list[Tensor], distance: float = 1e-3) -> float:
        """The reward's slope along a direction in the weights."""
        self.reward()
        found = []
        for side in (distance, -2 * distance):
            with torch.no_grad():
                for parameter, step in zip(self.stage.network.parameters(), direction, strict=True):
                    parameter.add_(side * step)
            found.append(self.reward())
        with torch.no_grad():
            for parameter, step in zip(self.stage.network.parameters(), direction, strict=True):
                parameter.add_(distance * step)
        return (found[0] - found[1]) / (2 * distance)


def assert_gradient_is_the_rewards(stage: Stage) -> None:
    """The loss's gradient is that of minus the mean reward in the wanted direction, along itself (float32 steps, float64 reference)."""
    batch = stage.rollout.next_batch()
    difference = Differences(stage, batch)
    norm = stage.gradient(batch).norm()
    assert norm > 1e-6
    direction = [(torch.zeros_like(part) if part.grad is None else part.grad) / norm for part in stage.network.parameters()]
    assert -difference.along(direction) == pytest.approx(norm.item(), rel=3e-4)


@pytest.mark.parametrize(("kind", "guidance"), [("sd1", 1.0), ("sd2_v", 4.0)])
@pytest.mark.parametrize("estimator", list(ESTIMATORS))
def test_gradient_equals_a_finite_difference(estimator: str, kind: str, guidance: float) -> None:
    assert_gradient_is_the_rewards(make_stage(kind, guidance=guidance, batch_size=2, num_steps=4, score_estimator=estimator, **PLAIN))


@pytest.mark.parametrize("sampler", ["euler_a", "dpmpp_2m"])
def test_gradient_equals_a_finite_difference_with_noise_and_with_history(sampler: str) -> None:
    stage = make_stage(guidance=3.0, batch_size=2, num_steps=4, sampler=sampler, **PLAIN)
    stage.rollout.advance(stage.trajectories.predict(stage.rollout.next_batch()))  # now every trajectory has a history
    assert_gradient_is_the_rewards(stage)


# -- sensitivity ---------------------------------------------------------------------------------------------------------------


def state_for(sampler: str, *, with_history: bool = False, seed: int = 0) -> StepState:
    stage = make_stage(guidance=1.0, batch_size=4, num_steps=5, sampler=sampler, strength=0.0, seed=seed)
    batch = stage.rollout.next_batch()
    if with_history and batch.history is not None:
        stage.rollout.advance(stage.trajectories.predict(batch))
        batch = stage.rollout.next_batch()
    assert batch.history is None or not with_history or bool((batch.history.abar > 0).any())
    added = torch.randn(batch.latents.shape, generator=torch.Generator().manual_seed(5))
    batch = replace(batch, added_noise=added)
    return stage.state(batch)


@pytest.mark.parametrize("with_history", [False, True])
@pytest.mark.parametrize("sampler", [name for name, solver in SOLVERS.items() if solver.name == name])
def test_sensitivity_of_a_step_equals_autograds(sampler: str, with_history: bool) -> None:
    state = state_for(sampler, with_history=with_history)
    batch = state.batch
    eps = torch.randn(batch.latents.shape, generator=torch.Generator().manual_seed(1)).requires_grad_()
    moved = state.solver.step(batch.latents, eps, state.abar, state.next_abar, batch.noise, batch.history)
    (slope,) = torch.autograd.grad(moved.sum(), eps)
    assert torch.allclose(per_sample(step_sensitivity(state), slope).expand_as(slope), slope, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", list(ESTIMATORS))
@pytest.mark.parametrize("sampler", ["ddim", "lcm"])
def test_sensitivity_of_every_estimator_equals_autograds(name: str, sampler: str) -> None:
    state = state_for(sampler, with_history=True)
    eps = torch.randn(state.batch.latents.shape, generator=torch.Generator().manual_seed(1)).requires_grad_()
    predicted = ESTIMATORS[name](part_settings().get(name)).predict_latents(state, eps)
    (slope,) = torch.autograd.grad(predicted.latents.sum(), eps)
    assert torch.allclose(per_sample(predicted.sensitivity, slope).expand_as(slope), slope, rtol=1e-4, atol=1e-6)
    assert (predicted.num_steps > 0.999).all()


# -- what is scored --------------------------------------------------------------------------------------------------------


def test_direct_align_recovers_the_picture_when_the_prediction_is_the_noise() -> None:
    """At every noise level, also where x0 of a wrong prediction is far off."""
    stage = make_stage(batch_size=8, num_steps=8, score_estimator="direct_align", guidance=1.0)
    batch = stage.rollout.next_batch()
    assert batch.added_noise is not None and len(set(batch.timesteps.tolist())) > 3
    state = stage.state(batch)
    abar = per_sample(state.abar, batch.latents)
    clean = (batch.latents - (1 - abar).sqrt() * batch.added_noise) / abar.sqrt()
    estimator = stage.objective.estimator
    assert torch.allclose(estimator.predict_latents(state, batch.added_noise).latents, clean, atol=1e-4)
    wrong = batch.added_noise + 1
    moved = estimator.predict_latents(state, wrong).latents - clean
    assert torch.allclose(moved, per_sample(abar_to_sigma(state.next_abar) - batch.sigmas, moved).expand_as(moved), atol=1e-4)


def test_x0_renoise_shows_every_sample_at_the_wanted_noise_several_times(monkeypatch: pytest.MonkeyPatch) -> None:
    state = state_for("ddim")
    estimator = X0Renoise()
    monkeypatch.setattr(estimator, "num_views", 3)
    monkeypatch.setattr(estimator, "abar", 0.8)
    predicted = estimator.predict_latents(state, torch.zeros_like(state.batch.latents))
    noise = torch.randn(3, *predicted.latents.shape, generator=torch.Generator().manual_seed(0))
    latents, sigmas, scales = estimator.views(predicted, noise)
    views = latents.view(3, 4, *latents.shape[1:])
    for view, drawn in zip(views, noise, strict=True):
        assert torch.allclose(view, 0.8**0.5 * predicted.latents + 0.2**0.5 * drawn)
    assert torch.allclose(sigmas, torch.full((12,), 0.5)) and torch.allclose(scales, torch.full((12,), 0.8**0.5))


def test_x0_renoise_shows_the_frozen_model_the_same_noise() -> None:
    """A LoRA that does nothing gains nothing, to the bit, although the score of noised latents depends on the noise."""
    stage = make_stage(strength=0.0, score_estimator="x0_renoise", guidance=1.0)
    batch = stage.rollout.next_batch()
    first, second = stage.loss(batch, views_seed=0), stage.loss(batch, views_seed=1)
    assert first.metrics["gain_per_step"] == 0 and second.metrics["gain_per_step"] == 0
    assert first.metrics["reward"] != second.metrics["reward"]


# -- strength ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", ["prev", "direct_align", "x0"])
def test_the_number_of_steps_does_not_change_the_push_of_one(estimator: str) -> None:
    """The same place of the schedule, left by a small step or by a large one."""
    stage = make_stage(score_estimator=estimator, scorer=ChannelScorer, strength=0.0, num_steps=5)
    batch = replace(stage.rollout.next_batch(), timesteps=torch.tensor([700, 500, 300]))
    batch = replace(batch, sigmas=stage.objective.schedule.sigmas(batch.timesteps))
    found = []
    for stride in (200, 20):
        after = batch.timesteps - stride
        found.append(stage.gradient(replace(batch, next_timesteps=after)))
    assert found[0].norm() > 1e-4
    assert torch.allclose(*found, rtol=1e-3, atol=1e-4 * float(found[0].abs().max()))


@pytest.mark.parametrize("guidance", [1.0, 7.0])
@pytest.mark.parametrize("estimator", list(ESTIMATORS))
def test_the_prediction_is_pushed_with_strength_1(estimator: str, guidance: float) -> None:
    """d loss / d eps of each sample is minus 1 along the score's gradient at RMS 1, whatever is scored."""
    count = 2
    settings: dict[str, Any] = {"reward_loss": "linear", "score_estimator": estimator, "num_steps": 4, "batch_size": count}
    stage = make_stage(scorer=ChannelScorer, strength=0.0, guidance=guidance, **settings)
    batch = stage.rollout.next_batch()
    caught: list[Tensor] = []

    def catching(predict: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def caught_predict(*args: Any) -> Tensor:
            eps = predict(*args)
            if torch.is_grad_enabled():
                eps.retain_grad()
                caught.append(eps)
            return eps

        return caught_predict

    stage.model.predict_eps = catching(stage.model.predict_eps)
    stage.loss(batch).loss.backward()
    (eps,) = caught
    assert eps.grad is not None
    pushed = eps.grad * eps[0].numel() * count  # the loss is a mean over samples of means over elements
    unit = torch.zeros_like(pushed)
    unit[:, 0] = 2.0  # channel 0 of 4: RMS 1
    # the step takes the noise away, so the score rises where eps falls
    assert torch.allclose(pushed, per_sample(batch.directions, unit) * unit, rtol=1e-3, atol=1e-4)


def test_a_schedule_that_ends_with_a_step_that_moves_nothing_is_no_harm() -> None:
    """Models with set_alpha_to_one false whose steps begin at 0: the last step leaves the noise as it is."""
    for estimator in ("prev", "x0", "direct_align"):
        stage = make_stage(score_estimator=estimator, reward_loss="target", num_steps=3)
        batch = stage.rollout.next_batch()
        still = replace(batch, next_timesteps=batch.timesteps)
        assert torch.isfinite(stage.gradient(still)).all()


def test_history_is_not_needed_for_the_sensitivity() -> None:
    """A sample without a step before it, as at the start of a trajectory, takes DDIM's step."""
    state = state_for("dpmpp_2m")
    batch = state.batch
    none = History(torch.zeros_like(batch.latents), torch.zeros_like(batch.sigmas))
    fresh = replace(state, batch=replace(batch, history=none))
    ddim = replace(state, solver=SOLVERS["euler"], batch=replace(batch, history=None))
    assert torch.allclose(step_sensitivity(fresh), step_sensitivity(ddim))
