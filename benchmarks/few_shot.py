"""How many ratings a score takes: from scratch against a backbone that learned something else first.

    python -m benchmarks.few_shot --output_dir output/few_shot

Beside them stands the diffusion model's own U-Net, with a LoRA, which is pretrained by nature.
The backbone is pretrained on other drawings, by the words that describe them (shape, colour, texture, background; none of them says
how large the object is), at equal proportions of classification and tags. Then `size` is learned from 50 to 2,000 ratings, and SRCC is
measured on 500 drawings that no training saw.
"""

import argparse
import csv
import json
import logging
import statistics
from pathlib import Path
from typing import Any

from benchmarks.shapes_runs import ROOT, columns_of, drawn_pictures, shuffled, train_scorer, write_results, write_subset

RATINGS = (50, 100, 200, 500, 1000, 2000)
VALIDATION = 500
FINE_TUNING = {"learning_rate": 1e-3, "train_batch_size": 32}
PRETRAINED = "pretrained"  # the way that starts from the backbone that `pretrain` made
WAYS = {
    "from scratch": {},
    PRETRAINED: {"layer_lr_decay": 0.8, "freeze_backbone_steps": 20},
    "unet_encoder, LoRA": {"scorer_kind": "unet_encoder", "scorer_size": "base"},
}
DATASETS = """
[[datasets]]
name = "shape"
criterion = "classification"
subsets = [{{path = "{table}"}}]

[[datasets]]
name = "words"
criterion = "multilabel"
subsets = [{{path = "{table}"}}]
"""


def pretrain(output_dir: Path, count: int, steps: int, cache_dir: Path) -> Path:
    """Teach a backbone the words of `count` drawings; returns the scorer's file, whose backbone it is."""
    path = output_dir / "pretrained" / "scorer.safetensors"
    if not path.is_file():
        ratings = drawn_pictures(output_dir / "other_pictures", count, "brightness", seed=1)
        with ratings.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        table = ratings.with_name("words.csv")
        with table.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["path", "label", "tags"])
            for row in rows:
                words = [tag for tag in row["tags"].split() if tag not in ("small", "medium", "large")]
                writer.writerow([row["path"], row["label"], " ".join(words)])
        mixture = output_dir / "pretraining.toml"
        mixture.write_text(DATASETS.format(table=table.as_posix()), encoding="utf-8")
        train_scorer(path.parent, dataset_config=str(mixture), cache_dir=str(cache_dir), max_train_steps=steps)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--pretraining_pictures", type=int, default=4000)
    parser.add_argument("--pretraining_steps", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--output_dir", type=Path, default=ROOT / "output" / "few_shot")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results" / "few_shot")
    args = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")

    cache_dir = args.output_dir / "latents"
    ratings = drawn_pictures(args.output_dir / "pictures", max(RATINGS) + VALIDATION, "size")
    backbone = pretrain(args.output_dir, args.pretraining_pictures, args.pretraining_steps, cache_dir)
    rows: list[dict[str, Any]] = []
    for count in RATINGS:
        for seed in args.seeds:
            chosen = shuffled(max(RATINGS), seed)[:count] + list(range(max(RATINGS), max(RATINGS) + VALIDATION))
            table = write_subset(ratings, ratings.with_name(f"{count}-{seed}.csv"), chosen, ["train"] * count + ["val"] * VALIDATION)
            for way, settings in WAYS.items():
                start = {"backbone_weights": str(backbone)} if way == PRETRAINED else {}
                folder = args.output_dir / f"{count}-{seed}-{way.replace(', ', '-').replace(' ', '-')}"
                if not (folder / "srcc.json").is_file():
                    scorer = train_scorer(
                        folder,
                        train_data_file=str(table),
                        cache_dir=str(cache_dir),
                        max_train_steps=args.steps,
                        validate_every_n_steps=args.steps // 2,
                        seed=seed,
                        **FINE_TUNING,
                        **settings,
                        **start,
                    )
                    (folder / "srcc.json").write_text(json.dumps(columns_of(scorer.spec.training["validation"], "srcc")), encoding="utf-8")
                srcc = json.loads((folder / "srcc.json").read_text(encoding="utf-8"))
                rows.append({"ratings": count, "seed": seed, "way": way, "srcc": srcc})
                print(json.dumps(rows[-1]), flush=True)
    table = markdown(rows)
    write_results(args.results, rows, table)
    print(table)


def markdown(rows: list[dict[str, Any]]) -> str:
    """SRCC on clean pictures, and at sigma 1, by number of ratings: mean over the seeds and the lowest to the highest."""
    lines = ["| ratings | " + " | ".join(WAYS) + " |", "|---|" + "---|" * len(WAYS)]
    for count in RATINGS:
        cells = []
        for way in WAYS:
            found = [row["srcc"] for row in rows if row["ratings"] == count and row["way"] == way]
            clean, noisy = [srcc[0] for srcc in found], [srcc[2] for srcc in found]
            cells.append(f"{statistics.mean(clean):.3f} ({min(clean):.3f}-{max(clean):.3f}), sigma 1: {statistics.mean(noisy):.3f}")
        lines.append(f"| {count} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
