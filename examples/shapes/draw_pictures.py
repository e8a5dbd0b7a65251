"""Draw a folder of rated pictures: what train_latent_scorer.py learns a score from.

    python -m examples.shapes.draw_pictures --output_dir output/shapes/pictures --count 2000 --score brightness

Writes PNG files and `ratings.csv` with the columns path, score (the true score of the pixels), prompt and label (the
shape, for pretraining), and two prompt lists that share no line: `prompts.txt` to train a slider on and
`held_out_prompts.txt` to judge it on.
"""

import argparse
import csv
import random
from pathlib import Path

from tqdm import tqdm

from examples.shapes.pictures import to_pixels
from examples.shapes.scores import SCORES
from examples.shapes.world import caption, draw, random_scene

NUM_PROMPTS = 256


def write_ratings(output_dir: Path, count: int, score: str, seed: int) -> Path:
    """Draw `count` pictures and rate them; returns the path of ratings.csv."""
    rng = random.Random(seed)
    (output_dir / "images").mkdir(parents=True, exist_ok=True)
    path = output_dir / "ratings.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "score", "prompt", "label"])
        for index in tqdm(range(count), desc="drawing rated pictures"):
            scene = random_scene(rng)
            picture = draw(scene)
            name = f"images/{index:05d}.png"
            picture.save(output_dir / name)
            value = SCORES[score](to_pixels([picture]) / 2 + 0.5).item()
            writer.writerow([name, f"{value:.6f}", caption(scene, rng), scene.shape])
    return path


def write_prompts(output_dir: Path, seed: int) -> tuple[Path, Path]:
    """Write the training and the held-out prompts, each a line; returns their paths."""
    rng = random.Random(seed)
    prompts: dict[str, None] = {}
    while len(prompts) < 2 * NUM_PROMPTS:
        prompts[caption(random_scene(rng), rng)] = None
    lines = list(prompts)
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
