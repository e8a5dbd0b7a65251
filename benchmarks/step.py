"""What one LECO-score training step costs: samples a second, U-Net evaluations, time by part, peak memory.

    python -m benchmarks.step --pretrained_model_name_or_path sd15.safetensors --mixed_precision bf16 --train_batch_size 1 4 8
    python -m benchmarks.step --model_family sdxl --random_weights --mixed_precision bf16 --gradient_checkpointing off on
    python -m benchmarks.step --model_family sd1 --random_weights --tiny

Every combination of the options that take several values is measured on a fresh model. A sample is one graded latent. Steps are
timed whole, with one wait for the device at the end; the parts are timed in further steps, since waiting between them costs time.
The scorer is an untrained latent ResNet: it costs what a trained one does. Left out: previews, evaluation, saving.
"""

import datetime
import gc
import importlib.metadata
import itertools
import json
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from tqdm import tqdm

from benchmarks.measured_step import MeasuredStep, StepSettings, measure
from benchmarks.random_models import random_model
from library.atomic_files import atomic_write_text
from library.errors import UserError
from library.models.base import DiffusionModel
from library.models.loading import load_model
from library.models.registry import FAMILIES
from library.objectives.estimator import ESTIMATORS
from library.settings.cli import parse_config, run_main
from library.settings.options import check_at_least, option
from library.settings.shared import NetworkConfig, OptimizerConfig, TrainingConfig
from library.training.runtime import create_accelerator, describe_device, set_num_threads, weight_dtype


@dataclass(frozen=True, kw_only=True)
class BenchmarkConfig:
    """What is measured, and where the result goes. Of the options with several values, every combination is measured."""

    pretrained_model_name_or_path: str = option("", help="Checkpoint file or diffusers folder.")
    model_family: str = option("auto", choices=("auto", *FAMILIES), help="Kind of model; auto reads it from the weights.")
    random_weights: bool = option(False, help="Measure the published size of model_family with random weights, in place of a checkpoint.")
    tiny: bool = option(False, help="With random_weights: the model of the tests, with latents of 8x8.")
    train_batch_size: tuple[int, ...] = option((1, 4), help="Batch sizes.")
    gradient_checkpointing: tuple[str, ...] = option(("off",), choices=("off", "on"), help="Without and with gradient checkpointing.")
    attention: tuple[str, ...] = option(("sdpa",), choices=("sdpa", "xformers"), help="How the U-Net computes attention.")
    mixed_precision: str = option("no", choices=("no", "fp16", "bf16"), help="Precision that the models compute in; no is float32.")
    torch_compile: bool = option(False, help="Compile the U-Net with torch.compile.")
    score_estimator: str = option("prev", choices=ESTIMATORS, help="Latents to score.")
    scorer_size: str = option("base", help="Size of the untrained scorer: tiny, small or base.")
    max_denoising_steps: int = option(20, help="Steps of the sampler's schedule.")
    leco_denoise_guidance_scale: float = option(5.0, help="Classifier-free guidance; 1 is none.")
    resolution: tuple[int, ...] = option((), help="Width and height (or one number) in pixels; default the model's own.")
    warm_up_steps: int = option(3, help="Steps before the timed ones.")
    timed_steps: int = option(5, help="Steps timed whole, and as many again timed by part.")
    seed: int = option(0, help="Seed of every random draw.")
    num_threads: int | None = option(None, help="CPU threads for torch; not set: the cores that this process may use.")
    output: Path | None = option(None, help="JSON file to write.")

    def __post_init__(self) -> None:
        check_at_least(self, 1, "max_denoising_steps", "warm_up_steps", "timed_steps", "num_threads")
        if self.random_weights == bool(self.pretrained_model_name_or_path):
            raise UserError("set either pretrained_model_name_or_path or random_weights (with model_family sd1, sd2 or sdxl)")
        if self.random_weights and self.model_family == "auto":
            raise UserError("random_weights is set and model_family is auto; say which size to measure: sd1, sd2 or sdxl")
        if self.tiny and not self.random_weights:
            raise UserError("tiny is set without random_weights; the tiny models have random weights, so set both")

    def combinations(self) -> list[StepSettings]:
        several = itertools.product(self.attention, self.gradient_checkpointing, self.train_batch_size)
        return [
            StepSettings(
                batch_size=batch_size,
                gradient_checkpointing=checkpointing == "on",
                attention=attention,
                torch_compile=self.torch_compile,
                score_estimator=self.score_estimator,
                scorer_size=self.scorer_size,
                num_steps=self.max_denoising_steps,
                guidance_scale=self.leco_denoise_guidance_scale,
                resolution=self.resolution,
                seed=self.seed,
            )
            for attention, checkpointing, batch_size in several
        ]


