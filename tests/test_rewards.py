"""Goals and what they are made from: limits, weights, ensembles, pessimism."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from library.errors import UserError
from library.objectives.reward_config import RewardConfig, load_reward, states_uncertainty
from library.objectives.rewards import Goal, Limit, Reward, score_gradients
from library.scorers.base import ScorerSpec, build_scorer
from library.scorers.heads import HeadSpec
from library.scorers.io import save_scorer
from library.types import Conditioning, PromptSpec
from tests.helpers.scorers import VAE, ChannelScorer, WavyScorer, a_scorer, ensemble_of, some_latents

PROMPTS = [PromptSpec(prompt="a red circle", direction=-1.0), PromptSpec(prompt="a blue square")]


def saved(folder: Path, name: str, seed: int = 0, head: HeadSpec | None = None, **spec) -> str:
    """A file with an untrained latent ResNet."""
    head = head or HeadSpec()
    architecture = {"in_channels": 4, "channels": [8, 16], "blocks": 1, "norm_groups": 4}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        scorer = build_scorer(ScorerSpec(kind="latent_resnet", architecture=architecture, vae=VAE, heads=(head,), **spec))
    folder.mkdir(exist_ok=True)
    save_scorer(folder / f"{name}.safetensors", scorer)
    return str(folder / f"{name}.safetensors")


def load(*paths: str, **settings) -> Reward:
    return load_reward(RewardConfig(scorer=paths, **settings), VAE, needs_noise_aware=True)


def test_the_reward_is_the_weighted_sum_of_standardised_scores_that_are_to_move() -> None:
    channel, wavy = a_scorer(mean=5.0, std=2.0), a_scorer(WavyScorer, mean=-1.0, std=0.1)
    held = a_scorer(WavyScorer, name="held")
    reward = Reward(
        [Goal(scorer=channel, weight=2.0), Goal(scorer=wavy, weight=-0.5), Goal(scorer=held, weight=7.0, limit=Limit("hold", 0.2))]
    )
    latents, sigmas = some_latents(), torch.tensor([0.0, 2.0])
    out = reward(latents, sigmas, None, PROMPTS)
    first = latents[:, 0].mean((1, 2))
    second = (latents.sin() + 0.5 * latents * latents.roll(1, -1)).mean((1, 2, 3)) / (1 + sigmas)
    assert torch.allclose(out.terms["ChannelScorer"], first, atol=1e-6)
    assert torch.allclose(out.terms["held"], second, atol=1e-6)
    assert torch.allclose(out.total, 2 * first - 0.5 * second, atol=1e-5)


def test_a_prompts_direction_does_not_reach_the_reward() -> None:
    reward = Reward([Goal(scorer=a_scorer())])
    turned = [PromptSpec(prompt=prompt.prompt, direction=-prompt.direction) for prompt in PROMPTS]
    first, second = (reward(some_latents(), torch.zeros(2), None, prompts).total for prompts in (PROMPTS, turned))
    assert torch.equal(first, second) and first.abs().min() > 0


def test_a_scorer_is_told_the_prompt_without_its_syntax() -> None:
    told: list[Sequence[str] | None] = []

    class Listener(ChannelScorer):
        def score(self, latents: Tensor, sigmas: Tensor, cond: Conditioning | None, prompts: Sequence[str] | None) -> Tensor:
            told.append(prompts)
            return super().score(latents, sigmas, cond, prompts)

    listener = a_scorer(Listener)
    prompts = [PromptSpec(prompt="a (red:1.3) [old] car BREAK at night"), PromptSpec(prompt=r"miku \(vocaloid\)")]
    Reward([Goal(scorer=listener)])(some_latents(), torch.zeros(2), None, prompts)
    assert told == [["a red old car at night", "miku (vocaloid)"]]


@pytest.mark.parametrize(
    ("word", "limit"),
    [("none", None), ("hold=0.2", Limit("hold", 0.2)), ("max=7.5", Limit("max", 7.5)), ("min=-3", Limit("min", -3.0))],
)
def test_limits_are_read(word: str, limit: Limit | None) -> None:
    assert Limit.parse(word) == limit


@pytest.mark.parametrize("word", ["", "hold", "hold=", "hold=much", "held=0.2", "max=inf", "min=nan", "0.2"])
def test_a_word_that_is_no_limit_is_refused(word: str) -> None:
    with pytest.raises(UserError, match="none, hold=0.2, max=7.5 or min=4"):
        Limit.parse(word)


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"scorer": ("a", "b"), "scorer_weights": (1.0,)}, "scorer_weights holds 1 numbers for 2 scorers"),
        ({"scorer": ("a", "b"), "scorer_limits": ("none",)}, "scorer_limits holds 1 words for 2 scorers"),
        ({"scorer": ("a", "b"), "scorer_limits": ("none", "hold=0.2"), "scorer_weights": (1.0, 1.0)}, "a held score has weight 0"),
        ({"scorer": ("a",), "scorer_limits": ("hold=0.2",)}, "no score is to rise or fall"),
        ({"scorer": ("a",), "scorer_weights": (0.0,)}, "no score is to rise or fall"),
        ({"scorer": ("a", "b"), "scorer_ensemble": True, "scorer_weights": (1.0, 1.0)}, "for the one score of an ensemble"),
        ({"scorer": ("a",), "scorer_limits": ("hold=0",)}, "must be above 0"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings: dict, complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        RewardConfig(**settings)


def test_goals_are_made_from_settings(tmp_path: Path) -> None:
    paths = [saved(tmp_path, name) for name in ("beauty", "size", "gore")]
    goals = load(*paths, scorer_limits=("max=7", "hold=0.2", "none"), scorer_weights=(2.0, 0.0, -1.0)).goals
    assert [(goal.name, goal.weight, goal.limit, goal.sign) for goal in goals] == [
        ("beauty", 2.0, Limit("max", 7.0), 1.0),
        ("size", 0.0, Limit("hold", 0.2), 0.0),
        ("gore", -1.0, None, -1.0),
    ]
    assert [goal.weight for goal in load(*paths, scorer_limits=("none", "hold=0.2", "min=4")).goals] == [1.0, 0.0, 1.0]


def test_two_scorers_of_one_name_are_refused(tmp_path: Path) -> None:
    paths = [saved(tmp_path / folder, "scorer") for folder in ("a", "b")]
    with pytest.raises(UserError, match="two scorers have the name 'scorer'"):
        load(*paths)
    with pytest.raises(UserError, match="two scorers have the name"):
        load(paths[0], paths[0], scorer_ensemble=True)
    assert load(*paths, scorer_ensemble=True).goals[0].name == "scorer"


HEADS = [
    (HeadSpec(), False),
    (HeadSpec(members=3), True),
    (HeadSpec(readout="gaussian", outputs=2), True),
    (HeadSpec(readout="distribution", outputs=3, values=(1.0, 2.0, 3.0)), True),
    (HeadSpec(readout="ordinal", outputs=2, values=(1.0, 2.0, 3.0)), False),
]


@pytest.mark.parametrize(("head", "states"), HEADS, ids=[head.readout + str(head.members) for head, _ in HEADS])
def test_pessimism_is_for_scorers_that_say_how_sure_they_are(tmp_path: Path, head: HeadSpec, states: bool) -> None:
    path = saved(tmp_path, "scorer", head=head)
    assert load(path).goals[0].pessimism == states
    assert states_uncertainty(load(path).scorers[0]) is states


@pytest.mark.parametrize(("head", "states"), HEADS, ids=[head.readout + str(head.members) for head, _ in HEADS])
@pytest.mark.parametrize("weight", [1.0, -1.0])
def test_a_score_is_taken_for_worse_than_it_says_whichever_way_it_is_to_go(
    tmp_path: Path, head: HeadSpec, states: bool, weight: float
) -> None:
    reward = load(saved(tmp_path, "scorer", head=head), scorer_weights=(weight,))
    latents, sigmas, ascent = some_latents().requires_grad_(), torch.zeros(2), torch.tensor([1.0, -1.0])
    goal = reward.goals[0]
    mean, uncertainty = goal.scorer.score_and_uncertainty(latents, sigmas)
    pessimistic = reward(latents, sigmas, None, PROMPTS, ascent).terms["scorer"]
    believed = reward(latents, sigmas, None, PROMPTS).terms["scorer"]
    assert torch.equal(believed, mean)
    assert torch.allclose(pessimistic, mean - weight * ascent * uncertainty)
    worse = weight * ascent * (believed - pessimistic)
    assert (worse > 0).all() if states else (worse == 0).all()
    (gradient,) = torch.autograd.grad(pessimistic.sum(), latents)
    assert gradient.isfinite().all() and gradient.abs().max() > 0


def test_an_ensemble_is_the_mean_of_standardised_scores_in_the_units_of_the_first() -> None:
    ensemble = ensemble_of(1.0, 3.0, units=[(5.0, 2.0), (500.0, 30.0)])
    latents = some_latents()
    mean, uncertainty = ensemble.score_and_uncertainty(latents, torch.zeros(2))
    first, second = latents[:, 0].mean((1, 2)), latents[:, 1].mean((1, 2))
    assert torch.allclose(mean, 5 + 2 * (first + 2 * second), atol=1e-4)
    assert torch.allclose(uncertainty, 2 * second.abs(), atol=1e-4)
    assert torch.equal(ensemble(latents, torch.zeros(2)), mean)
    assert torch.allclose(Goal(scorer=ensemble).value(latents, torch.zeros(2), None, PROMPTS), first + 2 * second, atol=1e-4)


def test_an_ensemble_counts_what_its_members_are_unsure_of_themselves(tmp_path: Path) -> None:
    head = HeadSpec(readout="gaussian", outputs=2)
    paths = [saved(tmp_path, name, seed, head, std=2.0) for seed, name in enumerate("ab")]
    ensemble = load(*paths, scorer_ensemble=True).scorers[0]
    latents, sigmas = some_latents(), torch.zeros(2)
    alone = [scorer.score_and_uncertainty(latents, sigmas) for scorer in load(*paths).scorers]
    scores, stated = (torch.stack(parts) for parts in zip(*alone, strict=True))
    expected = (scores.var(0, correction=0) + stated.square().mean(0)).sqrt()
    assert torch.allclose(ensemble.score_and_uncertainty(latents, sigmas)[1], expected, rtol=1e-5)


def test_where_members_agree_pessimism_has_a_gradient() -> None:
    latents = some_latents().requires_grad_()
    goal = Goal(scorer=ensemble_of(0.5, 0.5), pessimism=1.0)
    (gradient,) = torch.autograd.grad(goal.value(latents, torch.zeros(2), None, PROMPTS, torch.ones(2)).sum(), latents)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_pessimism_pulls_less_where_members_disagree(sign: float) -> None:
    """Members with slopes 0 and 2 along channel 1: the mean slope is 1, and at pessimism 1 nothing is left of it, at either sign."""
    ensemble, latents = ensemble_of(0.0, 2.0), some_latents()
    latents[:, 1] = sign * latents[:, 1].abs()  # the way that the wanted direction goes, where disagreement grows
    latents.requires_grad_()
    pulls = []
    for pessimism in (0.0, 0.5, 1.0):
        value = Goal(scorer=ensemble, pessimism=pessimism).value(latents, torch.zeros(2), None, PROMPTS, torch.full((2,), sign))
        pulls.append(torch.autograd.grad(value.sum(), latents)[0][:, :2].mean((2, 3)) * 64)  # [B, channel]
    for pull, left in zip(pulls, (1.0, 0.5, 0.0), strict=True):
        assert torch.allclose(pull[:, 0], torch.ones(2), atol=1e-5)
        assert torch.allclose(pull[:, 1], torch.full((2,), left), atol=1e-5)


@pytest.mark.parametrize("body", ["latents.detach()[:, 0].mean((1, 2))", "latents.new_zeros(len(latents))"])
def test_a_scorer_without_a_gradient_is_named(body: str) -> None:
    class Cut(ChannelScorer):
        def standardised(self, latents: Tensor, *rest: object) -> Tensor:
            return eval(body, {"latents": latents})

    with pytest.raises(UserError, match="scorer numpy has no gradient in the latents"):
        score_gradients(Reward([Goal(scorer=a_scorer(Cut, "numpy"))]), some_latents(2), torch.zeros(2), None, PROMPTS)
