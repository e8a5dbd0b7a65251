"""What the monitor measures: against the same numbers made by hand."""

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
import torch
from PIL import Image

from library.errors import UserError
from library.measuring.calibration import Calibration, CalibrationTarget
from library.measuring.judges import Judges
from library.measuring.record import REWARD, EvaluationRecord
from library.measuring.response_curve import ResponseCurve, curve_of
from library.measuring.statistics import within_prompt_std
from library.measuring.strength import choose_scale, next_strength
from library.models.base import DiffusionModel
from library.objectives.rewards import Goal, Limit, Reward
from library.reports.plots import GAP, HEADER, LABEL_WIDTH
from library.rollouts.prompt_encoder import PromptEncoder
from library.rollouts.sample import SamplingConfig, decode, sample
from library.scorers.base import Scorer
from library.scorers.pixel_decoder import check_decodes
from library.scorers.worth import Worth
from library.slider_training.monitor import Monitor
from library.slider_training.monitor_config import MonitorConfig
from library.slider_training.outcome import Observation
from library.slider_training.pictures import SliderPictures
from library.slider_training.previews import Previews
from library.training.checkpoints import load_state, save_state
from library.training.run_files import due
from library.types import PromptSpec
from networks.lora import LoRANetwork
from tests.helpers.records import record_of
from tests.helpers.scorers import ChannelScorer, WavyScorer, scorer_for
from tests.helpers.tiny_image_models import tiny_taesd
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
    num_steps = settings.pop("num_steps", 500)
    config = MonitorConfig(**settings)
    reward = Reward([Goal(scorer=scorer_for(model, scorer))])
    return (
        Monitor(model, network, reward, prompts, PromptEncoder(model, network), sampling, config, judges, num_steps=num_steps),
        model,
        network,
    )


def gains(monitor: Monitor) -> tuple[float, float]:
    """Of the reward, at +1 and at -1."""
    metrics = monitor.observe(50).record.metrics()
    return metrics["gain_at_+1"], metrics["gain_at_-1"]


def test_the_gain_is_in_within_prompt_standard_deviations() -> None:
    """The slider on the first seeds of each prompt, as many as an observation begins with; the unit from all of the base model's."""
    monitor, model, network = monitor_for()
    up, down = gains(monitor)
    sampling = SamplingConfig(num_steps=3, guidance_scale=2.0, size=(64, 64), batch_size=24)
    scores = {}
    for multiplier, count in ((1.0, 8), (0.0, 32), (-1.0, 8)):
        rows = [
            sample(model, network, [prompt] * count, range(32 * row, 32 * row + count), multiplier, sampling=sampling)
            for row, prompt in enumerate(PROMPTS)
        ]
        scores[multiplier] = torch.stack([latents[:, 0].mean((1, 2)) for latents in rows])
    unit = within_prompt_std(scores[0.0].double().numpy())
    wanted = torch.tensor([[1.0], [-1.0]])
    expected = [((scores[multiplier] - scores[0.0][:, :8]) * wanted).mean().item() / unit for multiplier in (1.0, -1.0)]
    assert abs(up) > 1e-3 and (up, down) == pytest.approx(expected, rel=1e-3, abs=1e-4)


def test_calibration_makes_weight_1_do_what_the_scale_did() -> None:
    """The calibrated strength, measured again, is the gain that was promised."""
    monitor, _, network = monitor_for(prompts=PROMPTS[1:], early_stop_gain=None)
    before = gains(monitor)[0]
    # out of reach: the end of the range in which the arm keeps rising
    calibration, record = monitor.pictures.calibration(CalibrationTarget(gain=1e6), monitor.best.record)
    assert not calibration.reached and calibration.note.endswith(".") and record.multipliers == (-1.0, 0.0, 1.0)
    assert calibration.curve is not None and record.pictures[0].shape[0] == 3
    farther = min(abs(math.log(weight)) for weight in (*calibration.curve.multipliers, calibration.pictured_at) if weight > 0)
    assert abs(math.log(calibration.pictured_at)) == pytest.approx(farther)  # no other measured weight is nearer to 1
    network.scale_alpha(2.0)
    assert gains(monitor)[0] != pytest.approx(before)


