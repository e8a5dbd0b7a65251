"""Draw a folder of rated pictures: what train_latent_scorer.py learns a score from.

    python -m examples.shapes.draw_pictures --output_dir output/shapes/pictures --count 2000 --score brightness

Writes PNG files and `ratings.csv` with the columns path, score (the true score of the pixels), prompt, label (the shape),
tags, and what a crowd of raters would have said: stars (1 to 5) and votes_1 to votes_10. `pairs.csv` has as many pairs of
pictures with the crowd's preference. Two prompt lists share no line: `prompts.txt` to train a slider on and
`held_out_prompts.txt` to judge it on.
"""

import argparse
import csv
import random
from pathlib import Path

import numpy as np
from tqdm import tqdm

from examples.shapes.pictures import to_pixels
from examples.shapes.scores import SCORES
from examples.shapes.world import caption, draw, random_scene

NUM_PROMPTS = 256
RATERS = 20  # of the simulated crowd
TIE = 0.3  # mean votes nearer than this are a tie


def write_ratings(output_dir: Path, count: int, score: str, seed: int) -> Path:
    """Draw `count` pictures and rate them; returns the path of ratings.csv."""
    rng = random.Random(seed)
    (output_dir / "images").mkdir(parents=True, exist_ok=True)
    rows = []
    for index in tqdm(range(count), desc="drawing rated pictures"):
        scene = random_scene(rng)
        picture = draw(scene)
        name = f"images/{index:05d}.png"
        picture.save(output_dir / name)
        value = SCORES[score](to_pixels([picture]) / 2 + 0.5).item()
        tags = " ".join((scene.shape, scene.colour, scene.size, scene.texture, scene.background))
        rows.append([name, f"{value:.6f}", caption(scene, rng), scene.shape, tags])

    scores = np.array([float(row[1]) for row in rows])
    votes, crowd = crowd_votes(scores, seed), np.random.default_rng([seed, 2])
    means = (votes * np.arange(1, 11)).sum(1) / votes.sum(1)
    with (output_dir / "pairs.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["path_a", "path_b", "label"])
        for first, second in (crowd.choice(count, size=2, replace=False) for _ in range(count)):
            label = 0.5 if abs(means[first] - means[second]) < TIE else float(means[first] > means[second])
            writer.writerow([rows[first][0], rows[second][0], label])
    path = output_dir / "ratings.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "score", "prompt", "label", "tags", "stars", *(f"votes_{bin}" for bin in range(1, 11))])
        for row, own_votes, mean in zip(rows, votes, means, strict=True):
            writer.writerow([*row, int(np.clip(np.ceil(mean / 2), 1, 5)), *own_votes])
    return path


def crowd_votes(scores: np.ndarray, seed: int) -> np.ndarray:
    """Votes 1 to 10 of RATERS raters [N, 10]: a picture's standard score is a mark around 5.5, and each adds an error."""
    marks = 5.5 + 2 * (scores - scores.mean()) / max(scores.std(), 1e-12)  # [N]
    given = np.random.default_rng([seed, 1]).normal(marks[:, None], 1.2, (len(scores), RATERS)).round().clip(1, 10).astype(int)
    return np.stack([(given == mark).sum(1) for mark in range(1, 11)], axis=1)


def write_prompts(output_dir: Path, seed: int) -> tuple[Path, Path]:
    """Write the training and the held-out prompts, each a line; returns their paths."""
    rng = random.Random(seed)
    prompts: dict[str, None] = {}
    while len(prompts) < 2 * NUM_PROMPTS:
        prompts[caption(random_scene(rng), rng)] = None
    lines = list(prompts)
    rng.shuffle(lines)  # those that say little come up early, so that the last ones would be other prompts than the first
    paths = output_dir / "prompts.txt", output_dir / "held_out_prompts.txt"
    for path, part in zip(paths, (lines[:NUM_PROMPTS], lines[NUM_PROMPTS:]), strict=True):
        path.write_text("\n".join(part) + "\n", encoding="utf-8")
    return paths


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("output/shapes/pictures"))
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--score", choices=list(SCORES), default="brightness")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    print(f"wrote {write_ratings(args.output_dir, args.count, args.score, args.seed)}")
    print("wrote {} and {}".format(*write_prompts(args.output_dir, args.seed)))


if __name__ == "__main__":
    main()
