"""What the monitor measures: against the same numbers made by hand."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from library.errors import UserError
from library.measuring.judges import Judges
from library.measuring.record import EvaluationRecord
from library.measuring.statistics import within_prompt_std
from library.models.base import DiffusionModel
from library.objectives.rewards import Goal, Limit, Reward
from library.reports.plots import GAP, HEADER, LABEL_WIDTH
from library.rollouts.prompt_encoder import PromptEncoder
from library.rollouts.sample import SamplingConfig, decode, sample
from library.scorers.base import Scorer
from library.slider_training.monitor import Monitor, MonitorConfig, Observation, due
from library.slider_training.previews import write_preview
from library.training.checkpoints import load_state, save_state
from library.types import PromptSpec
from networks.lora import LoRANetwork
from tests.helpers.records import record_of
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


def gains(monitor: Monitor) -> tuple[float, float]:
    """Of the reward, at +1 and at -1."""
    metrics = monitor.observe(50).record.metrics()
    return metrics["gain_at_+1"], metrics["gain_at_-1"]


def test_the_gain_is_in_within_prompt_standard_deviations() -> None:
    monitor, model, network = monitor_for()
    up, down = gains(monitor)
    sampling = SamplingConfig(num_steps=3, guidance_scale=2.0, size=(64, 64), batch_size=2)
    scores = {}
    for multiplier in (1.0, 0.0, -1.0):
        rows = [
            sample(model, network, [prompt] * 2, [2 * row, 2 * row + 1], multiplier, sampling=sampling)
            for row, prompt in enumerate(PROMPTS)
        ]
        scores[multiplier] = torch.stack([latents[:, 0].mean((1, 2)) for latents in rows])
    unit = within_prompt_std(scores[0.0].double().numpy())
    wanted = torch.tensor([[1.0], [-1.0]])
    expected = [((scores[multiplier] - scores[0.0]) * wanted).mean().item() / unit for multiplier in (1.0, -1.0)]
    assert abs(up) > 1e-3 and (up, down) == pytest.approx(expected, rel=1e-3, abs=1e-4)
    assert monitor.base_unit() == pytest.approx(unit, rel=1e-4)


def test_calibration_makes_weight_1_do_what_the_scale_did() -> None:
    """The calibrated strength, measured again, is the gain that was promised."""
    monitor, _, network = monitor_for(prompts=PROMPTS[1:], calibration_multipliers=(0.5, 1.0))
    before = gains(monitor)[0]
    calibration = monitor.calibration(1e6)  # out of reach: the end of the range in which the arm keeps rising
    assert not calibration.reached and calibration.note.endswith(".")
    again = monitor.curve(monitor.pictures, [calibration.scale])
    assert again.gains[2] != pytest.approx(calibration.gain, rel=1e-3)  # confirmed by other pictures
    network.scale_alpha(2.0)
    assert gains(monitor)[0] != pytest.approx(before)


def test_a_text_encoder_lora_is_measured_as_it_is_now() -> None:
    """Its encodings change while it trains; none may be kept from one measurement to the next."""

    monitor, _, network = monitor_for(PROMPTS[:1], network_of=lambda model: lora_for(model, 0.0, text_encoders=True))
    assert gains(monitor) == (0.0, 0.0)
    for lora in network.text_encoder_loras:
        torch.nn.init.normal_(lora.lora_up.weight, std=0.2, generator=torch.Generator().manual_seed(1))
    assert gains(monitor) != (0.0, 0.0)


def test_the_preview_is_a_picture(tmp_path: Path) -> None:
    monitor, _, _ = monitor_for()
    path = monitor.preview(tmp_path, "tiny", 30)
    assert path == tmp_path / "sample" / "tiny_000030.png"
    with Image.open(path) as picture:
        assert picture.width >= 3 * 64 and picture.height >= 2 * 64


def test_a_score_that_does_not_vary_has_no_unit() -> None:
    monitor, _, _ = monitor_for(scorer=ConstantScorer)
    with pytest.raises(UserError, match="does not vary"):
        monitor.observe(0)


class MadeUpPictures:
    """Stands for a `Measurer`: the training score gains as much as the network is strong, its judge agrees up to 1 and then less."""

    def base(self, network: LoRANetwork) -> "MadeUpPictures":
        return self

    @property
    def scores(self) -> dict[str, np.ndarray]:
        return {"reward": np.array([[0.0, 1.0]])}

    def measure(self, network: LoRANetwork, multipliers, *, name: str) -> EvaluationRecord:
        gain = strength_of(network)
        judged = gain - 0.6 * max(0.0, gain - 1.0) ** 2
        return record_of((gain, gain), {"taste": (judged, judged)}, statistics={"latent_drift": 0.1 * gain})


def made_up_monitor(**settings) -> tuple[Monitor, LoRANetwork]:
    model = tiny_model()
    judges = Judges(scorers={"taste": scorer_for(model)})
    monitor, _, network = monitor_for(judges=judges, **{"early_stop_gain": None, "calibrate": None, **settings})
    monitor.pictures = MadeUpPictures()  # pyright: ignore[reportAttributeAccessIssue]
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
    assert [observation.record.hack_index for observation in seen] == pytest.approx([0.0, 0.0, 0.135, 0.49, 0.9075, 1.35])
    assert [observation.stop is not None for observation in seen] == [False, False, False, False, True, True]
    assert "the score is gamed" in (seen[4].stop or "")
    assert [len(observation.warnings) for observation in seen] == [0, 0, 0, 0, 1, 1]
    assert "the way the weight says and a judge the other way: +4.0 against -1.4" in seen[5].warnings[0].text
    assert seen[5].warnings[0].text in caplog.text
    assert monitor.finish(50) == (20, None)
    assert strength_of(network) == pytest.approx(1.6)
    assert "step 20 is the best of all measured steps (selection score 1.38; step 50: -1.40)" in caplog.text
    assert "step 20 is kept: training score +1.60 at +1, -1.60 at -1; judge taste +1.38 at +1, -1.38 at -1; hack index 0.14" in caplog.text


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


def test_an_observation_of_real_pictures() -> None:
    """Every number can be logged, and a network that does nothing has no effect."""
    model = tiny_model()
    monitor, _, network = monitor_for(PROMPTS[:1], judges=Judges(scorers={"wavy": scorer_for(model, WavyScorer)}), pixel_statistics=True)
    metrics = monitor.observe(50).record.metrics()
    expected = {"judge/wavy/gain_at_+1", "score/ChannelScorer/gain_at_-1", "hack_index", "perceptual_distance_at_+1", "latent_drift_at_-1"}
    assert expected <= set(metrics) and all(np.isfinite(value) for value in metrics.values())
    assert monitor.best.step == 50
    for lora in network.loras:
        torch.nn.init.zeros_(lora.lora_up.weight)
    start = monitor.observe(0).record.metrics()
    assert {start[name] for name in ("gain_at_+1", "gain_at_-1", "judge/wavy/gain_at_+1", "hack_index", "latent_drift_at_+1")} == {0.0}


def test_an_error_at_the_end_does_not_cost_the_slider(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monitor, network = made_up_monitor(calibrate=1.0)
    observe_all(monitor, network, [0, 20])
    train_to(network, PATH[50])

    def broken(self: Monitor, target: float) -> None:
        raise np.linalg.LinAlgError("singular")

    monkeypatch.setattr(Monitor, "calibration", broken)
    assert monitor.finish(50) == (20, None)  # the best step was found before
    assert strength_of(network) == pytest.approx(1.6) and "saved as trained: LinAlgError: singular" in caplog.text
    monkeypatch.setattr(MadeUpPictures, "measure", lambda *args, **kwargs: 1 / 0)
    train_to(network, PATH[50])
    monitor.last = None
    assert monitor.finish(50) == (50, None) and strength_of(network) == pytest.approx(4.0)


def test_due() -> None:
    assert [step for step in range(1, 10) if due(step, 3)] == [3, 6, 9]
    assert not due(5, None)


@pytest.mark.parametrize(
    "values", [{"eval_seeds_per_prompt": 1}, {"calibration_multipliers": (0.0, 1.0)}, {"early_stop_gain": 0.0}, {"calibrate": 0.0}]
)
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


def test_scores_that_have_limits_are_watched() -> None:
    monitor, model, _ = monitor_for(PROMPTS[:1])
    held = Goal(scorer=scorer_for(model, WavyScorer), weight=0.0, limit=Limit("hold", 1e-4))
    monitor.reward = Reward([*monitor.reward.goals, held])
    monitor.pictures = monitor._measurer(monitor.prompts)
    assert any("the score WavyScorer, which is to be held within 0.0001" in warning.text for warning in monitor.observe(50).warnings)


def test_the_grid_of_previews_shows_every_pixel_where_it_belongs(tmp_path: Path) -> None:
    model = tiny_model()
    network, sampling = lora_for(model), SamplingConfig(num_steps=2, guidance_scale=3.0, size=(64, 64))
    prompts = [PromptSpec(prompt="a cat", seed=1), PromptSpec(prompt="a dog", width=96)]
    write_preview(tmp_path / "preview.png", model, network, prompts, (-1.0, 0.0, 1.0), sampling)
    grid = np.asarray(Image.open(tmp_path / "preview.png")).astype(int)
    with network.disabled():
        base = decode(model, sample(model, None, prompts[:1], [1], sampling=sampling), 1)[0].clamp(0, 1)
    enlarged = (base * 255).round().permute(1, 2, 0).numpy().astype(int).repeat(2, 0).repeat(2, 1)  # 64 -> 128
    left = LABEL_WIDTH + (192 + GAP) + (192 - 128) // 2  # the second column, in cells as wide as the second prompt's pictures
    assert np.abs(grid[HEADER : HEADER + 128, left : left + 128] - enlarged).max() <= 1