def test_an_observation_goes_on_while_its_answer_is_open() -> None:
    """16 pairs where they say it; all 64 where the interval of a gain holds the one that training is to stop at."""
    prompts = [replace(prompt, direction=1.0) for prompt in PROMPTS]  # what one end loses, the other gains
    monitor, _, _ = monitor_for(prompts, network_of=lambda model: lora_for(model, 0.2))
    first = monitor.observe(50).record
    assert first.num_pairs == 16
    gain = max((first.gain("reward", place) for place in first.ends), key=lambda gain: gain.value)
    monitor.config = replace(monitor.config, early_stop_gain=gain.value + 0.001 * (gain.high - gain.value))
    assert monitor.observe(50).record.num_pairs == 64


def test_full_confirms_weight_1_on_more_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, count in {"NUM_PROMPTS": 2, "NUM_PICTURES": 6, "FEWEST_PICTURES": 0, "FEWEST_FRESH": 3, "MANY_FRESH": 5}.items():
        monkeypatch.setattr(f"library.slider_training.pictures.{name}", count)
    prompts = [replace(PROMPTS[0], prompt=f"{number} cats") for number in range(10)]
    for measure, count in (("light", 3), ("full", 5)):
        pictures = monitor_for(prompts, measure=measure)[0].pictures
        _, record = pictures.calibration(CalibrationTarget(gain=0.01), None)
        assert len({*record.prompts} & {prompt.prompt for prompt in pictures.others}) == len(record.prompts) == count


def test_what_a_run_measures_is_counted() -> None:
    monitor, model, _ = monitor_for()
    before = model.num_unet_evaluations
    monitor.start()
    monitor.observe(50)
    # steps, branches of the guidance, pictures
    assert monitor.pictures.spent == model.num_unet_evaluations - before == 3 * 2 * (64 + 2 * 16 * 2)


def test_full_measures_all_pictures_as_the_training_samples() -> None:
    light, full = monitor_for(num_steps=500)[0], monitor_for(measure="full")[0]
    for monitor, sampler, num_calls, num_evaluations in ((light, "dpmpp_2m", 10, 15), (full, "ddim", 20, 40)):
        monitor.pictures.sampling = replace(monitor.pictures.sampling, num_steps=20)
        sampling = monitor.pictures.measurer_of(PROMPTS).sampling
        assert (sampling.sampler, sampling.num_calls, sampling.num_evaluations) == (sampler, num_calls, num_evaluations)
    assert full.observe(50).record.num_pairs == 64 and [light.interval, full.interval] == [167, 50]


def test_off_does_nothing() -> None:
    monitor, model, network = monitor_for(measure="off", evaluate_every_n_steps=1)
    assert monitor.start() is None and monitor.after(1) is None and monitor.finish(1).step == 1
    assert model.num_unet_evaluations == 0 and "never looked at" in monitor.finish(1).conclusion


def test_a_text_encoder_lora_is_measured_as_it_is_now() -> None:
    """Its encodings change while it trains; none may be kept from one measurement to the next."""

    monitor, _, network = monitor_for(PROMPTS[:1], network_of=lambda model: lora_for(model, 0.0, text_encoders=True))
    assert gains(monitor) == (0.0, 0.0)
    for lora in network.text_encoder_loras:
        torch.nn.init.normal_(lora.lora_up.weight, std=0.2, generator=torch.Generator().manual_seed(1))
    assert gains(monitor) != (0.0, 0.0)


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
        return {"reward": np.array([[0.0, 1.0], [0.0, 1.0]])}

    seeds = ((0,),)
    everything = None

    def state_dict(self) -> dict:
        return {}

    def load_state_dict(self, state: dict) -> None: ...

    def measure(self, network: LoRANetwork, multipliers, *, name: str, part: object) -> EvaluationRecord:
        gain = strength_of(network)
        judged = gain - 0.6 * max(0.0, gain - 1.0) ** 2
        return record_of((gain, gain), {"taste": (judged, judged)}, statistics={"latent_drift": 0.1 * gain})


