"""train_leco_score.py from its settings to its files: what it writes, and what its options do."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderTiny, StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

import train_leco_score
from library.models.loading import load_model
from library.rollouts.sample import SamplingConfig, initial_noise, sample
from library.settings.cli import parse_config
from library.settings.shared import NetworkConfig, SavingConfig
from library.slider_training.files import SliderFiles
from library.slider_training.pictures import SliderPictures
from library.slider_training.previews import Previews
from library.training.checkpoints import load_state
from library.training.tracking import read_metrics
from library.types import PromptSpec
from networks.lora import create_network_from_weights
from tests.helpers.records import record_of
from tests.helpers.tiny_image_models import tiny_taesd
from tests.helpers.tiny_leco_run import make_workplace, metadata_of, run, settings, write_toml
from tests.helpers.tiny_models import tiny_model
from train_leco_score import leco_score_config

ROOT = Path(__file__).resolve().parent.parent


def test_paths_in_the_home_folder(workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(workplace))
    here = {"pretrained_model_name_or_path": "~/model", "scorer": ["~/scorer.safetensors"], "prompts_file": "~/prompts.txt"}
    assert run(workplace, tmp_path / "out", **here, max_train_steps=1).is_file()


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
        "tiny.metrics.jsonl",
        "sample",
        *states,
        *(f"{step}.safetensors" for step in steps),
    ]
    assert sorted(entry.name for entry in output.iterdir()) == sorted(files)
    assert {tensor.dtype for tensor in load_file(path).values()} == {torch.float16}
    with Image.open(output / "sample" / "tiny_000004.png") as picture:
        assert picture.width > 3 * 64 and picture.height > 64
    records = read_metrics(output / "tiny.metrics.jsonl")
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

    write = Previews.write

    def seen(self: Previews, *given: Any) -> Path:
        previews.append([prompt.prompt for prompt in self.prompts])
        assert isinstance(self.tiny, AutoencoderTiny)
        return write(self, *given)

    monkeypatch.setattr(Previews, "write", seen)
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
    assert [record["step"] for record in read_metrics(path.parent / "tiny.metrics.jsonl")] == [2, 3]
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
def test_metadata_by_family(workplace: Path, tmp_path: Path, kind: str, base_version: str, architecture: str, prediction: str) -> None:
    path = run(
        workplace if kind == "sd1" else make_workplace(tmp_path / "in", kind),
        tmp_path / "out",
        max_train_steps=1,
        network_args=["conv_dim=1", "conv_alpha=0.5"],
    )
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
    assert len(read_metrics(tmp_path / "tiny.metrics.jsonl")) == 2


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
