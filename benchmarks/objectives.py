"""Which estimator, which reward shape, which guard: short sliders on the shapes world, judged by the true score.

    python -m benchmarks.objectives --score size --seeds 0 1 2

Every arm trains from the same learned scorer, by train_leco_score.py itself, up to the same budget of U-Net evaluations (a backward counts
as two). Gains are in within-prompt standard deviations of the base model over held-out prompts. The judge is another kind of scorer,
trained on other drawings. An arm is a change of the defaults; what was trained and measured is kept in output/proofs and not made again.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import ROOT, argument_parser, markdown_table
from benchmarks.proofs.runs import OUTPUT, PLAIN, measure, slider
from benchmarks.shapes_runs import learned_from_few, learned_scorer, write_results
from examples.shapes.scores import SCORES
from library.measuring.statistics import bootstrap_means, linear_fit
from library.models.packed import PACKERS
from library.objectives.estimator import ESTIMATORS
from library.objectives.reward_shapes import SHAPES
from library.objectives.score import ScoreConfig
from library.training.checkpoints import weights_path
from library.training.tracking import read_metrics

GROUPS = ("estimators", "shapes", "guards", "hackable", "evaluations", "quantised")
WEIGHTS = (-2.0, -1.0, 0.0, 1.0, 2.0)
BASE, MINUS, PLUS = (WEIGHTS.index(value) for value in (0.0, -1.0, 1.0))
FEWEST = 32  # evaluations of an update of 8 trajectories
EVERY = 10  # updates, after which a file is saved
HACKABLE_PREFIX = "100 ratings, "
DEFAULT = f"{ScoreConfig().score_estimator} + {ScoreConfig().reward_loss}"
GUARDS: dict[str, dict[str, Any]] = {
    "no preservation": {"preserve_weight": 0.0},
    "no preservation, linear": {"preserve_weight": 0.0, "reward_loss": "linear"},
    "preserve 1": {"preserve_weight": 1.0},
    "preserve 10": {"preserve_weight": 10.0},
    "ensemble": {"scorer": "ensemble"},
}
EVALUATIONS: dict[str, dict[str, Any]] = {
    "every step": {"uncond_every_n_steps": 1},
    "uncond 3": {"uncond_every_n_steps": 3},
}
# With the scorer of 100 ratings, from no guard to the defaults and beyond.
HACKABLE: dict[str, dict[str, Any]] = {
    "no guards": {"reward_loss": "linear", "preserve_weight": 0.0},
    "hinge alone": {"preserve_weight": 0.0},
    "preserve 3 alone": {"reward_loss": "linear"},
    "preserve 1": {"preserve_weight": 1.0},
    "ensemble": {"scorer": "few_ensemble"},
}
SCORERS: Mapping[str, Callable[[str], Path]] = {
    "scorer": lambda score: learned_scorer(OUTPUT, score),
    "ensemble": lambda score: learned_scorer(OUTPUT, score, name="ensemble", head_members=4),
    "few": lambda score: learned_from_few(OUTPUT, score, name="few"),
    "few_ensemble": lambda score: learned_from_few(OUTPUT, score, name="few_ensemble", head_members=4),
}


def arms(groups: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Arms by name: settings that differ from the defaults."""
    estimators = {f"{estimator} + hinge": {"score_estimator": estimator} for estimator in ESTIMATORS}
    shaped = [(estimator, shape) for shape in SHAPES if shape != "hinge" for estimator in ESTIMATORS]
    few = estimators | {f"{DEFAULT}, {name}": changes for name, changes in HACKABLE.items()}
    found = {
        "estimators": estimators,
        "shapes": {f"{estimator} + {shape}": {"score_estimator": estimator, "reward_loss": shape} for estimator, shape in shaped},
        "guards": {f"{DEFAULT}, {name}": changes for name, changes in GUARDS.items()},
        "evaluations": {f"{DEFAULT}, {name}": changes for name, changes in EVALUATIONS.items()},
        "quantised": {f"{DEFAULT}, base weights {name}": {"quantize_base": name} for name in PACKERS},
        "hackable": {f"{HACKABLE_PREFIX}{name}": {"scorer": "few", **changes} for name, changes in few.items()},
    }
    return {name: changes for group in groups for name, changes in found[group].items()}


