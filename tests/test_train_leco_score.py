"""train_leco_score.py from its settings to its files: what it writes, that it resumes to the bit, and how it refuses bad input."""

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from accelerate.state import AcceleratorState
from diffusers import AutoencoderTiny, StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

import train_leco_score
from library.atomic_files import only_process
from library.errors import UserError
from library.models.loading import load_model
from library.objectives.terms.score import ScoreTerm
from library.rollouts.sample import SamplingConfig, initial_noise, sample
from library.scorers.io import save_scorer
from library.settings.cli import parse_config, run_main
from library.settings.shared import NetworkConfig, SavingConfig
from library.slider_training.files import SliderFiles
from library.slider_training.pictures import SliderPictures
from library.slider_training.previews import write_preview
from library.training.checkpoints import STATE_FILE, load_state, save_state
from library.training.tracking import read_metrics
from library.types import LossOutput, PromptSpec
from networks.lora import create_network_from_weights
from tests.helpers.golden_run import RUNS, golden_file, golden_numbers
from tests.helpers.records import record_of
from tests.helpers.tiny_image_models import tiny_taesd
from tests.helpers.tiny_leco_run import foreign_vae_fingerprint, make_workplace, run, settings, tiny_scorer
from tests.helpers.tiny_models import tiny_model
from tests.helpers.two_processes import SETTINGS, run_alone
from train_leco_score import leco_score_config

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_workplace(tmp_path_factory.mktemp("leco"))


@pytest.fixture(autouse=True)
def fresh_accelerate() -> None:
    """Accelerate keeps the first run's precision for the whole process."""
    AcceleratorState._reset_state(reset_partial_state=True)


def write_toml(path: Path, values: dict[str, Any]) -> Path:
    path.write_text("[all]\n" + "".join(f"{name} = {json.dumps(value)}\n" for name, value in values.items()), encoding="utf-8")
    return path


def metadata_of(path: Path) -> dict[str, str]:
    with safetensors.safe_open(path, framework="pt") as file:
        return file.metadata()


# -- what it writes ------------------------------------------------------------------------------------------------------


