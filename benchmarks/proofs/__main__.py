"""Is the slider honest? Trainings on the shapes world that show, by the true score, what the objective's parts are for.

    python -m benchmarks.proofs calibration other_draws running_gain elsewhere worlds full_width both_ends
    python -m benchmarks.proofs hacking opposites two_scores leco text_free

calibration  three scores, three seeds: what the file promises of +1 and -1, the true gain on prompts that training never saw
other_draws  how far off the truth those promises would be, had other prompts and seeds measured them
running_gain  what those runs' running gain said before each observation, and what that measured
elsewhere    one of them at other guidance scales, samplers and numbers of steps
worlds       other learning rates, a score ten times as steep, other drawings and prompts
full_width   a full-width SD1.5 with random weights, at 64 pixels
both_ends    with and without more trajectories for the weaker sign
hacking      a scorer of 100 ratings, with and without the guards, watched by independent judges
opposites    "large" at direction +1 and "small" at direction -1 in one prompt file
two_scores   one score raised, another held, with and without the hold
leco         a prompt file of sd-scripts, alone and mixed with a score
text_free    a slider that learned on pictures without captions
Every run is train_leco_score.py's own, with the settings of examples/shapes/slider.toml where none are named. Gains are in within-prompt
standard deviations of the base model, by functions of pixels, on held-out prompts.
"""

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import ROOT, markdown_table
from benchmarks.proofs import objective, strength
from benchmarks.proofs.runs import SCORES, Row

PROOFS: dict[str, Callable[[], list[Row]]] = {
    proof.__name__: proof
    for proof in (
        *(strength.calibration, strength.other_draws, strength.running_gain, strength.elsewhere),
        *(strength.worlds, strength.full_width, strength.both_ends),
        *(objective.hacking, objective.opposites, objective.two_scores, objective.leco, objective.text_free),
    )
}
COLUMNS = {"promised -1": "promised at -1", "true -1": "true gain at -1", "promised +1": "promised at +1", "true +1": "true gain at +1"}
COLUMNS |= {"off -1": "promised over true at -1, less 1", "off +1": "at +1"}
COLUMNS |= {"other -1": "other score at -1", "other +1": "at +1", "running": "running gain", "measured": "measured", "step": "step"}
COLUMNS |= {"trained to": "measured last in training at -1 / +1, of what stops it"}
COLUMNS |= {"captions": "captions at -1 / 0 / +1", "told apart": "told from base at -1 / +1", "says": "says"}


def markdown(proof: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """A table of one proof."""

    def cell(name: str, value: Any) -> str:
        if name in ("captions", "told apart", "trained to"):
            return " / ".join(f"{share:.0%}" for share in value)
        if name in ("off -1", "off +1"):
            return ", ".join(f"{error:+.0%}" for error in value)
        if isinstance(value, list):
            return "{:+.2f} [{:+.2f}, {:+.2f}]".format(*value)
        return f"{value:+.2f}" if isinstance(value, float) else f"{value}"

    shown = [name for name in COLUMNS if any(name in row for row in rows)]
    lines = [[row["run"], *(cell(name, row[name]) if name in row else "" for name in shown)] for row in rows]
    text = f"### {proof}\n\n{markdown_table(['run', *(COLUMNS[name] for name in shown)], lines)}"
    if proof == "running_gain":
        held = sum(row["running"][1] <= row["measured"] <= row["running"][2] for row in rows)
        text += f"\n\nThe interval held what was measured {held} times of {len(rows)}."
    if proof == "other_draws":
        for score in SCORES:
            errors = np.array([row[end] for row in rows if row["run"].startswith(score) for end in ("off -1", "off +1")])
            off, close = np.sqrt(np.square(errors).mean()), (abs(errors) <= 0.15).mean()
            text += f"\n\n{score}: {off:.0%} off (root mean square), within 15 % at {close:.0%} of {errors.size} ends."
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("proofs", nargs="*", default=list(PROOFS), help=", ".join(PROOFS))
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results" / "proofs")
    args = parser.parse_args()
    torch.set_num_threads(1)
    kept = json.loads(args.results.with_suffix(".json").read_text(encoding="utf-8")) if args.results.with_suffix(".json").is_file() else {}
    args.results.parent.mkdir(parents=True, exist_ok=True)
    for proof in args.proofs:
        kept[proof] = PROOFS[proof]()
        args.results.with_suffix(".json").write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
        print(markdown(proof, kept[proof]), flush=True)
    text = "\n\n".join(markdown(proof, rows) for proof, rows in kept.items())
    args.results.with_suffix(".md").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
