"""What a whole run of train_leco_score.py costs, by part: U-Net evaluations, VAE pictures, scores, seconds, memory.

    python -m benchmarks.run
    python -m benchmarks.run --cases shapes --max_train_steps 40
    python -m benchmarks.run --config_file my_slider.toml --out my_run.json

Cases: `shapes`, the example on the embedded model; `defaults`, the script's defaults on that model; `sd15` and `sdxl`, the examples for
those on a tiny model of the family with random weights and latents of 8 x 8. There only the counts say something: how often a row goes
through the U-Net does not depend on how wide it is. (How early a run stops, and how many strengths calibration tries, does depend on the
slider.) Words that are not named here are settings of train_leco_score.py, for every case.

Each case is a process of its own that runs the script's own `train`, and everything is counted where it happens: rows at the U-Net (one
with gradient counts 3: its backward pass is about two), pictures at the VAE's decoder and encoder (the encoder also gives the features of
the perceptual distance), latents at the scorers. What a part holds is what happens while it is the innermost one that is open.
"""

import os
import shlex
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

import train_leco_score
from benchmarks import ROOT, argument_parser, markdown_table
from benchmarks.meter import Counts, Meter, environment
from benchmarks.random_models import PROMPTS
from benchmarks.shapes_runs import MODEL, learned_scorer, write_results, written_prompts
from library.models.config import ModelConfig
from library.settings.cli import parse_config, run_main
from library.slider_training.files import SliderFiles
from library.slider_training.monitor import Monitor
from library.slider_training.previews import Previews
from library.training.runtime import create_accelerator

FOLDER = ROOT / "output" / "runs"
LOAD, PROMPT, TRAIN, OBSERVE, FINISH, PREVIEW, SAVE = PARTS = (
    "load",
    "encode prompts",
    "train",
    "measure while training",
    "measure at the end",
    "previews",
    "save",
)
COLUMNS = ("part", "U-Net evaluations", "share", "a sample", "decoded", "encoded", "scored", "seconds", "peak GiB")


