"""Every setting that the examples and the documents show is one that its script takes."""

import logging
import re
import shlex
from pathlib import Path

import pytest

from library.prompts.leco_files import is_leco_file, load_leco_settings
from library.scorer_training.config import LatentScorerConfig
from library.settings.cli import parse_config
from tests.helpers.documents import LOG, PAGES
from tools.cache_latents import CacheLatentsConfig
from tools.evaluate_slider import EvaluateSliderConfig
from tools.make_pixel_scorer import MakePixelScorerConfig
from tools.score_images import ScoreImagesConfig
from tools.train_image_prompt_adapter import TrainImagePromptAdapterConfig
from train_leco_score import leco_score_config

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = {
    "train_latent_scorer.py": LatentScorerConfig,
    "train_leco_score.py": leco_score_config(),
    "tools/cache_latents.py": CacheLatentsConfig,
    "tools/evaluate_slider.py": EvaluateSliderConfig,
    "tools/make_pixel_scorer.py": MakePixelScorerConfig,
    "tools/score_images.py": ScoreImagesConfig,
    "tools/train_image_prompt_adapter.py": TrainImagePromptAdapterConfig,
}
TOMLS = sorted((ROOT / "examples").rglob("*.toml"))
LECO_FILES = [path for path in TOMLS if is_leco_file(path)]
EXAMPLES = [path for path in TOMLS if path not in LECO_FILES and "[[prompts]]" not in path.read_text(encoding="utf-8")]
COMMAND = re.compile(r"^ *(?:accelerate launch|python) ([\w/]+\.py) ((?:.*\\\n)*.*)$", re.MULTILINE)
COMMANDS = [
    (page.name, script, arguments)
    for page in PAGES
    for script, arguments in COMMAND.findall(page.read_text(encoding="utf-8"))
    if page != LOG and script in CONFIGS and "..." not in arguments
]


def dry_run(script: str, words: list[str], caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(SystemExit) as end, caplog.at_level(logging.WARNING):
        parse_config(CONFIGS[script], [*words, "--dry_run"])
    assert end.value.code == 0
    assert caplog.records == []  # such as: these settings do nothing here


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


@pytest.mark.parametrize(("page", "script", "arguments"), COMMANDS)
def test_command_of_a_document_is_accepted(
    page: str, script: str, arguments: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    dry_run(script, shlex.split(arguments.replace("\\\n", " ")), caplog)


def test_the_documents_show_every_script() -> None:
    shown = {(page, script) for page, script, _ in COMMANDS}
    assert {"train_latent_scorer.py", "train_leco_score.py", "tools/evaluate_slider.py"} <= {s for page, s in shown if page == "README.md"}
    assert {script for _, script in shown} >= CONFIGS.keys() - {"tools/cache_latents.py"}
