"""Every estimator: its gradient against finite differences, its reach against autograd, and the latents that it scores."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from library.diffusion.noise_schedule import per_sample, v_to_eps
from library.diffusion.solvers import SOLVERS, get_solver
from library.objectives.draft import Draft
from library.objectives.estimators import Predict, Scene, step_reach
from library.objectives.score_config import ESTIMATORS, ScoreConfig
from library.objectives.x0_renoise import X0Renoise
from library.types import Conditioning, History, RolloutBatch
from tests.helpers.objective import Stage, gradients, make_stage
from tests.helpers.scorers import ChannelScorer

PLAIN = {"reward_loss": "linear", "preserve_weight": 0.0, "normalize_gradient": False}
DIRECT = [name for name, make in ESTIMATORS.items() if not make(ScoreConfig()).at_frozen]


# -- gradients ---------------------------------------------------------------------------------------------------------------


class Differences:
    """The mean reward in the wanted direction as a function of the LoRA's weights, in float64, from the U-Net itself.

    What the objective means to hold still stays as it was at the first call: the unconditional branch, and with `stop_gradient` the
    latents that later steps start from.
    """

    def __init__(self, stage: Stage, batch: RolloutBatch) -> None:
        self.stage, self.batch = stage, batch
        self.held: dict[tuple[str, int], Tensor] = {}
        stage.model.unet.double()
        stage.network.double()

    def _eps(self, latents: Tensor, timesteps: Tensor, cond: Conditioning) -> Tensor:
        self.stage.network.set_multiplier(self.batch.multipliers)
        output = self.stage.model.unet(latents, timesteps, cond.text.double(), return_dict=False)[0]
        if self.stage.model.spec.prediction_type == "v_prediction":
            return v_to_eps(latents, output, self.stage.model.schedule.abar(timesteps).double())
        return output

    def _predictor(self) -> Predict:
        estimator = self.stage.objective.estimator

        def predict(latents: Tensor, timesteps: Tensor) -> Tensor:
            time = int(timesteps[0])
            if isinstance(estimator, Draft) and estimator.stop_gradient:
                latents = self.held.setdefault(("latents", time), latents)
            cond = self._eps(latents, timesteps, self.batch.cond)
            if bool((self.batch.guidance_scales == 1).all()):
                return cond
            uncond = self.held.setdefault(("uncond", time), self._eps(latents, timesteps, self.batch.uncond))
            return uncond + per_sample(self.batch.guidance_scales, cond) * (cond - uncond)

        return predict

    @torch.no_grad()
    def reward(self) -> float:
        objective, predict = self.stage.objective, self._predictor()
        batch = replace(self.batch, latents=self.batch.latents.double())
        scene = Scene(batch=batch, schedule=objective.schedule, solver=objective.solver)
        foreseen = objective.estimator.foresee(scene, predict(batch.latents, batch.timesteps), predict)
        views = objective.estimator.num_views
        noise = torch.randn(views, *batch.latents.shape, generator=torch.Generator().manual_seed(0))
        latents, sigmas, _ = objective.estimator.look(foreseen, noise)
        values = objective.reward.scorers[0].score(latents, sigmas, None, None)
        return (batch.directions.repeat(len(values) // len(batch.latents)) * values).mean().item()

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
    batch = stage.belt.batch()
    difference = Differences(stage, batch)
    norm = stage.gradient(batch).norm()
    assert norm > 1e-6
    direction = [(torch.zeros_like(part) if part.grad is None else part.grad) / norm for part in stage.network.parameters()]
    assert -difference.along(direction) == pytest.approx(norm.item(), rel=3e-4)


@pytest.mark.parametrize(("kind", "guidance"), [("sd1", 1.0), ("sd2_v", 4.0)])
@pytest.mark.parametrize("estimator", DIRECT)
def test_gradient_equals_a_finite_difference(estimator: str, kind: str, guidance: float) -> None:
    assert_gradient_is_the_rewards(
        make_stage(kind, guidance=guidance, batch_size=2, num_steps=4, num_views=2, score_estimator=estimator, **PLAIN)
    )


@pytest.mark.parametrize("sampler", [name for name in SOLVERS if name not in ("ddim", "euler", "ddpm")])
def test_gradient_equals_a_finite_difference_with_any_sampler(sampler: str) -> None:
    stage = make_stage(guidance=3.0, batch_size=2, num_steps=4, sampler=sampler, **PLAIN)
    stage.belt.advance(stage.belt.predict(stage.belt.batch()))  # now every trajectory has a history
    assert_gradient_is_the_rewards(stage)


DRAFT = {"batch_size": 2, "num_steps": 4, "score_estimator": "draft", **PLAIN}


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("stop_gradient", [True, False])
@pytest.mark.parametrize("draft_steps", [2, 3])
def test_gradient_of_draft_equals_a_finite_difference(draft_steps: int, stop_gradient: bool, guidance: float) -> None:
    """Without guidance and without `stop_gradient` nothing is held still: the gradient is the finished picture's own."""
    assert_gradient_is_the_rewards(make_stage(guidance=guidance, draft_steps=draft_steps, draft_stop_gradient=stop_gradient, **DRAFT))