def watch(meter: Meter) -> Counter[str]:
    """Hook the meter into the script and the library, for the rest of this process -> "updates" of training, as they come."""
    counter: Counter[str] = Counter()

    def watch_model(model: Any) -> None:
        meter.count_unet(model.unet)
        meter.count_calls(model.vae.encoder.conv_in, "encoded")
        meter.wrap(model, "encode_prompts", PROMPT)
        decode = model.vae.decode  # not one of its modules, which could be called once a tile

        def counted(latents: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            meter.current.decoded += len(latents)
            return decode(latents, *args, **kwargs)

        model.vae.decode = counted

    def watch_scorers(made: Any) -> None:
        for scorer in made.context.reward.scorers:
            for member in getattr(scorer, "scorers", [scorer]):  # of an ensemble
                meter.count_calls(getattr(member, "backbone", member), "scored")

    def updated(*args: Any) -> None:
        counter["updates"] += meter.open[-1] == TRAIN

    meter.wrap(ModelConfig, "load", LOAD, watch_model)
    meter.wrap(train_leco_score, "prepare", LOAD, watch_scorers)
    meter.wrap(Monitor, "observe", OBSERVE)
    meter.wrap(Monitor, "finish", FINISH)
    meter.wrap(Previews, "write", PREVIEW)
    meter.wrap(SliderFiles, "save", SAVE)
    meter.wrap(SliderFiles, "save_state", SAVE)
    register_optimizer_step_post_hook(updated)
    return counter


@dataclass(frozen=True)
class Case:
    """A run: the words of its command line; `counts_only` where the model is not one that anybody trains on."""

    name: str
    words: tuple[str, ...]
    counts_only: bool = False


def measure(case: Case) -> dict[str, Any]:
    """Run a case and count. Plain JSON values. To be called once in a process, for its hooks stay."""
    meter = Meter(TRAIN, divisible=(LOAD, TRAIN))
    with tempfile.TemporaryDirectory() as folder:
        config = parse_config(train_leco_score.leco_score_config(), [*case.words, "--output_dir", folder])
        counter = watch(meter)
        train_leco_score.train(config)
        meter.close()
    found = {name: meter.parts.get(name, Counts()) for name in PARTS}
    for name in ("unet_rows", "unet_rows_with_gradient"):  # the trajectories that training starts with are made while all is loaded
        setattr(found[TRAIN], name, getattr(found[TRAIN], name) + getattr(found[LOAD], name))
        setattr(found[LOAD], name, 0)
    parts = {name: asdict(counts) | {"evaluations": counts.evaluations} for name, counts in found.items()}
    samples = counter["updates"] * config.rollout.batch_size * config.training.gradient_accumulation_steps
    total = sum(part["evaluations"] for part in parts.values())
    return {
        "case": case.name,
        "counts_only": case.counts_only,
        "words": [word.removeprefix(f"{ROOT}{os.sep}") for word in case.words],
        "max_train_steps": config.training.max_train_steps,
        "updates": counter["updates"],
        "train_batch_size": config.rollout.batch_size,
        "graded_samples": samples,
        "evaluations": total,
        "evaluations_a_sample": total / samples,
        "share_outside_training": 1 - parts[TRAIN]["evaluations"] / total,
        "environment": environment(create_accelerator(config.training)),
        "parts": parts,
    }


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: a table for each case, a row for each part that did something."""
    texts = []
    for row in rows:
        count, batch = row["updates"], row["train_batch_size"]
        kind = "; tiny model with random weights, so only the counts say something" if row["counts_only"] else ""
        steps = f"{count} of {row['max_train_steps']} steps"
        texts.append(f"**{row['case']}**: {steps}, batch {batch}, {row['graded_samples']:,} graded samples{kind}.")
        whole = {
            key: sum(part[key] for part in row["parts"].values()) for key in ("evaluations", "decoded", "encoded", "scored", "seconds")
        }
        peaks = {key: max(part[key] for part in row["parts"].values()) for key in ("peak_resident", "peak_cuda")}
        lines = [_cells(name, part, row) for name, part in {**row["parts"], "**whole run**": whole | peaks}.items()]
        texts.append(markdown_table(COLUMNS, lines))
    return "\n\n".join(texts)


def _cells(name: str, part: Mapping[str, Any], row: Mapping[str, Any]) -> list[str]:
    evaluations = part["evaluations"]
    return [
        name,
        f"{evaluations:,}",
        f"{evaluations / row['evaluations']:.0%}",
        f"{evaluations / row['graded_samples']:.1f}",
        *(f"{part[key]:,}" for key in ("decoded", "encoded", "scored")),
        "-" if row["counts_only"] else f"{part['seconds']:.1f}",
        "-" if row["counts_only"] else f"{(part['peak_cuda'] or part['peak_resident']) / 2**30:.2f}",
    ]


def shapes_case(name: str, *words: str) -> Case:
    """A run on the embedded model, with a scorer of brightness that is trained if it is not there."""
    prompts, scorer = written_prompts(FOLDER / "prompts")[0], learned_scorer(FOLDER, "brightness")
    return Case(name, (*words, "--scorer", str(scorer), "--prompts_file", str(prompts)))


def tiny_case(name: str, family: str) -> Case:
    """An example's own settings, but for what needs its files or a GPU, on a tiny model with random weights."""
    from tests.helpers.tiny_leco_run import make_workplace  # the tests need not be there for the rest

    folder = FOLDER / name
    if not (folder / "model").is_dir():
        make_workplace(folder, family)
    prompts = folder / "many_prompts.txt"  # more than a measurement takes
    prompts.write_text("".join(f"{prompt}, number {number}\n" for number in range(8) for prompt in PROMPTS), encoding="utf-8")
    files = ("--pretrained_model_name_or_path", str(folder / "model"), "--scorer", str(folder / "scorer.safetensors"))
    here = ("--resolution", "64", "64", "--mixed_precision", "no", "--optimizer_type", "AdamW")
    words = ("--config_file", f"examples/{name}_slider.toml", *files, "--prompts_file", str(prompts), *here)
    return Case(name, words, counts_only=True)


CASES: dict[str, Callable[[], Case]] = {
    "shapes": lambda: shapes_case("shapes", "--config_file", "examples/shapes/slider.toml"),
    "defaults": lambda: shapes_case("defaults", "--pretrained_model_name_or_path", str(MODEL)),
    "sd15": lambda: tiny_case("sd15", "sd1"),
    "sdxl": lambda: tiny_case("sdxl", "sdxl"),
}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--config_file", nargs="+", type=Path, help="measure these runs in place of the cases; their output goes nowhere")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "run.json", help="JSON file; a table goes beside it")
    given, settings = parser.parse_known_args(argv)
    files = given.config_file or ()
    cases = [Case(file.stem, ("--config_file", str(file))) for file in files] if files else [CASES[name]() for name in given.cases]
    words = [word for word in (sys.argv[1:] if argv is None else argv) if word not in ("--out", str(given.out))]
    command = shlex.join(["python", "-m", "benchmarks.run", *words])
    rows = []
    for case in cases:
        whole = Case(case.name, (*case.words, *settings), case.counts_only)
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            rows.append(pool.submit(measure, whole).result() | {"command": command})
        write_results(given.out, rows, table(rows))
    print(table(rows))


if __name__ == "__main__":
    run_main(main)
