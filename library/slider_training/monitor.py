"""What a slider does while it trains: its effect on fixed prompts and seeds, what independent judges say of it, when to stop, which step
to keep, and which strength to call 1."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from library.errors import UserError
from library.measuring.calibration import Calibration, choose_scale, confirm, next_strength
from library.measuring.judges import Judges
from library.measuring.measure import Measurer, Raters, seed_table
from library.measuring.record import REWARD, EvaluationRecord
from library.measuring.response_curve import ResponseCurve, curve_of
from library.measuring.statistics import within_prompt_std
from library.measuring.warnings import SliderWarning, find_warnings
from library.models.base import DiffusionModel
from library.objectives.rewards import Reward
from library.prompts.files import spread
from library.rollouts.prompt_encoder import PromptEncoder, size_of
from library.rollouts.sample import SamplingConfig
from library.settings.options import check_above, check_at_least, option
from library.slider_training.early_stop import EarlyStop
from library.slider_training.keep_best import KeepBest, selection_score
from library.slider_training.previews import preview_path, write_preview
from library.types import PromptSpec
from networks.lora import LoRANetwork

logger = logging.getLogger(__name__)

FRESH_SEEDS = 1_000_000  # added to the seeds of pictures that check what others have chosen


@dataclass(frozen=True, kw_only=True)
class MonitorConfig:
    """Pictures and measurements while training, judges, early stop, the step that is kept, and the strength of the saved file."""

    eval_prompts_file: str | None = option(None, help="Prompts for measurements and previews; not set: the training prompts.", expert=True)
    num_eval_prompts: int = option(12, help="Prompts that every measurement takes, spread evenly over the file.", expert=True)
    eval_seeds_per_prompt: int = option(4, help="Pictures of each of them.", expert=True)
    evaluate_every_n_steps: int | None = option(50, help="Measure the slider's effect before training and every so many steps.")
    judges: tuple[str, ...] = option(
        (),
        help="Independent judges: functions of pixels, package.module:function or file.py:function, that training never follows. The best "
        "step is theirs, and training stops when they fall while the score rises.",
    )
    judge_scorers: tuple[str, ...] = option((), help="More judges: scorer files that training does not follow.", expert=True)
    pixel_statistics: bool = option(
        True,
        help="Decode the pictures of a measurement for saturation, clipping, edges, Nyquist energy and perceptual distance; without, only "
        "statistics of latents (and judges that need pixels) are made.",
        expert=True,
    )
    keep_best: bool = option(
        True,
        help="Save the best measured step, not the last: the one with the judges' highest gain, or without judges the highest gain of the "
        "score (up to early_stop_gain) less the drift; flaws such as clipping count against it.",
        expert=True,
    )
    early_stop_gain: float | None = option(
        2.0,
        help="Stop once weight +1 raises the score by so many within-prompt standard deviations and -1 lowers it as much.",
        only_with="evaluate_every_n_steps",
    )
    early_stop_patience: int | None = option(
        3,
        help="Stop once the judges' gain has been below its best for so many measurements while the training score rose.",
        expert=True,
        only_with="evaluate_every_n_steps",
    )
    early_stop_drift: float | None = option(
        None,
        help="Stop once the latents at weight +1 or -1 are farther (RMS) than this from the base model's.",
        expert=True,
        only_with="evaluate_every_n_steps",
    )
    calibrate: float | None = option(
        1.0,
        help="After training, scale alpha so that weight 1 moves the score by so many within-prompt standard deviations; not set: no.",
    )
    calibration_multipliers: tuple[float, ...] = option(
        (0.25, 0.5, 1.0, 1.5, 2.0),
        help="Strengths that calibration tries first, both signs; weaker and stronger ones follow where they are needed.",
        expert=True,
        only_with="calibrate",
    )
    num_calibration_prompts: int = option(
        32,
        help="Prompts whose pictures, at fresh seeds, confirm the strength that the calibration multipliers suggest; more are more exact.",
        expert=True,
        only_with="calibrate",
    )
    max_drift: float | None = option(
        None,
        help="Calibrate to no strength whose latents are farther than this (RMS) from the base model's.",
        expert=True,
        only_with="calibrate",
    )
    sample_every_n_steps: int | None = option(None, help="Write a grid of previews every so many steps.")
    sample_at_first: bool = option(False, help="Write a grid of previews before training, too.", expert=True)
    sample_multipliers: tuple[float, ...] = option(
        (-1.0, 0.0, 1.0),
        help="Weights of the preview grid, a column each.",
        expert=True,
        only_with=("sample_every_n_steps", "sample_at_first"),
    )
    num_sample_prompts: int = option(
        4, help="Rows of the preview grid.", expert=True, only_with=("sample_every_n_steps", "sample_at_first")
    )
    sample_batch_size: int = option(48, help="Pictures sampled together in previews and measurements.", expert=True)

    def __post_init__(self) -> None:
        check_at_least(self, 1, "num_eval_prompts", "num_sample_prompts", "sample_batch_size", "num_calibration_prompts")
        check_at_least(self, 1, "evaluate_every_n_steps", "sample_every_n_steps", "early_stop_patience")
        check_at_least(self, 2, "eval_seeds_per_prompt")
        check_above(self, 0, "calibrate", "early_stop_gain", "early_stop_drift", "max_drift")
        if not self.calibration_multipliers or min(map(abs, self.calibration_multipliers)) == 0:
            raise UserError("calibration_multipliers must hold at least one strength, and no 0; for example 0.5 1.0 1.5")
        if not self.sample_multipliers:
            raise UserError("sample_multipliers must hold at least one weight; for example -1 0 1")


@dataclass(frozen=True, kw_only=True)
class Observation:
    """What a slider does after `step` updates, at the weights -1, 0 and +1.

    Attributes:
        warnings: those that were not given before.
        stop: why training should stop now, or None.
    """

    step: int
    record: EvaluationRecord
    warnings: Sequence[SliderWarning] = ()
    stop: str | None = None


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
        self.pictures = self._measurer(self.prompts)
        lora = network.loras[0]
        self.early_stop = EarlyStop(
            gain=config.early_stop_gain,
            patience=config.early_stop_patience,
            drift=config.early_stop_drift,
            network_scale=lora.alpha.item() / lora.rank,
        )
        self.best = KeepBest()
        self.given: set[str] = set()  # the keys of the warnings that were given
        self.last: tuple[int, float] | None = None  # the step that was measured last, and its selection score

    def observes_at(self, step: int) -> bool:
        """Whether the slider is to be observed after update number `step`, or before training (0)."""
        return bool(self.prompts) and due(step, self.config.evaluate_every_n_steps)

    def observe(self, step: int) -> Observation:
        """Measure the slider at +1 and -1 after `step` updates, warn, and hold its weights if it is the best yet.

        Raises:
            UserError: the base model's score does not vary, so that a gain has no unit; a judge that breaks.
        """
        self._check_unit(self.pictures)
        record = self.pictures.measure(self.network, (-1.0, 1.0), name=f"step {step}")
        logger.info("step %d: %s", step, record)
        warnings = find_warnings(record, self.reward.goals)
        score = selection_score(record, warnings, self.config.early_stop_gain)
        stop, flat = self.early_stop.add(step, record)
        new = [warning for warning in [*warnings, *flat] if warning.key not in self.given]
        for warning in new:
            logger.warning("step %d: %s", step, warning)
        self.given |= {warning.key for warning in new}
        if step > 0 and self.config.keep_best:
            self.best.offer(step, score, str(record), self.network)
        self.last = step, score
        return Observation(step=step, record=record, warnings=new, stop=stop)

    def finish(self, step: int) -> tuple[int, Calibration | None]:
        """After the last update: the best weights are put into the network, and its alpha is scaled to what `calibrate` says.

        An error in a measurement does not cost the slider: it becomes a warning, and the network stays as trained.

        Returns:
            After how many updates the network now is, and the calibration; None without `calibrate`, a training score or prompts.
        """
        try:
            if self.config.keep_best and self.observes_at(0):
                step = self._restore_best(step)
            if self.config.calibrate is None or not self.reward.goals or not self.prompts:
                return step, None
            calibration = self.calibration(self.config.calibrate)
        except Exception as error:  # whatever it is: hours of training stand against one more measurement
            logger.warning("the last measurement ended in an error, so the slider is saved as trained: %s: %s", type(error).__name__, error)
            return step, None
        self.network.scale_alpha(calibration.scale)
        logger.info("%s", calibration.note)
        return step, calibration

    def _restore_best(self, step: int) -> int:
        if self.last is None or self.last[0] != step:
            self.observe(step)
        if self.best.step is None or self.last is None:
            return step
        if self.best.step != step:
            self.best.restore(self.network)
            scores = self.best.score, step, self.last[1]
            logger.info("step %d is the best of all measured steps (selection score %.2f; step %d: %.2f)", self.best.step, *scores)
        logger.info("step %d is kept: %s", self.best.step, self.best.words)
        return self.best.step

    def base_unit(self) -> float:
        """The within-prompt standard deviation of the reward over the base model's pictures; 0 without a training score."""
        return self._unit(self.pictures)

    def curve(self, pictures: Measurer, multipliers: Sequence[float]) -> ResponseCurve:
        """The reward and the judges at these multipliers and their opposites."""
        self._check_unit(pictures)
        both = [*multipliers, *(-multiplier for multiplier in multipliers)]
        return curve_of(pictures.measure(self.network, both, name="the strength", perceptual=False), REWARD)

    def calibration(self, target_gain: float) -> Calibration:
        """The strength that is to become weight 1: chosen among several, confirmed by more pictures at fresh seeds."""
        max_drift = self.config.max_drift
        curve = self.curve(self.pictures, [*{abs(multiplier) for multiplier in self.config.calibration_multipliers}])
        while (strength := next_strength(curve, target_gain, max_drift)) is not None:
            curve = curve.joined(self.curve(self.pictures, [strength]))
        scale = choose_scale(curve, target_gain, max_drift).scale
        many = self._measurer(self._chosen(self.config.num_calibration_prompts), FRESH_SEEDS)
        return confirm(curve, self.curve(many, [scale]), target_gain, max_drift)

    def preview(self, output_dir: Path, output_name: str, step: int) -> Path:
        """Write the grid of previews and return its path."""
        path = preview_path(output_dir, output_name, step)
        prompts = spread(self.prompts, self.config.num_sample_prompts)
        write_preview(path, self.model, self.network, prompts, self.config.sample_multipliers, self.sampling, self.encoder)
        return path

    def state_dict(self) -> dict[str, Any]:
        """What a run that goes on must know: what was measured and warned of, and the best weights."""
        return {"early_stop": self.early_stop.state_dict(), "given": sorted(self.given), "best": self.best.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.early_stop.load_state_dict(state["early_stop"])
        self.given = set(state["given"])
        self.best.load_state_dict(state["best"])

    def _chosen(self, count: int) -> list[PromptSpec]:
        """Prompts, evenly over the list; those that can be sampled together are neighbours."""
        chosen = spread(self.all_prompts, count)
        return sorted(chosen, key=lambda prompt: (size_of(prompt, self.sampling.size), prompt.num_steps or 0))

    def _measurer(self, prompts: Sequence[PromptSpec], seed_offset: int = 0) -> Measurer:
        return Measurer(
            model=self.model,
            raters=Raters(reward=self.reward, judges=self.judges),
            prompts=prompts,
            seeds=seed_table(prompts, self.config.eval_seeds_per_prompt, offset=seed_offset),
            sampling=self.sampling,
            encoder=self.encoder,
            pixels=self.config.pixel_statistics,
        )

    def _unit(self, pictures: Measurer) -> float:
        scores = pictures.base(self.network).scores
        return within_prompt_std(scores[REWARD]) if REWARD in scores else 0.0

    def _check_unit(self, pictures: Measurer) -> None:
        if self.reward.goals and self._unit(pictures) == 0:
            raise UserError("the base model's score does not vary between seeds, so a gain has no unit; give other eval prompts")


def due(step: int, every: int | None) -> bool:
    """Whether something that happens every n steps happens after update number `step` (1, 2, ...)."""
    return every is not None and step % every == 0
