"""Every option of sd-scripts' LECO and LoRA trainers in our file and on our command line, and the page that says what becomes of each."""

import logging
from typing import Any

import pytest

from library.settings.cli import parse_config
from library.settings.options import options
from library.settings.sd_scripts_defaults import REASONS, SD_SCRIPTS
from tools.sd_scripts_options import BESIDE, OF_THE_ENGINE, PAGE, fate, page, read_data, value_for
from train_leco_score import leco_score_config

DATA = read_data()
NONE = (None, "", (), 0)
SAME = {  # another value that means the same, or no value at all: the page says so
    "min_timestep": (0, None),
    "max_timestep": (1000, None),
    "optimizer_type": ("AdamW", ""),
    "network_train_unet_only": (True, False),
    "v_parameterization": (None, False),
    "output_dir": ("output", None),
}


def test_the_page_is_up_to_date():
    assert PAGE.read_text(encoding="utf-8") == page(), "run python -m tools.sd_scripts_options"


def test_no_option_is_fatal_and_those_without_use_are_one_warning(caplog: pytest.LogCaptureFixture):
    fates = {name: fate(name, entry) for name, entry in DATA.items() if name not in OF_THE_ENGINE}
    assert {found.kind for found in fates.values()} == {"obeyed", "warned"}, [found.note for found in fates.values()]

    def parse(*names: str) -> None:
        caplog.clear()
        given = {key: value for name in names for key, value in {**BESIDE.get(name, {}), name: value_for(name, DATA[name])}.items()}
        words = [word for key, value in given.items() for word in _words(key, value)]
        with caplog.at_level(logging.WARNING):
            parse_config(leco_score_config(), ["--pretrained_model_name_or_path", "m", *words])

    for name in [name for name, found in fates.items() if found.kind == "obeyed" and name != "pretrained_model_name_or_path"]:
        parse(name)
        assert not caplog.messages, name
    warned = [name for name, found in fates.items() if found.kind == "warned"]
    parse(*warned)
    (message,) = caplog.messages
    assert all(name in message for name in warned)


def _words(key: str, value: Any) -> list[str]:
    if isinstance(value, bool):
        return [f"--{key}" if value else f"--no-{key}"]
    return [f"--{key}", *map(str, value if isinstance(value, list) else [value])]


def test_every_default_that_differs_is_explained():
    table = options(leco_score_config())
    for name, entry in DATA.items():
        if name not in table or name in SAME:
            continue
        theirs = entry["default"].get("train_leco.py", entry["default"].get("train_network.py"))
        differs = theirs != table[name].default and not (theirs in NONE and table[name].default in NONE)
        assert differs == (name in REASONS), name
        if name in REASONS and theirs is not None:
            assert REASONS[name][0] == theirs


def test_their_defaults_can_be_had(tmp_path, capsys):
    file = tmp_path / "c.toml"
    file.write_text('pretrained_model_name_or_path = "m"\nnetwork_dim = 16\ndefaults = "sd-scripts"\n', encoding="utf-8")
    config = parse_config(leco_score_config(), ["--config_file", str(file), "--seed", "3"], defaults={"sd-scripts": SD_SCRIPTS})
    assert (config.network.network_dim, config.network.network_alpha, config.training.max_train_steps) == (16, 1.0, 1600)
    assert (config.optimizer.learning_rate, config.saving.save_precision, config.rollout.train_batch_size) == (2e-6, "float", 1)
