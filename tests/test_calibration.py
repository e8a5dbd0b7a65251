"""Choosing the strength that is called 1, on curves whose answer is known."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import norm

from library.errors import UserError
from library.measuring.calibration import Calibration, CalibrationTarget
from library.measuring.response_curve import CONFIDENCE, VISIBLE_SHARE, ResponseCurve, curve_of, exceeded, response_curve, summarise_curve
from library.measuring.statistics import Interval, PairedChanges, bootstrap_gains, within_prompt_std
from library.measuring.strength import STRONGEST, WEAKEST, choose_scale, confirm, next_strength
from library.rollouts.sample import SamplingConfig, sample
from library.types import PromptSpec
from tests.helpers.records import record_of
from tests.helpers.tiny_models import tiny_model
from tests.helpers.tiny_networks import lora_for

MULTIPLIERS = (-2.0, -1.5, -1.0, -0.75, -0.5, -0.25, 0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0)


def curve(gain, drift=abs, clipped=None) -> ResponseCurve:
    return ResponseCurve(
        multipliers=MULTIPLIERS,
        gains=tuple(gain(value) for value in MULTIPLIERS),
        drifts=tuple(drift(value) for value in MULTIPLIERS),
        clipped=() if clipped is None else tuple(clipped(value) for value in MULTIPLIERS),
    )


# ---- the strength ----


def test_many_pictures_confirm_the_level_that_few_suggested():
    """The ladder says 4 a unit and 2 below 0; more pictures at +-0.25 say 2 and 0.5: the form of each arm stays, the strength doubles."""
    ladder = curve(lambda m: 4 * m if m > 0 else 2 * m)
    many = ResponseCurve(multipliers=(-0.25, 0.0, 0.25), gains=(-0.125, 0.0, 0.5), drifts=(0.1, 0.0, 0.1))
    confirmed = confirm(ladder, many, CalibrationTarget(gain=1.0))
    assert confirmed.reached and confirmed.scale == pytest.approx(0.5) and confirmed.gain == pytest.approx(1.0)
    assert confirmed.down and confirmed.down.value == pytest.approx(-0.25)


def test_a_ladder_that_many_pictures_contradict_is_not_believed():
    many = ResponseCurve(multipliers=(-0.25, 0.0, 0.25), gains=(-0.25, 0.0, -0.5), drifts=(0.1, 0.0, 0.1))
    confirmed = confirm(curve(lambda m: 4 * m), many, CalibrationTarget(gain=1.0))
    assert confirmed.scale == pytest.approx(0.25) and confirmed.verified_up and confirmed.verified_up.value == pytest.approx(-0.5)


def test_the_doubt_is_that_of_the_many_pictures():
    """In parts of the gain, on each arm, wherever weight 1 comes to lie."""
    rng = np.random.default_rng(0)
    many = measured_at((0.25,), lambda m: np.where(m > 0, 2 * m, m), rng)
    confirmed = confirm(measured_at((0.5, 1.0), lambda m: 4 * m, rng), many, CalibrationTarget())
    assert confirmed.scale == pytest.approx(0.5, rel=0.05)
    for told, seen in ((confirmed.up, many.interval_at(0.25)), (confirmed.down, many.interval_at(-0.25))):
        assert told and (told.low / told.value, told.high / told.value) == pytest.approx((seen.low / seen.value, seen.high / seen.value))
        assert told.low < told.value < told.high


def test_straight_line():
    chosen = choose_scale(curve(lambda m: 4 * m), CalibrationTarget(gain=1.3))
    assert chosen.reached and chosen.scale == pytest.approx(1.3 / 4) and chosen.gain == pytest.approx(1.3)
    assert chosen.down and chosen.down.value == pytest.approx(-1.3) and chosen.line and chosen.line.r2 == pytest.approx(1)
    assert chosen.line.slope.value == pytest.approx(1.3)


def test_plus_one_is_promised_and_minus_one_is_told():
    chosen = choose_scale(curve(lambda m: 2 * m if m > 0 else 0.8 * m), CalibrationTarget(gain=1.0))
    assert chosen.reached and chosen.scale == pytest.approx(0.5) and chosen.gain == pytest.approx(1.0)
    assert chosen.down and chosen.down.value == pytest.approx(-0.4)
    assert "+1 moves the training score by +1.00 standard deviations, -1 by -0.40" in chosen.note


def test_a_bent_curve_is_read_between_its_rungs():
    """tanh at 0.62, between rungs: a chord would read 0.0084 less there, and miss the strength by 1.4 %."""
    chosen = choose_scale(curve(lambda m: math.tanh(m)), CalibrationTarget(gain=math.tanh(0.62)))
    assert chosen.scale == pytest.approx(0.62, rel=0.003)


def test_what_is_promised_is_what_the_curve_says():
    """With few rungs and arms of different steepness, too: the strength is read off the very curve that is shown."""
    few = ResponseCurve(multipliers=(-2.0, -1.0, 0.0, 1.0, 2.0), gains=(-3.0, -2.5, 0.0, 1.5, 2.1), drifts=(2, 1, 0, 1, 2))
    chosen = choose_scale(few, CalibrationTarget(gain=1.0))
    assert chosen.reached and chosen.gain == pytest.approx(1.0) and chosen.curve and chosen.curve.gain_at(1.0) == pytest.approx(1.0)


def test_out_of_reach_takes_the_end_of_the_ladder_and_says_so():
    chosen = choose_scale(curve(lambda m: 0.3 * m), CalibrationTarget(gain=1.0))
    assert not chosen.reached and chosen.scale == 2.0 and chosen.gain == pytest.approx(0.6)
    assert "not reached" in chosen.note and "largest that was tried" in chosen.note


def test_it_stops_where_the_curve_turns_back():
    chosen = choose_scale(curve(lambda m: 0.6 * m if m < 1.2 else 0.5), CalibrationTarget(gain=1.0))  # up to 0.6 at 1, then 0.5
    assert not chosen.reached and chosen.scale == 1.0 and chosen.gain == pytest.approx(0.6)
    assert "stops following" in chosen.note


def test_it_stops_at_the_drift_limit():
    chosen = choose_scale(curve(lambda m: m, drift=lambda m: 0.2 * abs(m)), CalibrationTarget(gain=1.0, max_drift=0.13))
    assert not chosen.reached and chosen.scale == pytest.approx(0.65) and chosen.gain == pytest.approx(0.65)
    assert "drift too far" in chosen.note
    assert choose_scale(curve(lambda m: m, drift=lambda m: 0.2 * abs(m)), CalibrationTarget(gain=1.0, max_drift=0.3)).reached


def test_a_dead_upper_arm_leaves_the_slider_as_it_is():
    chosen = choose_scale(curve(lambda m: m if m < 0 else -0.1 * m), CalibrationTarget(gain=1.0))
    assert not chosen.reached and chosen.scale == 1.0 and "left as trained" in chosen.note and chosen.gain == pytest.approx(-0.1)


# ---- a slider that is far too strong, or too weak ----


def measured_at(multipliers: tuple[float, ...], gain, rng: np.random.Generator) -> ResponseCurve:
    """A curve of noisy scores with intervals, at these strengths and their opposites."""
    both = np.array([-multiplier for multiplier in multipliers[::-1]] + [0.0, *multipliers])
    base = np.random.default_rng(0).normal(size=(12, 4, 1))  # the same pictures every time
    base /= within_prompt_std(base[:, :, 0])
    scores = base + gain(both) + 0.005 * rng.normal(size=(12, 4, len(both))) * (both != 0)
    return response_curve(both, scores, np.abs(both) / 10, rng)


def calibrated(gain, strengths: tuple[float, ...]) -> tuple[Calibration, list[float]]:
    """As a run calibrates; and at which strengths it had to measure more."""
    rng, more = np.random.default_rng(0), []
    found = measured_at(strengths, gain, rng)
    while (strength := next_strength(found, CalibrationTarget())) is not None:
        more.append(strength)
        found = found.joined(measured_at((strength,), gain, rng))
        assert len(more) < 10
    return choose_scale(found, CalibrationTarget()), more


@pytest.mark.parametrize("slope", [0.025, 0.3, 1.0, 6.0, 45.0])
def test_any_strength_that_a_training_leaves_is_calibrated(slope: float) -> None:
    chosen, more = calibrated(lambda m: slope * m, (0.25, 0.5, 1.0, 1.5, 2.0))
    assert chosen.reached and chosen.scale == pytest.approx(1 / slope, rel=0.1)  # of noise in the scores
    assert bool(more) is (slope != 1.0) and len(more) <= 6
    assert chosen.line and chosen.line.slope.value == pytest.approx(1.0, rel=0.05) and chosen.line.slope.low < chosen.line.slope.high


def test_a_slider_that_is_too_strong_at_once_and_then_no_stronger() -> None:
    chosen, more = calibrated(lambda m: 8 * np.tanh(3 * m), (0.5, 1.0, 1.5))
    assert chosen.reached and chosen.scale == pytest.approx(math.atanh(1 / 8) / 3, rel=0.2) and 1 <= len(more) <= 4


def test_beyond_what_can_be_calibrated_it_is_said_in_a_sentence() -> None:
    strong, more = calibrated(lambda m: 400 * m, (0.5, 1.0))
    assert not strong.reached and strong.scale == WEAKEST == min(more) and "the least that is tried; lower learning_rate" in strong.note
    weak, more = calibrated(lambda m: 0.01 * m, (0.5, 1.0, 1.5, 2.0))
    assert not weak.reached and weak.scale in (2.0, STRONGEST) and "not reached" in weak.note


def test_an_arm_that_was_measured_only_beyond_weight_2_has_a_line_all_the_same() -> None:
    """Without more strengths, too: nothing is solved that has no solution."""
    for slope in (4.0, 6.0, 10.0):
        chosen = choose_scale(measured_at((0.5, 1.0, 1.5), lambda m, slope=slope: slope * m, np.random.default_rng(0)), CalibrationTarget())
        assert chosen.line and math.isfinite(chosen.line.slope.value) and math.isfinite(chosen.line.slope.low)
    bent = ResponseCurve(multipliers=(-6.0, -3.0, 0.0, 3.0, 6.0), gains=(-3.0, -1.5, 0.0, 3.0, 6.0), drifts=(2, 1, 0, 1, 2))
    assert 0.6 < summarise_curve(bent).slope.value < 0.9  # between the arms'


def test_a_curve_that_is_zero_everywhere_is_confirmed_by_nothing() -> None:
    none = curve(lambda m: 0.0)
    flat = ResponseCurve(multipliers=(-1.0, 0.0, 1.0), gains=(0.0, 0.0, 0.0), drifts=(0, 0, 0))
    assert confirm(none, flat, CalibrationTarget()).scale == 1.0


# ---- a strength that can be seen ----


def test_what_nine_of_ten_pictures_exceed_is_told_with_confidence() -> None:
    pictures = np.exp(np.random.default_rng(0).normal(0.5, 0.8, (4000, 24)))  # two seeds of twelve prompts
    shares = norm.sf((np.log([exceeded(own.reshape(12, 2, 1))[0] for own in pictures]) - 0.5) / 0.8)  # of all pictures
    assert (shares >= VISIBLE_SHARE).mean() == pytest.approx(CONFIDENCE, abs=0.01)


def test_where_nothing_is_changed_nothing_is_exceeded() -> None:
    found = exceeded(np.array([[[2.0, 0.0, 0.0]], [[3.0, 0.0, 1e-4]]]))
    assert 0 < found[0] < 2 and found[1:].tolist() == [0, 0]
    assert exceeded(np.full((1, 1, 1), 2.0)) == pytest.approx(2)


SEEN = CalibrationTarget(visible=True)


def seen(visible, gain=lambda m: 2 * m, **changes) -> ResponseCurve:
    line = curve(gain)
    return replace(line, visible=tuple(map(visible, MULTIPLIERS)), resamples=np.array([line.gains] * 2), **changes)


def test_weight_1_is_strong_enough_to_be_seen():
    """A gain of 1 is at 0.5; nearly all pictures differ visibly at 1.25, at the arm where they differ less."""
    chosen = choose_scale(seen(lambda m: m if m > 0 else -0.8 * m), SEEN)
    assert chosen.reached and chosen.scale == pytest.approx(1.25, rel=0.01) and chosen.gain == pytest.approx(2.5, rel=0.01)
    assert chosen.visible == pytest.approx(1.0, rel=0.01)
    assert (
        "so that it can be seen; 1 standard deviation would be weight 0.40" in chosen.note and "plainly seen in nine of ten" in chosen.note
    )


def test_a_gain_that_is_visible_already_is_left_at_one_standard_deviation():
    chosen = choose_scale(seen(lambda m: 10 * abs(m)), SEEN)
    assert chosen.reached and chosen.scale == pytest.approx(0.5) and chosen.visible == pytest.approx(5.0)
    assert choose_scale(seen(lambda m: abs(m)), CalibrationTarget()).scale == pytest.approx(0.5)  # on request, by standard deviations alone


def test_it_is_not_raised_beyond_where_judges_and_pictures_hold():
    sound = tuple(abs(multiplier) <= 0.75 for multiplier in MULTIPLIERS)
    chosen = choose_scale(seen(abs, sound=sound), SEEN)
    assert chosen.scale == pytest.approx(0.75) and chosen.gain == pytest.approx(1.5) and "hard to see in some pictures" in chosen.note
    assert next_strength(seen(lambda m: 0.1 * abs(m), sound=sound), SEEN) is None  # and no stronger one is tried
    weak = choose_scale(seen(abs, gain=lambda m: 0.3 * m, sound=sound), SEEN)
    assert "1 standard deviation is not reached" in weak.note and "so that no more was tried" in weak.note


def test_it_is_not_raised_beyond_where_both_signs_are_usable():
    """Below 0 the gain hardly grows beyond -0.5: about -1, half of its effect per weight is gone."""
    chosen = choose_scale(seen(lambda m: 0.5 * abs(m), gain=lambda m: 2 * m if m > -0.5 else -1 + 0.1 * (m + 0.5)), SEEN)
    assert 0.85 < chosen.scale < 1.05 and math.isclose(chosen.gain, 2 * chosen.scale)
    assert chosen.line is not None and chosen.line.usable[0] <= -0.99


def test_a_change_that_nobody_sees_yet_is_looked_for_farther_out():
    assert next_strength(seen(lambda m: 0.4 * abs(m)), SEEN) == pytest.approx(1.5 * 2.0)
    assert next_strength(seen(lambda m: 0.3 * abs(m)), SEEN) == pytest.approx(1.1 / 0.6 * 2.0)  # a tenth more than it seems to need
    assert next_strength(seen(lambda m: abs(m)), SEEN) is None


def test_the_visibility_is_confirmed_too():
    """Few pictures say 1 at 1; more say half as much at 0.5: weight 1 is twice as strong."""
    many = ResponseCurve(multipliers=(-0.5, 0.0, 0.5), gains=(-1.0, 0.0, 1.0), drifts=(0, 0, 0), visible=(0.25, 0.0, 0.25))
    assert confirm(seen(abs), many, SEEN).scale == pytest.approx(2.0)
    for visible in ((1.0, 0.0, 2.0), (2.0, 0.0, 1.0)):  # one arm differs half as much as few said, the other as much
        level = confirm(seen(lambda m: 4 * abs(m), lambda m: 8 * m), replace(many, gains=(-4.0, 0.0, 4.0), visible=visible), SEEN)
        assert level.scale == pytest.approx(0.5) and level.visible == pytest.approx(1.0)


def test_a_scorer_in_doubt_is_not_raised_above_the_trained_strength():
    doubt = CalibrationTarget(max_strength=1.0)
    known = replace(curve(lambda m: 0.3 * m), multipliers=(-1.0, 0.0, 1.0), gains=(-0.3, 0.0, 0.3), drifts=(1.0, 0.0, 1.0))
    known = replace(known, resamples=np.array([known.gains] * 2))
    assert next_strength(known, CalibrationTarget()) == pytest.approx(2.5) and next_strength(known, doubt) is None
    for line in (known, curve(lambda m: 0.3 * m), seen(lambda m: 0.4 * abs(m))):
        chosen = choose_scale(line, replace(doubt, visible=bool(line.visible)))
        assert chosen.scale == 1 and chosen.reached == bool(line.visible)
        assert chosen.note.startswith("Weight 1 is 1 of the trained strength and no more, because what the scorer says is in doubt.")
    assert choose_scale(curve(lambda m: 4 * m), doubt).scale == pytest.approx(0.25)  # weaker it may become


# ---- the curve of the calibrated slider ----


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


def test_what_was_not_measured_is_not_claimed():
    chosen = choose_scale(curve(lambda m: 0.7 * m), CalibrationTarget(gain=1.0))  # scale 1.43: measured to weight 1.4
    assert chosen.line and chosen.line.measured[1] == pytest.approx(1.4) and chosen.line.usable == chosen.line.measured
    assert "usable from -1.4 (no farther measured) to +1.4 (no farther measured)" in chosen.note
    assert chosen.curve and math.isnan(chosen.curve.gain_at(1.5))


def test_preferred_weight_is_the_strongest_usable_one_up_to_1_on_the_side_that_is_usable():
    chosen = choose_scale(curve(lambda m: m), CalibrationTarget(gain=1.0))
    assert chosen.preferred_weight == 1.0 and chosen.line
    assert replace(chosen, line=replace(chosen.line, usable=(-0.5, 0.7))).preferred_weight == 0.7
    assert replace(chosen, line=replace(chosen.line, usable=(-0.5, 0.0))).preferred_weight == -0.5  # no weight above 0 is usable
    assert replace(chosen, line=replace(chosen.line, usable=(0.0, 0.0))).preferred_weight == 0.0


# ---- from scores to the curve, with its noise ----


def scores_of(rng: np.random.Generator, num_prompts: int, num_seeds: int, weights: np.ndarray, slope: float = 1.0) -> np.ndarray:
    """Scores [P, S, M] of a slider whose true gain is `slope` per weight in units of a within-prompt standard deviation of 3."""
    base = 10 * rng.normal(size=(num_prompts, 1)) + 3 * rng.normal(size=(num_prompts, num_seeds))
    effect = 3 * slope * (1 + 0.3 * rng.normal(size=(num_prompts, num_seeds)))  # differs from pair to pair
    return base[:, :, None] + effect[:, :, None] * weights


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


def test_a_weight_is_as_visible_as_nearly_all_of_its_pictures() -> None:
    pictures = np.exp(norm.ppf((np.arange(32) + 0.5) / 32))
    visibility = np.random.default_rng(0).permuted(pictures[:, None] * [2, 0, 1], axis=0).reshape(8, 4, 3)
    made = curve_of(replace(record_of(), visibility=visibility), "reward")
    assert made.visible == pytest.approx((2 * made.visible[2], 0, made.visible[2]))
    assert np.quantile(visibility[:, :, 2], 0.02) < made.visible[2] < np.quantile(visibility[:, :, 2], 1 - VISIBLE_SHARE)


def test_intervals_hold_the_truth_as_often_as_they_say():
    """100 measurements of a slider whose true gain is 1: the interval of the gain at +1 and of the slope hold 1 in about 95 % of them."""
    weights, held = np.array([-1.0, 0.0, 1.0]), np.zeros(2)
    for seed in range(100):
        rng = np.random.default_rng(seed)
        response = response_curve(weights, scores_of(rng, 24, 4, weights), [0, 0, 0], rng)
        for number, interval in enumerate([response.interval_at(1.0), summarise_curve(response).slope]):
            held[number] += interval.low <= 1 <= interval.high
    assert np.all(held >= 0.82 * 100) and np.all(held <= 100)


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


# ---- the second measurement ----


def test_verified_puts_other_seeds_beside_the_prediction():
    rng = np.random.default_rng(0)
    weights = np.array(MULTIPLIERS)
    chosen = choose_scale(response_curve(weights, scores_of(rng, 12, 4, weights, slope=2.0), np.abs(weights), rng), CalibrationTarget())
    assert chosen.scale == pytest.approx(0.5, rel=0.2) and chosen.up and chosen.up.low < 1 < chosen.up.high
    again = np.array([-chosen.scale, 0.0, chosen.scale])
    scores = scores_of(rng, 12, 4, again, slope=2.0)
    measured = response_curve(again, scores, np.abs(again), rng)
    checked = chosen.verified(replace(measured, judges={"eye": tuple(-gain for gain in measured.gains)}))
    assert checked.verified_up and checked.verified_down and checked.verified_up.value == pytest.approx(1.0, rel=0.3)
    assert checked.verified_up.value != chosen.up.value and checked.scale == chosen.scale
    assert checked.judges["eye"] == pytest.approx((-checked.verified_up.value, -checked.verified_down.value))
    assert f"On other seeds: {checked.verified_up.value:+.2f} (" in checked.note and "Judge eye: -" in checked.note
    assert checked.note.startswith(chosen.choice)


def test_metadata_is_json_and_has_the_promise():
    rng = np.random.default_rng(0)
    weights = np.array(MULTIPLIERS)
    entries = choose_scale(response_curve(weights, scores_of(rng, 12, 4, weights), np.abs(weights), rng), CalibrationTarget()).metadata()
    json.dumps(entries, allow_nan=False)
    gain_up = entries["leco_gain_up"]
    assert isinstance(gain_up, list)
    value, low, high = gain_up
    assert value == pytest.approx(1.0) and low < 1 < high
    assert {"leco_calibration_scale", "leco_slope", "leco_r2", "leco_usable_range", "leco_gain_down"} <= entries.keys()
    plain = Calibration(scale=0.5, gain=1.0, reached=True, note="Half.")
    assert plain.metadata() == {"leco_calibration_scale": 0.5, "leco_calibration_target": None} and plain.preferred_weight == 1.0


def test_a_curve_without_resamples_has_no_intervals():
    interval = curve(lambda m: m).interval_at(0.6)
    assert interval.value == pytest.approx(0.6) and math.isnan(interval.low)
    assert isinstance(interval, Interval)


def test_folding_the_scale_into_alpha_makes_weight_1_what_the_scale_was():
    model = tiny_model()
    network = lora_for(model)
    sampling = SamplingConfig(num_steps=2, guidance_scale=3.0, size=(64, 64))
    prompts, seeds = [PromptSpec(prompt="a cat"), PromptSpec(prompt="a dog")], [1, 2]
    before = sample(model, network, prompts, seeds, 0.3, sampling=sampling)
    network.scale_alpha(0.3)
    torch.testing.assert_close(sample(model, network, prompts, seeds, 1.0, sampling=sampling), before, atol=1e-4, rtol=1e-4)
