"""Several scores become one direction, and the gradients that it is made of."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import pytest
import torch
from torch import Tensor

from library.objectives.goals import BEYOND_BOUND, ascent_direction
from library.objectives.rewards import Goal, Limit, Reward, rms, score_gradients, unit_rms
from library.scorers.base import Scorer, build_scorer
from library.scorers.heads import HeadSpec
from library.scorers.io import load_scorer, save_scorer
from library.training.tracking import read_metrics
from library.types import Conditioning, PromptSpec
from tests.helpers.objective import Stage, make_stage
from tests.helpers.scorers import ChannelScorer, StandardisedScorer, WavyScorer, a_scorer, ensemble_of, some_latents
from tests.helpers.tiny_leco_run import make_workplace, run
from tests.helpers.tiny_models import tiny_model
from tests.helpers.tiny_networks import lora_for

ROWS = 4
DIRECTIONS = torch.tensor([1.0, -1.0, 1.0, -1.0])
SHARE = torch.full((ROWS,), 0.1)


def always(gain: Tensor) -> Tensor:
    return torch.ones_like(gain)


def hinge(gain: Tensor) -> Tensor:
    return (gain < 0.5).float()


def goal(name: str, weight: float = 1.0, limit: Limit | None = None, **spec) -> Goal:
    return Goal(scorer=a_scorer(name=name, **spec), weight=weight, limit=limit)


def random_gradients(*names: str, seed: int = 0, shared: float = 0.0) -> dict[str, Tensor]:
    """One a name, each at another scale; `shared` is how much of their variance they have in common."""
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(ROWS, 4, 8, 8, generator=generator)
    return {
        name: (shared**0.5 * common + (1 - shared) ** 0.5 * torch.randn(ROWS, 4, 8, 8, generator=generator)) * 10.0 ** -(place + 1)
        for place, name in enumerate(names)
    }


def direction(
    goals: Sequence[Goal],
    gradients: dict[str, Tensor],
    values: dict[str, float | Tensor] | None = None,
    push: Callable[[Tensor], Tensor] = always,
    directions: Tensor = DIRECTIONS,
) -> Tensor:
    """Values not given are 0, as those of the frozen model are."""
    zeros = {each.name: torch.zeros(ROWS) for each in goals}
    found = zeros | {name: torch.as_tensor(value, dtype=torch.float32).expand(ROWS) for name, value in (values or {}).items()}
    return ascent_direction(goals, gradients, found, zeros, push, directions, SHARE)


def change(direction: Tensor, gradient: Tensor) -> Tensor:
    """First-order change of a score along a direction, 1 for its own gradient at RMS 1 [B]."""
    return (direction * unit_rms(gradient)).mean((1, 2, 3))


@pytest.mark.parametrize("weight", [1.0, 3.0, -2.0])
def test_one_goal_is_its_own_gradient_at_rms_1_to_the_last_bit(weight: float) -> None:
    gradients = random_gradients("a")
    found = direction([goal("a", weight)], gradients, push=lambda gain: torch.full_like(gain, 0.7))
    gradient = gradients["a"]
    expected = (gradient / gradient.square().mean((1, 2, 3), keepdim=True).sqrt()) * (0.7 * DIRECTIONS * weight / abs(weight)).view(
        -1, 1, 1, 1
    )
    assert torch.equal(found, expected)


def test_one_goal_needs_no_frozen_model() -> None:
    gains = []
    gradients, values = random_gradients("a"), {"a": torch.zeros(ROWS)}
    found = ascent_direction([goal("a")], gradients, values, None, lambda gain: gains.append(gain) or always(gain), DIRECTIONS, SHARE)
    assert gains[0].isnan().all() and found.isfinite().all()
    with pytest.raises(AssertionError, match="frozen"):
        held = [goal("a"), goal("b", limit=Limit("hold", 0.2))]
        ascent_direction(held, random_gradients("a", "b"), values | {"b": torch.zeros(ROWS)}, None, always, DIRECTIONS, SHARE)


def test_the_push_is_asked_about_the_gain_in_the_wanted_direction() -> None:
    asked = []
    goals = [goal("up"), goal("down", -1.0)]
    direction(goals, random_gradients("up", "down"), {"up": 0.3, "down": 0.4}, lambda gain: asked.append(gain) or always(gain))
    assert torch.allclose(asked[0], 0.3 * DIRECTIONS) and torch.allclose(asked[1], -0.4 * DIRECTIONS)


def test_weights_mean_the_same_whatever_the_scale_of_the_gradients() -> None:
    """Of two gradients at right angles, weighted 2 and -1, the direction holds twice as much of the first, with signs turned at -1."""
    first, second = torch.zeros(2, ROWS, 4, 8, 8).unbind()
    first[:, 0], second[:, 1] = 100.0, 1e-4
    found = direction([goal("a", 2.0), goal("b", -1.0)], {"a": first, "b": second})
    assert torch.allclose(found[:, 0], 2 * 2 / 5**0.5 * DIRECTIONS.view(-1, 1, 1).expand(-1, 8, 8), atol=1e-5)
    assert torch.allclose(found[:, 1], -2 / 5**0.5 * DIRECTIONS.view(-1, 1, 1).expand(-1, 8, 8), atol=1e-5)


@pytest.mark.parametrize("shared", [0.0, 0.5, 0.9])
def test_held_scores_do_not_change_to_first_order(shared: float) -> None:
    goals = [goal("a"), goal("h", limit=Limit("hold", 0.2)), goal("i", limit=Limit("hold", 0.2)), goal("b", -0.5)]
    gradients = random_gradients("a", "h", "i", "b", shared=shared)
    found = direction(goals, gradients)
    assert change(found, gradients["h"]).abs().max() < 1e-5
    assert change(found, gradients["i"]).abs().max() < 1e-5
    assert torch.allclose(rms(found), torch.ones(ROWS), atol=1e-5)
    raised = DIRECTIONS * change(direction(goals[:2], gradients), gradients["a"])
    assert (raised > 0.2).all()
    if shared:
        assert change(direction([goals[0]], gradients), gradients["h"]).abs().min() > 0.3  # it would move, were it not held


def test_a_held_score_with_no_gradient_is_in_nobodys_way() -> None:
    gradients = random_gradients("a") | {"h": torch.zeros(ROWS, 4, 8, 8)}
    found = direction([goal("a"), goal("h", limit=Limit("hold", 0.2))], gradients)
    assert torch.allclose(found, direction([goal("a")], gradients), atol=1e-6)


def test_one_score_held_twice_is_held_once() -> None:
    goals = [goal("a"), goal("h", limit=Limit("hold", 0.2)), goal("i", limit=Limit("hold", 0.2))]
    gradients = random_gradients("a", "h", shared=0.5)
    gradients["i"] = 3 * gradients["h"]
    assert torch.allclose(direction(goals, gradients), direction(goals[:2], gradients), atol=1e-5)


@pytest.mark.parametrize("side", [1.0, -1.0])
def test_a_held_score_that_went_too_far_is_pushed_back_the_harder_the_farther(side: float) -> None:
    """0.2 over a whole trajectory is 0.02 in a step that is a tenth of it: there the push back is as strong as it gets."""
    goals, gradients = [goal("a"), goal("h", limit=Limit("hold", 0.2))], random_gradients("a", "h")
    changes = [change(direction(goals, gradients, {"h": side * value}), gradients["h"]) for value in (0.0, 0.005, 0.01, 0.02, 9.0)]
    assert changes[0].abs().max() < 1e-5
    for nearer, farther in zip(changes[:3], changes[1:4], strict=True):
        assert (side * (farther - nearer) < -0.1).all()
    assert torch.allclose(changes[3], changes[4])
    assert (side * changes[3] > -0.75).all()  # the raised score keeps its place beside it: 1 to 1 is 0.71 each
    rest = direction(goals, gradients, {"h": side * 0.01, "a": 9 * DIRECTIONS}, hinge)
    assert torch.allclose(rest, -0.5 * side * unit_rms(gradients["h"]), atol=1e-5)  # alone, it is as strong as its own push


@pytest.mark.parametrize(("kind", "side"), [("max", 1.0), ("min", -1.0)])
def test_a_score_beyond_its_bound_is_not_moved_on_and_is_pushed_back(kind: str, side: float) -> None:
    """The bound is in the score's own units: mean 5 and deviation 2 make 7 one deviation above the mean, and 3 one below."""
    goals = [goal("a"), goal("c", 0.0, Limit(kind, 5.0 + side * 2.0), mean=5.0, std=2.0)]
    gradients = random_gradients("a", "c", shared=0.5)
    free = direction([goals[0]], gradients)
    assert torch.allclose(direction(goals, gradients, {"c": side * 0.99}), free, atol=1e-5)
    at_bound = change(direction(goals, gradients, {"c": side * (1 + 1e-6)}), gradients["c"])
    outwards = side * DIRECTIONS > 0  # where the other score would take it farther
    assert at_bound[outwards].abs().max() < 1e-4
    assert torch.allclose(at_bound[~outwards], change(free, gradients["c"])[~outwards], atol=1e-4)  # where it comes back anyway
    beyond = [change(direction(goals, gradients, {"c": side * (1 + share * BEYOND_BOUND)}), gradients["c"]) for share in (0.3, 0.6, 1.0)]
    for nearer, farther in zip(beyond[:-1], beyond[1:], strict=True):
        assert (side * nearer < 0).all() and (side * (farther - nearer)[outwards] < -0.1).all()


