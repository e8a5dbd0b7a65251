"""Is the slider honest? Trainings on the shapes world that show, by the true score, what the objective's parts are for.

    python -m benchmarks.proofs calibration running_gain elsewhere hacking opposites two_scores leco early_stop text_free

calibration  three scores, three seeds: what the file promises of +1 and -1, the true gain on prompts that training never saw
hard_calibration  the same of two that a scorer learns less well
running_gain  what those runs' running gain said before each observation, and what that measured
elsewhere    one of them at other guidance scales, samplers and numbers of steps
worlds       other learning rates, a score ten times as steep, other drawings and prompts, a full-width SD1.5 with random weights
hacking      a scorer of 100 ratings, with and without the guards, watched by independent judges
opposites    "large" at direction +1 and "small" at direction -1 in one prompt file
two_scores   one score raised, another held, with and without the hold
leco         a prompt file of sd-scripts, alone and mixed with a score
early_stop   a run that would have ended worse, with and without judges
text_free    a slider that learned on pictures without captions
Every run is train_leco_score.py's own, with the settings of examples/shapes/slider.toml where none are named. Gains are in within-prompt
standard deviations of the base model, by functions of pixels, on held-out prompts.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from benchmarks import ROOT
from benchmarks.random_models import random_model, untrained_scorer
from benchmarks.shapes_runs import MODEL, drawn_pictures, independent_judge, learned_from_few, learned_scorer, written_prompts
from library.measuring.judges import Judges
from library.measuring.measure import Measurer, Raters, seed_table
from library.measuring.record import EvaluationRecord
from library.models.loading import load_model
from library.prompts.files import load_prompts, spread
from library.rollouts.sample import SamplingConfig
from library.scorers.io import load_scorer, save_scorer
from library.scorers.judges import load_judge
from library.settings.cli import read_config_file
from library.settings.options import build, options
from library.training.tracking import read_metrics
from networks.lora import create_network_from_weights
from train_leco_score import leco_score_config, train

OUTPUT = ROOT / "output" / "proofs"
scorer, prompts = partial(learned_scorer, OUTPUT), partial(written_prompts, OUTPUT / "prompts")
CAPTIONS = "examples.shapes.judge:caption_obeyed"
SIZE_SHOWN = "examples.shapes.judge:size_shown"
Row = dict[str, Any]


def judge_name(score: str) -> str:
    return f"examples.shapes.scores:{score}"


def slider(name: str, **changes: Any) -> Path:
    """Train a slider, or take the one that is there."""
    folder = OUTPUT / name
    path = folder / "slider.safetensors"
    if not path.is_file():
        defaults = read_config_file(ROOT / "examples" / "shapes" / "slider.toml", options(leco_score_config()))
        settings = {**defaults, "prompts_file": str(prompts()[0]), "calibrate": 1.0, "sample_every_n_steps": "", "num_threads": 1}
        settings |= {"output_dir": str(folder), "output_name": "slider", **changes}
        train(build(leco_score_config(), settings))
    return path


@cache
def measurer(
    judges: tuple[str, ...], prompts_file: Path, count: int, seeds: int, guidance: float = 3.0, sampler: str = "ddim", num_steps: int = 20
) -> Measurer:
    """One for all sliders that are measured alike, so that the base model's pictures are made once."""
    found = spread(load_prompts(prompts_file), count)
    return Measurer(
        model=load_model(str(MODEL)).freeze(),
        raters=Raters(judges=Judges({name.rpartition(":")[2]: load_judge(name) for name in judges})),
        prompts=found,
        seeds=seed_table(found, seeds, first=50_000),
        sampling=SamplingConfig(num_steps=num_steps, guidance_scale=guidance, size=(64, 64), sampler=sampler),
    )


