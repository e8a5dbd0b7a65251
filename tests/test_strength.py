"""Choosing the strength that is called 1, on curves whose answer is known."""

import math
from dataclasses import replace

import numpy as np
import pytest

from library.measuring.calibration import Calibration, CalibrationTarget
from library.measuring.response_curve import ResponseCurve, summarise_curve
from library.measuring.strength import STRONGEST, WEAKEST, choose_scale, confirm, next_strength
from tests.helpers.curves import MULTIPLIERS, curve, measured_at

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


def calibrated(gain, strengths: tuple[float, ...]) -> tuple[Calibration, list[float]]:
    """As a run calibrates; and at which strengths it had to measure more."""
    rng, more = np.random.default_rng(0), []
    found = measured_at(strengths, gain, rng)
    while (strength := next_strength(found, CalibrationTarget())) is not None:
        more.append(strength)
        found = found.joined(measured_at((strength,), gain, rng))
        assert len(more) < 10
    return choose_scale(found, CalibrationTarget()), more


@pytest.mark.parametrize("slope", [0.025, 0.3, 1.0, 6.0, 12.0, 45.0])
def test_any_strength_that_a_training_leaves_is_calibrated(slope: float) -> None:
    chosen, more = calibrated(lambda m: slope * m, (0.25, 0.5, 1.0, 1.5, 2.0))
    assert chosen.reached and chosen.scale == pytest.approx(1 / slope, rel=0.1)  # of noise in the scores
    assert bool(more) is (slope not in (1.0, 6.0)) and len(more) <= 6  # 6 is read off at two thirds of the weakest
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


def test_what_fresh_pictures_show_at_one_strength_is_brought_to_another_in_proportion():
    """Few pictures saw 1.3 at the trained strength; more of them at 0.8 see a tenth less than that: 1 is at 1 / 1.17."""
    known = ResponseCurve(multipliers=(-1.0, 0.0, 1.0), gains=(-2.0, 0.0, 2.0), drifts=(1, 0, 1), visible=(1.3, 0, 1.3))
    known = replace(known, resamples=np.array([known.gains] * 2))
    fresh = replace(known, multipliers=(-0.8, 0.0, 0.8), gains=(-1.6, 0.0, 1.6), visible=(0.936, 0.0, 0.936))
    chosen = confirm(known, fresh, SEEN)
    assert chosen.scale == pytest.approx(1 / 1.17) and chosen.visible == pytest.approx(1.0)
    assert chosen.curve is not None and chosen.curve.multipliers == pytest.approx([-1.17, -0.8 * 1.17, 0.0, 0.8 * 1.17, 1.17])


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