@dataclass(frozen=True, kw_only=True)
class Config:
    measurement: BenchmarkConfig
    network: NetworkConfig
    optimizer: OptimizerConfig


def run(config: Config) -> dict[str, Any]:
    """Measure every combination; one that fails says why under "error", and the rest goes on. The result is plain JSON values."""
    wanted = config.measurement
    set_num_threads(wanted.num_threads)
    accelerator = create_accelerator(TrainingConfig(mixed_precision=wanted.mixed_precision))
    result: dict[str, Any] = {
        "environment": environment(accelerator),
        "model": wanted.pretrained_model_name_or_path or f"{'tiny ' if wanted.tiny else ''}{wanted.model_family} with random weights",
        "mixed_precision": wanted.mixed_precision,
        "cells": [],
    }
    for settings in tqdm(wanted.combinations(), desc="measuring", unit="combination"):
        cell: dict[str, Any] = asdict(settings)
        gc.collect()  # modules with a LoRA on them are full of cycles, and two models may not fit
        try:
            cell |= _measure(config, accelerator, settings)
        except torch.OutOfMemoryError:
            cell["error"] = "out of memory"
        except UserError as error:
            cell["error"] = str(error)
        result["cells"].append(cell)
        if wanted.output is not None:
            atomic_write_text(wanted.output, json.dumps(result, indent=1))
    return result


def environment(accelerator: Accelerator) -> dict[str, str | None]:
    """Where and with what a measurement was made."""
    packages = ("torch", "diffusers", "transformers", "accelerate", "bitsandbytes", "xformers", "triton")
    return {
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "device": describe_device(accelerator),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "cuda": torch.version.cuda,
        **{package: _version(package) for package in packages},
    }


def table(result: dict[str, Any]) -> str:
    """The measurement for a terminal: a line for each combination, then its parts."""
    lines = [f"{result['model']}; {result['environment']['device']}"]
    header = ("batch", "checkpointing", "attention", "samples/s", "step s (min..max)", "evaluations/sample", "peak GiB")
    lines.append(_row(header))
    for cell in result["cells"]:
        settings = (cell["batch_size"], "on" if cell["gradient_checkpointing"] else "off", cell["attention"])
        if "error" in cell:
            lines.append(_row(settings) + f"  {cell['error']}")
            continue
        step, peak = cell["step_seconds"], cell["peak_memory_bytes"]
        measured = (
            f"{cell['samples_per_second']:.3g}",
            f"{step['median']:.3g} ({step['min']:.3g}..{step['max']:.3g})",
            f"{cell['unet_evaluations_per_sample']:.1f}" + ("" if cell["count_agrees"] else " NOT AS COUNTED"),
            "?" if peak is None else f"{peak / 2**30:.2f}",
        )
        parts = ", ".join(f"{name} {1000 * seconds['median']:.3g}" for name, seconds in cell["part_seconds"].items())
        lines += [_row((*settings, *measured)), f"    ms: {parts}"]
    return "\n".join(lines)


def _measure(config: Config, accelerator: Accelerator, settings: StepSettings) -> dict[str, Any]:
    wanted = config.measurement
    torch.manual_seed(wanted.seed)
    step = MeasuredStep(_model(wanted, accelerator), accelerator, settings, config.network, config.optimizer)
    return measure(step, warm_up_steps=wanted.warm_up_steps, timed_steps=wanted.timed_steps)


def _model(wanted: BenchmarkConfig, accelerator: Accelerator) -> DiffusionModel:
    dtype = weight_dtype(wanted.mixed_precision)
    if wanted.random_weights:
        return random_model(wanted.model_family, tiny=wanted.tiny, dtype=dtype, device=accelerator.device)
    return load_model(wanted.pretrained_model_name_or_path, family=wanted.model_family, dtype=dtype, device=accelerator.device)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _row(words: Sequence[object]) -> str:
    widths = (5, 13, 9, 9, 24, 18, 8)
    return "  ".join(str(word).ljust(width) for word, width in zip(words, widths, strict=False))


def main(argv: Sequence[str] | None = None) -> None:
    print(table(run(parse_config(Config, argv, description=__doc__))))


if __name__ == "__main__":
    run_main(main)
