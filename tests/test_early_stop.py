"""When training stops, and which step is the best: from records that are made up."""

import math

import pytest

from library.measuring.record import EvaluationRecord
from library.measuring.warnings import find_warnings
from library.slider_training.early_stop import EarlyStop
from library.slider_training.keep_best import selection_score
from tests.helpers.records import record_of


def early_stop(gain: float | None = None) -> EarlyStop:
    return EarlyStop(gain=gain, network_scale=0.5)


def test_stop_when_strong_enough() -> None:
    assert early_stop(gain=2.0).add(50, record_of((2.5, 1.9)))[0] is None
    assert "strong enough" in (early_stop(gain=2.0).add(50, record_of((2.5, 2.1)))[0] or "")


def test_stop_when_there_is_nothing_more_to_gain() -> None:
    """Two measurements that say so, where the running gain has said it before; a plateau alone, or before anything grew, stops nothing."""
    stop = early_stop()
    assert stop.add(0, record_of((0.0, 0.0)), plateau=True)[0] is None
    assert stop.add(50, record_of((1.0, 1.0)), plateau=True)[0] is None
    assert stop.add(100, record_of((1.02, 1.02)), plateau=False)[0] is None
    assert "since step 100" in (stop.add(150, record_of((1.05, 1.05)), plateau=True)[0] or "")


def stops(path: list[tuple[float, float]]) -> list[bool]:
    """Whether to stop after each of (score, judge)."""
    stop = early_stop()
    records = [record_of((score, score), {"taste": (judge, judge)}) for score, judge in path]
    return [stop.add(50 * number, record)[0] is not None for number, record in enumerate(records)]


def test_stop_when_the_judges_keep_falling_while_the_score_rises() -> None:
    path = [(0.0, 0.0), (0.5, 0.5), (1, 0.8), (1.5, 0.7), (2, 0.6), (2.5, 0.4)]
    assert stops(path) == [False, False, False, False, False, True]


@pytest.mark.parametrize(
    "path",
    [
        [(0.0, 0.0), (0.5, 0.5), (1, 0.3), (1.2, 0.35), (1.5, 0.7), (2, 0.6)],  # they recover
        [(0.0, 0.0), (1, 0.8), (0.8, 0.6), (0.7, 0.5), (0.6, 0.4)],  # the score falls, too
        [(0.0, 0.0), (1, 0.8), (1.1, 0.78), (1.2, 0.79), (1.3, 0.77)],  # they only wobble
    ],
)
def test_judges_that_do_not_stop_a_training(path: list[tuple[float, float]]) -> None:
    assert not any(stops(path))


def flat(step: int, score: tuple[float, float], stop: EarlyStop) -> bool:
    return bool(stop.add(step, record_of(score, spread=0.0))[1])


def test_a_flat_signal_is_warned_of_at_the_third_measurement_and_after_a_resume() -> None:
    stop = early_stop()
    assert [flat(step, (0.02, -0.03), stop) for step in (0, 50, 100, 150)] == [False, False, False, True]
    resumed = early_stop()
    resumed.load_state_dict(stop.state_dict())
    assert flat(200, (0.02, 0.03), resumed) and not flat(250, (0.3, 0.05), resumed)


# ---- the selection score ----


def score_of(record: EvaluationRecord, early_stop_gain: float | None = 2.0) -> float:
    return selection_score(record, find_warnings(record), early_stop_gain)


def test_with_judges_the_training_score_does_not_count() -> None:
    assert score_of(record_of((1.0, 1.0), {"taste": (0.9, 0.9)})) == pytest.approx(0.9)
    assert score_of(record_of((5.0, 5.0), {"taste": (0.5, 0.5)})) == pytest.approx(0.5)


def test_without_judges_gain_beyond_the_goal_counts_for_nothing_and_drift_against() -> None:
    for gain, drift, goal, score in ((1.5, 0.3, 2.0, 1.2), (2.5, 0.5, 2.0, 1.5), (4.0, 0.9, 2.0, 1.1), (4.0, 0.9, None, 1.1)):
        assert score_of(record_of((gain, gain), statistics={"latent_drift": drift}), goal) == pytest.approx(score)


def test_a_flaw_halves_the_score_and_does_not_make_nothing_better() -> None:
    flawed = score_of(record_of((2.0, 2.0), statistics={"latent_drift": 0.1, "nyquist": 4.0}))
    assert flawed == pytest.approx(1.9 / 2)
    assert score_of(record_of((0.2, 0.2), statistics={"latent_drift": 0.02})) < flawed
    colours = record_of((2.0, 2.0), statistics={"latent_drift": 0.1, "saturation": 2.0})
    assert score_of(colours) == pytest.approx(1.9)  # colour may be what was wanted
    assert score_of(record_of(judges={"taste": (-0.2, -0.2)}, shares={"obeyed": (1.0, 1.0, 0.5)})) == pytest.approx(-0.4)


def test_without_score_and_judges_no_step_is_better() -> None:
    assert math.isnan(score_of(record_of(None, shares={"obeyed": (1.0, 1.0, 1.0)})))