def run(score: str, name: str, changes: Mapping[str, Any], seed: int, budget: int) -> dict[str, Any]:
    """Train one slider, measure it where the budget is spent, and its gain on the way. Gains of every pair are kept [P, S, M]."""
    settings = {**PLAIN, "max_train_steps": budget // FEWEST // EVERY * EVERY, "save_every_n_steps": EVERY, "seed": seed, **changes}
    settings["scorer"] = [str(SCORERS[changes.get("scorer", "scorer")](score))]
    path = slider(f"objectives_{score}_{budget}/{name.replace(' ', '_')}_{seed}", **settings)
    spent = [entry["unet_evaluations"] or 0.0 for entry in read_metrics(path.with_suffix(".metrics.jsonl"))]
    last = max(step for step in range(EVERY, len(spent) + 1, EVERY) if spent[step - 1] <= budget)
    curve = [(0.0, 0.0)]
    for share in (0.25, 0.5, 0.75):
        step = max(EVERY, round(share * last / EVERY) * EVERY)
        quick = measure(weights_path(path.parent, path.stem, step), weights=(1.0,), count=5)
        curve.append((spent[step - 1], quick.responses[score].gains_std[-1].value))
    record = measure(weights_path(path.parent, path.stem, last), weights=tuple(w for w in WEIGHTS if w), count=10, seeds=3, judge_of=score)

    def gains(values: np.ndarray, std: float) -> np.ndarray:
        return (values - values[:, :, BASE : BASE + 1]) / std

    own = {key: response.values for key, response in record.responses.items()}
    units = {key: response.std for key, response in record.responses.items()}
    others = [gains(own[other], units[other]) for other in SCORES if other != score]
    true = gains(own[score], units[score])
    return {
        "updates": last,
        "evaluations": spent[last - 1],
        "curve": [*curve, (spent[last - 1], float(true[:, :, PLUS].mean()))],
        "true": true,
        "judge": gains(own["judge"], units["judge"]),
        # a picture that is no longer what was asked for is worth nothing
        "shown": gains(own[score] * own["caption_obeyed"], units[score]),
        "captions": own["caption_obeyed"].mean((0, 1)),
        "diversity": record.statistics["pixel_diversity"],
        "side effects": np.sqrt(np.square(others).mean((0, 1, 2))),
    }


def row(name: str, runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The table's row of one arm: means over seeds; intervals over prompts, seeds of pictures and seeds of training together."""
    rng = np.random.default_rng(0)
    pooled = {key: np.concatenate([run[key] for run in runs], axis=1) for key in ("true", "judge", "shown")}  # [P, S * runs, M]
    gains = {key: bootstrap_means(values, rng) for key, values in pooled.items()}
    cells = {f"{key} {WEIGHTS[place]:+g}": gains[key][place] for key in gains for place in (MINUS, PLUS)}
    curves = [run["true"].mean((0, 1)) for run in runs]
    beside = [side_effects_at(curve, run["side effects"], 1.0) for run, curve in zip(runs, curves, strict=True)]
    known = [value for value in beside if value is not None]
    reached = [value for value in (crossing(run["curve"], 1.0) for run in runs) if value is not None]
    return {
        "arm": name,
        "seeds": len(runs),
        **{key: [value.value, value.low, value.high] for key, value in cells.items()},
        "spread of true +1": float(np.std([curve[PLUS] for curve in curves])),
        "captions": np.mean([run["captions"] for run in runs], axis=0)[[MINUS, BASE, PLUS]].tolist(),
        "diversity": np.mean([run["diversity"] for run in runs], axis=0)[[MINUS, PLUS]].tolist(),
        "side effects": [float(np.mean(known)), min(known), max(known)] if len(known) == len(beside) else None,
        "r2": float(np.mean([linear_fit(np.array(WEIGHTS), curve)[1] for curve in curves])),
        "evaluations to +1": float(np.mean(reached)) if len(reached) == len(runs) else None,
        "reached": len(reached),
        "updates": float(np.mean([run["updates"] for run in runs])),
        "evaluations": float(np.mean([run["evaluations"] for run in runs])),
    }


def side_effects_at(gains: np.ndarray, effects: np.ndarray, level: float) -> float | None:
    """Side effects where the true gain is -level and where it is +level, the mean of the two; None where one is not reached.

    Sliders of different strength are compared at the same gain, as calibration would ship them.
    """
    found = []
    for step in (-1, 1):
        places = [BASE + step * count for count in range(BASE + 1)]
        found.append(crossing([(effects[place], step * gains[place]) for place in places], level))
    low, high = found
    return None if low is None or high is None else (low + high) / 2


def crossing(curve: Sequence[tuple[float, float]], level: float) -> float | None:
    """Where a curve of (x, gain) first reaches the gain `level`, by linear interpolation; None if it does not."""
    for (x, before), (after_x, after) in zip(curve[:-1], curve[1:], strict=True):
        if after >= level:
            return x + (level - before) / (after - before) * (after_x - x)
    return None


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """A table of the arms on the good scorer, by the true score; one of those on 100 ratings, by the score that is shown."""
    hackable = [entry for entry in rows if entry["arm"].startswith(HACKABLE_PREFIX)]
    good = [entry for entry in rows if entry not in hackable]
    short = [{**entry, "arm": entry["arm"].removeprefix(HACKABLE_PREFIX)} for entry in hackable]
    return "\n\n".join(_table(some, key) for some, key in ((good, "true"), (short, "shown")) if some)


def _table(rows: Sequence[Mapping[str, Any]], key: str) -> str:
    columns = ["arm", f"{key} gain at -1", f"{key} gain at +1", "judge at -1 / +1", "captions -1 / 0 / +1", "diversity -1 / +1", "R2"]
    columns += ["side effects at 1 std", "U-Net evaluations to +1 std", "updates", "seeds"]
    lines = []
    for entry in rows:
        low, high = ("{:+.2f} [{:+.2f}, {:+.2f}]".format(*entry[f"{key} {sign}"]) for sign in ("-1", "+1"))
        judge = f"{entry['judge -1'][0]:+.2f} / {entry['judge +1'][0]:+.2f}"
        captions = " / ".join(f"{share:.0%}" for share in entry["captions"])
        diversity = " / ".join(f"{value:.2f}" for value in entry["diversity"])
        beside = "-" if entry["side effects"] is None else "{:.2f} ({:.2f} to {:.2f})".format(*entry["side effects"])
        cost = f"not reached ({entry['reached']} of {entry['seeds']})"
        if entry["evaluations to +1"] is not None:
            cost = f"{entry['evaluations to +1']:,.0f}"
        moved = (entry["arm"], low, high, judge, captions, diversity, f"{entry['r2']:.3f}", beside)
        lines.append((*moved, cost, f"{entry['updates']:.0f}", entry["seeds"]))
    return markdown_table(columns, lines)


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--score", default="size", choices=list(SCORES))
    parser.add_argument("--groups", nargs="+", default=GROUPS, choices=GROUPS)
    parser.add_argument("--arms", nargs="+", help="only these, by name")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--budget", type=int, default=4800, help="U-Net evaluations of a run")
    parser.add_argument("--results", type=Path, help="default benchmarks/results/objectives_SCORE")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for name, changes in arms(args.groups).items():
        if not args.arms or name in args.arms:
            rows.append(row(name, [run(args.score, name, changes, seed, args.budget) for seed in args.seeds]))
            print(markdown(rows[-1:]), flush=True)
    write_results(args.results or ROOT / "benchmarks" / "results" / f"objectives_{args.score}", rows, markdown(rows))


if __name__ == "__main__":
    main()
