"""A look before the training: what it says of a good signal, of none, and of one that breaks; and that it leaves nothing behind."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from library.objectives.base import TrainingContext
from library.objectives.estimator import ESTIMATORS
from library.objectives.rewards import Goal, Reward
from library.objectives.terms.score import ScoreTerm
from library.scorers.base import Scorer
from library.settings.options import build_config
from library.settings.shared import OptimizerConfig
from library.slider_training.check import RewardCheck, check_reward
from library.types import PromptSpec
from networks.lora import create_network
from tests.helpers.context import make_context, part_settings
from tests.helpers.scorers import ChannelScorer, scorer_for
from tests.helpers.tiny_leco_run import settings
from tests.helpers.tiny_models import tiny_model
from train_leco_score import FLAT_OR_EXPLODING, leco_score_config, train

PROMPT = PromptSpec(prompt="a red circle")


class ConstantScorer(ChannelScorer):
    """Says the same of everything."""

    def score(self, latents, sigmas, cond, prompts):
        return super().score(latents, sigmas, cond, prompts) * 0


class BrokenScorer(ChannelScorer):
    """Is not finite."""

    def score(self, latents, sigmas, cond, prompts):
        return super().score(latents, sigmas, cond, prompts) / 0


def check(
    scorer: type[Scorer] = ChannelScorer,
    learning_rate: float = 1e-3,
    context: TrainingContext | None = None,
    prompt: PromptSpec = PROMPT,
    **score,
) -> tuple[RewardCheck, bool]:
    """The report, and whether the network is as it was."""
    context = context or make_context(strength=0.0)
    reward = Reward([Goal(scorer=scorer_for(context.model, scorer))])
    context = replace(context, reward=reward, prompts=[prompt], settings=part_settings(**score))
    config = context.settings["score"]
    term = ScoreTerm(context, config)
    before = {name: tensor.clone() for name, tensor in context.network.state_dict().items()}
    report = check_reward(context, {"score": term}, config, OptimizerConfig(learning_rate=learning_rate), prompt)
    after = context.network.state_dict()
    return report, all(torch.equal(before[name], after[name]) for name in before)


def test_a_good_signal_rises_at_both_signs_and_nothing_is_left_behind() -> None:
    report, unchanged = check(learning_rate=1e-2)
    assert report.passed and unchanged
    assert report.gain_up > 0 and report.gain_down > 0 and report.drift > 0
    assert [one.sigma for one in report.probes] == sorted((one.sigma for one in report.probes), reverse=True)
    assert "the reward can be trained" in str(report) and "score" in report.norms


@pytest.mark.parametrize("estimator", list(ESTIMATORS))
def test_every_estimator_can_be_looked_at(estimator: str) -> None:
    report, unchanged = check(learning_rate=1e-2, score_estimator=estimator, context=make_context(strength=0.0))
    assert unchanged and report.gain_up > 0 and report.gain_down > 0, report
    assert all(probe.gradient > 0 and probe.sensitivity > 0 for probe in report.probes)


@pytest.mark.parametrize(
    "settings",
    [
        {"reward_loss": "linear", "preserve_weight": 0.0},  # the frozen model is not asked, so the loss knows of no gain
        {"prompt": PromptSpec(prompt="a red circle", direction=-1.0, num_steps=3)},
    ],
    ids=str,
)
def test_a_good_signal_is_one_with_any_setting(settings: dict) -> None:
    report, unchanged = check(learning_rate=1e-2, **settings)
    assert report.passed and unchanged, report
    assert report.gain_up > 0 and report.gain_down > 0 and report.drift > 0


def test_a_network_that_does_something_already_is_looked_at_for_what_the_step_does() -> None:
    large = replace(PROMPT, width=128, height=128)  # at 64 the tiny model jumps
    fresh, worn = (check(context=make_context(strength=strength), prompt=large)[0] for strength in (0.0, 0.5))
    assert worn.drift < 20 * fresh.drift < 0.1, (worn, fresh)  # the network's own drift is several tenths


def test_half_precision_with_text_encoders() -> None:
    model = tiny_model()
    network = create_network(1.0, 4, 4.0, model.vae, model.text_encoders, model.unet, generator=torch.Generator().manual_seed(0))
    network.apply_to(model.text_encoders, model.unet)
    model.freeze().to(dtype=torch.bfloat16)
    report, unchanged = check(context=make_context(model=model, network=network), learning_rate=1e-2)
    assert report.passed and unchanged, report


def test_a_constant_score_is_flat_and_explained() -> None:
    report, unchanged = check(ConstantScorer)
    assert not report.passed and unchanged and "says the same of everything" in report.faults[0]


def test_a_score_that_is_not_finite_is_explained() -> None:
    report, unchanged = check(BrokenScorer)
    assert not report.passed and unchanged and "not finite" in report.faults[0]


def test_a_learning_rate_that_changes_everything_at_once_is_a_fault() -> None:
    report, unchanged = check(learning_rate=100.0)
    assert not report.passed and unchanged and "learning_rate" in " ".join(report.faults)


def test_a_learning_rate_that_does_nothing_is_a_fault() -> None:
    report, _ = check(learning_rate=1e-9)
    assert not report.passed and "next to nothing" in report.faults[0]


def test_the_script_reports_and_ends_without_a_file(workplace: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    config = build_config(leco_score_config(), settings(workplace, tmp_path / "out", check_reward=True, learning_rate=1e-12))
    with pytest.raises(SystemExit) as ended:
        train(config)
    assert ended.value.code == FLAT_OR_EXPLODING
    assert "fault: the run would gain next to nothing" in capsys.readouterr().out
    assert not list((tmp_path / "out").glob("*.safetensors"))
