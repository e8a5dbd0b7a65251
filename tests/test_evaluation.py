"""The statistics against analytic answers, and the measurement on a model whose pictures are known."""

import json
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from PIL import Image
from torch import Tensor

from library.errors import UserError
from library.measuring.evaluation import evaluate, sample_base
from library.measuring.slider_evaluation import SliderEvaluation
from library.measuring.statistics import bootstrap_means, linear_fit, paired_difference, summarise_response, within_prompt_std
from library.models.base import DiffusionModel
from library.reports.plots import GAP, HEADER, LABEL_WIDTH
from library.rollouts.sample import SamplingConfig, decode, sample
from library.scorers.base import Scorer, ScorerSpec
from library.slider_training.previews import preview_path, write_preview
from library.types import PromptSpec
from tests.helpers.tiny_models import tiny_model
from tests.test_sampling import network_for

MULTIPLIERS = (-1.0, -0.5, 0.0, 0.5, 1.0)
RUN: dict[str, Any] = {"sampling": SamplingConfig(num_steps=2, guidance_scale=3.0, size=(64, 64), batch_size=7)}


class MeanOfChannel(Scorer):
    """A latent scorer with a known answer: the mean of the first channel."""

    def score(self, latents: Tensor, sigmas: Tensor, cond, prompts) -> Tensor:
        assert (sigmas == 0).all()
        return latents[:, 0].mean((1, 2))


def scorer_for(model: DiffusionModel) -> Scorer:
    return MeanOfChannel(ScorerSpec(kind="mean_of_channel", architecture={}, vae=model.vae_fingerprint()))


def brightness(pixels: Tensor, prompts) -> Tensor:
    assert pixels.min() >= 0 and pixels.max() <= 1 and len(prompts) == len(pixels)
    return pixels.mean((1, 2, 3))


def test_within_prompt_std_leaves_out_what_differs_between_prompts():
    scores = np.array([[1.0, 3.0], [100.0, 104.0]])  # sample variances 2 and 8
    assert within_prompt_std(scores) == pytest.approx(math.sqrt(5))
    with pytest.raises(UserError, match="at least 2 seeds"):
        within_prompt_std(scores[:, :1])


def test_gains_are_paired_signed_and_in_standard_deviations():
    base = np.array([[1.0, 3.0], [100.0, 104.0]])
    values = base[:, :, None] + 5 * np.array(MULTIPLIERS)
    response = summarise_response("score", "judge", values, MULTIPLIERS, np.random.default_rng(0))
    assert [gain.value for gain in response.gains] == pytest.approx([-5, -2.5, 0, 2.5, 5])
    assert [gain.low for gain in response.gains] == pytest.approx([-5, -2.5, 0, 2.5, 5])  # all pairs agree: no width
    assert response.gains_std[-1].value == pytest.approx(math.sqrt(5))
    assert response.means[2].value == pytest.approx(52) and response.means[2].high - response.means[2].low > 50
    assert response.monotone and response.slope == pytest.approx(5) and response.r2 == pytest.approx(1)
    assert response.moved[0] == response.moved[4] == 1 and math.isnan(response.moved[2])
    turned = summarise_response("score", "judge", -values, MULTIPLIERS, np.random.default_rng(0), directions=np.array([-1.0, -1.0]))
    assert [gain.value for gain in turned.gains] == pytest.approx([-5, -2.5, 0, 2.5, 5])


def test_what_turns_back_is_not_monotone_and_not_a_line():
    values = np.zeros((2, 2, 1)) + np.array([-1.0, -0.5, 0.0, 0.5, 0.2])
    response = summarise_response("score", "judge", values, MULTIPLIERS, np.random.default_rng(0))
    assert not response.monotone and response.r2 < 0.95
    assert math.isnan(response.gains_std[0].value)  # base scores all alike: no unit
    assert linear_fit(np.arange(3.0), np.ones(3)) == (0.0, pytest.approx(math.nan, nan_ok=True))


def test_bootstrap_interval_has_the_width_of_theory():
    """Independent pairs, many prompts: the interval of a mean is +-1.96 standard errors."""
    rng = np.random.default_rng(3)
    values = rng.normal(size=(200, 1, 1)) + 0.0 * rng.normal(size=(200, 4, 1))  # seeds agree: 200 independent values
    (interval,) = bootstrap_means(values, rng, num_resamples=4000)
    assert interval.value == pytest.approx(values.mean())
    assert interval.high - interval.low == pytest.approx(2 * 1.96 / math.sqrt(200), rel=0.12)
    again = bootstrap_means(values, np.random.default_rng(5)), bootstrap_means(values, np.random.default_rng(5))
    assert again[0] == again[1]


