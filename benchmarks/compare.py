"""What a graded sample and a whole run cost in other programs, by their own step code, beside ours: FLOPs and CPU time on one U-Net.

    python -m benchmarks.compare --leco ../LECO --sd_scripts ../sd-scripts --ai_toolkit ../ai-toolkit --widths tiny published

The folders are those that you downloaded the programs to: p1atdev/LECO; kohya-ss/sd-scripts from v0.10.2 on, which has train_leco.py;
ostris/ai-toolkit, whose two slider trainers are measured. One that is not given, or does not run here, is left out with a line. A sample is
one latent with a gradient of its own. The U-Net is the tests' tiny SD1, or one of SD1.5's width (5 GB and more), with random weights and
latents of 8 x 8; the LoRAs' copies of it share its weights.

FLOPs are counted by torch where they are made, recomputation for checkpoints, LoRAs and our scorer included, and told in forwards of one
row through the U-Net. CPU time is of updates in turn with ours, in one process. Each program is measured at its own defaults, and all of
them with rank 4, 4 samples an update, 40 denoising steps and guidance 3, where a program has them.

A whole run has the program's own number of updates, or RUN_SAMPLES graded samples at equal settings. Ours adds what it measures besides, as
counted for the trainer's defaults by benchmarks.run: evaluations, decoded and encoded pictures; at its defaults it ends where that run was
stopped. Theirs measure nothing; previews are left out everywhere. What was measured before at other widths or settings is kept.
"""

import argparse
import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median, quantiles
from typing import Any
from unittest.mock import patch

import torch

from benchmarks import ROOT, markdown_table
from benchmarks import step as step_module
from benchmarks.earlier import OURS, Tree, sharing
from benchmarks.meter import Meter, count_flops, environment
from benchmarks.other_programs import BATCH, PROGRAMS, RANK, STEPS, Program, Task, their_packages
from benchmarks.random_models import random_model
from benchmarks.shapes_runs import write_results
from library.settings.cli import run_main
from library.training.runtime import create_accelerator

LATENT = 8
RUN_SAMPLES = 2000  # of a whole run at equal settings
EQUAL = f"--network_dim {RANK} --max_denoising_steps {STEPS} --leco_denoise_guidance_scale 3".split()
RANDINT = torch.randint


@contextlib.contextmanager
def counting(unet: torch.nn.Module, into: dict[str, Any]) -> Iterator[None]:
    """FLOPs, and rows through the U-Net, of what happens in the block."""
    meter = Meter("step")
    hook = meter.count_unet(unet)
    with count_flops() as counter:
        yield
    hook.remove()
    rows = {"forward": meter.current.unet_rows, "with_gradient": meter.current.unet_rows_with_gradient}
    into.update(flops=counter.get_total_flops(), rows=rows)


def ours(model: Any, scorer_size: str, equal: bool) -> tuple[step_module.Step, dict[str, Any]]:
    """The trainer's step on the model, and what it costs."""
    words = ["--random_weights", "sd1", "--scorer_size", scorer_size, "--resolution", str(8 * LATENT)]
    with patch.object(step_module, "random_model", lambda *_, **__: model):
        given, settings = step_module.parse([*words, *EQUAL * equal])
        step, config = step_module.build_step(given, [*settings, *["--train_batch_size", str(BATCH)] * equal])
    step()  # the first update moves nothing but sets up what later ones reuse
    cost: dict[str, Any] = {"samples": step.batch_size, "environment": environment(create_accelerator(config.training))}
    with counting(step.model.unet, cost):
        step()
    return step, cost


def theirs(program: Program, folder: Path, unet: Any, equal: bool, step: Callable[[], Any], pairs: int) -> dict[str, Any]:
    """Their update's cost, and the CPU seconds of each of `pairs` updates and of our step after it; or why there is none, under "error"."""
    own, cost, seconds = Tree(ROOT), dict[str, Any](), {"theirs": list[float](), "ours": list[float]()}
    own.modules = {name: module for name, module in sys.modules.items() if name.split(".")[0] in OURS}
    since, first = 0.0, contextlib.ExitStack()

    def in_turn() -> None:
        """After the first of their updates, which is counted and not timed, or after a timed one."""
        nonlocal since
        if not cost:
            first.close()
        else:
            seconds["theirs"].append(time.process_time() - since)
            since = time.process_time()
            with own.active(), patch.object(torch, "randint", RANDINT):
                step()
            seconds["ours"].append(time.process_time() - since)
        since = time.process_time()

    try:
        with their_packages(folder), first:
            first.enter_context(counting(unet, cost))
            samples = program.run(folder, Task(unet=unet, updates=pairs + 1, equal=equal, after=in_turn))
    except Exception as error:  # another program may fail in any way
        return {"error": f"does not run here: {type(error).__name__}: {error}"}
    return {**cost, "samples": samples, "seconds": seconds}


def forward_flops(model: Any) -> dict[str, int]:
    """Of one row through the U-Net without a LoRA, and of one picture through the VAE's decoder and encoder."""
    width, latents = model.unet.config["cross_attention_dim"], torch.randn(1, 4, LATENT, LATENT)
    calls = {
        "unet": lambda: model.unet(latents, torch.tensor([500]), torch.randn(1, 77, width)),
        "decoded": lambda: model.vae.decode(latents),
        "encoded": lambda: model.vae.encode(torch.randn(1, 3, 8 * LATENT, 8 * LATENT)),
    }
    found = {}
    for name, call in calls.items():
        with torch.no_grad(), count_flops() as counter:
            call()
        found[name] = counter.get_total_flops()
    return found


