"""The gain that training shows of itself: on made-up trainings whose true gain is known, and in a real one."""

import math
from pathlib import Path

import numpy as np
import pytest

from library.measuring.statistics import Interval
from library.slider_training.running_gain import MAX_SKIP, RunningGain
from library.training.tracking import read_metrics
from tests.helpers.tiny_leco_run import run

UNIT, LIFE = 2.0, 20


def trained(
    truth=lambda step: {1: 0.02 * step, -1: 0.02 * step}, share: float = 0.5, steps: int = 120, seed: int = 0, known: bool = True
) -> RunningGain:
    """A training whose gain at each sign is `truth` after each step, of which the steps promise 1 / share as much."""
    rng = np.random.default_rng(seed)
    base = {f"prompt {row}": float(rng.normal()) for row in range(16)}
    running = RunningGain(UNIT, base if known else {"another": 0.0}, spread=1.0, life=LIFE)
    for step in range(steps):
        signs = [1, -1] * 4
        promised = [UNIT * truth(step)[sign] / share * (1 + 0.3 * rng.normal()) for sign in signs]
        running.add_step(signs, promised)
        if step % 3 == 0:
            prompt, sign = f"prompt {rng.integers(16)}", int(rng.choice([1, -1]))
            lasted = np.mean([truth(max(0, step - ago))[sign] for ago in range(LIFE)])
            running.add_finished(prompt, sign, 1.0, base[prompt] + sign * UNIT * lasted + UNIT * float(rng.normal()))
    return running


def test_before_the_first_update_nothing_is_known() -> None:
    running = RunningGain(UNIT, {"a": 0.0}, 1.0, LIFE)
    assert math.isnan(running.gain(1).value) and running.skip() == (1, 0.0)


@pytest.mark.parametrize("known", [True, False], ids=["prompts that were measured", "other prompts"])
@pytest.mark.parametrize("share", [0.2, 0.5, 0.9])
def test_the_interval_holds_the_truth(share: float, known: bool) -> None:
    """Of 30 trainings and both signs, in at least 85 % (the interval is for 95 %), and not because it is wide."""
    runs = [trained(share=share, seed=seed, known=known) for seed in range(30)]
    gains = [running.gain(sign) for running in runs for sign in (1, -1)]
    truth = 0.02 * (119 - 7.5)  # the mean of the window
    assert np.mean([gain.low <= truth <= gain.high for gain in gains]) >= 0.85
    assert np.mean([gain.value for gain in gains]) == pytest.approx(truth, rel=0.2)
    assert np.mean([gain.high - gain.low for gain in gains]) < 2 * truth


def test_an_observation_sharpens_it() -> None:
    running = trained(share=0.2)
    before = running.gain(1)
    running.add_observation(1, Interval(2.2, 2.1, 2.3))  # it is trusted less than its interval says, see add_observation
    after = running.gain(1)
    assert after.value == pytest.approx(2.2, abs=0.15) and after.high - after.low < 0.75 * (before.high - before.low)


def test_a_direction_turns_what_is_wanted() -> None:
    """On a prompt that a positive weight is to lower, a low score at +1 is a gain."""
    gains = []
    for direction in (1.0, -1.0):
        running = RunningGain(UNIT, {"a": 0.0}, 1.0, LIFE)
        for _ in range(50):
            running.add_step([1, -1], [4.0, 4.0])
            running.add_finished("a", 1, direction, direction * 3.0)
        gains.append(running.gain(1).value)
    assert gains[0] == pytest.approx(gains[1]) and gains[0] == pytest.approx(1.5, rel=0.1)


def test_the_weaker_sign_is_given_more_of_the_trajectories() -> None:
    sign, share = trained(lambda step: {1: 0.03 * step, -1: 0.01 * step}, steps=200).skip()
    assert sign == 1 and 0.2 < share <= MAX_SKIP
    assert trained(lambda step: {1: 0.01 * step, -1: 0.03 * step}, steps=200).skip()[0] == -1
    assert trained(lambda step: {1: 0.0, -1: 0.0}, steps=10).skip()[1] == 0.0


def test_a_frozen_model_that_was_not_asked_promises_nothing() -> None:
    running = RunningGain(UNIT, {"a": 0.0}, 1.0, LIFE)
    running.add_step([1.0, -1.0], [math.nan, math.nan])
    running.add_finished("a", 1.0, 1.0, 1.0)
    assert math.isnan(running.gain(1).value)


def test_it_goes_on_after_a_resume() -> None:
    running = trained()
    again = RunningGain(UNIT, running.base, 1.0, LIFE)
    again.load_state_dict(running.state_dict())
    for one in (running, again):
        one.add_step([1, -1], [3.0, 2.0])
        one.add_finished("prompt 0", -1, 1.0, -2.0)
    assert [again.gain(sign) for sign in (1, -1)] == [running.gain(sign) for sign in (1, -1)]


def test_a_run_logs_it_and_its_trajectories_count(workplace: Path, tmp_path: Path) -> None:
    run(workplace, tmp_path / "out", measure="light", calibrate="off", early_stop_gain="", max_train_steps=8)
    records = read_metrics(tmp_path / "out" / "tiny.metrics.jsonl")
    assert all({"running_gain_at_+1", "running_gain_at_-1_high"} <= record.keys() for record in records)
    last = records[-1]
    value, low, high = (last[f"running_gain_at_+1{end}"] for end in ("", "_low", "_high"))
    assert value is not None and low is not None and high is not None and low < value < high
