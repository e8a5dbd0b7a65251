"""The golden run: rewards and drifts of 20 steps of train_leco_score.py on a tiny SD1 model: any change of what training computes shows.

python -m tests.helpers.golden_run     # writes tests/golden/leco_score_sd1.txt anew, when the change is meant
"""

import tempfile
from pathlib import Path

import torch

from library.training.tracking import read_metrics
from tests.helpers.tiny_leco_run import make_workplace, run

GOLDEN_FILE = Path(__file__).parents[1] / "golden" / "leco_score_sd1.txt"
# Every setting that decides a loss is named here or in tiny_leco_run, so that another default does not change the golden numbers.
SETTINGS = {
    "max_train_steps": 20,
    "seed": 1,
    "learning_rate": 1e-3,
    "optimizer_type": "AdamW",
    "sampler": "ddim",
    "rollout": "belt",
    "resolution": [128],  # at 64 the tiny U-Net's deepest norms have two values a group, and jump with the last bit
    "train_batch_size": 2,
    "max_denoising_steps": 4,
    "leco_denoise_guidance_scale": 4.0,
    "score_estimator": "prev",
    "reward_loss": "hinge",
    "hinge_margin": 2.0,
    "reward_weight": 1.0,
    "preserve_weight": 10.0,
    "normalize_gradient": True,
    "max_grad_norm": 1.0,
    "train_multipliers": [1.0, -1.0],
}


def golden_numbers(folder: Path) -> list[float]:
    """Train in `folder` and return the reward and the drift of every step, in turn."""
    run(make_workplace(folder / "in"), folder / "out", **SETTINGS)
    return [record[name] for record in read_metrics(folder / "out" / "metrics.jsonl") for name in ("reward", "eps_drift")]


if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        numbers = golden_numbers(Path(folder))
    GOLDEN_FILE.parent.mkdir(exist_ok=True)
    lines = ["# Reward and drift of each step; written by python -m tests.helpers.golden_run", *(f"{number:.8g}" for number in numbers)]
    GOLDEN_FILE.write_text("\n".join(lines) + "\n", encoding="utf-8")
