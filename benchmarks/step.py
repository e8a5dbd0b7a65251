"""What one training step of train_leco_score.py costs: samples a second, U-Net evaluations, time by part, peak memory.

    python -m benchmarks.step --pretrained_model_name_or_path sd15.safetensors --mixed_precision bf16 --train_batch_size 1 4 8
    python -m benchmarks.step --random_weights sdxl --mixed_precision bf16 --gradient_checkpointing off on
    python -m benchmarks.step --random_weights sd1 --tiny

All that is not named here is a setting of train_leco_score.py, and what is not set has the trainer's own default. Every combination of
the options that take several values is measured on a fresh model. A sample is one graded latent. Steps are timed whole, with one wait
for the device at the end; the parts are timed in further steps, since waiting between them costs time. The scorer is an untrained latent
ResNet: it costs what a trained one does. Left out: measurements, previews, saving (benchmarks.run has them).
"""

import argparse
import gc
import itertools
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
from accelerate import Accelerator
from torch import Tensor

from benchmarks import argument_parser
from benchmarks.meter import Counts, Meter, environment, peak_resident
from benchmarks.random_models import PROMPTS, random_model, untrained_scorer
from library.atomic_files import atomic_write_text
from library.errors import UserError
from library.models.base import DiffusionModel
from library.models.config import ModelConfig
from library.models.registry import FAMILIES
from library.rollouts.config import RolloutConfig
from library.rollouts.sample import model_autocast
from library.scorers.io import save_scorer
from library.settings.cli import parse_config, run_main
from library.slider_training.setup import LecoScoreConfig, decide_open, leco_score_config, prepare
from library.training.optimizers import create_optimizer, create_scheduler
from library.training.runtime import create_accelerator, set_num_threads, weight_dtype

PREDICT, GRADED, REST, BELT, BACKWARD, ADVANCE, OPTIMIZER = PARTS = (
    "no-grad predictions",
    "graded forward",
    "score and its gradient",  # all that an objective does besides predicting
    "belt batch",
    "backward",
    "advance",
    "optimizer",
)
Part = Callable[[str], AbstractContextManager[None]]


class Step:
    """Everything that a training step moves, as train_leco_score.py makes and moves it. Raises UserError for what cannot be had."""

    def __init__(self, config: LecoScoreConfig, accelerator: Accelerator) -> None:
        self.accelerator, self.max_grad_norm = accelerator, config.optimizer.max_grad_norm
        self.batch_size = config.rollout.batch_size
        made = prepare(config, accelerator)
        self.model, self.network, self.terms = made.model, made.network, made.terms
        check_attention(self.model, "xformers" if config.training.xformers else "sdpa")
        optimizer = config.optimizer
        groups, _ = self.network.prepare_optimizer_params(optimizer.text_encoder_lr, optimizer.unet_lr, optimizer.learning_rate)
        self.optimizer = accelerator.prepare(create_optimizer(optimizer, groups))
        self.scheduler = create_scheduler(optimizer, self.optimizer.optimizer, config.training.max_train_steps)

    def __call__(self, part: Part = nullcontext) -> Tensor:
        """One update; the loss of every sample."""
        losses = []
        for term in self.terms.values():
            with part(REST), model_autocast(self.model):
                out = term()
            with part(BACKWARD):
                self.accelerator.backward(out.loss * term.weight)
            losses.append(out.sample_losses)
        with part(OPTIMIZER):
            if self.max_grad_norm:
                self.accelerator.clip_grad_norm_(self.network.parameters(), self.max_grad_norm)
            self.optimizer.step()
            self.scheduler.step()
            self.optimizer.zero_grad()
        return torch.cat(losses)


