"""Short slider trainings on the shapes world, measured by the true score: what the benchmarks of the objective share.

Everything stays in memory: one model, one set of evaluation prompts and seeds, the base model's pictures made once.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.shapes_runs import MODEL
from examples.shapes.judge import caption_obeyed
from examples.shapes.scores import SCORES
from library.measuring.image_statistics import rms_diversity
from library.measuring.statistics import within_prompt_std
from library.models.loading import load_model
from library.models.packed import pack_unet
from library.objectives.base import TrainingContext
from library.objectives.estimator import ESTIMATORS
from library.objectives.reward_config import RewardConfig, load_reward
from library.objectives.score import ScoreConfig
from library.objectives.terms.score import ScoreTerm
from library.prompts.files import load_prompts, spread
from library.rollouts.config import RolloutConfig
from library.rollouts.few_step import resolve_sampling
from library.rollouts.prompt_encoder import PromptEncoder
from library.rollouts.sample import SamplingConfig, decode, sample
from library.scorers.base import Scorer
from library.scorers.io import load_scorer
from library.settings.options import build
from library.settings.shared import NetworkConfig
from library.slider_training.network import build_network
from library.training.runtime import generator
from library.types import PromptSpec
from networks.lora import LoRANetwork

MULTIPLIERS = (-2.0, -1.0, 0.0, 1.0, 2.0)
BASE, MINUS, PLUS = (MULTIPLIERS.index(value) for value in (0.0, -1.0, 1.0))
OTHER = "other "  # before the name of a true score that was not trained
SIZE = (64, 64)
SAMPLING = SamplingConfig(num_steps=20, guidance_scale=3.0, size=SIZE, batch_size=48)


@dataclass(frozen=True, kw_only=True)
class Settings:
    reward: RewardConfig
    score: ScoreConfig
    rollout: RolloutConfig


@dataclass(frozen=True)
class Measured:
    """What pictures at MULTIPLIERS scored: [P, S, M] by name of the score, and the diversity of their seeds against the base's [M]."""

    values: dict[str, np.ndarray]
    diversity: list[float]

    def gains(self, name: str) -> np.ndarray:
        """Gains over the base model of every pair of prompt and seed, in within-prompt standard deviations [P, S, M]."""
        values = self.values[name]
        return (values - values[:, :, BASE : BASE + 1]) / within_prompt_std(values[:, :, BASE])

    def side_effects(self) -> np.ndarray:
        """How far the true scores that were not trained have moved [M]: RMS of their gains over pairs and scores."""
        moved = [self.gains(name) for name in self.values if name.startswith(OTHER)]
        return np.sqrt(np.square(moved).mean((0, 1, 2)))


