"""What the monitor measures: against the same numbers made by hand."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from library.errors import UserError
from library.measuring.judges import Judges
from library.measuring.measurement import BasePictures, Measured
from library.measuring.observation import Observation
from library.measuring.statistics import within_prompt_std
from library.models.base import DiffusionModel
from library.objectives.rewards import Goal, Limit, Reward
from library.rollouts.prompt_encoder import PromptEncoder
from library.rollouts.sample import SamplingConfig, sample
from library.scorers.base import Scorer
from library.slider_training.monitor import Effect, Monitor, MonitorConfig, due
from library.training.checkpoints import load_state, save_state
from library.types import PromptSpec
from networks.lora import LoRANetwork, create_network
from tests.helpers.scorers import ChannelScorer, WavyScorer, scorer_for
from tests.helpers.tiny_models import tiny_model
from tests.helpers.tiny_networks import lora_for

PROMPTS = [PromptSpec(prompt="a red circle"), PromptSpec(prompt="a blue square", direction=-1.0)]


class ConstantScorer(ChannelScorer):
    """The same score for every picture."""

    def standardised(self, latents, sigmas, cond, prompts):
        return super().standardised(latents, sigmas, cond, prompts) * 0


def monitor_for(
    prompts: list[PromptSpec] = PROMPTS,
    *,
    scorer: type[Scorer] = ChannelScorer,
    network_of=lora_for,
    judges: Judges | None = None,
    **settings,
) -> tuple[Monitor, DiffusionModel, LoRANetwork]:
    model = tiny_model()
    network = network_of(model)
    sampling = SamplingConfig(num_steps=3, guidance_scale=2.0, size=(64, 64))
    config = MonitorConfig(**{"eval_seeds_per_prompt": 2, "num_sample_prompts": 2, "pixel_statistics": False, **settings})
    reward = Reward([Goal(scorer=scorer_for(model, scorer))])
    return Monitor(model, network, reward, prompts, PromptEncoder(model, network), sampling, config, judges), model, network


def latents_by_hand(model: DiffusionModel, network: LoRANetwork, prompt: PromptSpec, seeds: list[int], multiplier: float) -> torch.Tensor:
    return sample(
        model,
        network,
        [prompt] * 2,
        seeds,
        multiplier,
        sampling=SamplingConfig(num_steps=3, guidance_scale=2.0, size=(64, 64), batch_size=2),
    )


def test_the_effect_is_the_gain_in_within_prompt_standard_deviations() -> None:
    monitor, model, network = monitor_for()
    effect = monitor.effect()
    scores = {
        multiplier: torch.stack(
            [
                latents_by_hand(model, network, prompt, [2 * row, 2 * row + 1], multiplier)[:, 0].mean((1, 2))
                for row, prompt in enumerate(PROMPTS)
            ]
        )
        for multiplier in (1.0, 0.0, -1.0)
    }
    unit = within_prompt_std(scores[0.0].double().numpy())
    wanted = torch.tensor([[1.0], [-1.0]])
    up, down = (((scores[multiplier] - scores[0.0]) * wanted).mean().item() / unit for multiplier in (1.0, -1.0))
    assert abs(up) > 1e-3
    assert (effect.up, effect.down) == (pytest.approx(up, rel=1e-3, abs=1e-4), pytest.approx(down, rel=1e-3, abs=1e-4))


def test_what_counts_as_strong_enough() -> None:
    assert Effect(up=2.0, down=-2.5).reaches(2.0)
    assert not Effect(up=2.5, down=-1.9).reaches(2.0)
    assert not Effect(up=1.9, down=-2.5).reaches(2.0)
    assert not Effect(up=float("nan"), down=float("nan")).reaches(2.0)


def test_a_network_that_does_nothing_has_no_effect() -> None:
    monitor, _, network = monitor_for()
    for lora in network.loras:
        torch.nn.init.zeros_(lora.lora_up.weight)
    assert monitor.effect() == Effect(up=0.0, down=0.0)


def test_a_score_belongs_to_its_prompt_whatever_the_sizes() -> None:
    """A size that is given and one that is the run's own may be equal; a prompt's direction turns its own gain round."""
    prompts = [PromptSpec(prompt="a"), PromptSpec(prompt="b", height=32), PromptSpec(prompt="c", height=64)]
    gains = []
    for turned in (None, "b"):
        directed = [
            PromptSpec(prompt=prompt.prompt, height=prompt.height, direction=-1.0 if prompt.prompt == turned else 1.0) for prompt in prompts
        ]
        gains.append(monitor_for(directed)[0].effect().up)
    alone, _, _ = monitor_for(prompts)
    base = alone.pictures.base().scores["reward"]
    gain = alone.pictures.measure(1.0, "").scores["reward"] - base
    row = [prompt.prompt for prompt in alone.prompts].index("b")
    assert gains[0] - gains[1] == pytest.approx(2 * gain[row].sum() / 6 / within_prompt_std(base), rel=1e-3, abs=1e-5)
    assert abs(gain[row]).max() > 1e-4


def test_calibration_makes_weight_1_do_what_the_scale_did() -> None:
    """The calibrated strength, measured again, is the gain that was promised (one rung, so nothing is interpolated but the line to 0)."""
    monitor, _, network = monitor_for(prompts=PROMPTS[:1], calibration_multipliers=(0.5, 1.0))
    up = monitor.effect().up
    calibration = monitor.calibration(1e6)  # out of reach: the end of the range in which both arms keep going their way
    assert calibration.scale in (0.5, 1.0) and not calibration.reached
    assert calibration.note.endswith(".")
    again = monitor.response((-calibration.scale, calibration.scale))
    assert again.gains[2] != pytest.approx(calibration.gain, rel=1e-3)  # settled by other pictures
    network.scale_alpha(2.0)
    assert monitor.effect().up != pytest.approx(up)


def test_a_text_encoder_lora_is_measured_as_it_is_now() -> None:
    """Its encodings change while it trains; none may be kept from one measurement to the next."""

    def network_of(model: DiffusionModel) -> LoRANetwork:
        network = create_network(1.0, 2, 2.0, model.vae, model.text_encoders, model.unet, generator=torch.Generator().manual_seed(0))
        network.apply_to(model.text_encoders, model.unet)
        model.freeze()
        return network

    monitor, _, network = monitor_for(network_of=network_of)
    assert monitor.effect() == Effect(up=0.0, down=0.0)
    for lora in network.text_encoder_loras:
        torch.nn.init.normal_(lora.lora_up.weight, std=0.2, generator=torch.Generator().manual_seed(1))
    assert monitor.effect() != Effect(up=0.0, down=0.0)


def test_the_preview_is_a_picture(tmp_path: Path) -> None:
    monitor, _, _ = monitor_for()
    path = monitor.preview(tmp_path, "tiny", 30)
    assert path == tmp_path / "sample" / "tiny_000030.png"
    with Image.open(path) as picture:
        assert picture.width >= 3 * 64 and picture.height >= 2 * 64


def test_a_score_that_does_not_vary_has_no_unit() -> None:
    monitor, _, _ = monitor_for(scorer=ConstantScorer)
    with pytest.raises(UserError, match="does not vary"):
        monitor.effect()


class MadeUpPictures:
    """Stands for `FixedPictures`: the training score gains as much as the network is strong, its judge agrees up to 1 and then less."""

    directions = np.ones(3)

    def __init__(self, network: LoRANetwork) -> None:
        self.network = network

    def strength(self) -> float:
        return float(self.network.loras[0].lora_up.weight.detach().abs().max())

    def base(self) -> BasePictures:
        values = np.random.default_rng(0).standard_normal((3, 4))
        values /= within_prompt_std(values)
        looks = {"latent_diversity": 1.0, "clipped": 0.0}
        return BasePictures(scores={"reward": values, "taste": values}, statistics=looks, latents=(), shown=(), eps=())

    def measure(self, multiplier: float, label: str) -> Measured:
        gain = self.strength()
        judged = gain - 0.6 * max(0.0, gain - 1.0) ** 2
        scores = {name: values + multiplier * part for (name, values), part in zip(self.base().scores.items(), (gain, judged), strict=True)}
        statistics = dict.fromkeys(("saturation", "nyquist", "latent_nyquist", "diversity", "latent_diversity"), 1.0)
        return Measured(scores=scores, statistics=statistics | {"drift": 0.1 * gain, "eps_distance": 0.1 * gain, "clipped": 0.0})


def made_up_monitor(**settings) -> tuple[Monitor, LoRANetwork]:
    model = tiny_model()
    judges = Judges(scorers={"taste": scorer_for(model)})
    monitor, _, network = monitor_for(judges=judges, **{"early_stop_gain": None, "calibrate": 0.0, **settings})
    monitor.pictures = MadeUpPictures(network)  # pyright: ignore[reportAttributeAccessIssue]
    return monitor, network


def train_to(network: LoRANetwork, strength: float) -> None:
    for lora in network.loras:
        torch.nn.init.constant_(lora.lora_up.weight, strength)


def strength_of(network: LoRANetwork) -> float:
    return network.loras[0].lora_up.weight.max().item()


PATH = {0: 0.0, 10: 0.8, 20: 1.6, 30: 2.4, 40: 3.2, 50: 4.0}  # the judge's gain: 0, 0.8, 1.38, 1.22, 0.3, -1.4


def observe_all(monitor: Monitor, network: LoRANetwork, steps: list[int]) -> list[Observation]:
    seen = []
    for step in steps:
        train_to(network, PATH[step])
        seen.append(monitor.observe(step))
    return seen


def test_a_gamed_score_is_warned_of_stopped_and_its_best_step_restored(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    monitor, network = made_up_monitor(early_stop_patience=2)
    seen = observe_all(monitor, network, list(PATH))
    assert [observation.hack_index for observation in seen] == pytest.approx([0.0, 0.0, 0.135, 0.49, 0.9075, 1.35])
    assert [observation.stop is not None for observation in seen] == [False, False, False, False, True, True]
    assert "the score is gamed" in (seen[4].stop or "")
    assert [len(observation.warnings) for observation in seen] == [0, 0, 0, 0, 1, 1]
    assert "the training score rises while the judges fall: +4.0 against -1.4" in seen[5].warnings[0]
    assert seen[5].warnings[0] in caplog.text
    assert monitor.finish(50) == (20, None)
    assert strength_of(network) == pytest.approx(1.6)
    assert "step 20 is kept, not step 50: the judges' gain is 1.38 against -1.40" in caplog.text
    assert "step 20: training score +1.60 at +1, -1.60 at -1; judge taste +1.38 at +1, -1.38 at -1; hack index 0.14" in caplog.text


def test_the_last_step_is_measured_if_it_was_not() -> None:
    monitor, network = made_up_monitor()
    observe_all(monitor, network, [0, 10])
    train_to(network, PATH[20])
    assert monitor.finish(15) == (15, None)
    assert strength_of(network) == pytest.approx(1.6) and monitor.best.step == 15


def test_the_start_is_never_the_best_step() -> None:
    """A slider that did harm from the first step on is still saved, with its warnings, and not one that does nothing."""
    monitor, network = made_up_monitor()
    observe_all(monitor, network, [0])
    train_to(network, PATH[50])
    assert monitor.finish(50) == (50, None)


@pytest.mark.parametrize("settings", [{"keep_best": False}, {"evaluate_every_n_steps": None}])
def test_the_last_step_is_kept_on_request(settings: dict) -> None:
    monitor, network = made_up_monitor(**settings)
    observe_all(monitor, network, [20, 50])
    assert monitor.finish(50) == (50, None)
    assert strength_of(network) == pytest.approx(4.0)


def test_a_resumed_run_remembers_the_best_weights_and_what_was_said(tmp_path: Path) -> None:
    first, network = made_up_monitor(early_stop_patience=2)
    observe_all(first, network, [0, 10, 20, 30])
    save_state(tmp_path, first.state_dict())
    resumed, other = made_up_monitor(early_stop_patience=2)
    resumed.load_state_dict(load_state(tmp_path))
    seen = observe_all(resumed, other, [40])
    assert seen[0].stop is not None
    assert resumed.finish(40) == (20, None)
    assert strength_of(other) == pytest.approx(1.6)


def test_the_best_weights_are_a_copy() -> None:
    monitor, network = made_up_monitor()
    observe_all(monitor, network, [20])
    train_to(network, PATH[50])
    monitor.best.restore(network)
    assert strength_of(network) == pytest.approx(1.6)


def test_an_observation_of_real_pictures(tmp_path: Path) -> None:
    """Base, +1 and -1 are sampled once; gains agree with `effect`, and every number can be logged."""
    model = tiny_model()
    monitor, _, network = monitor_for(judges=Judges(scorers={"wavy": scorer_for(model, WavyScorer)}), pixel_statistics=True)
    seen, effect = monitor.observe(50), monitor.effect()
    metrics = seen.metrics()
    assert (metrics["gain_at_+1"], metrics["gain_at_-1"]) == (pytest.approx(effect.up, rel=1e-3), pytest.approx(effect.down, rel=1e-3))
    assert {"judge/wavy/gain_at_+1", "score/ChannelScorer/gain_at_-1", "hack_index", "perceptual_distance_at_+1"} <= set(metrics)
    assert all(np.isfinite(value) for value in metrics.values())
    assert monitor.best.step == 50
    for lora in network.loras:
        torch.nn.init.zeros_(lora.lora_up.weight)
    start = monitor.observe(0).metrics()
    assert {start[name] for name in ("gain_at_+1", "gain_at_-1", "judge/wavy/gain_at_+1", "hack_index", "drift_at_+1")} == {0.0}


def test_due() -> None:
    assert [step for step in range(1, 10) if due(step, 3)] == [3, 6, 9]
    assert not due(5, None)


@pytest.mark.parametrize("values", [{"eval_seeds_per_prompt": 1}, {"calibration_multipliers": (0.0, 1.0)}, {"early_stop_gain": 0.0}])
def test_settings_that_mean_nothing(values: dict) -> None:
    with pytest.raises(UserError):
        MonitorConfig(**values)


def test_without_prompts_nothing_is_measured() -> None:
    """As when a slider is learned from words alone."""
    monitor, _, network = monitor_for([])
    assert not monitor.observes_at(0) and not monitor.observes_at(50)
    assert monitor.finish(50) == (50, None)
    with pytest.raises(UserError, match="give eval_prompts_file"):
        monitor_for([], sample_every_n_steps=10)
    assert network.loras


def test_a_score_that_is_to_be_held_is_watched() -> None:
    monitor, model, _ = monitor_for(PROMPTS[:1])
    held = Goal(scorer=scorer_for(model, WavyScorer), weight=0.0, limit=Limit("hold", 1e-4))
    monitor.reward = monitor.pictures.reward = Reward([*monitor.reward.goals, held])
    assert any("the score WavyScorer, which is to be held within 0.0001" in warning for warning in monitor.observe(50).warnings)


def test_a_bound_that_is_passed_is_told_of() -> None:
    monitor, model, _ = monitor_for(PROMPTS[:1])
    for value, shares in ((-1e6, (1.0, 1.0, 1.0)), (1e6, (0.0, 0.0, 0.0))):
        goal = Goal(scorer=scorer_for(model, WavyScorer), weight=0.0, limit=Limit("max", value))
        monitor.reward = monitor.pictures.reward = Reward([*monitor.reward.goals[:1], goal])
        monitor.pictures._base = None
        seen = monitor.observe(50)
        assert seen.beyond == {"WavyScorer": (f"above {value:g}", shares)}
