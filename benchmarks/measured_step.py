"""One training step, built from the library's parts as train_leco_score.py does, with clocks and counters around it."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from benchmarks.timing import Part, Stopwatch, peak_memory, reset_peak_memory, spread_of, synchronize, untimed
from library.errors import UserError
from library.models.base import DiffusionModel
from library.objectives.base import TrainingContext
from library.objectives.estimator import ESTIMATORS
from library.objectives.rewards import Goal, Reward
from library.objectives.score import ScoreConfig, ScoreObjective
from library.objectives.terms.score import score_rollout
from library.rollouts.config import RolloutConfig
from library.rollouts.few_step import resolve_sampling
from library.rollouts.prompt_encoder import PromptEncoder
from library.rollouts.sample import model_autocast
from library.scorers.base import SCORER_KINDS, Scorer, ScorerSpec, build_scorer
from library.settings.shared import NetworkConfig, OptimizerConfig
from library.slider_training.network import build_network
from library.training.optimizers import create_optimizer, create_scheduler
from library.training.runtime import generator
from library.types import Conditioning, LossOutput, PromptSpec

PROMPTS = [PromptSpec(prompt=f"a photo of a {thing}") for thing in ("house", "face", "dog", "street", "forest", "car", "cup", "boat")]


@dataclass(frozen=True, kw_only=True)
class StepSettings:
    """One combination of what can be measured; the names are those of the training settings, `num_steps` is max_denoising_steps."""

    batch_size: int = 1
    gradient_checkpointing: bool = False
    attention: str = "sdpa"
    torch_compile: bool = False
    score_estimator: str = "prev"
    scorer_size: str = "base"
    num_steps: int = 20
    guidance_scale: float = 5.0
    resolution: tuple[int, ...] = ()
    seed: int = 0


class MeasuredStep:
    """Everything that a training step moves, on a model that it takes over. Raises UserError for settings that cannot be had."""

    def __init__(
        self, model: DiffusionModel, accelerator: Accelerator, settings: StepSettings, network: NetworkConfig, optimizer: OptimizerConfig
    ) -> None:
        self.model, self.accelerator, self.settings, self.optimizer_config = model, accelerator, settings, optimizer
        set_attention(model, settings.attention)
        self.network = build_network(
            network, model, generator(settings.seed, "network"), gradient_checkpointing=settings.gradient_checkpointing
        )
        groups, _ = self.network.prepare_optimizer_params(optimizer.text_encoder_lr, optimizer.unet_lr, optimizer.learning_rate)
        self.optimizer = accelerator.prepare(create_optimizer(optimizer, groups))
        self.scheduler = create_scheduler(optimizer, self.optimizer.optimizer, 1000)
        rollout = RolloutConfig(
            train_batch_size=settings.batch_size,
            max_denoising_steps=settings.num_steps,
            leco_denoise_guidance_scale=settings.guidance_scale,
            resolution=settings.resolution,
        )
        config, estimator = ScoreConfig(score_estimator=settings.score_estimator), ESTIMATORS[settings.score_estimator]
        context = TrainingContext(
            model=model,
            network=self.network,
            encoder=PromptEncoder(model, self.network),
            generator=lambda name: generator(settings.seed, name),
            rollout=rollout,
            sampling=resolve_sampling(rollout, model),
            reward=Reward([Goal(scorer=untrained_scorer(model, settings.scorer_size))]),
            prompts=PROMPTS,
            settings={settings.score_estimator: estimator.config_class and estimator.config_class()},
        )
        self.rollout, self.objective, self.views = (
            score_rollout(context, config),
            ScoreObjective(context, config),
            context.generator("views"),
        )

    def __call__(self, part: Part) -> LossOutput:
        with part("belt batch"):
            batch = self.rollout.next_batch()
        with part("objective"), model_autocast(self.model), timed_predictions(self.model, part):
            out, eps = self.objective(batch, self.views)
        with part("backward"):
            self.accelerator.backward(out.loss)
        with part("advance"):
            self.rollout.advance(eps)
        with part("optimizer"):
            if self.optimizer_config.max_grad_norm:
                self.accelerator.clip_grad_norm_(self.network.parameters(), self.optimizer_config.max_grad_norm)
            self.optimizer.step()
            self.scheduler.step()
            self.optimizer.zero_grad()
        return out


def measure(step: MeasuredStep, *, warm_up_steps: int, timed_steps: int) -> dict[str, Any]:
    """Run a step warm_up_steps + 2 timed_steps times and once more before that, to count; plain JSON values.

    Raises:
        UserError: a loss was not finite.
    """
    device, batch_size = step.model.device, step.settings.batch_size
    count_agrees = _counted(step)
    if step.settings.torch_compile:
        torch.compiler.reset()  # of what an earlier measurement compiled
        step.model.unet.compile()  # after the counting: its hook is no part of what is compiled
    reset_peak_memory(device)
    evaluations_before, losses = step.model.num_unet_evaluations, []

    def timed(part: Part) -> float:
        start = time.perf_counter()
        out = step(part)
        synchronize(device)
        losses.append(out.sample_losses)
        return time.perf_counter() - start

    warm_up = [timed(untimed) for _ in range(warm_up_steps)]
    whole = [timed(untimed) for _ in range(timed_steps)]
    parts: list[dict[str, float]] = []
    for _ in range(timed_steps):
        stopwatch = Stopwatch(device)
        timed(stopwatch.part)
        parts.append(_named_parts(stopwatch.seconds))
    if not torch.cat(losses).isfinite().all():
        raise UserError("the loss is not finite: the times say nothing")
    evaluations = step.model.num_unet_evaluations - evaluations_before
    step_seconds = spread_of(whole)
    return {
        "samples_per_second": batch_size / step_seconds["median"],
        "step_seconds": step_seconds,
        "part_seconds": {name: spread_of([seconds[name] for seconds in parts]) for name in parts[0]},
        "warm_up_seconds": warm_up,
        "unet_evaluations_per_sample": evaluations / (batch_size * len(losses)),
        "count_agrees": count_agrees,
        "peak_memory_bytes": peak_memory(device),
    }


def set_attention(model: DiffusionModel, name: str) -> None:
    """`DiffusionModel.set_attention`, which falls back to sdpa with a warning; a measurement must not. Raises UserError."""
    model.set_attention(name)
    if name == "xformers" and not all("XFormers" in type(processor).__name__ for processor in model.unet.attn_processors.values()):
        raise UserError("xformers cannot be used here; install it with pip install xformers on a machine with an NVIDIA GPU")


def untrained_scorer(model: DiffusionModel, size: str) -> Scorer:
    """A latent ResNet of the model's VAE, on its device."""
    architecture = SCORER_KINDS["latent_resnet"].preset(size) | {"in_channels": model.spec.latent_channels}
    scorer = build_scorer(ScorerSpec(kind="latent_resnet", architecture=architecture, vae=model.vae_fingerprint()))
    return scorer.requires_grad_(False).eval().to(model.device)


