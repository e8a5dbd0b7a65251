"""The golden runs: rewards and drifts of some steps of train_leco_score.py on a tiny SD1 model: any change of what training computes shows.

python -m tests.helpers.golden_run NAME     # writes tests/golden/NAME.txt anew, when the change is meant
"""

import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from library.training.tracking import read_metrics
from tests.helpers.tiny_leco_run import make_workplace, run, run_with_defaults

GOLDEN = Path(__file__).parents[1] / "golden"
COMMON: dict[str, Any] = {
    "max_train_steps": 20,
    "seed": 1,
    "resolution": [128],  # at 64 the tiny U-Net's deepest norms have two values a group, and jump with the last bit
}
# Every setting that decides a loss is named here or in tiny_leco_run, so that another default does not change the golden numbers.
PREV = COMMON | {
    "learning_rate": 1e-3,
    "optimizer_type": "AdamW",
    "sampler": "ddim",
    "rollout": "belt",
    "train_batch_size": 2,
    "max_denoising_steps": 4,
    "leco_denoise_guidance_scale": 4.0,
    "score_estimator": "prev",
    "reward_loss": "hinge",
    "preserve_weight": 10.0,
    "max_grad_norm": 1.0,
}
RUNS = {"leco_score_sd1": (run, PREV), "leco_score_defaults_sd1": (run_with_defaults, COMMON)}


def golden_file(name: str) -> list[float]:
    """The stored numbers of a run."""
    lines = (GOLDEN / f"{name}.txt").read_text(encoding="utf-8").splitlines()
    return [float(line) for line in lines if not line.startswith("#")]


def golden_numbers(name: str, folder: Path) -> list[float]:
    """Train in `folder` and return the reward and the drift of every step, in turn."""
    train, changes = RUNS[name]
    train(make_workplace(folder / "in", full=True), folder / "out", **changes)
    return [record[name] for record in read_metrics(folder / "out" / "tiny.metrics.jsonl") for name in ("reward", "eps_drift")]


if __name__ == "__main__":
    (wanted,) = sys.argv[1:]
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as made:
        numbers = golden_numbers(wanted, Path(made))
    header = f"# Reward and drift of each step; written by python -m tests.helpers.golden_run {wanted}"
    (GOLDEN / f"{wanted}.txt").write_text("\n".join([header, *(f"{number:.8g}" for number in numbers)]) + "\n", encoding="utf-8")
