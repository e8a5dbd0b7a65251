"""The golden run of a scorer: losses of 20 steps of train_latent_scorer.py with its defaults on drawn pictures.

Any change of a default, or of what training computes, shows.

python -m tests.helpers.golden_scorer     # writes tests/golden/latent_scorer.txt anew, when the change is meant
"""

import tempfile
from pathlib import Path

import torch

from examples.shapes.draw_pictures import write_ratings
from library.scorer_training.config import LatentScorerConfig
from library.settings.options import build_config
from library.training.tracking import read_metrics
from tests.helpers.tiny_models import FULL_VAE, tiny_vae
from train_latent_scorer import train

GOLDEN_FILE = Path(__file__).parents[1] / "golden" / "latent_scorer.txt"
# What makes it small; everything else is the default, so that another default shows.
SMALL = {
    "max_train_steps": 20,
    "resolution": "64",
    "enable_bucket": False,
    "scorer_size": "tiny",
    "train_batch_size": 8,
    "validation_folds": 0,
    "learning_rate": 1e-4,  # with a warm-up of two steps the default makes so rough a start that the last bits decide
}


def golden_losses(folder: Path) -> list[float]:
    """Train in `folder` and return the loss of every step."""
    tiny_vae(channels=FULL_VAE).save_pretrained(folder / "vae")
    ratings = write_ratings(folder / "pictures", 40, "brightness", seed=0)
    train(build_config(LatentScorerConfig, {"vae": folder / "vae", "train_data_file": ratings, "output_dir": folder / "out", **SMALL}))
    return [record["loss/score"] for record in read_metrics(folder / "out" / "scorer.metrics.jsonl")]


if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        losses = golden_losses(Path(folder))
    lines = ["# Loss of each step; written by python -m tests.helpers.golden_scorer", *(f"{loss:.8g}" for loss in losses)]
    GOLDEN_FILE.write_text("\n".join(lines) + "\n", encoding="utf-8")
