"""Every scorer with every criterion on the shapes world: what each learns, at what cost.

    python -m benchmarks.scorers --output_dir output/scorers

Draws 2,000 rated pictures, trains each pair of a kind and a criterion for a short and equal number of steps, and writes its tables to
benchmarks/results/scorers.md. Whatever was learned (a score, votes, stars, preferences), the reading of the scorer is held against the
true score of validation pictures, at each noise level; classes and tags have their own metrics. A pair that is in output_dir already is not
trained again, so several processes may share the work by --kinds.
"""

import json
import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks import ROOT, argument_parser, markdown_table
from benchmarks.shapes_runs import (
    SIGMAS,
    activation_bytes,
    columns_of,
    count_parameters,
    drawn_pictures,
    rated_task,
    train_scorer,
    write_results,
)
from library.scorer_data.batches import LatentDataset
from library.scorer_training.criteria.base import CRITERIA, get_criterion
from library.scorer_training.noise import NoisyBatch
from library.scorer_training.validation import table_of, validate
from library.scorers.base import BackboneScorer
from library.scorers.heads import HeadSpec

# Settings of each kind at a size that two CPU cores train in a minute; latents are 8x8 to 8x12.
KINDS: Mapping[str, Mapping[str, Any]] = {
    "latent_resnet": {"scorer_size": "tiny"},
    "transformers_cnn": {"scorer_kind": "transformers_cnn", "scorer_size": "resnet-tiny"},
    "latent_vit": {"scorer_kind": "latent_vit", "scorer_size": "tiny"},
    "unet_encoder": {"scorer_kind": "unet_encoder", "scorer_size": "base"},
    "pixel": {"scorer_kind": "pixel", "scorer_size": "tiny"},
}
SOURCES: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "ordinal": ("ratings.csv", {"score_column": "stars"}),
    "pairwise": ("pairs.csv", {}),
}
EXAMPLES_TIMED = 64


def run(kind: str, criterion: str, pictures: Path, folder: Path, steps: int, truth: LatentDataset) -> dict[str, Any]:
    """Train one scorer and measure it."""
    table, extra = SOURCES.get(criterion, ("ratings.csv", {}))
    started = time.process_time()
    scorer = train_scorer(
        folder,
        **KINDS[kind],
        **extra,
        criterion=criterion,
        train_data_file=str(pictures / table),
        cache_dir=str(pictures / "latents"),
        train_batch_size=32,
        max_train_steps=steps,
        validate_every_n_steps=steps // 2,
    )
    seconds = time.process_time() - started
    validation = scorer.spec.training["validation"]
    row: dict[str, Any] = {"kind": kind, "criterion": criterion, "parameters": count_parameters(scorer), "seconds": seconds, "steps": steps}
    metric = get_criterion(criterion).selection
    row["own_metric"], row["own"] = metric, columns_of(validation, metric)
    if get_criterion(criterion).target not in ("label", "tags"):
        by_truth = true_correlations(scorer, truth)
        row |= {"srcc": columns_of(by_truth, "srcc"), "plcc": columns_of(by_truth, "plcc")}
    return row | cost(scorer, truth)


def true_correlations(scorer: BackboneScorer, truth: LatentDataset) -> list[dict[str, float]]:
    """SRCC and PLCC of the score against the true one, at each noise level."""
    mse, scores = get_criterion("mse"), HeadSpec()  # a head whose outputs are scores
    found = validate(lambda batch, sigmas, rng: scorer(NoisyBatch.of(batch, sigmas, rng).latents, sigmas)[:, None], truth, batch_size=100)
    return table_of(found, mse, scores)


@torch.no_grad()
def cost(scorer: BackboneScorer, truth: LatentDataset) -> dict[str, float]:
    """Milliseconds to score a picture in a batch, and megabytes that its gradient keeps."""
    latents = next(iter(truth.in_order(EXAMPLES_TIMED))).latents
    scorer(latents, torch.zeros(len(latents)))  # the first call allocates
    started = time.process_time()
    for _ in range(3):
        scorer(latents, torch.zeros(len(latents)))
    milliseconds = (time.process_time() - started) / 3 / len(latents) * 1e3
    with torch.enable_grad():
        kept = activation_bytes(scorer, latents[:4]) / min(4, len(latents))
    return {"score_ms": milliseconds, "activation_mb": kept / 2**20}


def markdown(rows: list[dict[str, Any]]) -> str:
    """The tables."""
    first, sigmas = ("kind", "criterion", "steps"), [f"{sigma:g}" for sigma in SIGMAS]
    by_truth, own, cost = [], [], []
    for row in rows:
        begin = [row[name] for name in first]
        own.append([*begin, row["own_metric"], *(f"{value:.3f}" for value in row["own"])])
        if "srcc" in row:
            by_truth.append([*begin, *(f"{srcc:.3f} / {plcc:.3f}" for srcc, plcc in zip(row["srcc"], row["plcc"], strict=True))])
        if row["criterion"] == "mse":
            size, seconds = f"{row['parameters'] / 1e6:.2f} M", f"{row['seconds']:.0f}"
            cost.append([row["kind"], size, seconds, row["steps"], f"{row['score_ms']:.2f}", f"{row['activation_mb']:.2f}"])
    priced = ("kind", "parameters", "training, s", "steps", "scoring, ms a picture", "kept for the gradient, MB a picture")
    return "\n\n".join(
        [
            "SRCC / PLCC of the score against the true score, by sigma:",
            markdown_table([*first, *sigmas], by_truth),
            "The criterion's own metric, by sigma:",
            markdown_table([*first, "metric", *sigmas], own),
            "Cost, with criterion mse, in CPU time of one thread:",
            markdown_table(priced, cost),
        ]
    )


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--criteria", nargs="+", choices=list(CRITERIA), default=list(CRITERIA))
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--count", type=int, default=2000, help="rated pictures")
    parser.add_argument("--score", default="size")
    parser.add_argument("--output_dir", type=Path, default=ROOT / "output" / "scorers")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results" / "scorers")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")

    pictures = args.output_dir / "pictures"
    ratings = drawn_pictures(pictures, args.count, args.score)
    truth = rated_task(args.output_dir, train_data_file=str(ratings), cache_dir=str(pictures / "latents")).validation
    for kind in args.kinds:
        for criterion in args.criteria:
            folder = args.output_dir / f"{kind}-{criterion}"
            if not (folder / "row.json").is_file():
                row = run(kind, criterion, pictures, folder, args.steps, truth)
                (folder / "row.json").write_text(json.dumps(row), encoding="utf-8")
                print(json.dumps(row), flush=True)

    found = [args.output_dir / f"{kind}-{criterion}" / "row.json" for kind in KINDS for criterion in CRITERIA]
    rows = [json.loads(path.read_text(encoding="utf-8")) for path in found if path.is_file()]
    write_results(args.results, rows, markdown(rows))
    print(markdown(rows))


if __name__ == "__main__":
    main()
