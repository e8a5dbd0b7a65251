"""What a slider does while it trains: its effect on fixed prompts and seeds, what independent judges say of it, when to stop, which step
to keep, and which strength to call 1."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from library.errors import UserError
from library.measuring.calibration import Calibration, choose_scale, settle
from library.measuring.judges import Judges
from library.measuring.measurement import REWARD, FixedPictures
from library.measuring.observation import Bound, Observation, observe
from library.measuring.response_curve import ResponseCurve, response_curve
from library.measuring.statistics import within_prompt_std
from library.measuring.verdict import Watch
from library.models.base import DiffusionModel
from library.objectives.rewards import Goal, Reward
from library.prompts.files import spread
from library.rollouts.prompt_encoder import PromptEncoder, size_of
from library.rollouts.sample import SamplingConfig
from library.settings.options import check_above, check_at_least, option
from library.slider_training.keep_best import KeepBest, merit
from library.slider_training.previews import preview_path, write_preview
from library.types import PromptSpec
from networks.lora import LoRANetwork

logger = logging.getLogger(__name__)

FRESH_SEEDS = 1_000_000  # added to the seeds of pictures that check what others have chosen


@dataclass(frozen=True, kw_only=True)
class MonitorConfig:
    """Pictures and measurements while training, judges, early stop, the step that is kept, and the strength of the saved file."""

    eval_prompts_file: str = option("", help="Prompts for measurements and previews; default the training prompts.")
    num_eval_prompts: int = option(12, help="Prompts that every measurement takes, spread evenly over the file.")
    eval_seeds_per_prompt: int = option(4, help="Pictures of each of them.")
    evaluate_every_n_steps: int | None = option(50, help="Measure the slider's effect before training and every so many steps.")
    judges: tuple[str, ...] = option(
        (),
        help="Independent judges: functions of pixels, package.module:function or file.py:function, that training never follows. The best "
        "step is theirs, and training stops when they fall while the score rises.",
    )
    judge_scorers: tuple[str, ...] = option((), help="More judges: scorer files that training does not follow.")
    pixel_statistics: bool = option(
        True,
        help="Decode the pictures of a measurement for saturation, clipping, edges, Nyquist energy and perceptual distance; without, only "
        "statistics of latents (and judges that need pixels) are made.",
    )
    keep_best: bool = option(
        True,
        help="Save the best measured step, not the last: the one with the judges' highest gain, or without judges the highest gain of the "
        "score (up to early_stop_gain) less the drift; flaws such as clipping count against it.",
    )
    early_stop_gain: float | None = option(
        2.0, help="Stop once weight +1 raises the score by so many within-prompt standard deviations and -1 lowers it as much."
    )
    early_stop_patience: int | None = option(
        3, help="Stop once the judges' gain has been below its best for so many measurements while the training score rose."
    )
    early_stop_drift: float | None = option(
        None, help="Stop once the latents at weight +1 or -1 are farther (RMS) than this from the base model's."
    )
    calibrate: float | None = option(
        1.0, help="After training, scale alpha so that weight 1 moves the score by so many within-prompt standard deviations; 0 leaves it."
    )
    calibration_multipliers: tuple[float, ...] = option((0.25, 0.5, 1.0, 1.5, 2.0), help="Strengths that calibration tries, both signs.")
    num_calibration_prompts: int = option(
        32,
        help="Prompts whose pictures, at fresh seeds, settle the strength that the calibration multipliers suggest; more are more exact.",
    )
    max_drift: float | None = option(None, help="Calibrate to no strength whose latents are farther than this (RMS) from the base model's.")
    sample_every_n_steps: int | None = option(None, help="Write a grid of previews every so many steps.")
    sample_at_first: bool = option(False, help="Write a grid of previews before training, too.")
    sample_multipliers: tuple[float, ...] = option((-1.0, 0.0, 1.0), help="Weights of the preview grid, a column each.")
    num_sample_prompts: int = option(4, help="Rows of the preview grid.")
    sample_batch_size: int = option(48, help="Pictures sampled together in previews and measurements.")

    def __post_init__(self) -> None:
        check_at_least(self, 1, "num_eval_prompts", "num_sample_prompts", "sample_batch_size", "num_calibration_prompts")
        check_at_least(self, 1, "evaluate_every_n_steps", "sample_every_n_steps", "early_stop_patience")
        check_at_least(self, 2, "eval_seeds_per_prompt")
        check_at_least(self, 0, "calibrate")
        check_above(self, 0, "early_stop_gain", "early_stop_drift", "max_drift")
        if not self.calibration_multipliers or min(map(abs, self.calibration_multipliers)) == 0:
            raise UserError("calibration_multipliers must hold at least one strength, and no 0; for example 0.5 1.0 1.5")
        if not self.sample_multipliers:
            raise UserError("sample_multipliers must hold at least one weight; for example -1 0 1")


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
        prompts: what to measure on; `num_eval_prompts` of them are taken. With none, nothing is measured.
        encoder: holds their conditioning.
        sampling: as the training samples; pictures in one call are the monitor's own.
        judges: opinions that the training does not follow.
    """

    def __init__(
        self,
        model: DiffusionModel,
        network: LoRANetwork,
        reward: Reward,
        prompts: Sequence[PromptSpec],
        encoder: PromptEncoder,
        sampling: SamplingConfig,
        config: MonitorConfig,
        judges: Judges | None = None,
    ) -> None:
        self.model, self.network, self.reward, self.encoder = model, network, reward, encoder
        self.config, self.judges = config, judges or Judges()
        self.sampling = replace(sampling, batch_size=config.sample_batch_size)
        if not prompts:
            if config.sample_every_n_steps is not None or config.sample_at_first:
                raise UserError("there are no prompts to make previews of; give eval_prompts_file")
            logger.info("without prompts the slider is neither measured nor calibrated; eval_prompts_file gives some")
        self.all_prompts = prompts
        self.prompts = self._chosen(config.num_eval_prompts)
        self.pictures = self._fixed_pictures(self.prompts)
        lora = network.loras[0]
        self.watch = Watch(
            early_stop_gain=config.early_stop_gain,
            patience=config.early_stop_patience,
            max_drift=config.early_stop_drift,
            network_scale=lora.alpha.item() / lora.rank,
        )
        self.best = KeepBest()
        self.last: Observation | None = None

    def observes_at(self, step: int) -> bool:
        """Whether the slider is to be observed after update number `step`, or before training (0)."""
        return bool(self.prompts) and due(step, self.config.evaluate_every_n_steps)

    def observe(self, step: int) -> Observation:
        """Measure the slider at +1 and -1 after `step` updates, say what there is to say, and hold its weights if it is the best yet.

        Raises:
            UserError: the base model's score does not vary, so that a gain has no unit; a judge that breaks.
        """
        self._check_unit()
        up, down = self.pictures.measure(1.0, "measuring +1"), self.pictures.measure(-1.0, "measuring -1")
        held = {goal.name: goal.limit.value for goal in self.reward.goals if goal.limit is not None and goal.held}
        bounds = {goal.name: _bound(goal) for goal in self.reward.goals if goal.limit is not None and not goal.held}
        seen = observe(step, self.pictures.base(), up, down, self.judges.names, self.pictures.directions, held, bounds)
        seen = self.watch.judge(seen)
        logger.info("%s", seen)
        for warning in seen.warnings:
            logger.warning("%s", warning)
        if step > 0 and self.config.keep_best:
            self.best.offer(seen, merit(seen, self.config.early_stop_gain), self.network)
        self.last = seen
        return seen

    def finish(self, step: int) -> tuple[int, Calibration | None]:
        """After the last update: the best weights are put into the network, and its alpha is scaled to what `calibrate` says.

        Returns:
            After how many updates the network now is, and the calibration; None without `calibrate`, a training score or prompts.
        """
        if self.config.keep_best and self.observes_at(0):
            step = self._restore_best(step)
        if not (self.config.calibrate and self.reward.goals and self.prompts):
            return step, None
        calibration = self.calibration(self.config.calibrate)
        self.network.scale_alpha(calibration.scale)
        logger.info("%s", calibration.note)
        return step, calibration

    def _restore_best(self, step: int) -> int:
        last = self.last if self.last is not None and self.last.step == step else self.observe(step)
        if self.best.step is None:
            return step
        if self.best.step != step:
            self.best.restore(self.network)
            whose = "the judges' gain" if last.mean_judge_gain is not None else "the training score's gain, less the drift,"
            worse = merit(last, self.config.early_stop_gain)
            logger.info("step %d is kept, not step %d: %s is %.2f against %.2f", self.best.step, step, whose, self.best.merit, worse)
        logger.info("what is saved: %s", self.best.words)
        return self.best.step

    def effect(self) -> Effect:
        """Measure the reward at +1 and -1."""
        curve = self.response((-1.0, 1.0))
        return Effect(up=curve.gains[2], down=curve.gains[0])

    def response(self, multipliers: Sequence[float], pictures: FixedPictures | None = None) -> ResponseCurve:
        """Measure the reward and the judges at these multipliers and at 0, on the pictures of every measurement or on others."""
        pictures = pictures or self.pictures
        self._check_unit(pictures)
        strengths = sorted({0.0, *multipliers})
        measured = [pictures.measure(strength, f"measuring {strength:+g}", thorough=False) for strength in strengths]
        tables = {name: np.stack([one.scores[name] for one in measured], axis=2) for name in pictures.base().scores}
        clipped = [one.statistics.get("clipped") for one in measured]
        return response_curve(
            strengths,
            tables[REWARD],
            [one.statistics["drift"] for one in measured],
            np.random.default_rng(0),
            directions=pictures.directions,
            clipped=[share for share in clipped if share is not None],
            judges={name: tables[name] for name in self.judges.names},
        )

    def calibration(self, target_gain: float) -> Calibration:
        """The strength that is to become weight 1: chosen on a ladder, settled by more pictures at fresh seeds."""
        ladder = {abs(rung) for rung in self.config.calibration_multipliers}
        response = self.response([*ladder, *(-rung for rung in ladder)])
        strength = choose_scale(response, target_gain, self.config.max_drift).scale
        many = self._fixed_pictures(self._chosen(self.config.num_calibration_prompts), FRESH_SEEDS)
        return settle(response, self.response((-strength, strength), many), target_gain, self.config.max_drift)

    def preview(self, output_dir: Path, output_name: str, step: int) -> Path:
        """Write the grid of previews and return its path."""
        path = preview_path(output_dir, output_name, step)
        prompts = spread(self.prompts, self.config.num_sample_prompts)
        write_preview(
            path,
            self.model,
            self.network,
            prompts,
            [row if prompt.seed is None else prompt.seed for row, prompt in enumerate(prompts)],
            self.config.sample_multipliers,
            self.sampling,
            self.encoder,
        )
        return path

    def state_dict(self) -> dict[str, Any]:
        """What a run that goes on must know: what was seen and said, and the best weights."""
        return {"watch": self.watch.state_dict(), "best": self.best.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.watch.load_state_dict(state["watch"])
        self.best.load_state_dict(state["best"])

    def _chosen(self, count: int) -> list[PromptSpec]:
        """Prompts, evenly over the list; those that can be sampled together are neighbours."""
        chosen = spread(self.all_prompts, count)
        return sorted(chosen, key=lambda prompt: (size_of(prompt, self.sampling.size), prompt.num_steps or 0))

    def _fixed_pictures(self, prompts: Sequence[PromptSpec], seed_offset: int = 0) -> FixedPictures:
        return FixedPictures(
            model=self.model,
            network=self.network,
            reward=self.reward,
            judges=self.judges,
            prompts=prompts,
            encoder=self.encoder,
            sampling=self.sampling,
            seeds_per_prompt=self.config.eval_seeds_per_prompt,
            seed_offset=seed_offset,
            look_at_pixels=self.config.pixel_statistics,
        )

    def _check_unit(self, pictures: FixedPictures | None = None) -> None:
        scores = (pictures or self.pictures).base().scores
        if REWARD in scores and within_prompt_std(scores[REWARD]) == 0:
            raise UserError("the base model's score does not vary between seeds, so a gain has no unit; give other eval prompts")


def _bound(goal: Goal) -> Bound:
    """What a goal's limit, max or min, allows."""
    assert goal.limit is not None
    above = goal.limit.kind == "max"
    words = f"{'above' if above else 'below'} {goal.limit.value:g}"
    return Bound(1 if above else -1, float(goal.standardise(goal.limit.value)), words)


def due(step: int, every: int | None) -> bool:
    """Whether something that happens every n steps happens after update number `step` (1, 2, ...)."""
    return every is not None and step % every == 0
