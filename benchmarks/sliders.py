"""The bar of the main job: sliders for several scores and seeds, judged by the true score that training never saw.

    python -m benchmarks.sliders --scores brightness size --seeds 0 1 2
    python -m benchmarks.sliders --kinds latent_vit unet_encoder pixel --scores brightness --seeds 0 --results benchmarks/results/kinds

Runs the demonstration once for each score and seed and prints a table (also as Markdown and JSON, in benchmarks/results/). A gain
is in within-prompt standard deviations of the true score over the base model's seeds. A slider passes with a gain of at least 1 at
weight +1 and at most -1 at weight -1, monotone in between, shape and colour within 10 percentage points of the base model's, and a
scorer of at least 0.95 SRCC on clean held-out pictures.
"""

import itertools
import json
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks import ROOT, argument_parser, markdown_table
from benchmarks.shapes_runs import write_results
from library.measuring.record import EvaluationRecord
from library.scorers.io import load_scorer

CAPTION_JUDGE = "caption_obeyed"
# Size and steps of the kinds of scorer that are not trained as the demonstration trains its own: slower ones are given fewer steps.
SCORERS = {
    "transformers_cnn": ("resnet-tiny", 1000),
    "unet_encoder": ("base", 300),
    "latent_vit": ("tiny", 400),
    "pixel": ("tiny", 150),
}


@dataclass(frozen=True)
class Row:
    """One slider and the kind of its scorer. Gains by the true score at -1, -0.5, 0.5 and 1; captions obeyed at -1, 0 and 1, as shares."""

    kind: str
    score: str
    seed: int
    srcc: float
    gains: list[float]
    intervals: list[tuple[float, float]]
    monotone: bool
    captions: list[float]
    pairs: int

    @property
    def passed(self) -> bool:
        low, _, base, _, high = self.captions
        moves = self.gains[0] <= -1 and self.gains[-1] >= 1 and self.monotone
        return moves and self.srcc >= 0.95 and abs(low - base) <= 0.1 and abs(high - base) <= 0.1


def read_row(kind: str, score: str, seed: int, folder: Path) -> Row:
    """The row of a finished demonstration."""
    content = json.loads((folder / "evaluation" / "evaluation.json").read_text(encoding="utf-8"))
    record = EvaluationRecord.from_dict(content["sliders"][0])
    judges = [response for response in record.responses.values() if response.role == "judge"]
    captions = next(judge for judge in judges if CAPTION_JUDGE in judge.name)
    truth = next(judge for judge in judges if judge is not captions)
    table = load_scorer(folder / f"{score}.safetensors").spec.training["validation"]
    return Row(
        kind=kind,
        score=score,
        seed=seed,
        srcc=next(entry["srcc"] for entry in table if entry["sigma"] == 0),
        gains=[gain.value for gain in truth.gains_std],
        intervals=[(gain.low, gain.high) for gain in truth.gains_std],
        monotone=truth.monotone,
        captions=[mean.value for mean in captions.means],
        pairs=record.num_pairs,
    )


def markdown(rows: list[Row]) -> str:
    """The rows as a Markdown table."""
    columns = ("scorer", "score", "seed", "SRCC", "gain at -1", "at -0.5", "at +0.5", "gain at +1", "captions at -1 / 0 / +1", "passes")
    lines = []
    for row in rows:
        cells = [f"{row.gains[i]:+.2f} [{row.intervals[i][0]:+.2f}, {row.intervals[i][1]:+.2f}]" for i in (0, 1, 3, 4)]
        captions = " / ".join(f"{row.captions[i]:.0%}" for i in (0, 2, 4))
        lines.append([row.kind, row.score, row.seed, f"{row.srcc:.3f}", *cells, captions, "yes" if row.passed else "no"])
    return markdown_table(columns, lines)


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--kinds", nargs="+", default=["latent_resnet"], help="kinds of scorer")
    parser.add_argument("--scores", nargs="+", default=["brightness", "size"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--output_dir", type=Path, default=ROOT / "output" / "sliders")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results" / "sliders")
    parser.add_argument("--collect", action="store_true", help="make the table from runs that are finished already")
    args = parser.parse_args()

    rows = []
    for kind, score, seed in itertools.product(args.kinds, args.scores, args.seeds):
        folder = args.output_dir / kind / f"seed{seed}"
        if not args.collect:
            command = ["-m", "examples.shapes.demo", "--score", score, "--seed", str(seed), "--output_dir", str(folder)]
            size, steps = SCORERS.get(kind, ("tiny", 2000))
            command += ["--scorer_kind", kind, "--scorer_size", size, "--scorer_steps", str(steps)]
            subprocess.run([sys.executable, *command], cwd=ROOT, check=True)
        rows.append(read_row(kind, score, seed, folder / score))
    table = markdown(rows)
    write_results(args.results, [asdict(row) | {"passed": row.passed} for row in rows], table)
    print(table)


if __name__ == "__main__":
    main()
