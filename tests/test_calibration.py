"""Choosing the strength that is called 1, on curves whose answer is known."""

import pytest
import torch

from library.calibration import ResponseCurve, choose_scale
from library.sampling import sample
from library.types import PromptSpec
from tests.test_sampling import network_for
from tests.tiny_models import tiny_model

MULTIPLIERS = (-2.0, -1.5, -1.0, -0.75, -0.5, -0.25, 0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0)


def curve(gain, drift=abs) -> ResponseCurve:
    return ResponseCurve(
        multipliers=MULTIPLIERS, gains=tuple(gain(value) for value in MULTIPLIERS), drifts=tuple(drift(value) for value in MULTIPLIERS)
    )


def test_straight_line():
    chosen = choose_scale(curve(lambda m: 4 * m), target_gain=1.3)
    assert chosen.reached and chosen.scale == pytest.approx(1.3 / 4) and chosen.gain == pytest.approx(1.3)


def test_the_weaker_side_decides():
    chosen = choose_scale(curve(lambda m: 2 * m if m > 0 else 0.8 * m), target_gain=1.0)
    assert chosen.reached and chosen.scale == pytest.approx(1.25) and chosen.gain == pytest.approx(1.0)


def test_a_bent_curve_is_read_between_its_rungs():
    chosen = choose_scale(curve(lambda m: m * abs(m)), target_gain=1.625)  # 1 at 1, 2.25 at 1.5: the middle of that chord
    assert chosen.scale == pytest.approx(1.25) and chosen.gain == pytest.approx(1.625)


def test_out_of_reach_takes_the_end_of_the_ladder_and_says_so():
    chosen = choose_scale(curve(lambda m: 0.3 * m), target_gain=1.0)
    assert not chosen.reached and chosen.scale == 2.0 and chosen.gain == pytest.approx(0.6)
    assert "not reached" in chosen.note and "largest that was tried" in chosen.note


def test_it_stops_where_the_curve_turns_back():
    chosen = choose_scale(curve(lambda m: 0.6 * m if m < 1.2 else 0.5), target_gain=1.0)  # up to 0.6 at 1, then 0.5
    assert not chosen.reached and chosen.scale == 1.0 and chosen.gain == pytest.approx(0.6)
    assert "stops following" in chosen.note


def test_it_stops_at_the_drift_limit():
    chosen = choose_scale(curve(lambda m: m, drift=lambda m: 0.2 * abs(m)), target_gain=1.0, max_drift=0.13)
    assert not chosen.reached and chosen.scale == pytest.approx(0.65) and chosen.gain == pytest.approx(0.65)
    assert "drift too far" in chosen.note
    assert choose_scale(curve(lambda m: m, drift=lambda m: 0.2 * abs(m)), target_gain=1.0, max_drift=0.3).reached


def test_a_dead_side_leaves_the_slider_as_it_is():
    chosen = choose_scale(curve(lambda m: m if m > 0 else 0.1 * abs(m)), target_gain=1.0)
    assert not chosen.reached and chosen.scale == 1.0 and "left as trained" in chosen.note


def test_folding_the_scale_into_alpha_makes_weight_1_what_the_scale_was():
    model = tiny_model()
    network = network_for(model)
    run = {"num_steps": 2, "guidance_scale": 3.0, "resolution": (64, 64), "batch_size": 8}
    prompts, seeds = [PromptSpec(prompt="a cat"), PromptSpec(prompt="a dog")], [1, 2]
    before = sample(model, network, prompts, seeds, 0.3, **run)
    network.scale_alpha(0.3)
    torch.testing.assert_close(sample(model, network, prompts, seeds, 1.0, **run), before, atol=1e-4, rtol=1e-4)