def measure(step: Step, *, warm_up_steps: int, timed_steps: int, count: bool = True) -> dict[str, Any]:
    """Time a step; plain JSON values. `count` hooks into the U-Net, which must not be compiled then.

    Raises:
        UserError: a loss was not finite.
    """
    model, meter, losses, rows = step.model, Meter("other"), [], Counts()

    def timed(part: Part = nullcontext) -> float:
        start = time.perf_counter()
        losses.append(step(part))
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
        return time.perf_counter() - start

    already = model.num_unet_evaluations
    if count:
        rows = _rows_of(step)
    counted = model.num_unet_evaluations - already
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    already, resident = model.num_unet_evaluations, peak_resident()
    warm_up = [timed() for _ in range(warm_up_steps)]
    whole = [timed() for _ in range(timed_steps)]
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else max(resident, peak_resident())
    meter.wrap(model, "predict_eps", lambda: GRADED if torch.is_grad_enabled() else PREDICT)
    for rollout in {id(found): found for term in step.terms.values() if (found := getattr(term, "rollout", None))}.values():
        meter.wrap(rollout, "next_batch", BELT)
        meter.wrap(rollout, "advance", ADVANCE)
    parts: list[dict[str, float]] = []
    for _ in range(timed_steps):
        meter.parts.clear()
        timed(meter.part)
        parts.append({name: meter.parts.get(name, Counts()).seconds for name in PARTS})
    if not torch.cat(losses).isfinite().all():
        raise UserError("the loss is not finite: the times say nothing")
    step_seconds = _spread(whole)
    return {
        "samples_per_second": step.batch_size / step_seconds["median"],
        "step_seconds": step_seconds,
        "part_seconds": {name: _spread([seconds[name] for seconds in parts]) for name in PARTS},
        "warm_up_seconds": warm_up,
        "unet_evaluations_per_sample": (model.num_unet_evaluations - already) / (step.batch_size * len(losses)),
        "count_agrees": rows.evaluations == counted if count else None,
        "peak_memory_bytes": peak,
    }


def check_attention(model: DiffusionModel, name: str) -> None:
    """Where xformers cannot be had the model falls back to sdpa with a warning; a measurement must not. Raises UserError."""
    if name == "xformers" and not all("XFormers" in type(processor).__name__ for processor in model.unet.attn_processors.values()):
        raise UserError("xformers cannot be used here; install it with pip install xformers on a machine with an NVIDIA GPU")


def _rows_of(step: Step) -> Counts:
    """What goes through the U-Net in one step, counted there."""
    meter = Meter("step")
    hook = meter.count_unet(step.model.unet)
    try:
        step()
    finally:
        hook.remove()
    return meter.current


def _spread(seconds: list[float]) -> dict[str, float]:
    return {"median": median(seconds), "min": min(seconds), "max": max(seconds)}