def measure(
    path: Path,
    judges: Sequence[str],
    prompts_file: Path,
    multipliers: Sequence[float] = (-1.0, 1.0),
    count: int = 16,
    seeds: int = 4,
    **sampling: Any,
) -> EvaluationRecord:
    """What a slider does on `count` prompts with so many seeds each, by judges; kept beside it."""
    name = "_".join([prompts_file.stem, *map(str, sampling.values())])
    kept = path.with_name(f"measured_{name}.json")
    if kept.is_file():
        return EvaluationRecord.from_dict(json.loads(kept.read_text(encoding="utf-8")))
    used = measurer(tuple(judges), prompts_file, count, seeds, **sampling)
    model = used.model
    network, _ = create_network_from_weights(1.0, path, model.vae, model.text_encoders, model.unet, for_inference=True)
    network.apply_to(model.text_encoders, model.unet)
    try:
        record = used.measure(network, multipliers)
    finally:
        network.remove()
    kept.write_text(json.dumps(record.to_dict()), encoding="utf-8")
    return record


def gain(record: EvaluationRecord, name: str, multiplier: float) -> list[float]:
    """Gain and its interval at a multiplier."""
    found = record.responses[name].gains_std[record.multipliers.index(multiplier)]
    return [found.value, found.low, found.high]


def share(record: EvaluationRecord, multiplier: float) -> float:
    """Captions obeyed at a multiplier."""
    return record.responses["caption_obeyed"].means[record.multipliers.index(multiplier)].value


def calibration(scores: Sequence[str] = ("brightness", "size", "warmth"), seeds: Sequence[int] = (0, 1, 2)) -> list[Row]:
    """What the file promises of +1 and -1, and what the true score says on prompts that training never saw."""
    rows = []
    for seed in seeds:
        for score in scores:
            path = slider(f"calibration_{score}_{seed}", scorer=[str(scorer(score))], seed=seed, calibrate="visible")
            measured = measure(path, [judge_name(score), CAPTIONS], prompts()[1], count=48, seeds=2)
            seen = [measured.visible_share(place) for place in (0, 2)]
            rows.append({"run": f"{score}, seed {seed}", **promised(path), **ends(measured, score), "told apart": seen})
    return rows


def running_gain() -> list[Row]:
    """The running gain just before each observation of those runs, and what the observation then measured; and a plot of both."""
    rows = []
    for folder in sorted(OUTPUT.glob("calibration_*_*")):
        before: Mapping[str, Any] = {}
        for entry in read_metrics(folder / "metrics.jsonl"):
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
        entries = read_metrics(folder / "metrics.jsonl")
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
    path = slider("calibration_brightness_0", scorer=[str(scorer("brightness"))], seed=0, calibrate="visible")
    others: list[dict[str, Any]] = [{"guidance": scale} for scale in (1.0, 3.0, 5.0, 8.0)]
    others += [{"sampler": "dpmpp_2m", "num_steps": 10}, {"sampler": "euler_a", "num_steps": 30}, {"sampler": "ddim", "num_steps": 50}]
    rows = []
    for sampling in others:
        measured = measure(path, [judge_name("brightness"), CAPTIONS], prompts()[1], count=16, seeds=2, **sampling)
        rows.append({"run": ", ".join(f"{name} {value}" for name, value in sampling.items()), **ends(measured, "brightness")})
    return rows


def worlds() -> list[Row]:
    """Trainings that nobody tuned anything for: each ends calibrated, or says why not."""
    bright = {"scorer": [str(scorer("brightness"))], "calibrate": "visible"}
    steep, others = OUTPUT / "brightness" / "steep.safetensors", OUTPUT / "prompts" / "other_prompts.txt"
    spec = load_scorer(scorer("brightness"))
    spec.spec = replace(spec.spec, std=spec.spec.std / 10)  # its standardised score is ten times as steep
    save_scorer(steep, spec)
    others.write_text("\n".join(plain_prompts(prompts()[1])[::2]) + "\n", encoding="utf-8")
    other_data = str(learned_scorer(OUTPUT, "brightness", name="other_drawings", seed=2))
    runs: dict[str, dict[str, Any]] = {
        **{f"learning rate {rate:g}": bright | {"learning_rate": rate} for rate in (1e-4, 1e-3, 5e-3)},
        "score ten times as steep": bright | {"scorer": [str(steep)]},
        "other drawings and prompts": bright | {"scorer": [other_data], "prompts_file": str(others)},
    }
    rows = []
    for name, changes in runs.items():
        path = slider(f"worlds_{name.replace(' ', '_')}", **changes)
        rows.append(
            {"run": name, **promised(path), **ends(measure(path, [judge_name("brightness"), CAPTIONS], prompts()[1]), "brightness")}
        )
    path = slider("worlds_sd15", **random_sd15(OUTPUT / "random_sd15"))
    return [*rows, {"run": "SD1.5, full width, random weights, 64 pixels", **promised(path)}]


