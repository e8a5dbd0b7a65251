"""How honest a scorer of few ratings is about itself: the rank correlation in its file, with its interval, beside that on other pictures.

    python -m benchmarks.few_ratings --counts 60 200 --seeds 0 1 2
    python -m benchmarks.few_ratings --counts 30 60 200 --simulated 100    # ridge regressions in a scorer's place, without pictures

Drawings of the shapes world, rated by a true score with an error of as many of its standard deviations as `--noise` says. The training
is that of train_latent_scorer.py at its defaults. The true correlation is with the ratings, errors included, of 300 other drawings.
"""

import argparse
import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from benchmarks import ROOT
from benchmarks.shapes_runs import MODEL, drawn_pictures, rated_task
from library.scorer_data.splits import assign_folds
from library.scorer_training.config import LatentScorerConfig
from library.scorer_training.criteria.metrics import spearman
from library.scorers.io import load_scorer
from library.settings.options import build
from train_latent_scorer import train

OTHERS = 300
SIZING = {"resolution": "80", "bucket_no_upscale": True, "bucket_reso_steps": 8}


def write_noisy(ratings: Path, target: Path, rows: Sequence[int], noise: float, split: str = "") -> Path:
    """A table of these rows, each score with an error of `noise` standard deviations; the same error for a row in every table."""
    with ratings.open(encoding="utf-8", newline="") as file:
        entries = list(csv.DictReader(file))
    scores = np.array([float(entry["score"]) for entry in entries])
    scores = scores + noise * scores.std() * np.random.default_rng(0).normal(size=len(scores))
    target.parent.mkdir(parents=True, exist_ok=True)
    lines = [
        f"{ratings.parent / entries[row]['path']},{scores[row]:.6f},{split if place > 1 or not split else 'train'}"
        for place, row in enumerate(rows)
    ]
    target.write_text("\n".join(["path,score,split", *lines]), encoding="utf-8")
    return target


def simulate(count: int, noise: float, times: int, folds: int = 5, repeats: int = 2) -> None:
    """How often the interval of folds holds the truth, for several widths: ridge regressions, whose penalty the folds choose."""
    rng, rows = np.random.default_rng(1), []
    for _ in range(times):
        features, weights = rng.normal(size=(count + OTHERS, 20)), rng.normal(size=20)
        scores = features @ weights / np.linalg.norm(weights) + noise * rng.normal(size=len(features))
        own, ratings = features[:count], scores[:count]
        parts = [
            assign_folds([str(row) for row in range(count)], torch.from_numpy(ratings), folds, seed).numpy() for seed in range(repeats)
        ]
        best = max((np.mean([_in_folds(own, ratings, part, penalty) for part in parts]), penalty) for penalty in 3.0 ** np.arange(-1, 8))
        rows.append((best[0], _srcc(features[count:] @ _ridge(own, ratings, best[1]), scores[count:])))
    said, true = np.array(rows).T
    error = np.sqrt((1 + said**2 / 2) / (count - 3))
    held = {width: np.mean(np.abs(np.arctanh(said) - np.arctanh(true)) <= 1.96 * width * error) for width in (1.0, 1.2, 1.3, 1.4, 1.5, 1.6)}
    print(
        f"| {count} | {said.mean():.3f} | {true.mean():.3f} | {', '.join(f'{width}: {share:.0%}' for width, share in held.items())} |",
        flush=True,
    )


def _ridge(features: np.ndarray, scores: np.ndarray, penalty: float) -> np.ndarray:
    return np.linalg.solve(features.T @ features + penalty * np.eye(features.shape[1]), features.T @ (scores - scores.mean()))


def _srcc(said: np.ndarray, true: np.ndarray) -> float:
    return spearman(torch.from_numpy(said), torch.from_numpy(true))


def _in_folds(features: np.ndarray, scores: np.ndarray, part: np.ndarray, penalty: float) -> float:
    """Rank correlation of the predictions that were made without a picture's own rating."""
    predicted = np.empty(len(scores))
    for fold in range(part.max() + 1):
        held, rest = part == fold, part != fold
        predicted[held] = features[held] @ _ridge(features[rest], scores[rest], penalty) + scores[rest].mean()
    return _srcc(predicted, scores)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--score", default="size")
    parser.add_argument("--noise", type=float, default=1.0, help="error of a rating, in standard deviations of the true score")
    parser.add_argument("--counts", type=int, nargs="+", default=[60, 200], help="ratings to learn from")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="each takes other pictures")
    parser.add_argument("--max_train_steps", type=int, default=2000)
    parser.add_argument("--train_batch_size", type=int, default=64)
    parser.add_argument("--output_dir", type=Path, default=ROOT / "output" / "few_ratings")
    parser.add_argument("--simulated", type=int, default=0, help="so many times, without pictures")
    given = parser.parse_args()
    if given.simulated:
        print("| ratings | said | true | held by an interval so many times as wide |\n|---|---|---|---|")
        for count in given.counts:
            simulate(count, given.noise, given.simulated)
        return
    largest = max(given.counts)
    ratings = drawn_pictures(given.output_dir / "pictures", OTHERS + largest * (max(given.seeds) + 1), given.score)
    table = write_noisy(ratings, given.output_dir / "others.csv", [OTHERS, OTHERS + 1, *range(OTHERS)], given.noise, "val")
    cached = {"cache_dir": str(given.output_dir / "cache"), "num_threads": 1}
    others = rated_task(given.output_dir, train_data_file=str(table), validation_folds=0, **cached)

    print("| ratings | seed | steps | in the file | interval | on 300 other pictures |\n|---|---|---|---|---|---|")
    for count in given.counts:
        for seed in given.seeds:
            first = OTHERS + seed * largest
            table = write_noisy(ratings, given.output_dir / f"{count}_{seed}.csv", range(first, first + count), given.noise)
            settings = {"pretrained_model_name_or_path": str(MODEL), "train_data_file": str(table), "seed": seed, **SIZING, **cached}
            settings |= {"max_train_steps": given.max_train_steps, "train_batch_size": given.train_batch_size}
            scorer = load_scorer(train(build(LatentScorerConfig, {**settings, "output_dir": str(given.output_dir / table.stem)})))
            batches = list(others.validation.in_order(64))
            with torch.no_grad():
                scores = torch.cat([scorer(batch.latents, torch.zeros(len(batch))) for batch in batches])
            true, worth = spearman(scores, torch.cat([batch.targets for batch in batches])), scorer.spec.training["worth"]
            low, high = worth["interval"]
            steps = scorer.spec.training["steps"]
            print(f"| {count} | {seed} | {steps} | {worth['srcc']:.2f} | {low:.2f} to {high:.2f} | {true:.2f} |", flush=True)


if __name__ == "__main__":
    main()
