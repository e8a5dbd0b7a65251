"""What a slider promises, and whether its strength is under control."""

from dataclasses import replace
from itertools import product
from pathlib import Path

from benchmarks.proofs.runs import OUTPUT, SCORES, Row, plain_prompts, prompts, row, scorer, slider, written
from benchmarks.shapes_runs import learned_scorer
from library.scorers.io import load_scorer, save_scorer

SEEDS = (0, 1, 2)


def calibrated(score: str, seed: int) -> Path:
    return slider(f"calibration_{score}_{seed}", scorer=[str(scorer(score))], seed=seed)


def calibration() -> list[Row]:
    """What the file promises of +1 and -1, and what the true score says on prompts that training never saw."""
    runs = list(product(SEEDS, SCORES))
    return [row(f"{score}, seed {seed}", calibrated(score, seed), score, stops_at=1.3, count=48) for seed, score in runs]


def worlds() -> list[Row]:
    """Trainings that nobody tuned anything for: each ends calibrated, or says why not."""
    bright, steep = scorer("brightness"), OUTPUT / "brightness" / "steep.safetensors"
    tenfold = load_scorer(bright)
    tenfold.spec = replace(tenfold.spec, std=tenfold.spec.std / 10)  # its standardised score is ten times as steep
    save_scorer(steep, tenfold)
    drawings = learned_scorer(OUTPUT, "brightness", name="other_drawings", seed=2)
    others = written(OUTPUT / "prompts" / "other_prompts.txt", plain_prompts(prompts()[0])[::2])
    runs: dict[str, Row] = {
        **{f"learning rate {rate:g}": {"scorer": [str(bright)], "learning_rate": rate} for rate in (1e-4, 1e-3, 5e-3)},
        "score ten times as steep": {"scorer": [str(steep)]},
        "other drawings and prompts": {"scorer": [str(drawings)], "prompts_file": str(others)},
    }
    paths = {name: slider(f"worlds_{name.replace(' ', '_')}", **changes) for name, changes in runs.items()}
    return [row(name, path, "brightness", stops_at=1.3, count=16) for name, path in paths.items()]
