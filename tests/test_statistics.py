"""Gains, units and intervals against analytic answers, and the record that keeps them."""

import json
import math

import numpy as np
import pytest

from library.errors import UserError
from library.measuring.record import EvaluationRecord, hack_index
from library.measuring.statistics import (
    PairedChanges,
    bootstrap_gains,
    bootstrap_means,
    linear_fit,
    paired_difference,
    summarise_response,
    within_prompt_std,
)
from tests.helpers.records import record_of

MULTIPLIERS = (-1.0, -0.5, 0.0, 0.5, 1.0)


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


@pytest.mark.parametrize(
    ("score", "judge", "index"),
    [
        (2.0, 2.0, 0.0),  # confirmed
        (2.0, 1.0, 0.5),
        (2.0, 0.0, 1.0),  # the judges see nothing of it
        (2.0, -2.0, 2.0),  # they lose what the score gains
        (1.0, 2.0, -1.0),
        (0.0, 0.0, 0.0),  # the start
        (0.0, -0.5, 1.0),  # finite where the score does not move
        (-1.0, -1.0, 0.0),
    ],
)
def test_hack_index(score: float, judge: float, index: float) -> None:
    assert hack_index(score, judge) == pytest.approx(index)


def test_what_judges_gain_on_pictures_that_were_lost_is_no_gain() -> None:
    assert hack_index(2.0, 4.0, 0.25) == pytest.approx(0.5)
    assert hack_index(2.0, -1.0, 0.25) == pytest.approx(1.5)  # a loss stays one
    assert record_of((2.0, 2.0), {"a": (3.0, 2.0)}).hack_index == pytest.approx(0)
    lost = record_of((2.0, 2.0), {"a": (3.0, 2.0)}, {"obeyed": (1.0, 0.75, 0.1875), "sharp": (1.0, 1.0, 0.9)})  # a quarter is left at +1
    assert lost.hack_index_at(2) == pytest.approx((2 - 0.25 * 3) / 2) and lost.hack_index_at(0) == pytest.approx(0)


def test_gains_are_in_standard_deviations_and_in_the_wanted_direction() -> None:
    record = record_of((1.5, 0.5), {"a": (1.0, 0.2), "b": (0.0, -0.4)}, directions=np.array([1.0, -1.0] * 4))
    assert record.ends == (2, 0)
    assert [record.score_gain(place) for place in record.ends] == pytest.approx([1.5, 0.5])
    assert [record.judge_gain(place) for place in record.ends] == pytest.approx([0.5, -0.1])
    assert record.mean_judge_gain == pytest.approx(0.2) and record.mean_score_gain == pytest.approx(1.0)
    assert record.hack_index == pytest.approx((0.5 + 0.1) / 0.5)  # the worse sign
    interval = record.gain("reward", 0)
    assert interval.low < interval.value < interval.high


def test_the_metrics_are_flat_numbers() -> None:
    metrics = record_of((1.5, 0.5), {"a": (1.0, 0.2)}, {"obeyed": (0.75, 1.0, 0.5)}).metrics()
    expected = {
        "gain_at_+1": 1.5,
        "gain_at_-1": -0.5,  # as measured: a weight of -1 lowers the score
        "judge/a/gain_at_+1": 1.0,
        "judge/a/gain_at_-1": -0.2,
        "judge/obeyed/share_at_+1": 0.5,
        "judge/obeyed/share_at_-1": 0.75,
        "judge/obeyed/share_of_base": 1.0,
        "hack_index": 0.7,  # at -1: 0.75 of the judge's 0.2 is left of the score's 0.5
        "saturation_at_+1": 1.1,
        "latent_drift_at_-1": 0.2,
    }
    assert {name: metrics[name] for name in expected} == pytest.approx(expected)
    assert metrics["gain_at_-1_low"] < -0.5 < metrics["gain_at_-1_high"]
    assert all(isinstance(value, float) for value in metrics.values())


def test_without_judges_or_a_score_there_is_no_index() -> None:
    assert record_of().hack_index is None and "hack_index" not in record_of().metrics()
    assert record_of(shares={"obeyed": (1.0, 1.0, 1.0)}).hack_index is None  # a yes-or-no judge confirms nothing
    assert record_of(None, {"a": (1.0, 1.0)}).hack_index is None


