"""Several criteria on one backbone: summed losses, learned weights, or an optimizer each.

    python -m benchmarks.balancing --output_dir output/balancing

Learns votes (EMD), the shape (classification), tags (multi-label) and the score (MSE) of the shapes world at once, each from the same
2,000 drawings, in each of the three ways and, for each thing, alone. The scales of the losses differ; a weight of 100 on one of them shows
which way minds.
"""

import argparse
import json
import logging
from pathlib import Path
from typing import Any

from benchmarks.shapes_runs import ROOT, columns_of, drawn_pictures, train_scorer, write_results
from library.scorer_training.criteria.registry import CRITERIA

CRITERIA_MIXED = ("emd", "classification", "multilabel", "mse")
WAYS: dict[str, dict[str, Any]] = {
    "sum, AdamW": {"balancing": "sum"},
    "uncertainty, AdamW": {"balancing": "uncertainty"},
    "sum, Lion": {"balancing": "sum", "optimizer_type": "Lion", "learning_rate": 1e-4},
    "independent, Lion": {"balancing": "independent"},
    "independent, AdamW": {"balancing": "independent", "optimizer_type": "AdamW", "learning_rate": 1e-3},
}


def mixture(folder: Path, table: Path, mse_weight: float) -> Path:
    """A dataset.toml of all criteria on one table."""
    parts = []
    for criterion in CRITERIA_MIXED:
        weight = mse_weight if criterion == "mse" else 1.0
        subset = f'subsets = [{{path = "{table.as_posix()}"}}]'
        parts.append(f'[[datasets]]\nname = "{criterion}"\ncriterion = "{criterion}"\nweight = {weight}\n{subset}\n')
    path = folder / f"mixture-{mse_weight:g}.toml"
    path.write_text("\n".join(parts), encoding="utf-8")
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--output_dir", type=Path, default=ROOT / "output" / "balancing")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results" / "balancing")
    args = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")

    ratings = drawn_pictures(args.output_dir / "pictures", 2000, "size")
    runs: dict[str, dict[str, Any]] = {}
    for mse_weight in (1.0, 100.0):
        config = {"dataset_config": str(mixture(args.output_dir, ratings, mse_weight)), "train_batch_size": 128}
        for way, settings in WAYS.items():
            if mse_weight == 1 or settings["balancing"] != "independent":  # which has no weights
                runs[f"{way}, mse x {mse_weight:g}"] = {**config, **settings}
    for criterion in CRITERIA_MIXED:
        runs[f"{criterion} alone, AdamW"] = {"train_data_file": str(ratings), "criterion": criterion, "train_batch_size": 32}

    rows = []
    for name, settings in runs.items():
        for seed in args.seeds:
            folder = args.output_dir / f"{name.replace(', ', '-').replace(' ', '-')}-{seed}"
            if not (folder / "row.json").is_file():
                latents = str(args.output_dir / "latents")
                scorer = train_scorer(folder, cache_dir=latents, max_train_steps=args.steps, seed=seed, **settings)
                tables = scorer.spec.training["validation_by_task"]
                found = {}
                for task, table in tables.items():
                    criterion = scorer.spec.head(task).criterion
                    found[criterion] = columns_of(table, CRITERIA[criterion].selection)
                (folder / "row.json").write_text(json.dumps({"run": name, "seed": seed, "metrics": found}), encoding="utf-8")
            rows.append(json.loads((folder / "row.json").read_text(encoding="utf-8")))
            print(json.dumps(rows[-1]), flush=True)
    write_results(args.results, rows, markdown(rows))
    print(markdown(rows))


def markdown(rows: list[dict[str, Any]]) -> str:
    """Each criterion's metric on clean pictures and at sigma 1, mean over the seeds."""
    heads = [f"{criterion} ({CRITERIA[criterion].selection})" for criterion in CRITERIA_MIXED]
    lines = ["| run | " + " | ".join(heads) + " |", "|---|" + "---|" * len(heads)]
    for name in dict.fromkeys(row["run"] for row in rows):
        cells = []
        for criterion in CRITERIA_MIXED:
            found = [row["metrics"][criterion] for row in rows if row["run"] == name and criterion in row["metrics"]]
            mean = [sum(values) / len(values) for values in zip(*found, strict=True)]
            cells.append(f"{mean[0]:.3f}, sigma 1: {mean[2]:.3f}" if mean else "")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