@pytest.fixture(scope="module")
def measured():
    model = tiny_model()
    network = network_for(model)
    prompts = [PromptSpec(prompt="a cat"), PromptSpec(prompt="a dog", width=96), PromptSpec(prompt="a red star")]
    steps: list[int] = []
    evaluation = evaluate(
        model,
        network,
        prompts,
        [[1, 2], [3, 4], [5, 6]],
        (-1, 1),
        {"channel": scorer_for(model)},
        {"brightness": brightness},
        num_pictures=2,
        progress=steps.append,
        **RUN,
    )
    return model, network, prompts, evaluation, steps


def test_every_sample_is_scored_in_its_place(measured):
    model, network, prompts, evaluation, steps = measured
    assert evaluation.multipliers == (-1.0, 0.0, 1.0) and evaluation.num_pairs == 6 and sum(steps) == 3 * 2 * 3 * 2
    for prompt, seed, multiplier in [(0, 0, 2), (1, 1, 0), (2, 1, 1)]:
        latents = sample(model, network, [prompts[prompt]], [evaluation.seeds[prompt][seed]], evaluation.multipliers[multiplier], **RUN)
        score = evaluation.responses["channel"].values[prompt, seed, multiplier]
        assert score == pytest.approx(latents[0, 0].mean().item(), abs=1e-4)
        judged = evaluation.responses["brightness"].values[prompt, seed, multiplier]
        assert judged == pytest.approx(decode(model, latents, 1).clamp(0, 1).mean().item(), abs=1e-4)
    assert [response.role for response in evaluation.responses.values()] == ["scorer", "judge"]
    assert [tuple(picture.shape) for picture in evaluation.pictures] == [(3, 3, 64, 64), (3, 3, 64, 96)]


def test_drift_and_diversity_are_distances(measured):
    model, network, prompts, evaluation, _ = measured
    columns = {
        multiplier: [sample(model, network, [prompt] * 2, evaluation.seeds[row], multiplier, **RUN) for row, prompt in enumerate(prompts)]
        for multiplier in (0.0, 1.0)
    }
    drift = np.mean([((up - base) ** 2).mean((1, 2, 3)).sqrt().mean().item() for up, base in zip(columns[1.0], columns[0.0], strict=True)])
    spread = {key: np.mean([((pair[0] - pair[1]) ** 2).mean().sqrt().item() for pair in pairs]) for key, pairs in columns.items()}
    statistics = evaluation.statistics
    assert statistics.latent_drift[2] == pytest.approx(drift, rel=1e-3) and statistics.latent_drift[1] == 0 == statistics.pixel_drift[1]
    assert statistics.latent_diversity[2] == pytest.approx(spread[1.0] / spread[0.0], rel=1e-3)
    assert statistics.latent_diversity[1] == statistics.pixel_diversity[1] == 1
    assert all(0 <= share <= 1 for share in statistics.clipped)


def test_what_is_told_over_the_base_models_own_is_1_there(measured):
    model, network, prompts, evaluation, _ = measured
    statistics = evaluation.statistics
    for column in (statistics.saturation, statistics.edges, statistics.nyquist, statistics.pixel_diversity):
        assert column[1] == 1 and all(value > 0 for value in column) and column[0] != column[2]
    assert statistics.perceptual_distance[1] == 0 == statistics.latent_statistics[1] and min(statistics.perceptual_distance[::2]) > 0
    pictures = {
        multiplier: [
            decode(model, sample(model, network, [prompt] * 2, evaluation.seeds[row], multiplier, **RUN), 2).clamp(0, 1)
            for row, prompt in enumerate(prompts)
        ]
        for multiplier in (0.0, 1.0)
    }
    chromas = {key: np.mean([(rows.amax(1) - rows.amin(1)).mean().item() for rows in own]) for key, own in pictures.items()}
    assert statistics.saturation[2] == pytest.approx(chromas[1.0] / chromas[0.0], rel=1e-3)


def test_base_pictures_are_sampled_once_for_several_sliders(measured):
    model, network, prompts, evaluation, _ = measured
    table = [list(row) for row in evaluation.seeds]
    steps: list[int] = []
    with network.disabled():
        base = sample_base(model, prompts, table, progress=steps.append, **RUN)
    assert sum(steps) == 3 * 2 * 2 and [tuple(own.shape) for own in base][1] == (2, 4, 8, 12)
    steps.clear()
    again = evaluate(
        model, network, prompts, table, (-1, 1), {"channel": scorer_for(model)}, {}, base=base, num_pictures=0, progress=steps.append, **RUN
    )
    assert sum(steps) == 3 * 2 * 2 * 2  # the two other multipliers
    np.testing.assert_allclose(again.responses["channel"].values, evaluation.responses["channel"].values, atol=1e-4)
    foreign = [own + 1.0 for own in base]
    moved = evaluate(model, network, prompts, table, (1,), {"channel": scorer_for(model)}, {}, base=foreign, num_pictures=0, **RUN)
    difference = moved.responses["channel"].values[:, :, 0] - again.responses["channel"].values[:, :, 1]
    np.testing.assert_allclose(difference, 1.0, atol=1e-4)  # it is these latents that are the base


