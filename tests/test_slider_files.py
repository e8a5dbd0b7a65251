"""What is left beside a finished slider: the calibration in its metadata, its card and a plot."""

import base64
import hashlib
import io
import json
import shutil
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import safetensors
import torch
from PIL import Image

from library.atomic_files import unfinished_name
from library.errors import UserError
from library.measuring.calibration import Calibration, CalibrationTarget
from library.measuring.response_curve import ResponseCurve, summarise_curve
from library.measuring.strength import choose_scale
from library.measuring.warnings import SliderWarning
from library.models.config import ModelConfig
from library.scorers.worth import Worth
from library.settings.shared import NetworkConfig, RunFilesConfig, SavingConfig
from library.slider_training.files import SliderFiles
from library.slider_training.outcome import Outcome
from library.training.checkpoints import weights_path
from library.training.run_files import RunFiles
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
    CalibrationTarget(),
)
GAMED = SliderWarning("gamed", "", "The score is gamed.")
OUTCOME = Outcome(
    step=3, calibration=CALIBRATION, record=record_of(), warnings=(GAMED,), stop="the score is gamed", worth=[Worth("a", 0.5, 60)]
)


@pytest.fixture
def files(tmp_path):
    model = tiny_model()
    return SliderFiles(
        SavingConfig(output_dir=tmp_path, output_name="tiny.safetensors"), NetworkConfig(), model.spec, (64, 64), {}
    ), lora_for(model)


def test_what_the_run_came_to_is_in_the_metadata_the_card_and_a_plot(files, tmp_path):
    slider_files, network = files
    path = slider_files.save(network, 3, final=True, outcome=OUTCOME)
    with safetensors.safe_open(path, "pt") as file:
        metadata = file.metadata()
    assert "slope 1.00 per unit of weight, R2 1.000" in CALIBRATION.note
    assert metadata["modelspec.description"] == OUTCOME.note and OUTCOME.note.startswith(CALIBRATION.note)
    assert "Training stopped, because the score is gamed. The score was gamed: do not trust" in OUTCOME.note
    assert "Scorer a: rank correlation 0.50 (0.27 to 0.68) on 60 pictures that it never saw: what it says is in doubt" in OUTCOME.note
    assert metadata["ss_leco_warnings"] == '["gamed"]' and metadata["ss_leco_stopped"] == "the score is gamed"
    assert metadata["ss_leco_conclusion"] == OUTCOME.conclusion and "rank correlation 0.50" in metadata["ss_leco_scorer_worth"]
    assert float(metadata["ss_leco_calibration_scale"]) == 0.5 and float(metadata["ss_leco_r2"]) == 1.0
    assert json.loads(metadata["ss_leco_gain_up"]) == [1.0, None, None]
    assert json.loads(metadata["ss_leco_usable_range"]) == [-0.5, 2.0]  # -0.6 clips more than 20 % of the pixel values
    assert json.loads(metadata["ss_leco_judges"]) == {"my judge": [0.75, -0.75]}
    card = json.loads((tmp_path / "tiny.json").read_text())
    hint = "Usable from -0.5 to +2; begin with +1. The score was gamed."
    assert card["preferred weight"] == 1.0 and card["description"] == metadata["modelspec.usage_hint"] == hint
    table = (
        "weight | gain of the score | my judge | clipped\n-2 | -2.00 | -1.50 | 80.0%\n-1 | -1.00 | -0.75 | 40.0%\n0 | +0.00 | +0.00 | 0.0%"
    )
    assert card["notes"].startswith(f"{OUTCOME.note}\n\n{table}\n+1 | +1.00 | +0.75 | 0.0%")
    tips = json.loads(json.loads((tmp_path / "tiny.metadata.json").read_text())["usage_tips"])
    assert tips == {"strength": 1.0, "strength_min": -0.5, "strength_max": 2.0}
    with Image.open(tmp_path / "tiny_calibration.png") as picture:
        colours = {colour for _, colour in picture.convert("RGB").getcolors(maxcolors=1 << 24) or []}
        assert {(0x25, 0x63, 0xEB), (0xD9, 0x77, 0x06)} <= colours  # the training score's line and the judge's


