"""What a slider promises, and whether its strength is under control."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from benchmarks import ROOT
from benchmarks.proofs.runs import OUTPUT, SCORES, Row, attached, measure, plain_prompts, prompts, row, scorer, slider, written
from benchmarks.random_models import random_model, untrained_scorer
from benchmarks.shapes_runs import MODEL, VAE, learned_scorer
from library.measuring.measure import Measurer, Raters, seed_table
from library.measuring.pictures import Part
from library.measuring.response_curve import curve_of
from library.models.loading import load_model
from library.prompts.files import load_prompts
from library.rollouts.sample import SamplingConfig
from library.scorers.io import load_scorer, save_scorer
from library.slider_training.pictures import NUM_PROMPTS, QUICK_SAMPLER
from library.slider_training.running_gain import RunningGain
from library.training.tracking import read_metrics
from library.types import PromptSpec

SEEDS = (0, 1, 2)


def calibrated(score: str, seed: int) -> Path:
    return slider(f"calibration_{score}_{seed}", scorer=[str(scorer(score))], seed=seed)


def calibration() -> list[Row]:
    """What the file promises of +1 and -1, and what the true score says on prompts that training never saw: many, since prompts differ more
    than seeds."""
    runs = list(product(SEEDS, SCORES))
    return [row(f"{score}, seed {seed}", calibrated(score, seed), score, stops_at=1.3, count=256, seeds=1) for seed, score in runs]


def other_draws() -> list[Row]:
    """How far off a promise is by chance: what those nine sliders would promise if other prompts and seeds measured them, over the true
    gain. A draw is of 32 prompts; a short run measures 27 to 30: 16 that observations know, and those that confirm. No two share one."""
    found = load_prompts(prompts()[0])
    count = len(found) // (2 * NUM_PROMPTS)
    draws = [range(first, len(found), count)[: 2 * NUM_PROMPTS] for first in range(count)]
    quick, rows = quick_measurer(found), list[Row]()
    for score, seed in product(SCORES, SEEDS):
        path, name = calibrated(score, seed), f"scorer of {score}"
        truth = measure(path, count=256, seeds=1).responses[score].gains_std
        ratios = []
        with attached(quick.model, path) as network:
            base = quick.base(network).scores[name]
            for draw in draws:
                record = quick.measure(network, (-1.0, 1.0), part=Part(draw, slice(0, 2)))
                gains = curve_of(record, name, base[draw]).gains
                ratios.append([gains[place] / truth[place].value for place in (0, 2)])
        errors = {"off -1": [down - 1 for down, _ in ratios], "off +1": [up - 1 for _, up in ratios]}
        rows.append({"run": f"{score}, seed {seed}", **errors})
    return rows


def quick_measurer(found: Sequence[PromptSpec]) -> Measurer:
    """Has the nine sliders' scorers, and samples as a training does for its measurements."""
    return Measurer(
        model=load_model(str(MODEL), vae=VAE).freeze(),
        raters=Raters(scorers={f"scorer of {score}": load_scorer(scorer(score)) for score in SCORES}),
        prompts=found,
        seeds=seed_table(found, 4, first=90_000),
        sampling=SamplingConfig(num_steps=20, guidance_scale=3.0, size=(64, 64), sampler=QUICK_SAMPLER, stride=2, guidance_every=2),
        pixels=False,
    )


def running_gain() -> list[Row]:
    """The running gain just before each observation of those runs, and what the observation then measured; and a plot of both."""
    rows = []
    for folder in sorted(OUTPUT.glob("calibration_*_*")):
        before: Mapping[str, Any] = {}
        for entry in read_metrics(folder / "slider.metrics.jsonl"):
            for end in ("+1", "-1"):
                low, high = before.get(f"running_gain_at_{end}_low"), before.get(f"running_gain_at_{end}_high")
                if f"gain_at_{end}" in entry and low is not None and high is not None:
                    gain = entry[f"gain_at_{end}"]
                    running = [before[f"running_gain_at_{end}"], low, high]
                    rows.append({"run": folder.name, "step": int(entry["step"] or 0) + 1, "end": end, "running": running, "measured": gain})
            before = entry if entry.get("running_gain_at_+1") is not None else before
    plot_running_gain(sorted(OUTPUT.glob("calibration_*_*")), ROOT / "docs" / "images" / "running_gain.png")
    return rows