def test_a_scorer_may_judge(measured):
    model, network, prompts, evaluation, _ = measured
    table = [list(row) for row in evaluation.seeds]
    judged = evaluate(model, network, prompts[:1], table[:1], (-1, 1), {}, {"channel": scorer_for(model)}, num_pictures=0, **RUN)
    response = judged.responses["channel"]
    assert response.role == "judge"
    np.testing.assert_allclose(response.values, evaluation.responses["channel"].values[:1], atol=1e-4)


def test_a_prompt_brings_its_own_number_of_steps(measured):
    model, network, prompts, _, _ = measured
    own = [PromptSpec(prompt="a cat", num_steps=3), PromptSpec(prompt="a dog")]
    steps: list[int] = []
    long_run: dict[str, Any] = {"sampling": replace(RUN["sampling"], num_steps=3)}
    done = evaluate(model, network, own, [1, 2], (1,), {"channel": scorer_for(model)}, {}, num_pictures=0, progress=steps.append, **RUN)
    assert sum(steps) == 2 * 2 * 3 + 2 * 2 * 2
    latents = sample(model, network, own[:1], [1], 1.0, **long_run)
    assert done.responses["channel"].values[0, 0, 1] == pytest.approx(latents[0, 0].mean().item(), abs=1e-4)


def test_json_tells_every_prompt_apart(measured):
    evaluation = measured[3]
    rows = evaluation.to_dict()["per_prompt"]
    assert [row["prompt"] for row in rows] == list(evaluation.prompts)
    means = np.mean([row["gains_std"]["channel"] for row in rows], axis=0)
    assert means == pytest.approx([gain.value for gain in evaluation.responses["channel"].gains_std])


def test_two_sliders_are_compared_pair_by_pair():
    rng = np.random.default_rng(0)
    base = rng.normal(size=(20, 4, 1))
    hard = rng.normal(size=(20, 4, 1))  # what both gain differently from pair to pair
    first, second = (
        summarise_response("score", "judge", base + np.array(MULTIPLIERS) * (gain + hard), MULTIPLIERS, rng) for gain in (1.0, 0.8)
    )
    difference = paired_difference(first, second, rng)
    unit = within_prompt_std(base[:, :, 0])
    assert [part.value for part in difference] == pytest.approx([0.2 * weight / unit for weight in MULTIPLIERS])
    assert difference[-1].high - difference[-1].low < 1e-9 < first.gains[-1].high - first.gains[-1].low


def test_json_round_trip(measured):
    evaluation = measured[3]
    text = json.dumps(evaluation.to_dict(), allow_nan=False)
    again = SliderEvaluation.from_dict(json.loads(text))
    assert again.to_dict() == evaluation.to_dict()
    assert again.responses["channel"].gains == evaluation.responses["channel"].gains
    assert math.isnan(again.responses["channel"].moved[1])


@pytest.mark.parametrize(
    ("seeds", "multipliers", "judges", "message"),
    [
        ([1], (1,), {}, "at least 2 seeds"),
        ([1, 2], (0,), {}, "only multiplier is 0"),
        ([1, 2], (1,), {"channel": brightness}, "both called"),
    ],
)
def test_bad_input_is_said_before_any_sampling(seeds, multipliers, judges, message, monkeypatch):
    model = tiny_model()
    monkeypatch.setattr(model, "predict_eps", lambda *args: pytest.fail("sampled"))
    with pytest.raises(UserError, match=message):
        evaluate(model, network_for(model), [PromptSpec(prompt="a")], seeds, multipliers, {"channel": scorer_for(model)}, judges, **RUN)


def test_preview(measured, tmp_path):
    model, network, prompts, _, _ = measured
    path = preview_path(tmp_path, "slider", 20)
    assert path == tmp_path / "sample" / "slider_000020.png"
    write_preview(path, model, network, prompts[:2], [1, 2], (-1.0, 0.0, 1.0), **RUN)
    grid = np.asarray(Image.open(path)).astype(int)
    with network.disabled():
        base = decode(model, sample(model, None, prompts[:1], [1], **RUN), 1)[0].clamp(0, 1)
    enlarged = (base * 255).round().permute(1, 2, 0).numpy().astype(int).repeat(2, 0).repeat(2, 1)  # 64 -> 128
    left = LABEL_WIDTH + (192 + GAP) + (192 - 128) // 2  # the second column, in cells as wide as the second prompt's pictures
    assert np.abs(grid[HEADER : HEADER + 128, left : left + 128] - enlarged).max() <= 1