def test_stopping_the_gradient_matters_only_over_several_steps() -> None:
    for draft_steps in (1, 2):
        stopped, full = (
            make_stage(guidance=1.0, draft_steps=draft_steps, draft_stop_gradient=stop, **DRAFT).gradient() for stop in (True, False)
        )
        assert torch.equal(stopped, full) == (draft_steps == 1)


def test_draft_goes_the_whole_way_when_there_are_fewer_steps() -> None:
    stage = make_stage(guidance=1.0, draft_steps=3, **DRAFT)
    prompts = [replace(prompt, num_steps=2) for prompt in stage.belt.pools[0].prompts]
    stage = make_stage(guidance=1.0, draft_steps=3, prompts=prompts, **DRAFT)
    batch = stage.belt.batch()
    assert batch.tail_timesteps is not None and len(batch.tail_timesteps) == 3
    assert batch.tail_timesteps[0] == batch.timesteps[0] and torch.isfinite(stage.loss(batch).loss)


# -- reach ---------------------------------------------------------------------------------------------------------------


def scene_for(sampler: str, *, with_history: bool = False, seed: int = 0) -> Scene:
    stage = make_stage(guidance=1.0, batch_size=4, num_steps=5, sampler=sampler, strength=0.0, resolution=64, seed=seed)
    batch = stage.belt.batch()
    if with_history and batch.history is not None:
        stage.belt.advance(stage.belt.predict(batch))
        batch = stage.belt.batch()
    assert batch.history is None or not with_history or bool((batch.history.abar > 0).any())
    added = torch.randn(batch.latents.shape, generator=torch.Generator().manual_seed(5))
    batch = replace(batch, added_noise=added)
    return Scene(batch=batch, schedule=stage.objective.schedule, solver=stage.objective.solver)


def no_further_steps(latents: Tensor, timesteps: Tensor) -> Tensor:
    raise AssertionError("one step is enough")