def made_up_monitor(**settings) -> tuple[Monitor, LoRANetwork]:
    model = tiny_model()
    judges = Judges(scorers={"taste": scorer_for(model)})
    monitor, _, network = monitor_for(judges=judges, **{"early_stop_gain": None, "calibrate": "off", **settings})
    monitor.pictures.measurer = MadeUpPictures()  # pyright: ignore[reportAttributeAccessIssue]
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
    monitor, network = made_up_monitor()
    seen = observe_all(monitor, network, list(PATH))
    assert [observation.record.hack_index for observation in seen] == pytest.approx([0.0, 0.0, 0.135, 0.49, 0.9075, 1.35])
    assert [observation.stop is not None for observation in seen] == [False, False, False, False, False, True]
    assert "the score is gamed" in (seen[5].stop or "")
    assert [len(observation.warnings) for observation in seen] == [0, 0, 0, 0, 1, 1]
    assert "the way the weight says and a judge the other way: +4.0 against -1.4" in seen[5].warnings[0].text
    assert seen[5].warnings[0].text in caplog.text
    outcome = monitor.finish(50)
    assert outcome.step == 20 and outcome.calibration is None and outcome.record == monitor.best.record
    assert outcome.conclusion.startswith("The score was gamed") and outcome.metadata()["leco_stopped"] == seen[5].stop
    assert strength_of(network) == pytest.approx(1.6)
    assert "step 20 is the best of all measured steps (selection score 1.38; step 50: -1.40)" in caplog.text
    assert "step 20 is kept: training score +1.60 at +1, -1.60 at -1; judge taste +1.38 at +1, -1.38 at -1; hack index 0.14" in caplog.text


def test_the_last_step_is_measured_if_it_was_not() -> None:
    monitor, network = made_up_monitor()
    observe_all(monitor, network, [0, 10])
    train_to(network, PATH[20])
    assert monitor.finish(15).step == 15
    assert strength_of(network) == pytest.approx(1.6) and monitor.best.step == 15


def test_the_start_is_never_the_best_step() -> None:
    """A slider that did harm from the first step on is still saved, with its warnings, and not one that does nothing."""
    monitor, network = made_up_monitor()
    observe_all(monitor, network, [0])
    train_to(network, PATH[50])
    assert monitor.finish(50).step == 50


