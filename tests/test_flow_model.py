"""The embedded flow model: what its captions give, and a slider that was trained on it in diffusers' own pipeline."""

from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, ZImagePipeline

from benchmarks.shapes_runs import FLOW_MODEL, VAE
from examples.shapes.judge import caption_obeyed
from examples.shapes.world import COLOURS, SHAPES
from library.models.base import DiffusionModel
from library.models.loading import load_model
from library.rollouts.sample import SamplingConfig, decode, initial_noise, sample
from library.scorers.io import save_scorer
from library.settings.options import build_config
from library.types import PromptSpec
from networks.lora import create_network_from_weights
from tests.helpers.tiny_leco_run import tiny_scorer
from train_leco_score import leco_score_config, train

SAMPLING = SamplingConfig(num_steps=10, guidance_scale=3.0, size=(64, 64))


@pytest.fixture(scope="module")
def model() -> DiffusionModel:
    return load_model(FLOW_MODEL, vae=VAE).freeze()


def test_its_pictures_show_what_their_captions_say(model: DiffusionModel) -> None:
    captions = [f"a {colour} {shape}" for colour, shape in product(COLOURS, SHAPES)][::2]
    latents = sample(model, None, [PromptSpec(prompt=caption) for caption in captions], range(len(captions)), sampling=SAMPLING)
    assert caption_obeyed(decode(model, latents).clamp(0, 1), captions).mean() > 0.8


def test_a_slider_of_two_steps_moves_diffusers_pictures_as_ours(model: DiffusionModel, tmp_path: Path) -> None:
    """Trained from a scorer's file, loaded into ZImagePipeline: the same latents, which differ from the base model's."""
    save_scorer(tmp_path / "scorer.safetensors", tiny_scorer(model.vae_fingerprint()))
    (tmp_path / "prompts.txt").write_text("a red circle\n", encoding="utf-8")
    settings = {
        "pretrained_model_name_or_path": str(FLOW_MODEL),
        "vae": str(VAE),
        "scorer": [str(tmp_path / "scorer.safetensors")],
        "prompts_file": str(tmp_path / "prompts.txt"),
        "output_dir": str(tmp_path),
        "output_name": "slider",
        "resolution": [64, 64],
        "train_batch_size": 2,
        "max_denoising_steps": 4,
        "max_train_steps": 2,
        "learning_rate": 1e-2,
        "measure": "off",
        "num_threads": torch.get_num_threads(),
    }
    path = train(build_config(leco_score_config(), settings))

    prompt, seed = PromptSpec(prompt="a green star"), 3
    network, _ = create_network_from_weights(1.0, path, model.vae, model.text_encoders, model.unet, for_inference=True)
    network.apply_to(model.text_encoders, model.unet)
    ours, base = (sample(model, network, [prompt], [seed], weight, sampling=SAMPLING) for weight in (1.0, 0.0))
    network.remove()

    pipeline = ZImagePipeline.from_pretrained(FLOW_MODEL, vae=AutoencoderKL.from_pretrained(VAE), dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.load_lora_weights(str(path.parent), weight_name=path.name)
    theirs: Any = pipeline(
        prompt.prompt,
        latents=initial_noise([seed], (4, 8, 8))[0],
        height=64,
        width=64,
        num_inference_steps=SAMPLING.num_steps,
        guidance_scale=SAMPLING.guidance_scale - 1,  # Z-Image's own scale counts from 0
        output_type="latent",
    )
    assert (theirs.images - ours).abs().max() < 5e-3  # at its first step a trajectory of ours holds a trace of the picture
    assert (theirs.images - base).abs().max() > 5e-2