def test_a_raised_score_stops_at_its_own_maximum_and_can_still_be_lowered() -> None:
    goals, gradients = [goal("a", limit=Limit("max", 1.0))], random_gradients("a")
    free, unit = direction([goal("a")], gradients), unit_rms(gradients["a"])
    assert torch.allclose(direction(goals, gradients, {"a": 0.9}), free, atol=1e-5)
    beyond = direction(goals, gradients, {"a": 1 + 0.5 * BEYOND_BOUND})
    assert torch.allclose(beyond[DIRECTIONS > 0], -0.5 * unit[DIRECTIONS > 0], atol=1e-4)
    assert torch.allclose(beyond[DIRECTIONS < 0], -unit[DIRECTIONS < 0], atol=1e-4)


def test_a_held_score_stays_held_when_another_is_kept_from_its_bound() -> None:
    goals = [goal("a"), goal("h", limit=Limit("hold", 0.2)), goal("c", 0.0, Limit("max", 0.0))]
    gradients = random_gradients("a", "h", "c", shared=0.5)
    found = direction(goals, gradients, {"c": 1e-7}, directions=torch.ones(ROWS))
    assert change(found, gradients["h"]).abs().max() < 1e-5
    assert change(found, gradients["c"]).abs().max() < 1e-5
    assert (change(found, gradients["a"]) > 0.2).all()