def test_a_persons_own_words_win_over_those_of_the_run(files, tmp_path):
    slider_files, network = files
    slider_files.modelspec = {"title": "Light", "description": "It brightens."}
    with safetensors.safe_open(slider_files.save(network, 3, outcome=OUTCOME), "pt") as file:
        metadata = file.metadata()
    assert (metadata["modelspec.title"], metadata["modelspec.description"]) == ("Light", "It brightens.")


def test_without_calibration_there_is_no_plot_and_weight_1_is_preferred(files, tmp_path):
    slider_files, network = files
    slider_files.save(network, 3, final=True)
    assert json.loads((tmp_path / "tiny.json").read_text())["preferred weight"] == 1.0
    assert not (tmp_path / "tiny_calibration.png").exists()


def test_the_pictures_of_the_last_measurement_are_the_preview_and_the_thumbnail(files, tmp_path):
    """Two prompts at -1, 0 and +1, of which the calibration then found that they are 1.2 times as strong as weight 1."""
    slider_files, network = files
    pictures = tuple(torch.full((3, 3, 64, 64), grey, dtype=torch.uint8) for grey in (90, 160))
    outcome = replace(OUTCOME, record=replace(record_of(), pictures=pictures), calibration=replace(CALIBRATION, pictured_at=1.2))
    path = slider_files.save(network, 3, final=True, outcome=outcome)
    with Image.open(tmp_path / "tiny.preview.png") as preview, safetensors.safe_open(path, "pt") as file:
        assert preview.getpixel((preview.width // 2, preview.height // 4)) == (90, 90, 90)
        address, content = file.metadata()["modelspec.thumbnail"].split(",")
        assert address == "data:image/jpeg;base64" and len(content) < 40_000
        with Image.open(io.BytesIO(base64.b64decode(content))) as small:
            assert max(small.size) == 256 and abs(small.width / small.height - preview.width / preview.height) < 0.02
    slider_files.save(network, 3, final=True)  # of another run of this name, which has none
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["tiny.json", "tiny.metadata.json", "tiny.safetensors"]


@pytest.mark.parametrize(
    ("gains", "hint", "weight"),
    [
        ((-1.0, -0.5, 0.0, -0.5, -1.0), "Usable from -1 to 0; begin with -1.", -1.0),
        ((1.0, 0.5, 0.0, -0.5, -1.0), "Usable at no weight.", 0.01),
    ],
)
def test_a_slider_that_is_not_usable_at_1_is_not_preferred_at_1(files, tmp_path, gains, hint, weight):
    slider_files, network = files
    curve = ResponseCurve(multipliers=MULTIPLIERS, gains=gains, drifts=tuple(map(abs, MULTIPLIERS)))
    calibration = Calibration(
        scale=1.0, gain=gains[-1], reached=False, note="", curve=curve, target=CalibrationTarget(), line=summarise_curve(curve)
    )
    slider_files.save(network, 3, final=True, outcome=Outcome(step=3, calibration=calibration, record=record_of()))
    card = json.loads((tmp_path / "tiny.json").read_text())
    assert (card["description"], card["preferred weight"]) == (hint, weight)


def test_where_the_model_came_from_is_in_the_metadata(files, tmp_path):
    slider_files, network = files
    for name in ("model.safetensors", "my_vae.safetensors"):
        (tmp_path / name).write_bytes(b"x")
    model = ModelConfig(pretrained_model_name_or_path=str(tmp_path / "model.safetensors"), vae=tmp_path / "my_vae.safetensors", clip_skip=2)
    more = SliderFiles(slider_files.saving, slider_files.network, slider_files.spec, (64, 64), {}, model=model, timesteps=(200, 799))
    with safetensors.safe_open(more.save(network, 3, final=True), "pt") as file:
        metadata = file.metadata()
    assert metadata["ss_vae_name"] == "my_vae.safetensors" and metadata["ss_new_sd_model_hash"] == hashlib.sha256(b"x").hexdigest()
    assert metadata["modelspec.encoder_layer"] == "2" and metadata["modelspec.timestep_range"] == "200,799"


def test_what_a_killed_run_left_of_the_plot_is_removed(files, tmp_path):
    slider_files, _ = files
    for name in ("tiny_calibration.png", "tiny.preview.png", "tiny.metadata.json"):
        (tmp_path / f".{name}.99999999.tmp").touch()
    (tmp_path / ".other_calibration.png.99999999.tmp").touch()
    slider_files.remove_unfinished()
    assert [path.name for path in tmp_path.iterdir()] == [".other_calibration.png.99999999.tmp"]


def test_an_earlier_run_of_the_name_keeps_its_slider(files, tmp_path, monkeypatch, caplog):
    slider_files, network = files
    slider_files.save(network, 3, final=True, outcome=OUTCOME)
    slider_files.metrics_path.write_text("{}")
    before = (tmp_path / "tiny.safetensors").read_bytes()

    def again(**saving):
        config = SavingConfig(output_dir=tmp_path, output_name="tiny", **saving)
        return SliderFiles(config, NetworkConfig(), slider_files.spec, (64, 64), {})

    files = again()
    for final in (False, True, True):  # its own files it may write again
        files.save(network, 5, final=final)
    endings = (".json", ".metadata.json", ".safetensors")
    own = {"tiny-step00000005.safetensors", *(f"tiny{ending}" for ending in endings)}
    kept = {"tiny-1_calibration.png", "tiny-1.metrics.jsonl", *(f"tiny-1{ending}" for ending in endings)}
    assert {path.name for path in tmp_path.iterdir()} == kept | own
    assert (tmp_path / "tiny-1.safetensors").read_bytes() == before
    again(overwrite=True).save(network, 6, final=True)
    resumed = again()
    resumed.owns_names = True
    resumed.save(network, 7, final=True)
    assert {path.name for path in tmp_path.iterdir()} == kept | own


def test_less_space_than_the_run_takes_is_found_before_it(files, tmp_path, monkeypatch):
    slider_files, network = files
    weights = sum(weight.numel() for weight in network.state_dict().values())
    saving = SavingConfig(
        output_dir=tmp_path, output_name="tiny", save_every_n_steps=10, save_last_n_steps=20, save_state=True, save_precision="fp16"
    )
    files = SliderFiles(saving, NetworkConfig(), slider_files.spec, (64, 64), {})
    least = 4 * weights * 2 + 4 * weights * 4  # three on the way and the last one
    for free, refused in ((least, False), (least - 1, True)):
        monkeypatch.setattr(shutil, "disk_usage", lambda folder, free=free: SimpleNamespace(free=free))
        with pytest.raises(UserError, match="to be written") if refused else nullcontext():
            files.check_space(network, 100)


def test_the_longest_name_that_is_taken_leaves_room_for_the_last_step(tmp_path):
    def is_taken(name):
        try:
            RunFiles(RunFilesConfig(output_dir=tmp_path, output_name=name)).check_outputs()
        except UserError as error:
            assert "name" in str(error)
            return False
        return True

    longest = max(length for length in range(180, 250) if is_taken("n" * length))
    weights = weights_path(tmp_path, "n" * longest, 99_999_999)
    assert len(unfinished_name(weights).name) == 255  # bytes, the most that a file system takes


@pytest.mark.parametrize(("steps", "last", "expected"), [(25, None, 2), (25, 100, 2), (1000, 100, 11), (9, 100, 0)])
def test_at_most_so_many_files_are_there_on_the_way(tmp_path, steps, last, expected):
    own = RunFilesConfig(output_dir=tmp_path, save_every_n_steps=10, save_last_n_steps=last)
    assert RunFiles(own).num_on_the_way(steps) == expected
