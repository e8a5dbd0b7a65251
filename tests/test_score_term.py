"""The score as a term of training, for every estimator: what it costs, what it trains, that it resumes, and whole runs."""

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from library.errors import UserError
from library.objectives.base import TrainingContext
from library.objectives.estimator import ESTIMATORS
from library.objectives.rewards import Goal, Reward
from library.objectives.terms.score import ScoreTerm
from library.rollouts.base import ROLLOUTS
from library.rollouts.noised import NUM_RENOISINGS
from library.training.tracking import read_metrics
from library.types import PromptSpec
from tests.helpers.context import assert_resumes, evaluations_of, make_context, part_settings
from tests.helpers.scorers import WavyScorer, scorer_for
from tests.helpers.tiny_leco_run import run
from tests.helpers.tiny_models import tiny_model
from tests.helpers.tiny_networks import lora_for

PROMPTS = [PromptSpec(prompt="a red circle"), PromptSpec(prompt="a blue square", width=128)]
BATCH = 3


def make_term(context: TrainingContext, **options: Any) -> ScoreTerm:
    settings = part_settings(**options)
    reward = Reward([Goal(scorer=scorer_for(context.model, WavyScorer))])
    return ScoreTerm(replace(context, reward=reward, prompts=PROMPTS, settings=settings), settings["score"])


# -- what it costs -----------------------------------------------------------------------------------------------------------


class CopiesThatWait(TorchDispatchMode):
    """Counts copies to a device without values (meta) that are not merely put in its queue."""

    found = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result, kwargs = function(*args, **kwargs or {}), kwargs or {}
        if function.overloadpacket in (torch.ops.aten._to_copy, torch.ops.aten.copy_) and isinstance(result, torch.Tensor):
            from_host = any(isinstance(value, torch.Tensor) and value.device.type == "cpu" for value in args)
            self.found += from_host and result.device.type == "meta" and not (kwargs.get("non_blocking") or True in args[2:])
        return result


