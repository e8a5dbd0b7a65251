"""The main job from end to end on the embedded model: rate pictures, learn the score, train a slider, prove that it works.

    python -m examples.shapes.demo --score brightness --output_dir output/shapes

Each step is a command that this script prints and runs; the same commands do the same work on a real checkpoint. The
pictures are rated by a true score (a function of pixels). Training sees it only through those ratings; at the end it judges
the slider on held-out prompts, together with a judge of whether pictures still show the shape and colour that is asked for.
"""

import argparse
import json
import shlex
import subprocess
import sys
import time
from pathlib import Path

from examples.shapes.scores import SCORES

ROOT = Path(__file__).resolve().parents[2]


def run(title: str, *words: str | Path) -> None:
    """Announce and run one command of this repository; its failure ends the demonstration with its exit code."""
    print(f"\n== {title}\n$ python {shlex.join(map(str, words))}", flush=True)
    finished = subprocess.run([sys.executable, *map(str, words)], cwd=ROOT)
    if finished.returncode != 0:
        sys.exit(finished.returncode)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--score", choices=list(SCORES), default="brightness", help="the opinion to learn")
    parser.add_argument("--output_dir", type=Path, default=ROOT / "output" / "shapes", help="folder for all results")
    parser.add_argument("--seed", type=int, default=0, help="seed of the trainings (the pictures and the held-out prompts stay the same)")
    parser.add_argument("--scorer_kind", default="latent_resnet", help="kind of scorer; docs/guide.md says which to take")
    parser.add_argument("--scorer_size", default="tiny", help="its size")
    parser.add_argument("--scorer_steps", type=int, default=2000, help="steps of its training")
    args = parser.parse_args()

    started, output, seed = time.monotonic(), args.output_dir.resolve() / args.score, str(args.seed)
    pictures, scorer, slider = output / "pictures", output / f"{args.score}.safetensors", output / f"{args.score}_slider.safetensors"
    evaluation = output / "evaluation"
    run("1. Draw 2,000 pictures and rate them", "-m", "examples.shapes.draw_pictures", "--output_dir", pictures, "--score", args.score)
    run(
        "2. Learn the score from the ratings, in latent space",
        *("train_latent_scorer.py", "--config_file", "examples/shapes/scorer.toml", "--train_data_file", pictures / "ratings.csv"),
        *("--scorer_kind", args.scorer_kind, "--scorer_size", args.scorer_size),
        *("--max_train_steps", str(args.scorer_steps)),
        *("--output_dir", output, "--output_name", scorer.stem, "--seed", seed),
    )
    run(
        "3. Train a slider from the learned score alone",
        *("train_leco_score.py", "--config_file", "examples/shapes/slider.toml", "--scorer", scorer),
        *("--prompts_file", pictures / "prompts.txt", "--output_dir", output, "--output_name", slider.stem, "--seed", seed, "--overwrite"),
    )
    judges = [f"examples.shapes.scores:{args.score}", "examples.shapes.judge:caption_obeyed"]
    run(
        "4. Prove it on 32 held-out prompts with 4 seeds each, by the true score that training never saw",
        *("tools/evaluate_slider.py", "--config_file", "examples/shapes/evaluation.toml", "--network_weights", slider, "--scorer", scorer),
        *("--judges", *judges, "--prompts_file", pictures / "held_out_prompts.txt", "--output_dir", evaluation),
    )
    print(f"\nDone in {(time.monotonic() - started) / 60:.1f} minutes.")
    for name, path in {"LoRA": slider, "scorer": scorer, "grid": evaluation / "grid.png", "report": evaluation / "report.html"}.items():
        print(f"{name:7} {path}")
    measured = json.loads((evaluation / "evaluation.json").read_text(encoding="utf-8"))["sliders"][0]
    num_pairs = len(measured["prompts"]) * len(measured["seeds"][0])
    print(f"Measured on {num_pairs} pairs of prompt and seed; all numbers are in {evaluation / 'evaluation.json'}")


if __name__ == "__main__":
    main()
