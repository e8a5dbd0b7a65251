"""The score as a term of training, for every estimator: what it costs, what it trains, that it resumes, and whole runs."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from torch import nn

from library.errors import UserError
from library.objectives.base import Workbench
from library.objectives.reward_shapes import SHAPES
from library.objectives.rewards import Goal, Reward
from library.objectives.score_config import ESTIMATORS, ScoreConfig
from library.objectives.score_term import SCORE_ROLLOUTS, ScoreTerm
from library.training.tracking import read_metrics
from library.types import PromptSpec
from networks.lora import LoRANetwork, create_network
from tests.helpers.scorers import WavyScorer, scorer_for
from tests.helpers.tiny_leco_run import make_workplace, run
from tests.helpers.tiny_models import tiny_model
from tests.helpers.workbench import assert_resumes, make_workbench

PROMPTS = [PromptSpec(prompt="a red circle"), PromptSpec(prompt="a blue square", width=128)]
BATCH = 3


def make_term(workbench: Workbench, **settings: Any) -> ScoreTerm:
    reward = Reward([Goal(scorer=scorer_for(workbench.model, WavyScorer))])
    return ScoreTerm(workbench, reward, ScoreConfig(**settings), PROMPTS)


# -- what it costs -----------------------------------------------------------------------------------------------------------

COSTS: list[dict[str, Any]] = [
    {},
    {"reward_loss": "linear"},
    {"preserve_weight": 0.0},
    {"reward_loss": "linear", "preserve_weight": 0.0},
    {"paired_signs": True, "odd_weight": 0.1},
]


@pytest.mark.parametrize("guidance", [1.0, 5.0])
@pytest.mark.parametrize("settings", COSTS, ids=str)
@pytest.mark.parametrize("estimator", list(ESTIMATORS))
def test_evaluations_are_the_rows_that_the_unet_saw(estimator: str, settings: dict[str, Any], guidance: float) -> None:
    """Of training and rollout together; a row that carries gradient is counted three times, for the backward pass."""
    pairs_a_trajectory = settings.get("paired_signs") and estimator in ("draft", "draft_lv")
    if pairs_a_trajectory or (estimator == "guidance" and settings.get("preserve_weight") == 0):
        with pytest.raises(UserError, match=f"score_estimator {estimator}"):
            ScoreConfig(score_estimator=estimator, **settings)
        return
    bench = make_workbench(leco_denoise_guidance_scale=guidance, num_renoisings=2, draft_steps=3)
    rows = 0

    def count(module: nn.Module, args: tuple) -> None:
        nonlocal rows
        rows += len(args[0]) * (3 if torch.is_grad_enabled() else 1)

    bench.model.unet.register_forward_pre_hook(count)
    term = make_term(bench, score_estimator=estimator, **settings)
    reported = [term().num_unet_evaluations for _ in range(3)]
    assert sum(reported) == rows


def test_a_step_on_the_belt_costs_what_it_is_said_to() -> None:
    """uncond, frozen, cond, and the backward pass as two; both signs share the frozen model's."""
    for settings, per_sample in (({}, 5), ({"reward_loss": "linear", "preserve_weight": 0.0}, 4), ({"paired_signs": True}, 9)):
        term = make_term(make_workbench(), **settings)
        term()  # with the trajectories' beginning
        assert term().num_unet_evaluations == per_sample * BATCH


# -- put away and taken out again ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", ["ddim", "euler_a", "dpmpp_2m"])
@pytest.mark.parametrize("rollout", ["belt", "per_sample"])
def test_a_restored_term_goes_on(rollout: str, sampler: str) -> None:
    assert_resumes(make_term, lambda **seed: make_workbench(rollout=rollout, sampler=sampler, **seed))


@pytest.mark.parametrize("estimator", [name for name in ESTIMATORS if name != "prev"])
def test_a_restored_term_of_every_estimator_goes_on(estimator: str) -> None:
    assert_resumes(
        lambda bench: make_term(bench, score_estimator=estimator), lambda **seed: make_workbench(draft_steps=2, num_renoisings=3, **seed)
    )


def test_every_rollout_was_resumed() -> None:
    needed = {make(ScoreConfig()).rollout or "belt" for make in ESTIMATORS.values()} | {"per_sample"}
    assert needed == set(SCORE_ROLLOUTS)