def test_a_config_file_alone_makes_a_slider_and_everything_around_it(workplace: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    values = settings(workplace, output, max_train_steps=4, save_every_n_steps=1, save_last_n_steps=2, save_state=True)
    values |= {"sample_every_n_steps": 4, "evaluate_every_n_steps": 2, "early_stop_gain": 1e6, "measure": "light", "save_precision": "fp16"}
    config = parse_config(leco_score_config(), ["--config_file", str(write_toml(tmp_path / "x.toml", values))])

    path = train_leco_score.train(config)

    assert path == output / "tiny.safetensors"
    steps = [f"tiny-step0000000{step}" for step in (2, 3, 4)]  # step 1 is more than 2 steps old
    states = ["tiny-state", *(f"{step}-state" for step in steps)]
    files = [
        "tiny.safetensors",
        "tiny.json",
        "tiny.metadata.json",
        "tiny.preview.png",
        "tiny_calibration.png",
        "metrics.jsonl",
        "sample",
        *states,
        *(f"{step}.safetensors" for step in steps),
    ]
    assert sorted(entry.name for entry in output.iterdir()) == sorted(files)
    assert {tensor.dtype for tensor in load_file(path).values()} == {torch.float16}
    with Image.open(output / "sample" / "tiny_000004.png") as picture:
        assert picture.width > 3 * 64 and picture.height > 64
    records = read_metrics(output / "metrics.jsonl")
    assert [record["step"] for record in records] == [0, 1, 2, 3]
    assert all(record[name] is not None for record in records for name in ("loss", "reward", "eps_drift", "grad_norm", "lr"))
    assert [record["step"] for record in records if "gain_at_+1" in record] == [0, 1, 3]  # before training, after 2 updates and after 4
    counts = [record["unet_evaluations"] or 0.0 for record in records]
    assert counts == sorted(counts) and counts[0] > 0
    card = json.loads((output / "tiny.json").read_text(encoding="utf-8"))
    metadata = metadata_of(path)
    assert card["sd version"] == "SD1" and card["description"] == metadata["modelspec.usage_hint"] != ""
    low, high = json.loads(metadata["ss_leco_usable_range"])
    assert card["preferred weight"] == pytest.approx((min(1.0, high) if high > 0 else max(-1.0, low)) or 0.01, abs=0.01)
    assert metadata["modelspec.description"] in card["notes"] and "weight | gain of the score" in card["notes"]
    with Image.open(output / "tiny.preview.png") as picture:
        assert picture.width > 3 * 128 and picture.height >= 128
    assert metadata["modelspec.timestep_range"] == "0,999" and metadata["modelspec.thumbnail"].startswith("data:image/jpeg;base64,")
    assert ("ss_new_sd_model_hash" in metadata) == (workplace / "model").is_file()


def test_what_a_person_says_of_a_run_counts(
    workplace: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ModelSpec's fields, the prompts of previews, where counting begins, which states are kept; and a seed that nobody gave is told."""
    caplog.set_level("INFO")
    previews = []

    def seen(*given: Any) -> None:
        previews.append([prompt.prompt for prompt in given[3]])
        assert isinstance(given[-1], AutoencoderTiny)
        write_preview(*given)

    monkeypatch.setattr("library.slider_training.monitor.write_preview", seen)
    (tmp_path / "sample.txt").write_text("a hut --w 64 --h 64\n", encoding="utf-8")
    tiny_taesd().save_pretrained(tmp_path / "tiny")
    said = {"title": "Light", "author": "Ada", "description": "It brightens.", "license": "CC-BY-4.0", "tags": "light, slider"}
    path = run(
        workplace,
        tmp_path / "out",
        seed=None,
        initial_step=2,
        max_train_steps=4,
        save_every_n_steps=1,
        save_state=True,
        save_last_n_steps_state=0,
        sample_prompts=str(tmp_path / "sample.txt"),
        sample_every_n_steps=4,
        preview_vae=str(tmp_path / "tiny"),
        **{f"metadata_{name}": value for name, value in said.items()},
    )
    metadata = metadata_of(path)
    assert {name: metadata[f"modelspec.{name}"] for name in said} == said
    assert metadata["ss_steps"] == "4"
    assert f"seed {metadata['ss_seed']}: give it as seed to repeat this run" in caplog.text
    assert load_state(path.parent / "tiny-state")["shared"]["seed"] == int(metadata["ss_seed"])
    assert [record["step"] for record in read_metrics(path.parent / "metrics.jsonl")] == [2, 3]
    assert sorted(entry.name for entry in path.parent.glob("tiny-step*")) == [
        "tiny-step00000003.safetensors",
        "tiny-step00000004-state",
        "tiny-step00000004.safetensors",
    ]
    assert previews == [["a hut"]]


@pytest.mark.parametrize(
    ("kind", "base_version", "architecture", "prediction"),
    [
        ("sd1", "sd_v1", "stable-diffusion-v1/lora", "epsilon"),
        ("sd2_v", "sd_v2_v", "stable-diffusion-v2-768-v/lora", "v"),
        ("sdxl", "sdxl_base_v1-0", "stable-diffusion-xl-v1-base/lora", "epsilon"),
    ],
)
def test_metadata_by_family(tmp_path: Path, kind: str, base_version: str, architecture: str, prediction: str) -> None:
    path = run(make_workplace(tmp_path / "in", kind), tmp_path / "out", max_train_steps=1, network_args=["conv_dim=1", "conv_alpha=0.5"])
    metadata = metadata_of(path)
    expected = {
        "ss_v2": str(kind.startswith("sd2")),
        "ss_base_model_version": base_version,
        "modelspec.architecture": architecture,
        "modelspec.prediction_type": prediction,
        "modelspec.resolution": "64x64",
        "modelspec.title": "tiny",
        "ss_network_module": "networks.lora",
        "ss_network_dim": "2",
        "ss_network_alpha": "2.0",
        "ss_output_name": "tiny",
        "ss_steps": "1",
        "ss_seed": "0",
        "ss_optimizer": "AdamW",
        "ss_learning_rate": "0.01",
        "ss_sd_model_name": "model",
        "ss_resolution": "(64, 64)",
    }
    assert {name: metadata.get(name) for name in expected} == expected
    assert json.loads(metadata["ss_network_args"]) == {"conv_dim": "1", "conv_alpha": "0.5"}
    assert len(metadata["sshs_model_hash"]) == 64 and float(metadata["ss_training_started_at"]) > 0
    tensors = load_file(path)
    assert all(name.startswith("lora_unet_") for name in tensors)
    assert any(tensor.abs().max() > 0 for name, tensor in tensors.items() if name.endswith("lora_up.weight"))


def test_calibration_is_in_the_alphas_and_in_the_metadata(workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from library.measuring.calibration import Calibration

    half = Calibration(scale=0.5, gain=1.0, reached=True, note="Half.")
    monkeypatch.setattr(SliderPictures, "calibration", lambda self, target, known: (half, record_of()))
    path = run(workplace, tmp_path, measure="light", early_stop_gain="", save_state_on_train_end=True)
    alphas = {tensor.item() for name, tensor in load_file(path).items() if name.endswith(".alpha")}
    assert (
        alphas == {1.0}
        and metadata_of(path)["ss_network_alpha"] == "1.0"
        and metadata_of(path)["modelspec.description"].startswith("Half.")
    )
    state = load_state(tmp_path / "tiny-state")["parts"]["network"]["state"]
    assert {tensor.item() for name, tensor in state.items() if name.endswith(".alpha")} == {2.0}  # what is resumed is not scaled


def test_it_stops_when_the_slider_is_strong_enough(workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from library.slider_training.early_stop import EarlyStop

    monkeypatch.setattr(EarlyStop, "add", lambda self, step, record, plateau: ("it is strong enough" if step == 2 else None, []))
    run(workplace, tmp_path, max_train_steps=5, evaluate_every_n_steps=2, measure="light", calibrate="off")
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 2


@pytest.mark.slow
def test_the_script_itself(workplace: Path, tmp_path: Path) -> None:
    """`accelerate launch` starts it as `python train_leco_score.py`."""
    launcher = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes=1"]
    config = write_toml(tmp_path / "x.toml", settings(workplace, tmp_path / "out", max_train_steps=1))
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *launcher, "train_leco_score.py", "--config_file", str(config), "--output_name", "named"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "named.safetensors").is_file() and "slider saved to" in done.stderr


def test_what_a_killed_run_left_unfinished_goes_and_nothing_else(tmp_path: Path) -> None:
    dead = "99999999.tmp"  # no process has that number
    unfinished = [f".tiny.safetensors.{dead}", f".tiny-step00000002.safetensors.{dead}", f"sample/.tiny_000002.png.{dead}"]
    unfinished += [
        f".tiny.json.{dead}",
        f".tiny-state.{dead}/training_state.pt",
        f".tiny-step00000002-state.{dead}/training_state.pt",
    ]
    others = [
        "tiny.safetensors",
        f".tiny2.safetensors.{dead}",
        f".tiny2-state.{dead}/training_state.pt",
        ".notes.tmp",
        "tiny-state/training_state.pt",
    ]
    for name in unfinished + others:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    SliderFiles(SavingConfig(output_dir=tmp_path, output_name="tiny"), NetworkConfig(), tiny_model().spec, (64, 64), {}).remove_unfinished()
    left = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert left == set(others)


# -- exactness -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", [{}, {"optimizer_type": "AdamWScheduleFree", "max_grad_norm": 0.0}], ids=["AdamW", "schedule_free"])
def test_a_resumed_run_ends_in_the_same_bits(workplace: Path, tmp_path: Path, optimizer: dict) -> None:
    """With dropout, fresh noise in every sampler step, a schedule, accumulation, two sizes, and previews and measurements in between."""
    common = {"max_train_steps": 4, "gradient_accumulation_steps": 2, "network_dropout": 0.3, "sampler": "euler_a", "save_every_n_steps": 2}
    common |= {
        "save_state": True,
        "sample_every_n_steps": 2,
        "evaluate_every_n_steps": 2,
        "measure": "light",
        "calibrate": "off",
        **optimizer,
    }
    if optimizer.get("optimizer_type") != "AdamWScheduleFree":
        common["lr_scheduler"] = "cosine"
    straight = load_file(run(workplace, tmp_path / "a", **common))
    resumed = load_file(run(workplace, tmp_path / "b", resume=tmp_path / "a" / "tiny-step00000002-state", **common))
    assert straight.keys() == resumed.keys()
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in straight.items())
    halfway = load_file(tmp_path / "a" / "tiny-step00000002.safetensors")
    assert not all(torch.equal(tensor, halfway[name]) for name, tensor in straight.items())
    first, second = (read_metrics(tmp_path / name / "metrics.jsonl")[-2:] for name in "ab")
    for one, two in zip(first, second, strict=True):
        assert {key: value for key, value in one.items() if key != "time"} == {key: value for key, value in two.items() if key != "time"}


def test_the_seed_decides(workplace: Path, tmp_path: Path) -> None:
    runs = (run(workplace, tmp_path / name, seed=seed) for name, seed in (("a", 1), ("b", 1), ("c", 2)))
    first, again, other = map(load_file, runs)
    assert all(torch.equal(tensor, again[name]) for name, tensor in first.items())
    assert not all(torch.equal(tensor, other[name]) for name, tensor in first.items())


def test_the_file_in_diffusers_gives_our_picture_and_so_does_it_merged(workplace: Path, tmp_path: Path) -> None:
    """Latents agree within 1e-3 RMS; the slider itself moves them by more than 20 times that."""
    path = run(workplace, tmp_path, max_train_steps=4, learning_rate=3e-2)
    model = load_model(workplace / "model")
    prompt, seed, steps, guidance = PromptSpec(prompt="a red circle", negative_prompt="blurry"), 7, 4, 5.0

    def ours(network: Any, multiplier: float = 1.0) -> Tensor:
        return sample(
            model, network, [prompt], [seed], multiplier, sampling=SamplingConfig(num_steps=steps, guidance_scale=guidance, size=(128, 128))
        )

    def distance(one: Tensor, two: Tensor) -> float:
        return (one - two).square().mean().sqrt().item()

    plain = ours(None)
    network, _ = create_network_from_weights(1.0, path, model.vae, [], model.unet, for_inference=True)
    network.apply_to([], model.unet, apply_text_encoder=False)
    with_slider = ours(network)
    assert distance(with_slider, plain) > 2e-2
    assert torch.equal(ours(network, 0.0), plain)
    with network.disabled():
        assert torch.equal(ours(network), plain)

    network.remove()
    network.set_multiplier(1.0)
    network.merge_to([], model.unet)
    assert distance(ours(None), with_slider) < 1e-3

    pipeline = StableDiffusionPipeline.from_pretrained(workplace / "model", safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.load_lora_weights(str(path.parent), weight_name=path.name)
    theirs: Any = pipeline(
        prompt.prompt,
        negative_prompt=prompt.negative_prompt,
        latents=initial_noise([seed], (4, 16, 16))[0],
        height=128,
        width=128,
        num_inference_steps=steps,
        guidance_scale=guidance,
        output_type="latent",
    )
    assert distance(theirs.images, with_slider) < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_the_golden_runs(name: str, tmp_path: Path) -> None:
    """Some steps from fixed seeds. The tolerance absorbs other CPUs; `python -m tests.helpers.golden_run NAME` writes a file anew."""
    expected = golden_file(name)
    assert len(expected) == 2 * RUNS[name][1]["max_train_steps"]
    assert golden_numbers(name, tmp_path) == pytest.approx(expected, rel=2e-3, abs=2e-5)


@pytest.mark.slow
def test_two_processes_are_one_with_the_batches_of_both_and_one_goes_on_from_them(workplace: Path, tmp_path: Path) -> None:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "tests.helpers.two_processes"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    command = [*launch, str(workplace), str(tmp_path / "two")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    two, one = load_file(tmp_path / "two" / "tiny.safetensors"), load_file(run_alone(workplace, tmp_path / "one"))
    assert two.keys() == one.keys()
    for name, weight in two.items():
        torch.testing.assert_close(weight, one[name], atol=1e-6, rtol=0)
    assert max(weight.abs().max() for name, weight in two.items() if "lora_up" in name) > 1e-4

    again = run(workplace, tmp_path / "two", **SETTINGS | {"max_train_steps": 4}, resume=str(tmp_path / "two" / "tiny-state"))
    assert [record["step"] for record in read_metrics(tmp_path / "two" / "metrics.jsonl")] == [0, 1, 2, 3]
    assert any(not torch.equal(weight, two[name]) for name, weight in load_file(again).items())


# -- options -------------------------------------------------------------------------------------------------------------

VARIANTS = {
    "bf16": {"mixed_precision": "bf16", "gradient_checkpointing": True},
    "fp16": {"mixed_precision": "fp16"},
    "text_encoder": {
        "network_train_unet_only": False,
        "gradient_checkpointing": True,
        "gradient_accumulation_steps": 2,
    },
    "conv": {"network_args": ["conv_dim=2"], "scale_weight_norms": 0.001},
    "prodigy": {"optimizer_type": "Prodigy", "learning_rate": 1.0},
    "one": {"train_batch_size": 1, "max_denoising_steps": 1},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_options_train_in_float32_and_move_the_weights(workplace: Path, tmp_path: Path, name: str) -> None:
    tensors = load_file(run(workplace, tmp_path, save_state_on_train_end=True, **VARIANTS[name]))
    state = load_state(tmp_path / "tiny-state")["parts"]["network"]["state"]
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}
    moved = [key for key, tensor in tensors.items() if key.endswith("lora_up.weight") and tensor.abs().max() > 0]
    assert any(key.startswith("lora_unet") for key in moved)
    assert any(key.startswith("lora_te_text_model") for key in moved) == (name == "text_encoder")
    if name == "conv":
        for key in moved:
            up, down = tensors[key].flatten(1), tensors[key.replace("lora_up", "lora_down")].flatten(1)
            scale = tensors[key.replace("lora_up.weight", "alpha")] / down.shape[0]
            assert (up @ down * scale).norm() < 0.00101


# -- bad input -----------------------------------------------------------------------------------------------------------


def complaint(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], config: Path, *words: str) -> str:
    """Run the script as a command that has to fail; its one line, without the "error: "."""
    monkeypatch.setattr("sys.argv", ["train_leco_score.py", "--config_file", str(config), *words])
    with pytest.raises(SystemExit) as caught:
        run_main(train_leco_score.main)
    assert caught.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0].removeprefix("error: ")


def cut(path: Path, target: Path) -> Path:
    target.parent.mkdir(parents=True, exist_ok=True)
    content = path.read_bytes()
    target.write_bytes(content[: len(content) // 2])
    return target


@pytest.fixture(scope="module")
def broken(workplace: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files that are wrong, each in its way."""
    folder = tmp_path_factory.mktemp("broken")
    fingerprint = load_model(workplace / "model").vae_fingerprint()
    save_scorer(folder / "foreign.safetensors", tiny_scorer(foreign_vae_fingerprint()))
    save_scorer(folder / "blind.safetensors", tiny_scorer(fingerprint, noise_aware=False))
    with_nan = tiny_scorer(fingerprint)
    torch.nn.init.constant_(with_nan.get_parameter("heads.score.members.0.weight"), torch.nan)
    save_scorer(folder / "nan.safetensors", with_nan)
    cut(workplace / "scorer.safetensors", folder / "cut.safetensors")
    (folder / "empty.txt").write_text("# nothing but a comment\n\n", encoding="utf-8")
    unet = Path("unet/diffusion_pytorch_model.safetensors")
    for file in (workplace / "model").rglob("*"):
        if file.is_file():
            target = folder / "model" / file.relative_to(workplace / "model")
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(file.read_bytes())
    cut(workplace / "model" / unet, folder / "model" / unet)
    cut(workplace / "model" / unet, folder / "cut_checkpoint.safetensors")
    return folder


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"pretrained_model_name_or_path": "{broken}/none.safetensors"}, ["none.safetensors"]),
        ({"pretrained_model_name_or_path": "{broken}/cut_checkpoint.safetensors"}, ["cut_checkpoint.safetensors"]),
        ({"pretrained_model_name_or_path": "{broken}/model"}, ["model", "unet"]),
        ({"learning_rat": 1e-4}, ["learning_rat", "learning_rate"]),
        ({"max_train_steps": "many"}, ["max_train_steps", "'many'", "whole number"]),
        ({"max_train_steps": 0}, ["max_train_steps is 0", "at least 1"]),
        ({"scorer": ["{broken}/none.safetensors"]}, ["none.safetensors"]),
        ({"scorer": ["{broken}/foreign.safetensors"]}, ["foreign", "another VAE"]),
        ({"scorer": ["{broken}/cut.safetensors"]}, ["cut.safetensors", "truncated"]),
        ({"scorer": ["{broken}/blind.safetensors"]}, ["blind.safetensors", "score_estimator x0"]),
        ({"scorer": []}, ["scorer is not set"]),
        ({"prompts_file": "{broken}/empty.txt"}, ["empty.txt", "no prompts"]),
        ({"prompts_file": "{broken}/none.txt"}, ["none.txt", "does not exist"]),
        ({"network_args": ["conv_dimm=4"]}, ["conv_dimm", "conv_dim"]),
        ({"network_module": "lycoris.nothing"}, ["lycoris.nothing", "networks.lora"]),
        ({"network_weights": "{broken}/none.safetensors"}, ["network_weights", "does not exist"]),
        ({"network_weights": "{broken}/cut.safetensors"}, ["cut.safetensors"]),
        ({"optimizer_type": "AdamWW"}, ["AdamWW", "AdamW"]),
        ({"optimizer_args": ["betta=1"]}, ["betta"]),
        ({"lr_scheduler": "cosin"}, ["cosin", "cosine"]),
        ({"resume": "{broken}"}, ["no saved training state"]),
    ],
)
def test_bad_input_is_one_sentence_and_leaves_nothing(
    workplace: Path,
    broken: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    changes: dict[str, Any],
    says: list[str],
) -> None:
    def filled(value: Any) -> Any:
        return [filled(item) for item in value] if isinstance(value, list) else str(value).format(broken=broken)

    changes = {name: filled(value) if isinstance(value, (str, list)) else value for name, value in changes.items()}
    output = tmp_path / "out"
    config = write_toml(tmp_path / "x.toml", settings(workplace, output, **changes))
    sentence = complaint(monkeypatch, capsys, config)
    assert all(word in sentence for word in says), sentence
    assert not output.exists() or not list(output.iterdir())


def test_an_output_dir_that_cannot_be_written_to(
    workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").write_text("a file")
    sentence = complaint(monkeypatch, capsys, write_toml(tmp_path / "x.toml", settings(workplace, tmp_path / "out")))
    assert f"{tmp_path / 'out'} is a file" in sentence and "choose another folder" in sentence
    assert (tmp_path / "out").read_text() == "a file"


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"scorer": "nan"}, ["step 1:", "scorer nan", "not finite", "timestep", "--check_reward"]),
        ({"learning_rate": 1e30, "max_grad_norm": 0.0, "max_train_steps": 20}, ["step 2:", "nor were 8 more", "timestep", "learning_rate"]),
        ({"learning_rate": 1e6, "max_train_steps": 1, "save_precision": "fp16"}, ["step 1:", "not finite in fp16"]),
    ],
)
def test_what_is_never_finite_stops_the_run_and_no_slider_is_written(
    workplace: Path,
    broken: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    changes: dict[str, Any],
    says: list[str],
) -> None:
    if "scorer" in changes:
        changes = {"scorer": [str(broken / "nan.safetensors")]}
    (tmp_path / "one.txt").write_text("a green star\n", encoding="utf-8")
    values = settings(workplace, tmp_path / "out", prompts_file=str(tmp_path / "one.txt"), **changes)
    sentence = complaint(monkeypatch, capsys, write_toml(tmp_path / "x.toml", values))
    assert all(word in sentence for word in says), sentence
    assert "timestep" not in says or "'a green star'" in sentence
    assert not list((tmp_path / "out").rglob("*.safetensors"))


def test_an_optimizer_that_does_not_exist_is_told_before_anything_is_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="optimizer_type"):
        run(tmp_path / "nowhere", tmp_path / "out", optimizer_type="none.None")
    assert not list(tmp_path.iterdir())


def with_nan_at(monkeypatch: pytest.MonkeyPatch, bad: Callable[[int], bool]) -> None:
    """Make the loss of one sample of a batch NaN; `bad` is asked with the number of the update, from 1."""
    call, updates = ScoreTerm.__call__, itertools.count(1)

    def spoiled(self: ScoreTerm) -> LossOutput:
        out = call(self)
        if bad(next(updates)):
            spoil = torch.tensor([torch.nan, *[0.0] * (len(out.sample_losses) - 1)])
            out = replace(out, loss=out.loss * spoil[0], sample_losses=out.sample_losses + spoil)
        return out

    monkeypatch.setattr(ScoreTerm, "__call__", spoiled)


def test_one_sample_without_a_finite_loss_is_named_and_does_not_count(
    workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with_nan_at(monkeypatch, lambda update: update == 2)
    path = run(workplace, tmp_path, max_train_steps=4)
    assert all(tensor.isfinite().all() for tensor in load_file(path).values())
    assert [record["loss"] is None for record in read_metrics(tmp_path / "metrics.jsonl")] == [False, True, False, False]
    (said,) = [record.getMessage() for record in caplog.records if "finite" in record.getMessage()]
    assert said.startswith("step 2: the score loss of prompt 'a ") and "(scorer scorer)" in said


def test_losses_that_stop_being_finite_end_the_run_with_the_last_good_weights(
    workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = load_file(run(workplace, tmp_path / "whole", max_train_steps=3))
    with_nan_at(monkeypatch, lambda update: update > 4)
    with pytest.raises(UserError, match="step 5: .* nor were 8 more, .* the weights of step 3, the last good ones") as caught:
        run(workplace, tmp_path / "out", max_train_steps=50)
    assert "lower learning_rate" in str(caught.value)
    assert [path.name for path in (tmp_path / "out").glob("*.safetensors")] == ["tiny-step00000003.safetensors"]
    kept = load_file(tmp_path / "out" / "tiny-step00000003.safetensors")
    assert all(torch.equal(tensor, kept[name]) for name, tensor in whole.items())


@pytest.fixture(scope="module")
def state(workplace: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """After the last of two steps."""
    return run(workplace, tmp_path_factory.mktemp("state"), save_state_on_train_end=True).parent / "tiny-state"


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"max_train_steps": 2}, "nothing is left to train"),
        ({"train_batch_size": 3}, "batch size"),
        ({"network_dim": 3}, "network"),
        ({"optimizer_type": "Prodigy"}, "optimizer"),
        ({"seed": 7}, "seed is 7 and was 0"),
        ({"sampler": "euler"}, "sampler is 'euler' and was 'ddim'"),
        ({"max_denoising_steps": 4}, "max_denoising_steps is 4 and was 3"),
    ],
)
def test_a_state_of_other_settings_is_refused(
    workplace: Path,
    state: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    changes: dict[str, Any],
    says: str,
) -> None:
    values = settings(workplace, tmp_path / "out", resume=str(state), **{"max_train_steps": 3, **changes})
    sentence = complaint(monkeypatch, capsys, write_toml(tmp_path / "x.toml", values))
    assert says in sentence and "resume" in sentence or "nothing is left" in sentence
    assert not (tmp_path / "out").exists()


def test_on_purpose_a_run_goes_on_with_another_seed(workplace: Path, state: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = run(workplace, tmp_path, resume=state, seed=7, max_train_steps=3, resume_with_changes=True)
    assert path.is_file() and "resumed with a change: seed is 7 and was 0" in caplog.text


@pytest.mark.parametrize("part", ["step", "rng", "parts", "term score", "negative", "generators"])
def test_a_state_that_lacks_something_is_one_sentence(workplace: Path, state: Path, tmp_path: Path, part: str) -> None:
    content = load_state(state)
    if part == "negative":
        content["step"] = -5
    elif part == "generators":
        content["rng"] = {"python": (1,)}
    else:
        del (content if part in content else content["parts"])[part]
    save_state(tmp_path / "tiny-state", content)
    with pytest.raises(UserError, match="no usable|does not fit|are none"):
        run(workplace, tmp_path, resume=tmp_path / "tiny-state", max_train_steps=3)


def test_resume_auto_passes_a_broken_state_over_and_begins_where_there_is_none(
    workplace: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    common: dict[str, Any] = {"max_train_steps": 3, "save_every_n_steps": 1, "save_state": True, "resume": "auto"}
    caplog.set_level("INFO")
    whole = load_file(run(workplace, tmp_path, **common))
    assert "no state of tiny yet, training begins" in caplog.text
    shutil.rmtree(tmp_path / "tiny-state")
    for step in (2, 3):
        (tmp_path / f"tiny-step0000000{step}-state" / STATE_FILE).write_bytes(b"cut")
    caplog.clear()
    again = load_file(run(workplace, tmp_path, **common))
    assert caplog.text.count("passed over") == 2 and "resume auto: " in caplog.text and "tiny-step00000001-state" in caplog.text
    assert all(torch.equal(tensor, again[name]) for name, tensor in whole.items())


def test_a_second_run_of_the_same_name_is_refused(workplace: Path, tmp_path: Path) -> None:
    with only_process(tmp_path / ".tiny.lock", "it"), pytest.raises(UserError, match="tiny in .* is trained by process"):
        run(workplace, tmp_path)
    assert list(tmp_path.iterdir()) == []


# -- signals -------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="POSIX only")
def test_an_interrupted_run_saves_itself_and_goes_on_to_the_same_bits(workplace: Path, tmp_path: Path) -> None:
    """SIGTERM, SIGINT and SIGHUP one after the other, each in the middle of what is left, with measurements in between."""
    common: dict[str, Any] = {
        "max_train_steps": 40,
        "evaluate_every_n_steps": 5,
        "measure": "light",
        "early_stop_gain": 1e6,
        "resume": "auto",
    }
    straight = load_file(run(workplace, tmp_path / "whole", **common))
    output = tmp_path / "out"
    config = write_toml(tmp_path / "x.toml", settings(workplace, output, **common))
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-u", "train_leco_score.py", "--config_file", str(config)]
    steps = []
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, None):
        with subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True) as process:
            assert process.stderr is not None
            if number is not None:
                wait_for_lines(output / "metrics.jsonl", (steps[-1] if steps else 0) + 4, process)
                process.send_signal(number)
            said = process.stderr.read()
        assert process.returncode == (0 if number is None else 128 + number), said
        if number is not None:
            assert "--resume auto goes on from there" in said
            steps.append(max(load_state(path)["step"] for path in output.glob("*-state")))
            assert (output / f"tiny-step{steps[-1]:08d}.safetensors").is_file() and not (output / "tiny.safetensors").exists()
    assert steps == sorted(set(steps)) and steps[-1] < 40
    resumed = load_file(output / "tiny.safetensors")
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in straight.items())
    assert [record["step"] for record in read_metrics(output / "metrics.jsonl")] == list(range(40))


def wait_for_lines(path: Path, count: int, process: subprocess.Popen) -> None:
    while process.poll() is None and not (path.is_file() and len(path.read_text(encoding="utf-8").splitlines()) >= count):
        time.sleep(0.01)
