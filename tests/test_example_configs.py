"""Every setting that the examples and the README show is one that its script takes."""

import logging
import re
from pathlib import Path

import pytest

from library.prompts.leco_files import is_leco_file, load_leco_settings
from library.scorer_training.config import LatentScorerConfig
from library.settings.cli import parse_config
from tools.evaluate_slider import EvaluateSliderConfig
from train_leco_score import LecoScoreConfig

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = {
    "train_latent_scorer.py": LatentScorerConfig,
    "train_leco_score.py": LecoScoreConfig,
    "tools/evaluate_slider.py": EvaluateSliderConfig,
}
TOMLS = sorted((ROOT / "examples").rglob("*.toml"))
LECO_FILES = [path for path in TOMLS if is_leco_file(path)]
EXAMPLES = [path for path in TOMLS if path not in LECO_FILES and "[[prompts]]" not in path.read_text(encoding="utf-8")]
README_COMMANDS = re.findall(
    r"^(?:accelerate launch|python) ([\w/]+\.py) ((?:.*\\\n)*.*)$", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE
)


def dry_run(script: str, words: list[str], caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(SystemExit) as end, caplog.at_level(logging.WARNING):
        parse_config(CONFIGS[script], [*words, "--dry_run"])
    assert end.value.code == 0
    assert caplog.records == []  # such as: these options of sd-scripts do nothing here


def test_there_are_examples() -> None:
    assert {"sd15_scorer.toml", "sd15_slider.toml", "sdxl_slider.toml"} <= {path.name for path in EXAMPLES}


@pytest.mark.parametrize("path", LECO_FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_leco_example_can_be_read(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert load_leco_settings(path)
    assert caplog.records == []


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_example_is_accepted_by_the_script_that_it_names(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first_line = path.read_text(encoding="utf-8").partition("\n")[0]
    script = re.fullmatch(r"# script: (\S+)", first_line)
    assert script is not None, f"{path.name} must begin with the line '# script: NAME.py'"
    dry_run(script[1], ["--config_file", str(path)], caplog)


@pytest.mark.parametrize(("script", "arguments"), [pair for pair in README_COMMANDS if pair[0] in CONFIGS])
def test_command_of_the_readme_is_accepted(
    script: str, arguments: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    dry_run(script, arguments.replace("\\\n", " ").split(), caplog)


def test_the_readme_shows_all_three_scripts() -> None:
    assert {script for script, _ in README_COMMANDS} >= set(CONFIGS)