def beside(run: Mapping[str, Any], flops: Mapping[str, int]) -> float:
    """What a run of benchmarks.run cost outside of its training, in forwards of a row."""
    outside = [part for name, part in run["parts"].items() if name != "train"]
    evaluations, decoded, encoded = (sum(part[key] for part in outside) for key in ("evaluations", "decoded", "encoded"))
    return evaluations + (decoded * flops["decoded"] + encoded * flops["encoded"]) / flops["unet"]


def measure(width: str, equal: bool, folders: Mapping[str, Path | None], run: Mapping[str, Any], pairs: int) -> Iterator[dict[str, Any]]:
    """A row for each program, ours first."""
    torch.manual_seed(0)
    model = random_model("sd1", tiny=width == "tiny")
    model.unet.register_to_config(sample_size=LATENT)  # type: ignore[operator]
    flops, unet = forward_flops(model), sharing(model.unet)
    step, cost = ours(model, "tiny" if width == "tiny" else "base", equal)
    samples = RUN_SAMPLES if equal else run["graded_samples"]
    common = {"width": width, "equal": equal, "forward_flops": flops}
    yield {"program": "LECO score", **common, **cost, "run_samples": samples, "beside": beside(run, flops)}
    for title, program in PROGRAMS.items():
        folder = folders[program.option]
        if folder is None:
            found = {"error": f"left out: --{program.option} names no folder"}
        else:
            found = theirs(program, folder.resolve(), sharing(unet), equal, step, pairs)
            found |= {"run_samples": RUN_SAMPLES if equal else program.updates * found.get("samples", 0)}
        yield {"program": title, **common, **found}


def forwards(row: Mapping[str, Any]) -> tuple[float, float]:
    """Of a sample, and of a whole run."""
    sample = row["flops"] / row["samples"] / row["forward_flops"]["unet"]
    return sample, sample * row["run_samples"] + row.get("beside", 0.0)


def times(ratio: float) -> str:
    """With two figures."""
    return f"{float(f'{ratio:.2g}'):g}"


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: a table for each width, at the defaults and at equal settings."""
    columns = (
        "program",
        "samples an update",
        "rows through the U-Net a sample",
        "of them with gradient",
        "FLOPs a sample, in forwards of a row",
        "of ours",
        "samples a run",
        "a whole run, in thousands of forwards",
        "of ours",
        "CPU time a sample, of ours (quartiles)",
    )
    texts = []
    for width, equal in dict.fromkeys((row["width"], row["equal"]) for row in rows):
        own, *others = (row for row in rows if (row["width"], row["equal"]) == (width, equal))
        sample, run = forwards(own)
        lines = []
        for row in (own, *others):
            if "error" in row:
                lines.append([row["program"], row["error"], *[""] * (len(columns) - 2)])
                continue
            counts, (their_sample, their_run), ratio = row["samples"], forwards(row), "1" if row is own else "-"
            if row.get("seconds", {}).get("theirs"):
                pairs = zip(row["seconds"]["theirs"], row["seconds"]["ours"], strict=True)
                ratios = [(one / counts) / (other / own["samples"]) for one, other in pairs]
                low, _, high = quantiles(ratios, n=4, method="inclusive")
                ratio = f"{times(median(ratios))} x ({times(low)} to {times(high)})"
            called = [f"{row['rows'][name] / counts:.1f}" for name in ("forward", "with_gradient")]
            flops = [f"{their_sample:.1f}", f"{times(their_sample / sample)} x"]
            whole = [f"{row['run_samples']:,}", f"{their_run / 1000:.1f}", f"{times(their_run / run)} x"]
            lines.append([row["program"], counts, *called, *flops, *whole, ratio])
        title = f"**{'Equal settings' if equal else 'Defaults'}, U-Net of {'the tests' if width == 'tiny' else 'SD1.5'}.**"
        texts += [title, markdown_table(columns, lines)]
    return "\n\n".join(texts)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--leco", type=Path, help="folder of p1atdev/LECO")
    parser.add_argument("--sd_scripts", type=Path, help="folder of kohya-ss/sd-scripts")
    parser.add_argument("--ai_toolkit", type=Path, help="folder of ostris/ai-toolkit")
    parser.add_argument("--widths", nargs="+", choices=("tiny", "published"), default=["tiny"])
    parser.add_argument("--settings", nargs="+", choices=("defaults", "equal"), default=["defaults", "equal"])
    parser.add_argument("--pairs", type=int, default=8, help="of updates that are timed: 2 or more, or 0 to count FLOPs only")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results" / "compare")
    given = parser.parse_args(argv)
    os.environ["ACCELERATE_USE_CPU"] = "true"
    folders = {program.option: getattr(given, program.option) for program in PROGRAMS.values()}
    runs = json.loads((ROOT / "benchmarks" / "results" / "run.json").read_text(encoding="utf-8"))
    run = next(run for run in runs if run["case"] == "defaults")
    chosen = [(width, settings == "equal") for width in given.widths for settings in given.settings]
    written = given.results.with_suffix(".json")
    rows = json.loads(written.read_text(encoding="utf-8")) if written.exists() else []
    rows = [row for row in rows if (row["width"], row["equal"]) not in chosen]
    for width, equal in chosen:
        for row in measure(width, equal, folders, run, given.pairs):
            rows.append(row)
            write_results(given.results, rows, table(rows))
    print(table(rows))


if __name__ == "__main__":
    run_main(main)