def plot_running_gain(folders: Sequence[Path], path: Path) -> None:
    """A panel a run: the running gain with its interval over the updates, and what observations measured."""
    import matplotlib.pyplot as plt

    columns = min(3, len(folders))
    figure, axes = plt.subplots(
        -(-len(folders) // columns), columns, figsize=(4 * columns, 2.4 * -(-len(folders) // columns)), squeeze=False
    )
    for axis, folder in zip(axes.flat, folders, strict=False):
        entries = read_metrics(folder / "slider.metrics.jsonl")
        for end, colour in (("+1", "#2563eb"), ("-1", "#d97706")):
            known = [entry for entry in entries if entry.get(f"running_gain_at_{end}_low") is not None]
            steps = [entry["step"] for entry in known]
            value, low, high = ([entry[f"running_gain_at_{end}{part}"] for entry in known] for part in ("", "_low", "_high"))
            axis.fill_between(steps, low, high, color=colour, alpha=0.15, linewidth=0)
            axis.plot(steps, value, color=colour, label=f"running gain at {end}")
            seen = [entry for entry in entries if f"gain_at_{end}" in entry and entry["step"]]
            axis.plot([entry["step"] for entry in seen], [entry[f"gain_at_{end}"] for entry in seen], "o", color=colour, label="measured")
        axis.axhline(0, color="#9ca3af", linewidth=0.8)
        axis.set_ylim(-4, 4)
        axis.set_title(folder.name.removeprefix("calibration_").replace("_", ", seed "), fontsize=10)
    axes[0, 0].legend(fontsize=7, loc="upper left")
    figure.supxlabel("updates", fontsize=10)
    figure.supylabel("gain, within-prompt standard deviations", fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=80)
    plt.close(figure)


def elsewhere() -> list[Row]:
    """A slider at other guidance scales, samplers and numbers of steps than it was trained and calibrated with."""
    others: list[Row] = [{"guidance": scale} for scale in (1.0, 3.0, 5.0, 8.0)]
    others += [{"sampler": "dpmpp_2m", "num_steps": 10}, {"sampler": "euler_a", "num_steps": 30}, {"sampler": "ddim", "num_steps": 50}]
    path = calibrated("brightness", 0)
    names = [", ".join(f"{name} {value}" for name, value in sampling.items()) for sampling in others]
    return [row(name, path, "brightness", count=16, **sampling) for name, sampling in zip(names, others, strict=True)]


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


def full_width() -> list[Row]:
    """A world of another size: SD1.5 with random weights, at 64 pixels. Neither its pictures nor its score mean anything."""
    folder = OUTPUT / "random_sd15"
    path = slider("worlds_sd15", **random_sd15(folder))
    return [row("SD1.5, random weights", path, None, stops_at=1.3, model=folder, count=8, num_steps=4, guidance=1.0)]


def random_sd15(folder: Path) -> dict[str, Any]:
    """Settings for a short training of a full-width SD1.5 without weights, which is written if it is not there."""
    if not (folder / "model_index.json").is_file():
        from tests.helpers.tiny_models import save_folder  # the tests need not be there for the rest

        torch.manual_seed(0)
        model = random_model("sd1")
        save_folder(model, folder)
        save_scorer(folder / "scorer.safetensors", untrained_scorer(model, "tiny"))
    short = {
        "resolution": [64, 64],
        "max_train_steps": 8,
        "train_batch_size": 2,
        "max_denoising_steps": 4,
        "leco_denoise_guidance_scale": 1.0,
    }
    return {"pretrained_model_name_or_path": str(folder), "scorer": [str(folder / "scorer.safetensors")], **short}


def both_ends() -> list[Row]:
    """Trainings of 120 updates whose weaker sign is given more of the trajectories, and that whose signs take turns."""
    rows = []
    for seed in SEEDS:
        run = {"scorer": [str(scorer("brightness"))], "seed": seed, "max_train_steps": 120, "calibrate": "off", "early_stop_gain": ""}
        with patch.object(RunningGain, "skip", return_value=(1, 0.0)):
            turns = slider(f"both_ends_turns_{seed}", **run)
        for name, path in {"in turn": turns, "the weaker more": slider(f"both_ends_{seed}", **run)}.items():
            rows.append(row(f"{name}, seed {seed}", path, "brightness"))
    return rows