def promised(path: Path) -> Row:
    """What the file says of weight +1 and -1, and in words."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    gains = {f"promised {end}": json.loads(metadata.get(f"ss_leco_gain_{name}", "null")) for end, name in (("-1", "down"), ("+1", "up"))}
    note = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))["description"]
    return {**{name: gain for name, gain in gains.items() if gain}, "says": note.partition(". ")[0]}


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
    return {"pretrained_model_name_or_path": str(folder), "scorer": [str(folder / "scorer.safetensors")], "calibrate": "visible", **short}


# What takes the guards away: the score pushes for ever, nothing holds the model, and nothing stops the run or turns back.
UNGUARDED = {
    "reward_loss": "linear",
    "preserve_weight": 0.0,
    "learning_rate": 3e-4,
    "early_stop_gain": "",
}
PLAIN = {"max_train_steps": 120, "measure": "off"}  # as trained: neither stopped, chosen nor calibrated
LONG = {"max_train_steps": 120, "calibrate": "off"}


def hacking() -> list[Row]:
    score, rows = "size", []
    judged = {"judge_scorers": [str(independent_judge(OUTPUT, score))], "judges": [CAPTIONS]}
    for name, changes in {"without guards": UNGUARDED, "default guards": {"early_stop_gain": ""}}.items():
        path = slider(f"hacking_{name.replace(' ', '_')}", scorer=[str(learned_from_few(OUTPUT, score))], **LONG, **judged, **changes)
        measured = measure(path, [SIZE_SHOWN, CAPTIONS], prompts()[1])
        rows.append({"run": name, **ends(measured, "size_shown"), "path": trail(path.parent)})
    return rows


def early_stop() -> list[Row]:
    """The unguarded run again; now judges may choose its step, and it may stop once it is strong enough."""
    score, rows = "size", []
    judged = {"judge_scorers": [str(independent_judge(OUTPUT, score))], "judges": [CAPTIONS]}
    for name, (folder, changes) in {
        "as trained, nothing measured": ("early_stop_off", {**UNGUARDED, "measure": "off"}),
        "best step kept by judges": ("hacking_without_guards", UNGUARDED),
        "stopped at a gain of 1.3, best step kept": ("early_stop_gain", {**UNGUARDED, "early_stop_gain": 1.3}),
    }.items():
        path = slider(folder, scorer=[str(learned_from_few(OUTPUT, score))], **LONG, **judged, **changes)
        measured = measure(path, [SIZE_SHOWN, CAPTIONS], prompts()[1])
        rows.append({"run": name, **ends(measured, "size_shown"), "path": trail(path.parent)})
    return rows


def opposites() -> list[Row]:
    """One file with "large" at +1 and "small" at -1: at weight +1 what is to be large is larger, and what is to be small is smaller."""
    folder = OUTPUT / "opposites"
    folder.mkdir(parents=True, exist_ok=True)
    plain, plain_held_out = (plain_prompts(path) for path in prompts())
    file, files = folder / "prompts.txt", {}
    lines = [f"{_sized(text, word)} --direction {sign}" for text in plain[:64] for word, sign in (("large", 1), ("small", -1))]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    for word in ("large", "small"):
        files[word] = folder / f"held_out_{word}.txt"
        files[word].write_text("\n".join(_sized(text, word) for text in plain_held_out[:16]) + "\n", encoding="utf-8")
    path = slider("opposites", scorer=[str(scorer("size"))], prompts_file=str(file), **PLAIN)
    rows = []
    for word, held in files.items():
        measured = measure(path, [judge_name("size"), CAPTIONS], held)
        rows.append({"run": f"prompts that say {word}", **ends(measured, "size")})
    return rows


def two_scores() -> list[Row]:
    rows = []
    for raised, held in (("size", "brightness"), ("brightness", "size")):
        files = [str(scorer(raised)), str(scorer(held, name=f"{held}_held"))]
        for name, changes in {
            f"{raised} alone": {"scorer": files[:1]},
            f"{raised}, {held} held": {"scorer": files, "scorer_limits": ["none", "hold=0.1"]},
        }.items():
            path = slider(f"two_scores_{name.replace(', ', '_').replace(' ', '_')}", **PLAIN, **changes)
            measured = measure(path, [judge_name(raised), judge_name(held), CAPTIONS], prompts()[1])
            rows.append({"run": name, "raised": raised, "other": held, **ends(measured, raised), **other_ends(measured, held)})
    return rows


def text_free() -> list[Row]:
    """A slider that learned on pictures without captions, and the same on written prompts."""
    clip, adapter = OUTPUT / "clip", OUTPUT / "text_free" / "adapter.safetensors"
    rated = scorer("brightness")
    pictures = drawn_pictures(OUTPUT / "pictures_brightness_0", 2000, "brightness", 0).parent / "images"
    if not (clip / "captions.txt").is_file():
        run("-m", "examples.shapes.train_clip", "--output_dir", clip)
    if not adapter.is_file():
        files = ["--pretrained_model_name_or_path", MODEL, "--clip_model", clip, "--prompts_file", clip / "captions.txt"]
        files += ["--pictures", pictures, "--num_pictures", 500, "--output", adapter, "--num_threads", 1]
        recipe = ["--adapter_width", 256, "--max_train_steps", 200, "--learning_rate", 5e-4, "--guidance_scale", 3]
        run("tools/train_image_prompt_adapter.py", *files, *recipe)
    seen = {"image_prompts": str(pictures), "image_prompt_adapter": str(adapter), "clip_model": str(clip)}
    rows = []
    for name, changes in {"pictures without captions": seen, "written prompts": {}}.items():
        path = slider(f"text_free_{name.partition(' ')[0]}", scorer=[str(rated)], **PLAIN, **changes)
        rows.append({"run": name, **ends(measure(path, [judge_name("brightness"), CAPTIONS], prompts()[1]), "brightness")})
    return rows


def run(*words: object) -> None:
    """Another program of the repository, with this Python."""
    subprocess.run([sys.executable, *map(str, words)], check=True, cwd=ROOT)


LECO_FILE = """# As in the documentation of sd-scripts' train_leco.py: a slider in words.
[[targets]]
target_class = "{target}"
positive = "{positive}"
negative = "{negative}"
guidance_scale = 1.5
resolution = 64
multiplier = 1.0
weight = 1.0
"""


def leco() -> list[Row]:
    """A slider from words alone (small against large), from a score alone, and from both at once, on the same prompts.

    The score's preserve_weight of 3 holds the model against the words, too, so the words are given a weight of 4 beside it.
    """
    folder = OUTPUT / "leco"
    folder.mkdir(parents=True, exist_ok=True)
    seen, held_out = folder / "prompts.txt", folder / "held_out.txt"
    texts, others = (plain_prompts(path) for path in prompts())
    seen.write_text("\n".join(texts[:24]) + "\n", encoding="utf-8")
    held_out.write_text("\n".join(others[:16]) + "\n", encoding="utf-8")
    settings = [LECO_FILE.format(target=text, positive=_sized(text, "large"), negative=_sized(text, "small")) for text in texts[:24]]
    (folder / "size.toml").write_text("\n".join(settings), encoding="utf-8")
    words = {"leco_prompts_file": str(folder / "size.toml")}
    bright = {"scorer": [str(scorer("brightness"))], "prompts_file": str(seen)}
    rows = []
    for name, changes in {
        "words: size": {"prompts_file": str(folder / "size.toml"), "objective": ["leco"], "scorer": []},
        "score: brightness": bright,
        "both": {**words, **bright, "objective": ["score", "leco"], "objective_weights": ["leco=4"]},
    }.items():
        path = slider(f"leco_{name.replace(': ', '_')}", **PLAIN, **changes)
        measured = measure(path, [judge_name("size"), judge_name("brightness"), CAPTIONS], held_out)
        rows.append({"run": name, "raised": "size", "other": "brightness", **ends(measured, "size"), **other_ends(measured, "brightness")})
    return rows


def plain_prompts(path: Path) -> list[str]:
    """Those of a file that say nothing of size."""
    return [prompt.prompt for prompt in load_prompts(path) if not any(word in prompt.prompt for word in ("large", "small", "medium"))]


def ends(measured: EvaluationRecord, score: str) -> Row:
    """True gains at both ends, and captions obeyed at -1, 0 and +1."""
    captions = [share(measured, multiplier) for multiplier in (-1.0, 0.0, 1.0)]
    return {"true -1": gain(measured, score, -1.0), "true +1": gain(measured, score, 1.0), "captions": captions}


def other_ends(measured: EvaluationRecord, score: str) -> Row:
    return {"other -1": gain(measured, score, -1.0), "other +1": gain(measured, score, 1.0)}


def trail(folder: Path) -> list[Row]:
    """What the run's own measurements said: the score's and the judges' gains at +1 and -1, the hack index, captions."""
    rows = []
    for entry in read_metrics(folder / "metrics.jsonl"):
        if "hack_index" in entry:
            rows.append({name: value for name, value in entry.items() if name == "step" or "gain_at" in name or name == "hack_index"})
    return rows