def test_goals_that_contradict_each_other_do_not_blow_up_what_is_left() -> None:
    """The same score raised and held, or raised and lowered: the rest is rounding error, and stays it."""
    gradients = random_gradients("a")
    gradients["b"] = 3 * gradients["a"]
    for other in (goal("b", 0.0, Limit("hold", 0.2)), goal("b", -1.0)):
        assert rms(direction([goal("a"), other], gradients)).max() < 1e-3


def test_a_score_that_is_far_enough_rests_while_another_is_pushed_at_full_strength() -> None:
    goals, gradients = [goal("a"), goal("b")], random_gradients("a", "b")
    found = direction(goals, gradients, {"a": DIRECTIONS}, hinge)
    assert torch.allclose(found, direction([goals[1]], gradients), atol=1e-5)
    assert direction(goals, gradients, {"a": DIRECTIONS, "b": DIRECTIONS}, hinge).abs().max() == 0


@pytest.mark.parametrize("strength", [0.0, 0.3, 1.0])
def test_the_strength_is_that_of_the_strongest_push(strength: float) -> None:
    goals = [goal("a"), goal("b", -3.0), goal("h", limit=Limit("hold", 0.2))]
    found = direction(goals, random_gradients("a", "b", "h"), push=lambda gain: torch.full_like(gain, -strength))
    assert torch.allclose(rms(found), torch.full((ROWS,), strength), atol=1e-5)