@contextmanager
def timed_predictions(model: DiffusionModel, part: Part) -> Iterator[None]:
    """Every prediction inside the block is a part, by whether it carries gradient."""
    predict = model.predict_eps

    def timed(latents: Tensor, timesteps: Tensor, cond: Conditioning) -> Tensor:
        with part("graded forward" if torch.is_grad_enabled() else "no-grad predictions"):
            return predict(latents, timesteps, cond)

    model.predict_eps = timed
    try:
        yield
    finally:
        del model.predict_eps  # the class's own again


def _named_parts(seconds: dict[str, float]) -> dict[str, float]:
    """What an objective does besides predicting is the score and its gradient (and two sums over latents)."""
    predictions = {name: seconds[name] for name in ("no-grad predictions", "graded forward")}
    score = seconds["objective"] - sum(predictions.values())
    rest = {name: seconds[name] for name in ("backward", "optimizer", "advance")}
    return {"belt batch": seconds["belt batch"], **predictions, "score and its gradient": score, **rest}


def _counted(step: MeasuredStep) -> bool:
    """Run one step; whether the U-Net saw as many rows as the model has counted (a backward counts as two forwards)."""
    rows, before = 0, step.model.num_unet_evaluations

    def count(module: torch.nn.Module, args: tuple) -> None:
        nonlocal rows
        rows += len(args[0]) * (3 if torch.is_grad_enabled() else 1)

    hook = step.model.unet.register_forward_pre_hook(count)
    try:
        step(untimed)
    finally:
        hook.remove()
    return rows == step.model.num_unet_evaluations - before