def build_step(given: argparse.Namespace, settings: Sequence[str]) -> tuple[Step, LecoScoreConfig]:
    """The step that the trainer would make of these words, on a random model if `given` says so."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "prompts.txt").write_text("\n".join(PROMPTS) + "\n", encoding="utf-8")
        model_words = ["--pretrained_model_name_or_path", "random"] if given.random_weights else []
        files = ["--prompts_file", str(folder / "prompts.txt"), "--scorer", str(folder / "scorer.safetensors"), "--output_dir", name]
        config = parse_config(leco_score_config(), [*model_words, *files, "--seed", "0", *settings])
        set_num_threads(config.training.num_threads)
        accelerator = create_accelerator(config.training)
        config = decide_open(config, accelerator)
        torch.manual_seed(config.training.seed or 0)
        placed: dict[str, Any] = {"dtype": weight_dtype(accelerator.mixed_precision), "device": accelerator.device}
        model = random_model(given.random_weights, tiny=given.tiny, **placed) if given.random_weights else config.model.load(**placed)
        save_scorer(folder / "scorer.safetensors", untrained_scorer(model, given.scorer_size))
        with patch.object(ModelConfig, "load", lambda *_, **__: model):
            return Step(config, accelerator), config


def run(given: argparse.Namespace, settings: Sequence[str]) -> dict[str, Any]:
    """Measure every combination; one that fails says why under "error", and the rest goes on. The result is plain JSON values."""
    result: dict[str, Any] = {"environment": None, "settings": [*settings], "tiny": given.tiny, "cells": []}
    result["model"] = f"{'tiny ' if given.tiny else ''}{given.random_weights} with random weights" if given.random_weights else "checkpoint"
    for checkpointing, batch_size in itertools.product(given.gradient_checkpointing, given.train_batch_size):
        cell: dict[str, Any] = {"batch_size": batch_size, "gradient_checkpointing": checkpointing}
        gc.collect()  # modules with a LoRA on them are full of cycles, and two models may not fit
        torch.compiler.reset()  # of what an earlier combination compiled
        no = "" if checkpointing == "on" else "no-"
        own = ["--train_batch_size", str(batch_size), f"--{no}gradient_checkpointing"]
        try:
            step, config = build_step(given, [*own, *settings])
            result["environment"] = result["environment"] or environment(step.accelerator)
            compiled = config.training.torch_compile
            cell |= measure(step, warm_up_steps=given.warm_up_steps, timed_steps=given.timed_steps, count=not compiled)
            del step
        except torch.OutOfMemoryError:
            cell["error"] = "out of memory"
        except UserError as error:
            cell["error"] = str(error)
        result["cells"].append(cell)
        if given.output is not None:
            atomic_write_text(given.output, json.dumps(result, indent=1))
    return result


def table(result: dict[str, Any]) -> str:
    """The measurement for a terminal: a line for each combination, then its parts."""
    lines = [f"{result['model']}; {(result['environment'] or {}).get('device')}"]
    lines.append(_row(("batch", "checkpointing", "samples/s", "step s (min..max)", "evaluations/sample", "peak GiB")))
    for cell in result["cells"]:
        settings = (cell["batch_size"], cell["gradient_checkpointing"])
        if "error" in cell:
            lines.append(f"{_row(settings)}  {cell['error']}")
            continue
        step = cell["step_seconds"]
        measured = (
            f"{cell['samples_per_second']:.3g}",
            f"{step['median']:.3g} ({step['min']:.3g}..{step['max']:.3g})",
            f"{cell['unet_evaluations_per_sample']:.1f}" + (" NOT AS COUNTED" if cell["count_agrees"] is False else ""),
            f"{cell['peak_memory_bytes'] / 2**30:.2f}",
        )
        parts = ", ".join(f"{name} {1000 * seconds['median']:.3g}" for name, seconds in cell["part_seconds"].items())
        lines += [_row((*settings, *measured)), f"    ms: {parts}"]
    return "\n".join(lines)


def _row(words: Sequence[object]) -> str:
    return "  ".join(str(word).ljust(width) for word, width in zip(words, (5, 13, 9, 24, 18, 8), strict=False))


def parse(argv: Sequence[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    """This benchmark's own options, and the words for the trainer."""
    parser = argument_parser(__doc__)
    parser.add_argument("--random_weights", choices=FAMILIES, help="measure a family's published size with random weights")
    parser.add_argument("--tiny", action="store_true", help="with --random_weights: the model of the tests, with latents of 8 x 8")
    parser.add_argument("--train_batch_size", nargs="+", type=int, default=[RolloutConfig().batch_size])
    parser.add_argument("--gradient_checkpointing", nargs="+", choices=("off", "on"), default=["off"])
    parser.add_argument("--scorer_size", default="base", help="size of the untrained scorer: tiny, small or base")
    parser.add_argument("--warm_up_steps", type=int, default=3, help="steps before the timed ones")
    parser.add_argument("--timed_steps", type=int, default=5, help="steps timed whole, and as many again timed by part")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    given, settings = parser.parse_known_args(argv)
    if given.timed_steps < 1:
        raise UserError(f"timed_steps is {given.timed_steps}; give 1 or more")
    if given.tiny and not given.random_weights:
        raise UserError("tiny is set without random_weights; the tiny models have random weights, so set both")
    return given, settings


def main(argv: Sequence[str] | None = None) -> None:
    print(table(run(*parse(argv))))


if __name__ == "__main__":
    run_main(main)
