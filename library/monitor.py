"""What a slider does while it trains: its effect on fixed prompts and seeds, when to stop, and which strength to call 1."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from library.calibration import Calibration, ResponseCurve, choose_scale
from library.config import check_above, check_at_least, option
from library.errors import UserError
from library.models.base import DiffusionModel
from library.previews import preview_path, write_preview
from library.prompts import spread
from library.rewards import Reward
from library.rollout import RolloutConfig
from library.sampling import PromptEncoder, sample, size_of
from library.statistics import within_prompt_std
from library.types import PromptSpec
from networks.lora import LoRANetwork

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class MonitorConfig:
    """Pictures and measurements while training, early stop, and the strength of the saved file."""

    eval_prompts_file: str = option("", help="Prompts for measurements and previews; default the training prompts.")
    num_eval_prompts: int = option(12, help="Prompts that every measurement takes, spread evenly over the file.")
    eval_seeds_per_prompt: int = option(4, help="Pictures of each of them.")
    evaluate_every_n_steps: int | None = option(50, help="Measure the slider's effect every so many steps.")
    early_stop_gain: float | None = option(
        2.0, help="Stop once weight +1 raises the score by so many within-prompt standard deviations and -1 lowers it as much."
    )
    calibrate: float | None = option(
        1.0, help="After training, scale alpha so that weight 1 moves the score by so many within-prompt standard deviations; 0 leaves it."
    )
    calibration_multipliers: tuple[float, ...] = option((0.25, 0.5, 0.75, 1.0, 1.5), help="Strengths that calibration tries, both signs.")
    max_drift: float | None = option(None, help="Calibrate to no strength whose latents are farther than this (RMS) from the base model's.")
    sample_every_n_steps: int | None = option(None, help="Write a grid of previews at weights -1, 0 and +1 every so many steps.")
    sample_at_first: bool = option(False, help="Write a grid of previews before training, too.")
    num_sample_prompts: int = option(4, help="Rows of the preview grid.")
    sample_batch_size: int = option(48, help="Pictures sampled together in previews and measurements.")

    def __post_init__(self) -> None:
        check_at_least(self, 1, "num_eval_prompts", "num_sample_prompts", "sample_batch_size")
        check_at_least(self, 1, "evaluate_every_n_steps", "sample_every_n_steps")
        check_at_least(self, 2, "eval_seeds_per_prompt")
        check_at_least(self, 0, "calibrate")
        check_above(self, 0, "early_stop_gain", "max_drift")
        if not self.calibration_multipliers or min(map(abs, self.calibration_multipliers)) == 0:
            raise UserError("calibration_multipliers must hold at least one strength, and no 0; for example 0.5 1.0 1.5")


@dataclass(frozen=True)
class Effect:
    """Mean gain of the reward at +1 and at -1, in within-prompt standard deviations of the base model."""

    up: float
    down: float

    def __str__(self) -> str:
        return f"{self.up:+.2f} standard deviations at +1, {self.down:+.2f} at -1"

    def reaches(self, gain: float) -> bool:
        return self.up >= gain and self.down <= -gain


class Monitor:
    """Measures a network on fixed prompts and seeds. The base model's pictures are made once.

    Args:
        prompts: what to measure on; `num_eval_prompts` of them are taken.
        encoder: holds their conditioning.
    """

    def __init__(
        self,
        model: DiffusionModel,
        network: LoRANetwork,
        reward: Reward,
        prompts: Sequence[PromptSpec],
        encoder: PromptEncoder,
        rollout: RolloutConfig,
        config: MonitorConfig,
    ) -> None:
        self.model, self.network, self.reward, self.encoder = model, network, reward, encoder
        self.rollout, self.config = rollout, config
        self.resolution = rollout.size(model.spec.resolution)
        self.prompts = sorted(spread(prompts, config.num_eval_prompts), key=lambda prompt: size_of(prompt, self.resolution))
        self._base: tuple[Tensor, list[Tensor]] | None = None

    def effect(self) -> Effect:
        """Measure the slider at +1 and -1."""
        (up, _), (down, _) = self._gain(1.0, "measuring +1"), self._gain(-1.0, "measuring -1")
        return Effect(up, down)

    def calibration(self, target_gain: float) -> Calibration:
        """The strength at which both signs move the reward by `target_gain` within-prompt standard deviations."""
        ladder = sorted({abs(rung) for rung in self.config.calibration_multipliers})
        strengths = [-rung for rung in reversed(ladder)] + ladder
        measured = [self._gain(strength, f"calibrating {strength:+g}") for strength in strengths]
        middle = len(ladder)
        gains, drifts = ([*column[:middle], 0.0, *column[middle:]] for column in zip(*measured, strict=True))
        curve = ResponseCurve(multipliers=(*strengths[:middle], 0.0, *strengths[middle:]), gains=tuple(gains), drifts=tuple(drifts))
        return choose_scale(curve, target_gain, self.config.max_drift)

    def preview(self, output_dir: Path, output_name: str, step: int) -> Path:
        """Write the grid of previews and return its path."""
        path = preview_path(output_dir, output_name, step)
        prompts = spread(self.prompts, self.config.num_sample_prompts)
        write_preview(
            path,
            self.model,
            self.network,
            prompts,
            range(len(prompts)),
            encoder=self.encoder,
            resolution=self.resolution,
            num_steps=self.rollout.max_denoising_steps,
            guidance_scale=self.rollout.leco_denoise_guidance_scale,
            solver=self.rollout.sampler,
            batch_size=self.config.sample_batch_size,
        )
        return path

    def _gain(self, multiplier: float, label: str) -> tuple[float, float]:
        """Mean gain over the base model in within-prompt standard deviations, and mean RMS distance from its latents."""
        base_scores, base_latents = self._base_pictures()
        scores, latents = self._pictures(multiplier, label)
        unit = within_prompt_std(base_scores.double().numpy())
        if unit == 0:
            raise UserError("the base model's score does not vary between seeds, so a gain has no unit; give other eval prompts")
        wanted = torch.tensor([prompt.direction for prompt in self.prompts])[:, None]
        gain = ((scores - base_scores) * wanted).mean() / unit
        drift = torch.cat([(now - base).square().mean((1, 2, 3)).sqrt() for now, base in zip(latents, base_latents, strict=True)]).mean()
        return gain.item(), drift.item()

    def _base_pictures(self) -> tuple[Tensor, list[Tensor]]:
        if self._base is None:
            with self.network.disabled():
                self._base = self._pictures(0.0, "measuring the base model")
        return self._base

    @torch.no_grad()
    def _pictures(self, multiplier: float, label: str) -> tuple[Tensor, list[Tensor]]:
        """Rewards [P, S] and, for each prompt, clean latents [S, C, h, w], on the CPU. The seeds of all prompts differ."""
        count = self.config.eval_seeds_per_prompt
        scores, latents = [], []
        total = len(self.prompts) * count * self.rollout.max_denoising_steps
        with tqdm(total=total, desc=label, leave=False, unit="step") as bar:
            for rows in self._groups():
                prompts = [self.prompts[row] for row in rows for _ in range(count)]
                size = size_of(prompts[0], self.resolution)
                clean = sample(
                    self.model,
                    self.network,
                    prompts,
                    [row * count + seed for row in rows for seed in range(count)],
                    multiplier,
                    num_steps=self.rollout.max_denoising_steps,
                    guidance_scale=self.rollout.leco_denoise_guidance_scale,
                    resolution=size,
                    batch_size=self.config.sample_batch_size,
                    solver=self.rollout.sampler,
                    encoder=self.encoder,
                    progress=bar.update,
                )
                cond = self.encoder.encode([prompt.prompt for prompt in prompts], size)
                total_reward = self.reward(clean, clean.new_zeros(len(clean)), cond, prompts).total
                scores.append(total_reward.cpu().unflatten(0, (len(rows), count)))
                latents += list(clean.cpu().unflatten(0, (len(rows), count)))
        return torch.cat(scores), latents

    def _groups(self) -> list[list[int]]:
        """Rows of prompts with one picture size each; `self.prompts` is ordered by size, so their concatenation is 0, 1, 2, ..."""
        groups: dict[tuple[int, int], list[int]] = {}
        for row, prompt in enumerate(self.prompts):
            groups.setdefault(size_of(prompt, self.resolution), []).append(row)
        return list(groups.values())


def due(step: int, every: int | None) -> bool:
    """Whether something that happens every n steps happens after update number `step` (1, 2, ...)."""
    return every is not None and step % every == 0