class CurvedScorer(StandardisedScorer):
    """Something that bends with the latents, and that the mean of channel 0 takes along."""

    def standardised(self, latents: Tensor, sigmas: Tensor, cond: Conditioning | None, prompts: Sequence[str] | None) -> Tensor:
        return (latents[:, 0] + 0.3 * latents[:, 0] * latents[:, 1].sin() + 0.5 * latents[:, 1].sin()).mean((1, 2))


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_climbing_raises_one_score_and_leaves_the_held_one(sign: float) -> None:
    """60 steps through scores that bend: by the gradients alone the second score goes along; held, it stays within 0.2."""
    moved = {}
    for limit in (None, Limit("hold", 0.2)):
        goals = [Goal(scorer=a_scorer(ChannelScorer)), Goal(scorer=a_scorer(CurvedScorer), weight=0.0, limit=limit)]
        reward, latents = Reward(goals), some_latents(ROWS)
        prompts, sigmas, directions = [PromptSpec(prompt="")] * ROWS, torch.zeros(ROWS), torch.full((ROWS,), sign)
        start, _ = score_gradients(reward, latents, sigmas, None, prompts)
        for _ in range(60):
            values, gradients = score_gradients(reward, latents, sigmas, None, prompts, directions)
            latents = latents + 0.03 * ascent_direction(goals, gradients, values, start, always, directions, torch.ones(ROWS))
        end, _ = score_gradients(reward, latents, sigmas, None, prompts)
        moved[limit] = {name: end[name] - start[name] for name in end}
    assert (sign * moved[None]["ChannelScorer"] > 1).all() and (sign * moved[None]["CurvedScorer"] > 1).all()
    held = moved[Limit("hold", 0.2)]
    assert (sign * held["ChannelScorer"] > 0.7).all() and (held["CurvedScorer"].abs() < 0.2).all()


def gradients_of(scorer: Scorer, latents: Tensor, **settings) -> tuple[Tensor, Tensor]:
    rows = len(latents)
    reward = Reward(
        [Goal(scorer=scorer, weight=settings.pop("weight", 1.0), limit=settings.pop("limit", None), pessimism=settings.pop("k", 0.0))]
    )
    values, gradients = score_gradients(reward, latents, torch.full((rows,), 0.5), None, [PromptSpec(prompt="")] * rows, **settings)
    return values[scorer.name], gradients[scorer.name]


def numeric_gradient(scorer: Scorer, latents: Tensor, step: float = 1e-4) -> Tensor:
    """Central differences of the score itself, one element at a time, in double precision."""
    latents, sigmas = latents.double(), torch.full((len(latents),), 0.5, dtype=torch.float64)
    gradient = torch.zeros_like(latents)
    for place in range(latents[0].numel()):
        change = torch.zeros_like(latents).flatten(1)
        change[:, place] = step
        change = change.view_as(latents)
        high, low = (scorer.score(latents + sign * change, sigmas, None, None) for sign in (1, -1))
        gradient.flatten(1)[:, place] = (high - low) / (2 * step)
    return gradient / scorer.spec.std


def test_values_and_gradients_are_those_of_the_standardised_score() -> None:
    scorer, latents = a_scorer(WavyScorer, mean=3.0, std=0.25), some_latents()
    values, gradients = gradients_of(scorer, latents)
    assert torch.allclose(values, (scorer(latents, torch.full((2,), 0.5)) - 3) / 0.25)
    assert torch.allclose(gradients, numeric_gradient(scorer, latents).float(), atol=1e-6)
    assert not latents.requires_grad and not values.requires_grad and not gradients.requires_grad


def test_a_held_score_is_not_doubted() -> None:
    latents, limit, ascent = some_latents(), Limit("hold", 0.2), torch.ones(2)
    for scorer in (a_scorer(WavyScorer), ensemble_of(0.0, 2.0)):
        plain = gradients_of(scorer, latents, limit=limit)
        guarded = gradients_of(scorer, latents, limit=limit, ascent=ascent, k=1.0)
        assert torch.equal(plain[0], guarded[0]) and torch.equal(plain[1], guarded[1])


def test_pessimism_turns_the_direction_away_from_what_members_disagree_about() -> None:
    latents = some_latents()
    latents[:, 1] = latents[:, 1].abs()
    shares = []
    for pessimism in (0.0, 1.0):
        _, gradient = gradients_of(ensemble_of(0.0, 2.0), latents, ascent=torch.ones(2), k=pessimism)
        shares.append(gradient[:, 1].square().sum() / gradient.square().sum())
    assert shares[0] == pytest.approx(0.5, abs=1e-4) and shares[1] < 1e-6