@pytest.mark.parametrize("with_history", [False, True])
@pytest.mark.parametrize("sampler", list(SOLVERS))
def test_reach_of_a_step_equals_autograds(sampler: str, with_history: bool) -> None:
    scene = scene_for(sampler, with_history=with_history)
    batch = scene.batch
    eps = torch.randn(batch.latents.shape, generator=torch.Generator().manual_seed(1)).requires_grad_()
    moved = scene.solver.step(batch.latents, eps, scene.abar, scene.next_abar, batch.noise, batch.history)
    (slope,) = torch.autograd.grad(moved.sum(), eps)
    assert torch.allclose(per_sample(step_reach(scene), slope).expand_as(slope), slope, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", [name for name, make in ESTIMATORS.items() if not isinstance(make(ScoreConfig()), Draft)])
@pytest.mark.parametrize("sampler", ["ddim", "dpmpp_2m", "lcm"])
def test_reach_of_every_estimator_equals_autograds(name: str, sampler: str) -> None:
    scene = scene_for(sampler, with_history=True)
    eps = torch.randn(scene.batch.latents.shape, generator=torch.Generator().manual_seed(1)).requires_grad_()
    foreseen = ESTIMATORS[name](ScoreConfig()).foresee(scene, eps, no_further_steps)
    (slope,) = torch.autograd.grad(foreseen.latents.sum(), eps)
    assert torch.allclose(per_sample(foreseen.reach, slope).expand_as(slope), slope, rtol=1e-4, atol=1e-6)
    assert (foreseen.share > 0.999).all()


@pytest.mark.parametrize("sampler", [name for name, solver in SOLVERS.items() if not solver.needs_noise])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_reach_of_a_tail_is_that_of_all_its_steps(sampler: str, count: int) -> None:
    stage = make_stage(guidance=1.0, num_steps=5, sampler=sampler, strength=0.0, resolution=64, draft_steps=count, score_estimator="draft")
    batch = stage.belt.batch()
    scene = Scene(batch=batch, schedule=stage.objective.schedule, solver=stage.objective.solver)
    draws = torch.randn(count, *batch.latents.shape, generator=torch.Generator().manual_seed(1)).requires_grad_()
    later = iter(draws[1:])
    foreseen = stage.objective.estimator.foresee(scene, draws[0], lambda latents, timesteps: next(later))
    (slopes,) = torch.autograd.grad(foreseen.latents.sum(), draws)
    assert torch.allclose(foreseen.reach, slopes.square().sum(0).sqrt().flatten(1)[:, 0], rtol=1e-4)
    assert (foreseen.share == count).all()


# -- what is scored --------------------------------------------------------------------------------------------------------


def finished_by_sampler(stage: Stage, batch: RolloutBatch) -> Tensor:
    latents, _ = stage.belt.step(batch, stage.belt.predict(batch))
    return latents


@pytest.mark.parametrize("sampler", ["ddim", "dpmpp_2m"])
def test_draft_scores_the_finished_picture(sampler: str) -> None:
    """As the rollout itself would finish it, at its end."""
    stage = make_stage(draft_steps=3, num_steps=4, sampler=sampler, score_estimator="draft", reward_loss="linear", scorer=ChannelScorer)
    batch = stage.belt.batch()
    pool = stage.belt.pools[0]
    assert batch.tail_timesteps is not None and pool.steps == [1, 1, 1]
    reward = stage.loss(batch).metrics["reward"]
    for step in range(1, 4):
        pool.latents, pool.history = stage.belt.step(batch, stage.belt.predict(batch))
        pool.steps = [min(step + 1, 3)] * 3
        batch = stage.belt._batch_of(pool)
    assert reward == pytest.approx(pool.latents[:, 0].mean().item(), abs=1e-5)


def test_draft_lv_scores_what_the_last_step_leads_to() -> None:
    stage = make_stage(num_steps=4, score_estimator="draft_lv", reward_loss="linear", scorer=ChannelScorer, sampler="euler")
    batch = stage.belt.batch()
    assert (batch.next_timesteps == -1).all()
    x0 = make_stage(num_steps=4, score_estimator="x0", reward_loss="linear", scorer=ChannelScorer, sampler="euler")
    scored = stage.loss(batch)
    assert torch.equal(scored.sample_losses, x0.loss(batch).sample_losses)
    assert scored.metrics["reward"] == pytest.approx(finished_by_sampler(stage, batch)[:, 0].mean().item(), abs=1e-5)


def test_direct_align_recovers_the_picture_when_the_prediction_is_the_noise() -> None:
    """At every noise level, also where x0 of a wrong prediction is far off."""
    stage = make_stage(batch_size=8, num_steps=8, resolution=64, score_estimator="direct_align", guidance=1.0)
    batch = stage.belt.batch()
    assert batch.added_noise is not None and len(set(batch.timesteps.tolist())) > 3
    scene = Scene(batch=batch, schedule=stage.objective.schedule, solver=stage.objective.solver)
    abar = per_sample(scene.abar, batch.latents)
    clean = (batch.latents - (1 - abar).sqrt() * batch.added_noise) / abar.sqrt()
    estimator = stage.objective.estimator
    assert torch.allclose(estimator.foresee(scene, batch.added_noise, no_further_steps).latents, clean, atol=1e-4)
    wrong = batch.added_noise + 1
    moved = estimator.foresee(scene, wrong, no_further_steps).latents - clean
    assert torch.allclose(moved, per_sample(batch.next_sigmas - batch.sigmas, moved).expand_as(moved), atol=1e-4)


def test_x0_renoise_shows_every_sample_at_the_wanted_noise_several_times() -> None:
    scene = scene_for("ddim")
    estimator = X0Renoise(num_views=3, abar=0.8)
    foreseen = estimator.foresee(scene, torch.zeros_like(scene.batch.latents), no_further_steps)
    noise = torch.randn(3, *foreseen.latents.shape, generator=torch.Generator().manual_seed(0))
    latents, sigmas, scales = estimator.look(foreseen, noise)
    views = latents.view(3, 4, *latents.shape[1:])
    for view, drawn in zip(views, noise, strict=True):
        assert torch.allclose(view, 0.8**0.5 * foreseen.latents + 0.2**0.5 * drawn)
    assert torch.allclose(sigmas, torch.full((12,), 0.5)) and torch.allclose(scales, torch.full((12,), 0.8**0.5))


def test_x0_renoise_shows_the_frozen_model_the_same_noise() -> None:
    """A LoRA that does nothing gains nothing, to the bit, although the score of noised latents depends on the noise."""
    stage = make_stage(strength=0.0, score_estimator="x0_renoise", guidance=1.0)
    batch = stage.belt.batch()
    first, second = stage.loss(batch, views_seed=0), stage.loss(batch, views_seed=1)
    assert first.metrics["gain_per_step"] == 0 and second.metrics["gain_per_step"] == 0
    assert first.metrics["reward"] != second.metrics["reward"]


# -- guidance ------------------------------------------------------------------------------------------------------------


def test_guidance_is_the_regression_that_it_says_it_is() -> None:
    """The same loss as preserve_weight |eps_m - eps_0 - m lambda g|^2 up to what does not depend on the LoRA: the same gradient."""
    reward_weight, preserve_weight = 1.5, 2.0
    stage = make_stage(score_estimator="guidance", reward_weight=reward_weight, preserve_weight=preserve_weight)
    batch = stage.belt.batch()
    batch = replace(batch, multipliers=torch.tensor([1.0, -0.5, 2.0]))
    found = stage.gradient(batch)

    objective, model, network = stage.objective, stage.model, stage.network
    network.set_multiplier(batch.multipliers)
    with torch.no_grad():
        uncond = model.predict_eps(batch.latents, batch.timesteps, batch.uncond)
        with network.disabled():
            frozen = model.predict_eps(batch.latents, batch.timesteps, batch.cond)
    eps = frozen.clone().requires_grad_()
    guided = uncond + per_sample(batch.guidance_scales, eps) * (eps - uncond)
    leads_to, _ = stage.belt.step(batch, guided)
    score = objective.reward(leads_to, batch.next_sigmas, None, batch.prompts).total.sum()
    (slope,) = torch.autograd.grad(score, eps)  # along the score in the prediction itself
    slope = slope / slope.square().mean((1, 2, 3), keepdim=True).sqrt()

    network.zero_grad()
    wanted = frozen + per_sample(batch.multipliers, frozen) * reward_weight / (2 * preserve_weight) * slope
    predicted = model.predict_eps(batch.latents, batch.timesteps, batch.cond)
    (preserve_weight * (predicted - wanted).square().mean((1, 2, 3)).mean()).backward()
    expected = gradients(network)
    assert torch.allclose(found, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


def test_the_push_of_guidance_is_odd_in_the_multiplier() -> None:
    """At zero the prediction moves as the multiplier times the weights, and is pushed by the multiplier: the weights' gradient is even."""
    stage = make_stage(score_estimator="guidance", strength=0.0)
    batch = stage.belt.batch()
    once = stage.gradient(replace(batch, multipliers=torch.ones(3)))
    for multiplier in (-1.0, 2.0):
        found = stage.gradient(replace(batch, multipliers=torch.full((3,), multiplier)))
        assert torch.allclose(found, multiplier**2 * once, rtol=1e-3, atol=1e-5 * float(once.abs().max()))


# -- strength ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", ["prev", "direct_align", "guidance", "x0"])
def test_the_number_of_steps_does_not_change_the_push_of_one(estimator: str) -> None:
    """The same place of the schedule, left by a small step or by a large one."""
    stage = make_stage(score_estimator=estimator, scorer=ChannelScorer, strength=0.0, num_steps=5)
    batch = replace(stage.belt.batch(), timesteps=torch.tensor([700, 500, 300]))
    batch = replace(batch, sigmas=stage.objective.schedule.sigmas(batch.timesteps))
    found = []
    for stride in (200, 20):
        after = batch.timesteps - stride
        found.append(stage.gradient(replace(batch, next_timesteps=after, next_sigmas=stage.objective.schedule.sigmas(after))))
    assert found[0].norm() > 1e-4
    assert torch.allclose(*found, rtol=1e-3, atol=1e-4 * float(found[0].abs().max()))


@pytest.mark.parametrize("guidance", [1.0, 7.0])
@pytest.mark.parametrize("estimator", list(ESTIMATORS))
def test_the_prediction_is_pushed_with_the_reward_weight(estimator: str, guidance: float) -> None:
    """d loss / d eps of each sample is minus reward_weight along the score's gradient at RMS 1, whatever is scored."""
    count = 2
    settings: dict[str, Any] = {"reward_loss": "linear", "score_estimator": estimator, "num_steps": 4, "batch_size": count}
    stage = make_stage(scorer=ChannelScorer, strength=0.0, guidance=guidance, reward_weight=0.7, **settings)
    batch = stage.belt.batch()
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
    assert torch.allclose(pushed, 0.7 * per_sample(batch.directions, unit) * unit, rtol=1e-3, atol=1e-4)


def test_a_schedule_that_ends_with_a_step_that_moves_nothing_is_no_harm() -> None:
    """Models with set_alpha_to_one false whose steps begin at 0: the last step leaves the noise as it is."""
    for estimator in ("prev", "x0", "direct_align"):
        stage = make_stage(score_estimator=estimator, reward_loss="target", num_steps=3)
        batch = stage.belt.batch()
        still = replace(batch, next_timesteps=batch.timesteps, next_sigmas=batch.sigmas)
        assert torch.isfinite(stage.gradient(still)).all()


def test_history_is_not_needed_for_the_reach() -> None:
    """A sample without a step before it, as at the start of a trajectory, takes DDIM's step."""
    scene = scene_for("dpmpp_2m")
    batch = scene.batch
    none = History(torch.zeros_like(batch.latents), torch.zeros_like(batch.sigmas))
    fresh = replace(scene, batch=replace(batch, history=none))
    ddim = replace(scene, solver=get_solver("euler"), batch=replace(batch, history=None))
    assert torch.allclose(step_reach(fresh), step_reach(ddim))
