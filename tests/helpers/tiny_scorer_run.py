"""train_latent_scorer.py on a handful of pictures: a folder with them and their ratings, and settings for seconds."""

import random
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torch.nn.functional import avg_pool2d

import train_latent_scorer
from examples.shapes.pictures import to_pixels
from examples.shapes.scores import brightness
from examples.shapes.world import draw, random_scene
from library.scorer_training.config import LatentScorerConfig
from library.settings.options import build_config
from tests.helpers.tiny_models import tiny_vae

MIXTURE = """
[general]
validation_split = 0.25

[[datasets]]
name = "bright"
criterion = "huber"
proportion = 3
  [[datasets.subsets]]
  path = "{folder}/ratings.csv"
  num_repeats = 2

[[datasets]]
name = "backdrop"
criterion = "classification"
target_class = "dark"
weight = 0.5
  [[datasets.subsets]]
  path = "{folder}/ratings.csv"

[[datasets]]
name = "words"
criterion = "multilabel"
  [[datasets.subsets]]
  path = "{folder}/ratings.csv"

[[datasets]]
name = "pairs"
criterion = "pairwise"
  [[datasets.subsets]]
  path = "{folder}/pairs.csv"
"""


def write_mixture(workplace: Path, path: Path, *changes: tuple[str, str]) -> Path:
    text = MIXTURE
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    path.write_text(text.replace("{folder}", workplace.as_posix()), encoding="utf-8")
    return path


def make_workplace(folder: Path) -> Path:
    """A random VAE, 96 small pictures with their brightness and their background."""
    draws, rows = random.Random(0), []
    for index in range(96):
        scene = random_scene(draws, (64, 64))
        picture = draw(scene).resize((32, 32))
        picture.save(folder / f"{index}.png")
        score = brightness((to_pixels([picture]) + 1) / 2).item()
        tags = f"{scene.shape} {scene.background} {scene.colour}"
        rows.append(f"{index}.png,{score},{scene.background},{'val' if index % 4 == 0 else 'train'},{tags}")
    (folder / "ratings.csv").write_text("\n".join(["path,score,label,split,tags", *rows]), encoding="utf-8")
    scores = [float(row.split(",")[1]) for row in rows]
    pairs = [f"{first}.png,{first + 1}.png,{float(scores[first] > scores[first + 1])}" for first in range(95)]
    (folder / "pairs.csv").write_text("\n".join(["path_a,path_b,label", *pairs]), encoding="utf-8")
    tiny_vae().save_pretrained(folder / "vae")
    return folder


def train(workplace: Path, output_dir: Path, **changes: object) -> Path:
    values = {
        "vae": workplace / "vae",
        "train_data_file": workplace / "ratings.csv",
        "output_dir": output_dir,
        "cache_dir": workplace / "cache",
        "resolution": 32,
        "enable_bucket": False,
        "scorer_size": "tiny",
        "max_train_steps": 6,
        "train_batch_size": 8,
        "lr_warmup_steps": 2,
        "validate_every_n_steps": 3,
        **changes,
    }
    return train_latent_scorer.train(build_config(LatentScorerConfig, values))


def pool(_vae: AutoencoderKL, pixels: Tensor) -> Tensor:
    """Latents that hold the colours, which those of a random VAE hardly do."""
    return torch.cat([avg_pool2d(pixels, 8), torch.zeros(len(pixels), 1, pixels.shape[2] // 8, pixels.shape[3] // 8)], dim=1)
