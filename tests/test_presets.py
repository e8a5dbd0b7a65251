"""A preset stands for settings that give way to the user's own."""

import logging

import pytest

from library.settings.options import build_config, options
from library.settings.presets import PRESETS
from library.slider_training.setup import leco_score_config

MODEL = {"pretrained_model_name_or_path": "model"}


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_changes_defaults_and_nothing_that_was_set(name: str) -> None:
    table = options(leco_score_config())
    config = build_config(leco_score_config(), MODEL | {"preset": name})
    for setting, value in PRESETS[name].items():
        assert getattr(getattr(config, table[setting].section), setting) == value != table[setting].default
    own = build_config(leco_score_config(), MODEL | {"gradient_checkpointing": False, "preset": name})
    assert own.training.gradient_checkpointing is False
    assert own.rollout.batch_size == config.rollout.batch_size
    batch = config.rollout.batch_size * config.training.gradient_accumulation_steps
    assert batch == build_config(leco_score_config(), MODEL).rollout.batch_size  # what an update learns from stays the same


def test_sd_scripts_fp8_base_is_obeyed(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert build_config(leco_score_config(), MODEL | {"fp8_base": True}).memory.quantize_base == "fp8"
        assert build_config(leco_score_config(), MODEL | {"fp8_base": "false"}).memory.quantize_base is None
        assert build_config(leco_score_config(), MODEL | {"fp8_base": True, "quantize_base": "int8"}).memory.quantize_base == "int8"
    assert not caplog.records