class Laboratory:
    """Args:
    score: name of the true score.
    judge: a scorer that no training uses.
    """

    def __init__(self, score: str, judge: Path, prompts: Path, held_out: Path, num_prompts: int = 10, num_seeds: int = 3) -> None:
        self.model = load_model(str(MODEL)).freeze()
        self.encoder = PromptEncoder(self.model)
        self.true_score, self.judge = SCORES[score], load_scorer(judge)
        self.other_scores = {f"{OTHER}{name}": function for name, function in SCORES.items() if name != score}
        self.prompts, self.prompts_file = load_prompts(prompts), str(prompts)
        self.eval_prompts = spread(load_prompts(held_out), num_prompts)
        self.num_seeds = num_seeds
        self.base = self._scores(None, 0.0, self.eval_prompts, num_seeds)

    def train(
        self,
        changes: Mapping[str, Any],
        seed: int,
        budget: int,
        checks: Sequence[float] = (0.25, 0.5, 0.75),
        updates: int | None = None,
    ) -> tuple[dict[str, Any], Measured]:
        """Train one slider until its U-Net evaluations reach `budget`, or for so many `updates`.

        Args:
            changes: settings by option name; `learning_rate` among them. With `quantize_base` it trains on packed weights, and is
                measured on the whole ones, as a UI has them.
            checks: at which shares of the budget the true gain at +1 is measured, which is not part of the time.

        Returns:
            A record of the training, with the curve [evaluations, seconds, true gain at +1], and what the slider does at the end.
        """
        options = {"leco_denoise_guidance_scale": 3.0, "prompts_file": self.prompts_file, "train_batch_size": 8, **changes}
        learning_rate = options.pop("learning_rate", 1e-3)
        precision = options.pop("quantize_base", None)
        model = self.model
        if precision:
            model = load_model(str(MODEL)).freeze()
            pack_unet(model.unet, precision, 0, "cpu")
        settings = build(Settings, options)
        network = build_network(
            NetworkConfig(network_dim=8, network_alpha=8.0), model, generator(seed, "network"), gradient_checkpointing=False
        )
        try:
            reward = load_reward(
                settings.reward,
                model.vae_fingerprint(),
                needs_noise_aware=ESTIMATORS[settings.score.score_estimator].noisy,
            )
            started, spent, evaluations_before = time.process_time(), 0.0, model.num_unet_evaluations
            context = TrainingContext(
                model=model,
                network=network,
                encoder=self.encoder,
                generator=lambda name: generator(seed, name),
                rollout=settings.rollout,
                sampling=resolve_sampling(settings.rollout, model),
                reward=reward,
                prompts=self.prompts,
                settings=vars(settings),
            )
            term = ScoreTerm(context, settings.score)
            optimizer = torch.optim.AdamW(network.parameters(), lr=learning_rate)
            evaluations = made = 0
            curve, goals = [(0, 0.0, 0.0)], [share * budget for share in checks]
            while evaluations < budget if updates is None else made < updates:
                out = term()
                out.loss.backward()
                torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
                evaluations, made = evaluations + model.num_unet_evaluations - evaluations_before, made + 1
                evaluations_before = model.num_unet_evaluations
                if goals and evaluations >= goals[0]:
                    spent += time.process_time() - started
                    goals = [goal for goal in goals if goal > evaluations]
                    curve.append((evaluations, spent, self.quick_gain(network)))
                    evaluations_before = model.num_unet_evaluations  # without those of the measurement
                    started = time.process_time()
            spent += time.process_time() - started
            network.eval()
            if model is not self.model:
                network.remove()
                network.apply_to(None, self.model.unet)
            measured = self.measure(network)
            curve.append((evaluations, spent, float(measured.gains("true")[:, :, PLUS].mean())))
        finally:
            network.remove()
        return {"updates": made, "evaluations": evaluations, "seconds": spent, "curve": curve}, measured

    def measure(self, network: LoRANetwork) -> Measured:
        """Every evaluation prompt and seed at MULTIPLIERS."""
        parts = [
            self.base if strength == 0 else self._scores(network, strength, self.eval_prompts, self.num_seeds) for strength in MULTIPLIERS
        ]
        values = {name: np.stack([part[0][name] for part in parts], axis=-1) for name in parts[0][0]}
        return Measured(values, [part[1] / self.base[1] for part in parts])

    def quick_gain(self, network: LoRANetwork) -> float:
        """True gain at +1, from every other evaluation prompt."""
        network.eval()
        some = self.eval_prompts[::2]
        moved, _ = self._scores(network, 1.0, some, 2)
        network.train()
        base = self.base[0]["true"]
        return float((moved["true"] - base[::2, :2]).mean() / within_prompt_std(base))

    @torch.no_grad()
    def _scores(
        self, network: LoRANetwork | None, strength: float, prompts: Sequence[PromptSpec], num_seeds: int
    ) -> tuple[dict[str, np.ndarray], float]:
        """Scores [P, S] by name, and the mean RMS distance between two seeds of a prompt."""
        rows = [prompt for prompt in prompts for _ in range(num_seeds)]
        places = [self.eval_prompts.index(prompt) for prompt in prompts]
        seeds = [1000 + place * 100 + seed for place in places for seed in range(num_seeds)]
        latents = sample(self.model, network, rows, seeds, strength, encoder=self.encoder, sampling=SAMPLING)
        pixels = decode(self.model, latents).clamp(0, 1)
        texts = [prompt.prompt for prompt in rows]
        shape = (len(prompts), num_seeds)
        found = {
            "true": self.true_score(pixels),
            "judge": scorer_on(self.judge, latents),
            "captions": caption_obeyed(pixels, texts),
        }
        found |= {name: function(pixels) for name, function in self.other_scores.items()}
        found["shown"] = found["true"] * found["captions"]  # a picture that is no longer what was asked for is worth nothing
        diversity = float(np.mean([rms_diversity(group) for group in pixels.unflatten(0, shape)]))
        return {name: value.double().numpy().reshape(shape) for name, value in found.items()}, diversity


def scorer_on(scorer: Scorer, latents: Tensor) -> Tensor:
    """A scorer's opinion of clean latents [B]."""
    return scorer(latents, latents.new_zeros(len(latents)))


def crossing(curve: Sequence[Sequence[float]], level: float, column: int) -> float | None:
    """Where the gain (last column) first reaches `level`, in units of `column`, by linear interpolation; None if it does not."""
    for before, after in zip(curve[:-1], curve[1:], strict=True):
        if after[-1] >= level:
            part = (level - before[-1]) / (after[-1] - before[-1])
            return before[column] + part * (after[column] - before[column])
    return None