def _sized(text: str, word: str) -> str:
    """ "a red circle" -> "a large red circle"; "red circle" -> "large red circle"."""
    article, _, rest = text.partition(" ")
    return f"a {word} {rest}" if article in ("a", "an") else f"{word} {text}"


PROOFS: dict[str, Callable[[], list[Row]]] = {
    "calibration": calibration,
    "hard_calibration": lambda: calibration(("contrast", "centredness"), (0,)),
    "running_gain": running_gain,
    "elsewhere": elsewhere,
    "worlds": worlds,
    "hacking": hacking,
    "opposites": opposites,
    "two_scores": two_scores,
    "leco": leco,
    "early_stop": early_stop,
    "text_free": text_free,
}


COLUMNS = {"promised -1": "promised at -1", "true -1": "true gain at -1", "promised +1": "promised at +1", "true +1": "true gain at +1"}
COLUMNS |= {"other -1": "other score at -1", "other +1": "at +1", "running": "running gain", "measured": "measured", "step": "step"}
COLUMNS |= {"captions": "captions at -1 / 0 / +1", "told apart": "told from base at -1 / +1", "says": "says"}


def markdown(proof: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """A table of one proof."""

    def cell(name: str, value: Any) -> str:
        if name in ("captions", "told apart"):
            return " / ".join(f"{share:.0%}" for share in value)
        return (
            "{:+.2f} [{:+.2f}, {:+.2f}]".format(*value)
            if isinstance(value, list)
            else f"{value:+.2f}"
            if isinstance(value, float)
            else f"{value}"
        )

    shown = [name for name in COLUMNS if any(name in row for row in rows)]
    lines = [f"### {proof}", "", f"| run | {' | '.join(COLUMNS[name] for name in shown)} |", "|" + "---|" * (1 + len(shown))]
    for row in rows:
        lines.append(f"| {row['run']} | {' | '.join(cell(name, row[name]) if name in row else '' for name in shown)} |")
    if proof == "running_gain":
        held = sum(row["running"][1] <= row["measured"] <= row["running"][2] for row in rows)
        lines.append(f"\nThe interval held what was measured {held} times of {len(rows)}.")
    return "\n".join(lines)


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