def test_a_state_of_another_batch_size_is_refused() -> None:
    for estimator in ("prev", "direct_align"):
        small, large = (make_term(make_workbench(train_batch_size=size), score_estimator=estimator) for size in (2, 3))
        with pytest.raises(UserError, match="same settings"):
            large.load_state_dict(small.state_dict())


# -- text encoders ---------------------------------------------------------------------------------------------------------


def lora_of_both(model) -> LoRANetwork:
    """LoRA in U-Net and text encoders, already doing something."""
    network = create_network(1.0, 2, 2.0, model.vae, model.text_encoders, model.unet, generator=torch.Generator().manual_seed(0))
    for lora in [*network.text_encoder_loras, *network.unet_loras]:
        nn.init.normal_(lora.lora_up.weight, std=0.05, generator=torch.Generator().manual_seed(1))
    network.apply_to(model.text_encoders, model.unet)
    model.freeze()
    return network


# SDXL: one estimator of each kind of rollout
@pytest.mark.parametrize(
    ("estimator", "kind"), [*((name, "sd1") for name in ESTIMATORS), *((name, "sdxl") for name in ("prev", "draft", "direct_align"))]
)
def test_text_encoders_are_trained_too(estimator: str, kind: str) -> None:
    model = tiny_model(kind)
    network = lora_of_both(model)
    term = make_term(make_workbench(model=model, network=network, draft_steps=2), score_estimator=estimator)
    for _ in range(2):
        term().loss.backward()
    gradients = {lora.name: lora.lora_up.weight.grad for lora in [*network.text_encoder_loras, *network.unet_loras]}
    # SDXL does not read its first text encoder's last layer
    unread = {name for name in gradients if kind == "sdxl" and name.startswith("lora_te1_text_model_encoder_layers_2_")}
    assert unread == {name for name, gradient in gradients.items() if gradient is None}
    # Self-attention among one token is 1 whatever its query and key are: there their gradient is 0 by mathematics, and what is computed is
    # rounding. At 64 pixels the tiny SDXL has one token in every block, the tiny SD1 in all but its first ones.
    one_token = {name for name in gradients if re.search(r"lora_unet_.*_attn1_to_[qk]$", name)}
    for name, gradient in gradients.items():
        assert gradient is None or torch.isfinite(gradient).all(), name
        assert gradient is None or name in one_token or gradient.abs().max() > 0, name


def test_paired_signs_with_text_encoders_are_refused() -> None:
    model = tiny_model()
    with pytest.raises(UserError, match="network_train_unet_only"):
        make_term(make_workbench(model=model, network=lora_of_both(model)), paired_signs=True)


@pytest.mark.parametrize("sampler", ["euler_a", "lcm"])
def test_draft_with_a_sampler_that_draws_noise_is_refused(sampler: str) -> None:
    with pytest.raises(UserError, match="use ddim or dpmpp_2m"):
        make_term(make_workbench(sampler=sampler), score_estimator="draft")


# -- whole runs ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_workplace(tmp_path_factory.mktemp("term"))


@pytest.fixture(autouse=True)
def fresh_accelerate() -> None:
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("reward_loss", list(SHAPES))
@pytest.mark.parametrize("estimator", list(ESTIMATORS))
def test_training_runs(estimator: str, reward_loss: str, workplace: Path, tmp_path: Path) -> None:
    """Two steps of the script: finite numbers, a slider that moved."""
    path = run(workplace, tmp_path, score_estimator=estimator, reward_loss=reward_loss, draft_steps=2, num_views=2)
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert path.exists() and len(records) == 2
    numbers = {
        name: [float(record[name] or 0) for record in records] for name in ("loss", "reward", "gain_per_step", "eps_drift", "grad_norm")
    }
    # An untrained LoRA does nothing; but the frozen model's rows stand in another batch, for which other kernels may run: 1e-6 of a drift.
    assert numbers["eps_drift"][1] > 10 * numbers["eps_drift"][0] and numbers["eps_drift"][0] < 2e-6
    assert numbers["grad_norm"][0] > 0 and all(numbers["reward"])
