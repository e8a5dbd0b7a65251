"""Which estimator, which reward shape, which guard: short sliders on the shapes world, judged by the true score.

    python -m benchmarks.objectives --score size --seeds 0 1 2
    python -m benchmarks.objectives --collect

Every arm trains from the same learned scorer with the same budget of U-Net evaluations (a backward counts as two). Gains are in
within-prompt standard deviations of the base model over held-out prompts. The judge is another kind of scorer, trained on other
drawings. An arm is a change of the defaults; finished runs are kept in output_dir/runs.jsonl and not made again.
"""

import argparse
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import ROOT, markdown_table
from benchmarks.shapes_runs import independent_judge, learned_from_few, learned_scorer, write_results, written_prompts
from benchmarks.slider_laboratory import BASE, MINUS, MULTIPLIERS, PLUS, Laboratory, Measured, crossing
from library.measuring.statistics import bootstrap_means, linear_fit
from library.models.packed import PACKERS
from library.objectives.estimator import ESTIMATORS
from library.objectives.reward_shapes import SHAPES
from library.objectives.score import ScoreConfig

GROUPS = ("estimators", "shapes", "guards", "hackable", "evaluations", "quantised")
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


def arms(groups: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Arms by name: settings that differ from the defaults."""
    estimators = {f"{estimator} + hinge": {"score_estimator": estimator} for estimator in ESTIMATORS}
    found: dict[str, dict[str, Any]] = {}
    if "estimators" in groups:
        found |= estimators
    if "shapes" in groups:
        shaped = [(estimator, shape) for shape in SHAPES if shape != "hinge" for estimator in ESTIMATORS]
        found |= {f"{estimator} + {shape}": {"score_estimator": estimator, "reward_loss": shape} for estimator, shape in shaped}
    if "guards" in groups:
        found |= {f"{DEFAULT}, {name}": changes for name, changes in GUARDS.items()}
    if "evaluations" in groups:
        found |= {f"{DEFAULT}, {name}": changes for name, changes in EVALUATIONS.items()}
    if "quantised" in groups:
        found |= {f"{DEFAULT}, base weights {name}": {"quantize_base": name} for name in PACKERS}
    if "hackable" in groups:
        few = estimators | {f"{DEFAULT}, {name}": changes for name, changes in HACKABLE.items()}
        found |= {f"{HACKABLE_PREFIX}{name}": {"scorer": "few", **changes} for name, changes in few.items()}
    return found


def prepare(folder: Path, score: str, needed: Collection[str]) -> dict[str, Path]:
    """The needed scorers: "scorer", "ensemble" of four heads, "few" ratings, "few_ensemble", "judge"."""
    makers: dict[str, Callable[[], Path]] = {
        "scorer": lambda: learned_scorer(folder, score),
        "ensemble": lambda: learned_scorer(folder, score, name="ensemble", head_members=4),
        "few": lambda: learned_from_few(folder, score, name="few"),
        "few_ensemble": lambda: learned_from_few(folder, score, name="few_ensemble", head_members=4),
        "judge": lambda: independent_judge(folder, score),
    }
    return {name: make() for name, make in makers.items() if name in needed}


def record(name: str, seed: int, run: Mapping[str, Any], measured: Measured) -> dict[str, Any]:
    """One run as JSON values; gains of every pair are kept, for intervals over several seeds."""
    return {
        "arm": name,
        "seed": seed,
        **run,
        "true": measured.gains("true").tolist(),
        "judge": measured.gains("judge").tolist(),
        "shown": measured.gains("shown").tolist(),
        "captions": measured.values["captions"].mean((0, 1)).tolist(),
        "diversity": measured.diversity,
        "side effects": measured.side_effects().tolist(),
    }


def row(name: str, runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The table's row of one arm: means over seeds; intervals over prompts, seeds of pictures and seeds of training together."""
    rng = np.random.default_rng(0)
    keys = ["true", "judge", *(["shown"] if all("shown" in run for run in runs) else [])]
    pooled = {key: np.concatenate([np.array(run[key]) for run in runs], axis=1) for key in keys}  # [P, S * runs, M]
    gains = {key: bootstrap_means(values, rng) for key, values in pooled.items()}
    cells = {f"{key} {MULTIPLIERS[place]:+g}": gains[key][place] for key in gains for place in (MINUS, PLUS)}
    curves = [np.array(run["true"]).mean((0, 1)) for run in runs]
    beside = [side_effects_at(curve, run["side effects"], 1.0) for run, curve in zip(runs, curves, strict=True)]
    known = [value for value in beside if value is not None]
    reached = [crossing(run["curve"], 1.0, 0) for run in runs]
    seconds = [crossing(run["curve"], 1.0, 1) for run in runs]
    return {
        "arm": name,
        "seeds": len(runs),
        **{key: [value.value, value.low, value.high] for key, value in cells.items()},
        "spread of true +1": float(np.std([curve[PLUS] for curve in curves])),
        "captions": np.mean([run["captions"] for run in runs], axis=0)[[MINUS, BASE, PLUS]].tolist(),
        "diversity": np.mean([run["diversity"] for run in runs], axis=0)[[MINUS, PLUS]].tolist(),
        "side effects": [float(np.mean(known)), min(known), max(known)] if len(known) == len(beside) else None,
        "r2": float(np.mean([linear_fit(np.array(MULTIPLIERS), curve)[1] for curve in curves])),
        "evaluations to +1": None if None in reached else float(np.mean([value for value in reached if value is not None])),
        "seconds to +1": None if None in seconds else float(np.mean([value for value in seconds if value is not None])),
        "reached": sum(value is not None for value in reached),
        "updates": float(np.mean([run["updates"] for run in runs])),
        "evaluations": float(np.mean([run["evaluations"] for run in runs])),
    }


def side_effects_at(gains: np.ndarray, effects: Sequence[float], level: float) -> float | None:
    """Side effects where the true gain is -level and where it is +level, the mean of the two; None where one is not reached.

    Sliders of different strength are compared at the same gain, as calibration would ship them.
    """
    found = []
    for step in (-1, 1):
        places = [BASE + step * count for count in range(BASE + 1)]
        found.append(crossing([(effects[place], step * gains[place]) for place in places], level, 0))
    low, high = found
    return None if low is None or high is None else (low + high) / 2


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """A table of the arms on the good scorer, by the true score; one of those on 100 ratings, by the score that is shown."""
    good, hackable = [], []
    for entry in rows:
        (hackable if entry["arm"].startswith(HACKABLE_PREFIX) else good).append(entry)
    tables = [_table(good, "true")] if good else []
    if hackable:
        tables.append(_table([{**entry, "arm": entry["arm"].removeprefix(HACKABLE_PREFIX)} for entry in hackable], "shown"))
    return "\n\n".join(tables)


def _table(rows: Sequence[Mapping[str, Any]], key: str) -> str:
    columns = ["arm", f"{key} gain at -1", f"{key} gain at +1", "judge at -1 / +1", "captions -1 / 0 / +1", "diversity -1 / +1", "R2"]
    columns += ["side effects at 1 std", "U-Net evaluations to +1 std", "CPU seconds", "updates", "seeds"]
    lines = []
    for entry in rows:
        low, high = ("{:+.2f} [{:+.2f}, {:+.2f}]".format(*entry[f"{key} {sign}"]) for sign in ("-1", "+1"))
        judge = f"{entry['judge -1'][0]:+.2f} / {entry['judge +1'][0]:+.2f}"
        captions = " / ".join(f"{share:.0%}" for share in entry["captions"])
        diversity = " / ".join(f"{value:.2f}" for value in entry["diversity"])
        if entry["evaluations to +1"] is None:
            cost = f"not reached ({entry['reached']} of {entry['seeds']})", "-"
        else:
            cost = f"{entry['evaluations to +1']:,.0f}", f"{entry['seconds to +1']:.0f}"
        beside = "-" if entry["side effects"] is None else "{:.2f} ({:.2f} to {:.2f})".format(*entry["side effects"])
        moved = (entry["arm"], low, high, judge, captions, diversity, f"{entry['r2']:.3f}", beside)
        lines.append((*moved, *cost, f"{entry['updates']:.0f}", entry["seeds"]))
    return markdown_table(columns, lines)


def collect(runs_file: Path, results: Path) -> None:
    """Make the table of all finished runs."""
    lines = map(json.loads, runs_file.read_text(encoding="utf-8").splitlines())
    runs = list({(run["arm"], run["seed"]): run for run in lines}.values())  # two processes may have made the same run
    names = list(dict.fromkeys(run["arm"] for run in runs))
    rows = [row(name, [run for run in runs if run["arm"] == name]) for name in names]
    write_results(results, rows, markdown(rows))
    print(markdown(rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--score", default="size")
    parser.add_argument("--groups", nargs="+", default=GROUPS, choices=GROUPS)
    parser.add_argument("--arms", nargs="+", help="only these, by name")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--budget", type=int, default=4800, help="U-Net evaluations of a run")
    parser.add_argument("--updates", type=int, help="end after so many updates, whatever they cost")
    parser.add_argument("--output_dir", type=Path, default=ROOT / "output" / "objectives")
    parser.add_argument("--results", type=Path, help="default benchmarks/results/objectives_SCORE")
    parser.add_argument("--collect", action="store_true", help="make the table from runs that are finished already")
    args = parser.parse_args()
    folder: Path = args.output_dir / args.score
    runs_file, results = folder / "runs.jsonl", args.results or ROOT / "benchmarks" / "results" / f"objectives_{args.score}"
    if not args.collect:
        wanted = {name: changes for name, changes in arms(args.groups).items() if not args.arms or name in args.arms}
        files = prepare(folder, args.score, {"judge"} | {changes.get("scorer", "scorer") for changes in wanted.values()})
        torch.set_num_threads(1)
        laboratory = Laboratory(args.score, files["judge"], *written_prompts(folder / "prompts"))
        finished = [json.loads(line) for line in runs_file.read_text(encoding="utf-8").splitlines()] if runs_file.is_file() else []
        done = {(run["arm"], run["seed"]) for run in finished}
        for seed in args.seeds:
            for name, changes in wanted.items():
                if (name, seed) in done:
                    continue
                settings = {**changes, "scorer": [str(files[changes.get("scorer", "scorer")])]}
                run, measured = laboratory.train(settings, seed, args.budget, () if args.updates else (0.25, 0.5, 0.75), args.updates)
                with runs_file.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(record(name, seed, run, measured)) + "\n")
                gains = measured.gains("true").mean((0, 1))
                print(
                    f"{name} seed {seed}: {gains[MINUS]:+.2f} / {gains[PLUS]:+.2f}, {run['updates']} updates, {run['seconds']:.0f} s",
                    flush=True,
                )
    collect(runs_file, results)


if __name__ == "__main__":
    main()