def two_scores(limit: Limit | None, **settings) -> Stage:
    """Training on a tiny model: the mean of channel 0 is raised, and takes a score that bends along unless that is held."""
    prompts = [PromptSpec(prompt="a red circle"), PromptSpec(prompt="a blue square", direction=-1.0)]
    goals = [Goal(scorer=a_scorer(ChannelScorer)), Goal(scorer=a_scorer(CurvedScorer), weight=0.0, limit=limit)]
    settings = {"score_estimator": "x0_renoise", "reward_loss": "linear", "preserve_weight": 0.0, **settings}
    return make_stage(reward=Reward(goals), prompts=prompts, strength=0.0, batch_size=4, **settings)


@pytest.mark.slow
def test_training_raises_one_score_and_leaves_the_held_one() -> None:
    """Means over four batches, each measured where the next step leads: the held score moved 0.31 to 0.37 times as far as the free one,
    and the other 0.33 to 0.38 times."""
    changes, directions = {}, set()
    for limit in (None, Limit("hold", 0.2)):
        moved = []
        for seed in range(4):
            model = tiny_model()
            stage = two_scores(limit, seed=seed, model=model, network=lora_for(model, 0.0, rank=16))
            views = torch.Generator().manual_seed(seed)
            objective = stage.objective
            batch, optimizer = stage.rollout.next_batch(), torch.optim.Adam(stage.network.parameters(), lr=4e-3)
            directions |= set(batch.directions.tolist())
            found = []
            for _ in range(10):
                optimizer.zero_grad()
                out, eps = objective(batch, views)
                out.loss.backward()
                optimizer.step()
                abar, next_abar = (objective.model.schedule.abar(times) for times in (batch.timesteps, batch.next_timesteps))
                latents = objective.solver.step(batch.latents, eps, abar, next_abar)
                terms = objective.reward(latents, objective.schedule.sigmas(batch.next_timesteps), None, batch.prompts).terms
                found.append({name: batch.directions * value for name, value in terms.items()})
            moved.append({name: (found[-1][name] - found[0][name]).mean() for name in found[0]})
        changes[limit] = {name: torch.stack([own[name] for own in moved]).mean() for name in moved[0]}
    assert directions == {1.0, -1.0}
    free, held = changes[None], changes[Limit("hold", 0.2)]
    assert free["ChannelScorer"] > 0.01 and free["CurvedScorer"] > 0.01
    assert held["ChannelScorer"] > 0.3 * free["ChannelScorer"]
    assert held["CurvedScorer"].abs() < 0.5 * free["CurvedScorer"]


def test_a_hold_consults_the_frozen_model_and_needs_normalised_gradients() -> None:
    for limit, evaluations in ((None, 4), (Limit("hold", 0.2), 5)):
        stage = two_scores(limit)
        batch, before = stage.rollout.next_batch(), stage.model.num_unet_evaluations
        stage.objective(batch)
        assert stage.model.num_unet_evaluations - before == evaluations * 4


def test_a_run_takes_limits_and_ensembles(tmp_path: Path) -> None:
    """Each setting changes what the first update of train_leco_score.py scores: none is parsed and ignored."""
    workplace, own = make_workplace(tmp_path / "in"), []
    for seed, name in enumerate(("first", "second")):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            scorer = build_scorer(replace(load_scorer(workplace / "scorer.safetensors").spec, heads=(HeadSpec(std=0.05, members=2),)))
        save_scorer(workplace / f"{name}.safetensors", scorer)
        own.append(str(workplace / f"{name}.safetensors"))
    rewards = []
    for number, changes in enumerate(
        (
            {},
            {},  # once more: the runs differ by their settings alone
            {"scorer_limits": ["none", "hold=0.2"]},
            {"scorer_ensemble": True},
        )
    ):
        out = tmp_path / str(number)
        run(workplace, out, scorer=own, seed=1, max_train_steps=1, resolution=[128], **changes)
        rewards.append(read_metrics(out / "tiny.metrics.jsonl")[0]["reward"])
    assert rewards[1] == pytest.approx(rewards[0], rel=1e-4)
    for first, second in combinations(rewards[1:], 2):
        assert first != pytest.approx(second, rel=1e-3)
