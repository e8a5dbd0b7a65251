"""The gain over the weight: from scores to the curve with its noise, and the curve in three numbers."""

import math
from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import norm

from library.measuring.calibration import CalibrationTarget
from library.measuring.response_curve import CONFIDENCE, VISIBLE_SHARE, ResponseCurve, curve_of, exceeded, response_curve, summarise_curve
from library.measuring.statistics import Interval, within_prompt_std
from library.measuring.strength import choose_scale
from tests.helpers.curves import curve, scores_of
from tests.helpers.records import record_of


def test_response_curve_is_in_within_prompt_standard_deviations():
    rng = np.random.default_rng(0)
    weights = np.array([-1.0, 0.0, 1.0])
    scores = scores_of(rng, 5, 3, weights)
    response = response_curve(weights, scores, [0.1, 0, 0.1], rng)
    unit = within_prompt_std(scores[:, :, 1])
    assert response.gains == pytest.approx(((scores - scores[:, :, [1]]) / unit).mean((0, 1)))
    turned = response_curve(weights, -scores, [0.1, 0, 0.1], rng, directions=-np.ones(5))
    assert turned.gains == pytest.approx(response.gains)


def test_the_curve_of_a_record_has_its_judges() -> None:
    record = record_of((1.5, 0.5), {"a": (1.0, 0.2)}, {"obeyed": (1.0, 1.0, 1.0)}, directions=np.array([1.0, -1.0] * 4))
    made = curve_of(record, "reward")
    assert made.gains == pytest.approx((-0.5, 0.0, 1.5)) and made.drifts == (0.2, 0.0, 0.2) and made.clipped == (0.02, 0.01, 0.02)
    assert made.judges.keys() == {"a"} and made.judges["a"] == pytest.approx((-0.2, 0.0, 1.0))


def test_intervals_hold_the_truth_as_often_as_they_say():
    """100 measurements of a slider whose true gain is 1: the interval of the gain at +1 and of the slope hold 1 in about 95 % of them."""
    weights, held = np.array([-1.0, 0.0, 1.0]), np.zeros(2)
    for seed in range(100):
        rng = np.random.default_rng(seed)
        response = response_curve(weights, scores_of(rng, 24, 4, weights), [0, 0, 0], rng)
        for number, interval in enumerate([response.interval_at(1.0), summarise_curve(response).slope]):
            held[number] += interval.low <= 1 <= interval.high
    assert np.all(held >= 0.82 * 100) and np.all(held <= 100)


def test_a_curve_without_resamples_has_no_intervals():
    interval = curve(lambda m: m).interval_at(0.6)
    assert interval.value == pytest.approx(0.6) and math.isnan(interval.low)
    assert isinstance(interval, Interval)


# ---- what can be seen ----


def test_what_nine_of_ten_pictures_exceed_is_told_with_confidence() -> None:
    pictures = np.exp(np.random.default_rng(0).normal(0.5, 0.8, (4000, 24)))  # two seeds of twelve prompts
    shares = norm.sf((np.log([exceeded(own.reshape(12, 2, 1))[0] for own in pictures]) - 0.5) / 0.8)  # of all pictures
    assert (shares >= VISIBLE_SHARE).mean() == pytest.approx(CONFIDENCE, abs=0.01)


def test_where_nothing_is_changed_nothing_is_exceeded() -> None:
    found = exceeded(np.array([[[2.0, 0.0, 0.0]], [[3.0, 0.0, 1e-4]]]))
    assert 0 < found[0] < 2 and found[1:].tolist() == [0, 0]
    assert exceeded(np.full((1, 1, 1), 2.0)) == pytest.approx(2)


def test_a_weight_is_as_visible_as_nearly_all_of_its_pictures() -> None:
    pictures = np.exp(norm.ppf((np.arange(32) + 0.5) / 32))
    visibility = np.random.default_rng(0).permuted(pictures[:, None] * [2, 0, 1], axis=0).reshape(8, 4, 3)
    made = curve_of(replace(record_of(), visibility=visibility), "reward")
    assert made.visible == pytest.approx((2 * made.visible[2], 0, made.visible[2]))
    assert np.quantile(visibility[:, :, 2], 0.02) < made.visible[2] < np.quantile(visibility[:, :, 2], 1 - VISIBLE_SHARE)


def test_between_its_rungs_a_change_is_as_visible_as_its_own_arm_says() -> None:
    """It grows in proportion on both sides of 0; a smooth curve through both arms is a parabola there."""
    few = ResponseCurve(multipliers=(-1.0, 0.0, 1.0), gains=(-1.0, 0.0, 1.0), drifts=(0.2, 0.0, 0.1), visible=(1.6, 0.0, 1.2))
    assert [few.visible_at(weight) for weight in (-0.5, 0.0, 0.75, 1.0)] == pytest.approx([0.8, 0.0, 0.9, 1.2])
    assert math.isnan(few.visible_at(1.5)) and math.isnan(replace(few, visible=()).visible_at(0.5))
    assert summarise_curve(few, max_drift=0.1).usable == (pytest.approx(-0.5), 1.0)


# ---- the curve in three numbers ----


def test_slope_and_r2_are_those_of_the_least_squares_line_within_two():
    """Trained twice too strong: only multipliers up to 1 are weights up to 2."""
    chosen = choose_scale(curve(lambda m: 2 * math.tanh(m)), CalibrationTarget(gain=2 * math.tanh(0.5)))
    weights = np.array([-2, -1.5, -1, -0.5, 0, 0.5, 1, 1.5, 2])
    gains = 2 * np.tanh(weights / 2)
    assert chosen.line
    assert chosen.line.slope.value == pytest.approx(np.polyfit(weights, gains, 1)[0])
    assert chosen.line.r2 == pytest.approx(np.corrcoef(weights, gains)[0, 1] ** 2)
    assert chosen.line.measured == pytest.approx((-4.0, 4.0)) and chosen.line.usable == pytest.approx((-3.8, 3.8))  # half of the effect


def test_usable_range_ends_where_the_curve_turns():
    line = summarise_curve(curve(lambda m: m if m <= 1 else 2 - m))
    assert line.usable == (-2.0, pytest.approx(1.0))


def test_usable_range_ends_where_the_pictures_clip_or_drift():
    line = summarise_curve(curve(lambda m: m, clipped=lambda m: 0.3 + 0.16 * max(m, 0.0)))
    assert line.usable == (-2.0, pytest.approx(1.2))  # a rise of 0.2 is at 1.25; the range is on multiples of 0.1
    line = summarise_curve(curve(lambda m: m, drift=lambda m: 0.1 * abs(m)), max_drift=0.151)
    assert line.usable == (pytest.approx(-1.5), pytest.approx(1.5))


def test_usable_range_ends_where_the_weight_no_longer_says_how_much():
    """Rises everywhere, but from 0.5 on so little that the effect per weight is halved at 1."""
    line = summarise_curve(curve(lambda m: m if m < 0.6 else 0.5 + 1e-3 * m))
    assert line.usable[0] == -2.0 and line.usable[1] in (0.9, 1.0)  # the cubic bends a little before its rungs


def test_no_usable_range():
    line = summarise_curve(curve(lambda m: -m))
    assert line.usable == (0.0, 0.0) and "usable at no weight" in str(line)
    assert summarise_curve(curve(lambda m: 0.0)).usable == (0.0, 0.0)  # what does nothing is of no use
