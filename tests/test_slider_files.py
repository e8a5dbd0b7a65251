"""What is left beside a finished slider: the calibration in its metadata, its card and a plot."""

import json

import pytest
import safetensors
from PIL import Image

from library.measuring.calibration import Target, choose_scale
from library.measuring.response_curve import ResponseCurve
from library.measuring.warnings import SliderWarning
from library.scorers.worth import Worth
from library.settings.shared import NetworkConfig, SavingConfig
from library.slider_training.files import SliderFiles
from library.slider_training.outcome import Outcome
from tests.helpers.records import record_of
from tests.helpers.tiny_models import tiny_model
from tests.helpers.tiny_networks import lora_for

MULTIPLIERS = (-1.0, -0.5, 0.0, 0.5, 1.0)
CALIBRATION = choose_scale(
    ResponseCurve(
        multipliers=MULTIPLIERS,
        gains=tuple(2 * weight for weight in MULTIPLIERS),
        drifts=tuple(map(abs, MULTIPLIERS)),
        clipped=(0.8, 0.4, 0.0, 0.0, 0.0),
        judges={"my judge": tuple(1.5 * weight for weight in MULTIPLIERS)},
    ),
    Target(),
)
GAMED = SliderWarning("gamed", "", "The score is gamed.")
OUTCOME = Outcome(
    step=3, calibration=CALIBRATION, record=record_of(), warnings=(GAMED,), stop="the score is gamed", worth=[Worth("a", 0.5, 60)]
)


@pytest.fixture
def files(tmp_path):
    model = tiny_model()
    return SliderFiles(SavingConfig(output_dir=tmp_path, output_name="tiny"), NetworkConfig(), model.spec, (64, 64), {}), lora_for(model)


def test_what_the_run_came_to_is_in_the_metadata_the_card_and_a_plot(files, tmp_path):
    slider_files, network = files
    path = slider_files.save(network, 3, final=True, outcome=OUTCOME)
    with safetensors.safe_open(path, "pt") as file:
        metadata = file.metadata()
    assert "slope 1.00 per unit of weight, R2 1.000" in CALIBRATION.note
    assert metadata["modelspec.usage_hint"] == OUTCOME.note and OUTCOME.note.startswith(CALIBRATION.note)
    assert "Training stopped, because the score is gamed. The score was gamed: do not trust" in OUTCOME.note
    assert "Scorer a: rank correlation 0.50 (0.27 to 0.68) on 60 pictures that it never saw: what it says is in doubt" in OUTCOME.note
    assert metadata["ss_leco_warnings"] == '["gamed"]' and metadata["ss_leco_stopped"] == "the score is gamed"
    assert metadata["ss_leco_verdict"] == OUTCOME.verdict and "rank correlation 0.50" in metadata["ss_leco_scorer_worth"]
    assert float(metadata["ss_leco_calibration_scale"]) == 0.5 and float(metadata["ss_leco_r2"]) == 1.0
    assert json.loads(metadata["ss_leco_gain_up"]) == [1.0, None, None]
    assert json.loads(metadata["ss_leco_usable_range"]) == [-0.5, 2.0]  # -0.6 clips more than 20 % of the pixel values
    assert json.loads(metadata["ss_leco_judges"]) == {"my judge": [0.75, -0.75]}
    card = json.loads((tmp_path / "tiny.json").read_text())
    assert card["preferred weight"] == 1.0 and card["description"] == OUTCOME.note
    with Image.open(tmp_path / "tiny_calibration.png") as picture:
        colours = {colour for _, colour in picture.convert("RGB").getcolors(maxcolors=1 << 24) or []}
        assert {(0x25, 0x63, 0xEB), (0xD9, 0x77, 0x06)} <= colours  # the training score's line and the judge's


def test_without_calibration_there_is_no_plot_and_weight_1_is_preferred(files, tmp_path):
    slider_files, network = files
    slider_files.save(network, 3, final=True)
    assert json.loads((tmp_path / "tiny.json").read_text())["preferred weight"] == 1.0
    assert not (tmp_path / "tiny_calibration.png").exists()


def test_what_a_killed_run_left_of_the_plot_is_removed(files, tmp_path):
    slider_files, _ = files
    (tmp_path / ".tiny_calibration.png.123.tmp").touch()
    (tmp_path / ".other_calibration.png.123.tmp").touch()
    slider_files.remove_unfinished()
    assert [path.name for path in tmp_path.iterdir()] == [".other_calibration.png.123.tmp"]