@pytest.mark.parametrize("estimator", ["x0_renoise", "direct_align"])
def test_no_step_waits_for_the_device(estimator: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On tensors without values, each line that needs one is an error; and whatever is sent to the device is only put in its queue."""
    monkeypatch.setattr(torch, "autocast", lambda *args, **settings: nullcontext())  # meta has none
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: False)
    context = make_context("sdxl")
    context.encoder.encode_ahead(PROMPTS, context.sampling.size)
    reward = Reward([Goal(scorer=scorer_for(context.model, WavyScorer))]).to("meta")
    context.model.unet.to("meta")
    context.network.to("meta")
    settings = part_settings(score_estimator=estimator)
    term = ScoreTerm(replace(context, reward=reward, prompts=PROMPTS, settings=settings), settings["score"])
    term()  # tables are copied once
    with CopiesThatWait() as copies:
        for _ in range(4):
            out = term()
            out.loss.backward()
    assert copies.found == 0
    assert out.sample_losses.device.type == "meta" and all(weight.grad is not None for weight in context.network.parameters())


def test_batches_outside_the_timestep_range_are_passed_over() -> None:
    context = make_context(train_batch_size=1)
    term = make_term(context, max_timestep=300)
    for _ in range(4):
        (sample,) = term().samples
        assert int(sample.split()[-1]) < 300


@pytest.mark.parametrize("guidance", [1.0, 5.0])
@pytest.mark.parametrize("estimator", list(ESTIMATORS))
def test_evaluations_are_the_rows_that_the_unet_saw(estimator: str, guidance: float) -> None:
    """Of training and rollout together; a row that carries gradient is counted three times, for the backward pass."""
    context, rows = make_context(leco_denoise_guidance_scale=guidance), 0

    def count(module: nn.Module, args: tuple) -> None:
        nonlocal rows
        rows += len(args[0]) * (3 if torch.is_grad_enabled() else 1)

    context.model.unet.register_forward_pre_hook(count)
    term = make_term(context, score_estimator=estimator)
    for _ in range(NUM_RENOISINGS + 1):
        term()
    assert context.model.num_unet_evaluations == rows


def test_a_step_on_the_belt_costs_what_it_is_said_to() -> None:
    """uncond, frozen, cond, and the backward pass as two."""
    for settings, each in (({}, 5), ({"reward_loss": "linear"}, 5), ({"reward_loss": "linear", "preserve_weight": 0.0}, 4)):
        context = make_context()
        assert evaluations_of(context, make_term(context, **settings)) == each * BATCH


# -- put away and taken out again ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", ["euler_a", "dpmpp_2m"])  # one that adds noise, one with a history
def test_a_restored_term_goes_on(sampler: str) -> None:
    assert_resumes(make_term, lambda **seed: make_context(sampler=sampler, **seed))


@pytest.mark.parametrize("rollout", list(ROLLOUTS))
def test_a_restored_term_of_every_rollout_goes_on(rollout: str) -> None:
    assert_resumes(lambda context: make_term(context, score_estimator="x0"), lambda **seed: make_context(rollout=rollout, **seed))


def test_an_estimator_that_needs_another_rollout_than_the_one_that_is_set_is_refused() -> None:
    for other in sorted(set(ROLLOUTS) - {"noised"}):
        with pytest.raises(UserError, match=f"score_estimator direct_align needs rollout noised, not {other}"):
            make_term(make_context(rollout=other), score_estimator="direct_align")
    assert isinstance(make_term(make_context(), score_estimator="direct_align").rollout, ROLLOUTS["noised"])


def test_a_state_of_another_batch_size_is_refused() -> None:
    for estimator in ("prev", "direct_align"):
        small, large = (make_term(make_context(train_batch_size=size), score_estimator=estimator) for size in (2, 3))
        with pytest.raises(UserError, match="same settings"):
            large.load_state_dict(small.state_dict())


# -- text encoders ---------------------------------------------------------------------------------------------------------


# SDXL: one estimator of each kind of rollout
@pytest.mark.parametrize(
    ("estimator", "kind"), [*((name, "sd1") for name in ESTIMATORS), *((name, "sdxl") for name in ("prev", "direct_align"))]
)
def test_text_encoders_are_trained_too(estimator: str, kind: str) -> None:
    model = tiny_model(kind)
    network = lora_for(model, text_encoders=True)
    term = make_term(make_context(model=model, network=network), score_estimator=estimator)
    for _ in range(2):
        term().loss.backward()
    gradients = {lora.name: lora.lora_up.weight.grad for lora in [*network.text_encoder_loras, *network.unet_loras]}
    # SDXL does not read its first text encoder's last layer
    unread = {name for name in gradients if kind == "sdxl" and name.startswith("lora_te1_text_model_encoder_layers_2_")}
    assert unread == {name for name, gradient in gradients.items() if gradient is None}
    for name, gradient in gradients.items():
        assert gradient is None or torch.isfinite(gradient).all(), name
        assert gradient is None or gradient.abs().max() > 0, name


# -- whole runs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", list(ESTIMATORS))
def test_training_runs(estimator: str, workplace: Path, tmp_path: Path) -> None:
    """Two steps of the script: finite numbers, a slider that moved."""
    path = run(workplace, tmp_path, score_estimator=estimator)
    records = read_metrics(tmp_path / "tiny.metrics.jsonl")
    assert path.exists() and len(records) == 2
    numbers = {
        name: [float(record[name] or 0) for record in records] for name in ("loss", "reward", "gain_per_step", "eps_drift", "grad_norm")
    }
    # An untrained LoRA does nothing; but the frozen model's rows stand in another batch, for which other kernels may run: 1e-6 of a drift.
    assert numbers["eps_drift"][1] > 10 * numbers["eps_drift"][0] and numbers["eps_drift"][0] < 2e-6
    assert numbers["grad_norm"][0] > 0 and all(numbers["reward"])


def test_timesteps_that_hold_no_step_of_the_sampler_are_refused() -> None:
    """They would be looked for without end."""
    with pytest.raises(UserError, match="no step of the sampler is from min_timestep 999 to .* its steps are at 751, 501, 251, 1; widen"):
        make_term(make_context("sd1"), min_timestep=999, max_timestep=1000)
    make_term(make_context("sd1"), max_timestep=2)
