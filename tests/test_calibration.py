"""What a calibration says of itself, and that it is in the file."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from library.measuring.calibration import Calibration, CalibrationTarget
from library.measuring.response_curve import response_curve
from library.measuring.strength import choose_scale
from library.rollouts.sample import SamplingConfig, sample
from library.types import PromptSpec
from tests.helpers.curves import MULTIPLIERS, curve, scores_of
from tests.helpers.tiny_models import tiny_model
from tests.helpers.tiny_networks import lora_for


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


def test_folding_the_scale_into_alpha_makes_weight_1_what_the_scale_was():
    model = tiny_model()
    network = lora_for(model)
    sampling = SamplingConfig(num_steps=2, guidance_scale=3.0, size=(64, 64))
    prompts, seeds = [PromptSpec(prompt="a cat"), PromptSpec(prompt="a dog")], [1, 2]
    before = sample(model, network, prompts, seeds, 0.3, sampling=sampling)
    network.scale_alpha(0.3)
    torch.testing.assert_close(sample(model, network, prompts, seeds, 1.0, sampling=sampling), before, atol=1e-4, rtol=1e-4)