def test_the_reward_stands_for_its_parts_and_several_scores_for_themselves() -> None:
    parts = {"one": (3.0, 3.0), "two": (3.0, 3.0)}
    assert [score.name for score in record_of(others=parts).training_scores] == ["reward"]
    assert [score.name for score in record_of(None, others=parts).training_scores] == ["one", "two"]


def test_json_round_trip_and_every_prompt_apart() -> None:
    record = record_of((1.5, 0.5), {"a": (1.0, 0.2)}, statistics={"saturation": math.nan})
    data = record.to_dict()
    again = EvaluationRecord.from_dict(json.loads(json.dumps(data, allow_nan=False)))
    assert again.to_dict() == data and again.responses["a"].gains == record.responses["a"].gains
    assert math.isnan(again.responses["a"].moved[1]) and math.isnan(again.statistics["saturation"][0])
    assert [row["prompt"] for row in data["per_prompt"]] == list(record.prompts)
    means = np.mean([row["gains_std"]["a"] for row in data["per_prompt"]], axis=0)
    assert means == pytest.approx([gain.value for gain in record.responses["a"].gains_std])


# ---- gains in a unit that was measured, too ----


def test_more_pictures_of_the_base_model_make_the_unit_surer():
    """12 prompts and 4 seeds know the unit to 12 %; 16 seeds to 5 %."""
    widths = []
    for num_seeds in (4, 16):
        rng = np.random.default_rng(1)
        base = 3 * rng.normal(size=(12, num_seeds))
        changes = np.full((12, 4, 1), 3.0)
        _, resamples = bootstrap_gains([PairedChanges(base, changes)], rng)
        widths.append(resamples.std())
    assert widths[1] < 0.7 * widths[0] and 0.03 < widths[1] < 0.08


def test_prompts_that_tell_the_unit_alone_count_for_the_unit():
    """9 prompts were measured, whose own unit is 0.5; with 31 others it is 3. The interval holds the gain, which is 1."""
    rng = np.random.default_rng(1)
    measured, others = 0.5 * rng.normal(size=(9, 3)), 3.36 * rng.normal(size=(31, 3))
    changes = np.full((9, 3, 1), within_prompt_std(np.concatenate([measured, others])))
    gains, resamples = bootstrap_gains([PairedChanges(measured, changes), PairedChanges(others)], rng)
    low, high = np.percentile(resamples, [2.5, 97.5])
    assert gains == pytest.approx([1.0]) and 0.7 < low < 1 < high < 1.6


def test_sets_of_other_numbers_of_seeds_are_one_set_of_prompts():
    """Each prompt weighs the same in the mean, each degree of freedom in the unit."""
    rng = np.random.default_rng(1)
    sets = [
        PairedChanges(rng.normal(size=(count, seeds)), rng.normal(size=(count, pairs, 2))) for count, seeds, pairs in ((6, 4, 2), (3, 3, 1))
    ]
    gains, resamples = bootstrap_gains(sets, rng)
    means = np.concatenate([part.changes.mean(1) for part in sets if part.changes is not None])
    squares = sum(((part.base - part.base.mean(1, keepdims=True)) ** 2).sum() for part in sets)
    unit = (squares / (6 * 3 + 3 * 2)) ** 0.5
    assert gains == pytest.approx(means.mean(0) / unit)
    assert resamples.mean(0) == pytest.approx(gains, abs=0.1) and resamples.shape == (1000, 2)


def test_a_gain_over_the_unit_of_its_own_prompts_is_surer():
    """Prompts of twice the spread are moved twice as far: drawn together, what the draw of prompts does to both falls out of the ratio."""
    rng = np.random.default_rng(1)
    spread = np.repeat([0.5, 2.0], 10)[:, None]
    base, changes = spread * [[1.0, -1.0, 1.0, -1.0]], spread[:, :, None] * np.ones((20, 2, 1))
    together = bootstrap_gains([PairedChanges(base, changes)], rng)[1].std()
    apart = bootstrap_gains([PairedChanges(base[::-1].copy(), changes)], rng)[1].std()
    assert together < 0.5 * apart


def test_a_score_that_does_not_vary_has_no_unit():
    with pytest.raises(UserError, match="does not vary"):
        bootstrap_gains([PairedChanges(np.ones((2, 2)), np.ones((2, 2, 1)))], np.random.default_rng(0))