def test_a_judge_that_breaks_costs_a_measurement_and_not_the_run(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monitor, network = made_up_monitor(evaluate_every_n_steps=10)
    observe_all(monitor, network, [0])
    monkeypatch.setattr(MadeUpPictures, "measure", lambda *args, **kwargs: 1 / 0)
    assert monitor.after(10) is None and "step 10: the measurement ended in an error: ZeroDivisionError" in caplog.text


def test_a_resumed_run_remembers_the_best_weights_and_what_was_said(tmp_path: Path) -> None:
    first, network = made_up_monitor()
    observe_all(first, network, [0, 10, 20, 30, 40])
    save_state(tmp_path, first.state_dict())
    resumed, other = made_up_monitor()
    resumed.load_state_dict(load_state(tmp_path))
    seen = observe_all(resumed, other, [50])
    assert seen[0].stop is not None
    assert resumed.finish(50).step == 20
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
    monitor, _, network = monitor_for(PROMPTS[:1], judges=Judges(scorers={"wavy": scorer_for(model, WavyScorer)}))
    metrics = monitor.observe(50).record.metrics()
    expected = {"judge/wavy/gain_at_+1", "score/ChannelScorer/gain_at_-1", "hack_index", "perceptual_distance_at_+1", "latent_drift_at_-1"}
    assert expected <= set(metrics) and all(np.isfinite(value) for value in metrics.values())
    assert monitor.best.step == 50
    for lora in network.loras:
        torch.nn.init.zeros_(lora.lora_up.weight)
    start = monitor.observe(0).record.metrics()
    assert {start[name] for name in ("gain_at_+1", "gain_at_-1", "judge/wavy/gain_at_+1", "hack_index", "latent_drift_at_+1")} == {0.0}


def test_an_error_at_the_end_does_not_cost_the_slider(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monitor, network = made_up_monitor(calibrate="1.0")
    observe_all(monitor, network, [0, 20])
    train_to(network, PATH[50])

    def broken(*_arguments: object) -> None:
        raise np.linalg.LinAlgError("singular")

    monkeypatch.setattr(SliderPictures, "calibration", broken)
    outcome = monitor.finish(50)
    assert outcome.step == 20 and outcome.calibration is None  # the best step was found before
    assert "was lost (LinAlgError: singular)" in outcome.conclusion
    assert strength_of(network) == pytest.approx(1.6) and "saved as trained: LinAlgError: singular" in caplog.text
    monkeypatch.setattr(MadeUpPictures, "measure", lambda *args, **kwargs: 1 / 0)
    train_to(network, PATH[50])
    monitor.last = None
    assert monitor.finish(50).step == 50 and strength_of(network) == pytest.approx(4.0)


@pytest.mark.parametrize(("correlation", "strength"), [(0.44, 1.0), (0.95, 2.0)])
def test_a_slider_is_raised_only_where_its_scorer_is_not_in_doubt(
    correlation: float, strength: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trained to a gain of 0.8, where 1.6 is asked for."""
    monitor, network = made_up_monitor(calibrate="1.6")
    scorer = monitor.reward.goals[0].scorer
    scorer.spec = replace(scorer.spec, training={"worth": Worth("", correlation, 57, in_folds=True).to_dict()})
    line = ResponseCurve(multipliers=(-4.0, 0.0, 4.0), gains=(-3.2, 0.0, 3.2), drifts=(0.1, 0.0, 0.1))
    monkeypatch.setattr(SliderPictures, "calibration", lambda _pictures, target, known: (choose_scale(line, target), known))
    observe_all(monitor, network, [0, 10])
    outcome = monitor.finish(10)
    assert outcome.error is None and outcome.calibration is not None and outcome.calibration.scale == pytest.approx(strength)
    assert ("no more, because what the scorer says is in doubt" in outcome.note) == (strength == 1)


def test_due() -> None:
    assert [step for step in range(1, 10) if due(step, 3)] == [3, 6, 9]
    assert not due(5, None)


@pytest.mark.parametrize(
    "values", [{"evaluate_every_n_steps": 0}, {"max_drift": 0.0}, {"early_stop_gain": 0.0}, {"calibrate": "0"}, {"calibrate": "much"}]
)
def test_settings_that_mean_nothing(values: dict) -> None:
    with pytest.raises(UserError):
        MonitorConfig(**values)


def test_without_prompts_nothing_is_measured() -> None:
    """As when a slider is learned from words alone."""
    monitor, _, network = monitor_for([])
    assert monitor.start() is None and monitor.after(50) is None and monitor.finish(50).step == 50
    assert network.loras


def test_scores_that_have_limits_are_watched() -> None:
    monitor, model, _ = monitor_for(PROMPTS[:1])
    held = Goal(scorer=scorer_for(model, WavyScorer), weight=0.0, limit=Limit("hold", 1e-4))
    monitor.reward = Reward([*monitor.reward.goals, held])
    monitor.pictures.raters = replace(monitor.pictures.raters, reward=monitor.reward)
    monitor.pictures.measurer = monitor.pictures.measurer_of(PROMPTS[:1])
    assert any("the score WavyScorer, which is to be held within 0.0001" in warning.text for warning in monitor.observe(50).warnings)


def test_the_grid_of_previews_shows_every_pixel_where_it_belongs(tmp_path: Path) -> None:
    model = tiny_model()
    network, sampling = lora_for(model), SamplingConfig(num_steps=2, guidance_scale=3.0, size=(64, 64))
    prompts = [PromptSpec(prompt="a cat", seed=1), PromptSpec(prompt="a dog", width=96)]
    previews = Previews(model=model, network=network, prompts=prompts, sampling=sampling, encoder=PromptEncoder(model, network))
    path = previews.write(tmp_path, "tiny", 30)
    assert path == tmp_path / "sample" / "tiny_000030.png"
    grid = np.asarray(Image.open(path)).astype(int)
    with network.disabled():
        base = decode(model, sample(model, None, prompts[:1], [1], sampling=sampling))[0].clamp(0, 1)
    enlarged = (base * 255).round().permute(1, 2, 0).numpy().astype(int).repeat(2, 0).repeat(2, 1)  # 64 -> 128
    left = LABEL_WIDTH + (192 + GAP) + (192 - 128) // 2  # the second column, in cells as wide as the second prompt's pictures
    assert np.abs(grid[HEADER : HEADER + 128, left : left + 128] - enlarged).max() <= 1


def test_a_tiny_decoder_makes_the_pictures_of_previews() -> None:
    model, tiny = tiny_model(), tiny_taesd()
    latents = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    expected = tiny.decode(latents).sample / 2 + 0.5  # type: ignore[arg-type]
    torch.testing.assert_close(decode(model, latents, tiny), expected, rtol=0, atol=1e-5)
    check_decodes(tiny, model.vae, "preview_vae")
    with pytest.raises(UserError, match="preview_vae x is for latents of 16 channels, 8 pixels wide, and the model makes"):
        check_decodes(tiny_taesd(latent_channels=16), model.vae, "preview_vae x")


def test_the_running_gain_asks_for_an_observation_when_the_slider_is_strong_enough() -> None:
    monitor, network = made_up_monitor(early_stop_gain=1.5, evaluate_every_n_steps=1000)
    observe_all(monitor, network, [0])
    train_to(network, 1.6)
    assert monitor.running is not None

    def promise(gain: float, step: int) -> Observation | None:
        for _ in range(20):
            monitor._seen.append((torch.tensor([1.0, -1.0]), torch.tensor([gain, gain]) * monitor.running.unit, None))
        return monitor.after(step)

    assert promise(1.0, 40) is None  # a share of 0.4 is expected to last
    seen = promise(5.0, 80)
    assert seen is not None and "strong enough" in (seen.stop or "")
    assert monitor.running.gain(1).value == pytest.approx(1.6, rel=0.1)  # now it is known better
    assert promise(5.0, 85) is None  # not again at once


def test_a_slider_that_may_be_much_too_strong_is_looked_at_before_it_is_thought_to_be_strong_enough() -> None:
    """After three updates nobody knows how much of them lasts; after an observation it is known."""
    monitor, network = made_up_monitor(early_stop_gain=1.5, evaluate_every_n_steps=1000)
    observe_all(monitor, network, [0])
    train_to(network, 1.2)
    running = monitor.running
    assert running is not None

    def promise(step: int) -> Observation | None:
        monitor._seen += [(torch.tensor([1.0, -1.0]), torch.tensor([gain, gain]) * running.unit, None) for gain in (3.2, 3.3, 3.4)]
        return monitor.after(step)

    seen = promise(5)
    assert seen is not None and seen.stop is None and running.weaker.value < 1.5
    assert all(promise(step) is None for step in (10, 15, 20))


def test_a_run_that_gains_no_more_is_looked_at_and_ended() -> None:
    monitor, network = made_up_monitor()
    observe_all(monitor, network, [0])
    train_to(network, 1.0)
    assert monitor.running is not None
    for step in range(5, 500, 5):
        for _ in range(5):
            monitor._seen.append((torch.tensor([1.0, -1.0]), torch.tensor([4.0, 4.0]) * monitor.running.unit, None))
        seen = monitor.after(step)
        if seen is not None and seen.stop is not None:
            break
    assert step < 300 and seen is not None and "nothing more to gain" in (seen.stop or "")


@pytest.mark.parametrize(("count", "trained", "confirmed"), [(38, 0, 14), (38, 10**6, 22), (33, 10**6, 17)])
def test_a_short_training_is_calibrated_by_fewer_pictures(
    count: int, trained: int, confirmed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = [PromptSpec(prompt=f"a circle, number {number}") for number in range(count)]
    monitor, _, _ = monitor_for(prompts, network_of=lambda model: lora_for(model, 0.2), early_stop_gain=None)
    monkeypatch.setattr(SliderPictures, "trained", property(lambda self: trained))
    _, record = monitor.pictures.calibration(CalibrationTarget(gain=0.01), None)
    assert len(record.prompts) == confirmed and len(record.seeds[0]) == 2


def test_what_an_observation_knows_is_brought_to_the_strength_that_becomes_weight_1() -> None:
    """The base scores of its prompts in its order, its changes at another strength by the form of the curve; the unit alone of a slider
    that lowers its score."""
    prompts = [PromptSpec(prompt=f"a circle, number {number}", direction=1 - 2 * (number % 2)) for number in range(18)]
    monitor, _, network = monitor_for(prompts, network_of=lambda model: lora_for(model, 0.2), early_stop_gain=None)
    pictures = monitor.pictures
    known = pictures.measured((-1.0, 1.0), "observed")
    whole = pictures._whole(known)
    assert len(known.prompts) < len(whole.prompts) == len(pictures.prompts) and pictures._whole(whole) is whole
    response, curve = whole.responses[REWARD], curve_of(whole, REWARD)
    rising = replace(curve, multipliers=(-1.0, 0.0, 1.0), gains=(-2.0, 0.0, 1.0))
    found = pictures._changes(whole, rising, 0.5)
    assert found.changes is not None and np.array_equal(found.base[:, :2], response.values[:, :, 1])
    own = (response.values - response.values[:, :, 1:2]) * response.signs[:, None, None]
    assert found.changes == pytest.approx(own * [rising.gain_at(-0.5) / -2.0, 0.0, rising.gain_at(0.5) / 1.0])
    assert pictures._changes(whole, replace(rising, gains=(1.0, 0.0, 2.0)), 0.5).changes is None


def test_strengths_are_compared_on_the_same_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice the strength doubles the gain of the pictures that it was measured on, which gain more than the others do."""
    pictures = monitor_for()[0].pictures
    known = record_of((2.0, 1.0)).joined(record_of((1.0, 0.8)))
    monkeypatch.setattr(pictures, "measured", lambda *_: replace(record_of((4.0, 2.0)), multipliers=(-2.0, 0.0, 2.0)))
    made, before = {1.0: known}, curve_of(known, REWARD)
    curve = pictures._farther(before, 2.0, made)
    assert curve.multipliers == (-2.0, -1.0, 0.0, 1.0, 2.0) and curve.gains[1:4] == before.gains and sorted(made) == [1.0, 2.0]
    assert (curve.gains[0], curve.gains[4]) == pytest.approx((2 * curve.gains[1], 2 * curve.gains[3]))
    flat = {1.0: record_of((-2.0, 1.0)).joined(record_of((4.0, 0.8)))}  # an arm on which the first pictures say the opposite
    assert pictures._farther(curve_of(flat[1.0], REWARD), 2.0, flat).gains[4] == pytest.approx(4.0, rel=0.01)


@pytest.mark.parametrize(
    ("gain", "visible", "is_visible_wanted", "farther"),
    [(2.0, 0.5, True, 2.2), (2.0, 1.2, True, None), (2.0, 0.5, False, None), (0.5, 1.2, False, 2.2), (5.0, 1.2, False, 0.2)],
)
def test_where_fresh_pictures_say_otherwise_one_strength_more_is_measured(
    gain: float, visible: float, is_visible_wanted: bool, farther: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Farther out where they gain less or hardly see it; nearer where they gain far more."""
    monitor, _, _ = monitor_for(PROMPTS[:2], network_of=lambda model: lora_for(model, 0.2), early_stop_gain=None)
    fresh = ResponseCurve(multipliers=(-1.0, 0.0, 1.0), gains=(-gain, 0.0, gain), drifts=(1.0, 0.0, 1.0), visible=(visible, 0.0, visible))
    fresh = replace(fresh, resamples=np.array([fresh.gains] * 2))
    measured, more = monitor.pictures.measured, []

    def confirm(curve: ResponseCurve, level: ResponseCurve, target: CalibrationTarget) -> Calibration:
        return choose_scale(fresh, target)

    def measure(multipliers: tuple[float, ...], *others: object) -> EvaluationRecord:
        more.append(max(multipliers))
        return measured(multipliers, *others)  # pyright: ignore[reportArgumentType]

    known = measured((-1.0, 1.0), "observed")
    monkeypatch.setattr("library.slider_training.pictures.FEWEST_PICTURES", 0)  # nor is the usable range looked at
    monkeypatch.setattr("library.slider_training.pictures.choose_scale", lambda curve, target: choose_scale(fresh, CalibrationTarget()))
    monkeypatch.setattr("library.slider_training.pictures.confirm", confirm)
    asked = iter([None])  # before the fresh pictures
    monkeypatch.setattr("library.slider_training.pictures.next_strength", lambda curve, target: next(asked, next_strength(curve, target)))
    monkeypatch.setattr(monitor.pictures, "measured", measure)
    monitor.pictures.calibration(CalibrationTarget(visible=is_visible_wanted), known)
    assert more == pytest.approx([] if farther is None else [farther])


def test_prompts_of_one_text_are_measured_whole_once() -> None:
    """Their parts are joined as more seeds of one prompt, so that whole is told by the number of pairs."""
    prompts = [PromptSpec(prompt="a circle")] * 16
    pictures = monitor_for(prompts, network_of=lambda model: lora_for(model, 0.2), early_stop_gain=None)[0].pictures
    whole = pictures._whole(pictures.measured((-1.0, 1.0), "observed"))
    assert pictures._whole(whole) is whole
    calibration, _ = pictures.calibration(CalibrationTarget(gain=0.01), whole)
    assert calibration.up is not None and np.isfinite(calibration.up.low)


@pytest.mark.parametrize(("scores", "said"), [(np.full((2, 2), np.nan), "is not finite"), (np.ones((2, 2)), "no unit")])
def test_base_scores_that_give_no_unit_are_refused(scores: np.ndarray, said: str) -> None:
    base = SimpleNamespace(scores={REWARD: scores})
    pictures = cast(SliderPictures, SimpleNamespace(network=None, measurer=SimpleNamespace(base=lambda network: base)))
    with pytest.raises(UserError, match=said):
        SliderPictures.base_scores(pictures)
