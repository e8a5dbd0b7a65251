"""What a slider does while it trains: its running gain, observations where one is worth it, what independent judges say, when to stop,
which step to keep, and which strength to call 1."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from library.errors import UserError
from library.measuring.calibration import Calibration, Target, choose_scale, confirm, next_strength
from library.measuring.judges import Judges
from library.measuring.measure import Measurer, Part, Raters, seed_table
from library.measuring.record import FIRM_GAIN, REWARD, EvaluationRecord
from library.measuring.response_curve import ResponseCurve, curve_of
from library.measuring.statistics import within_prompt_std
from library.measuring.warnings import SliderWarning, find_warnings
from library.models.base import DiffusionModel
from library.objectives.rewards import Reward
from library.objectives.terms.score import ScoreTerm
from library.prompts.files import spread
from library.rollouts.few_step import detect
from library.rollouts.prompt_encoder import PromptEncoder, size_of
from library.rollouts.sample import SamplingConfig
from library.rollouts.trajectories import Trajectories
from library.settings.options import check_above, check_at_least, option
from library.slider_training.early_stop import EarlyStop
from library.slider_training.keep_best import KeepBest, selection_score
from library.slider_training.outcome import Outcome
from library.slider_training.previews import preview_path, write_preview
from library.slider_training.running_gain import SIGNS, RunningGain
from library.types import Finished, LossOutput, PromptSpec, RolloutBatch
from networks.lora import LoRANetwork

logger = logging.getLogger(__name__)

FRESH_SEEDS = 1_000_000  # added to the seeds of pictures that check what others have chosen
NUM_PROMPTS, NUM_PICTURES = 16, 48  # of the base model; with fewer prompts, more seeds of each
FIRST_PAIRS = 16  # of prompt and seed, that an observation begins with
QUICK_SAMPLER, QUICK_STEPS = "dpmpp_2m", 10  # whose gains agree with those of 20 steps of ddim (docs/experiments.md)
LOOKS, LOOKS_WITH_JUDGES = 3, 8  # observations of a run at regular places, besides those that the running gain asks for
CHECKS = 100  # times a run that the running gain is looked at
PLATEAU = 0.1  # within-prompt standard deviations in a fifth of a run: less is no growth
MAX_STRENGTHS = 3  # measured for the calibration besides those that observations know
CALIBRATION_SHARE = 0.25  # of the training's evaluations, that a calibration may take
FEWEST_FRESH = 9  # prompts that confirm it all the same
FARTHER = 1.5  # times weight 1, that the usable range is to be known to
PREVIEW_PROMPTS, PREVIEW_WEIGHTS = 4, (-1.0, 0.0, 1.0)
SAMPLED_LATENTS = 8 * 64 * 64  # latent positions in one call of the sampler: 8 pictures of 512 x 512, which bounds a run's memory


MEASURED = {"measure": ("light", "full")}


@dataclass(frozen=True, kw_only=True)
class MonitorConfig:
    """Pictures and measurements while training, judges, early stop, and the strength of the saved file."""

    measure: str = option(
        "light",
        choices=("off", "light", "full"),
        help="light: few quick pictures, where they are worth it, and calibration; full: more of them, sampled as the training samples; "
        "off: nothing is measured, stopped, chosen or calibrated.",
    )
    eval_prompts_file: str | None = option(None, help="Prompts for measurements and previews; not set: the training prompts.", expert=True)
    evaluate_every_n_steps: int | None = option(
        None,
        help="Measure the slider every so many steps, too; not set: a few times a run, or every 50 steps with measure full.",
        expert=True,
        only_with=MEASURED,
    )
    judges: tuple[str, ...] = option(
        (),
        help="Independent opinions that training never follows: functions of pixels, package.module:function or file.py:function. They "
        "choose the step that is kept, and stop a training that games the score. With =stay it is a side effect that should not move, "
        "with =share a yes or no that must not fall.",
        only_with=MEASURED,
    )
    judge_scorers: tuple[str, ...] = option(
        (), help="More judges: scorer files that training does not follow; =stay and =share as above.", expert=True, only_with=MEASURED
    )
    early_stop_gain: float | None = option(
        2.0,
        help="Stop once weight +1 raises the score by so many within-prompt standard deviations and -1 lowers it as much.",
        only_with=MEASURED,
    )
    calibrate: str = option(
        "visible",
        help="After training, scale alpha so that weight 1 moves the score by one within-prompt standard deviation, or by more where that "
        "is too little to be plainly seen (visible); by exactly so many (a number, such as 1.0); or not at all (off).",
        only_with=MEASURED,
    )
    max_drift: float | None = option(
        None,
        help="Calibrate to no strength whose latents are farther than this (RMS) from the base model's.",
        expert=True,
        only_with=MEASURED,
    )
    sample_every_n_steps: int | None = option(None, help="Write a grid of previews, at weights -1, 0 and 1, every so many steps.")
    sample_at_first: bool = option(False, help="Write a grid of previews before training, too.", expert=True)

    def __post_init__(self) -> None:
        check_at_least(self, 1, "evaluate_every_n_steps", "sample_every_n_steps")
        check_above(self, 0, "early_stop_gain", "max_drift")
        _ = self.target

    @property
    def target(self) -> Target | None:
        """What weight +1 is to do; None without calibration. Raises UserError for a word that is none."""
        if self.calibrate in ("off", ""):
            return None
        if self.calibrate == "visible":
            return Target(visible=True, max_drift=self.max_drift)
        try:
            gain = float(self.calibrate)
        except ValueError:
            gain = 0.0
        if not 0 < gain < float("inf"):
            raise UserError(f"calibrate is {self.calibrate!r}, but it must be visible, off, or a number above 0 such as 1.0")
        return Target(gain=gain, max_drift=self.max_drift)


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
    """Watches a training, and measures its network on fixed prompts and seeds. The base model's pictures are made once.

    Args:
        prompts: what to measure on; some of them are taken. With none, nothing is measured.
        encoder: holds their conditioning.
        sampling: as the training samples.
        judges: opinions that the training does not follow.
        num_steps: updates of the whole run.
        agree: what all processes of a run decide, of what this one does; one process decides alone.

    Attributes:
        running: the gain that training shows of itself; None before the first observation and without a training score.
        spent: evaluations of the U-Net for measurements.
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
        *,
        num_steps: int = 500,
        agree: Callable[[bool], bool] = bool,
    ) -> None:
        self.model, self.network, self.reward, self.encoder = model, network, reward, encoder
        self.config, self.judges, self.num_steps, self.agree = config, judges or Judges(), num_steps, agree
        self.train_steps = sampling.num_steps
        height, width = (side // model.spec.vae_scale_factor for side in sampling.size)
        self.sampling = replace(sampling, batch_size=max(1, min(NUM_PICTURES, SAMPLED_LATENTS // (height * width))))
        if not prompts:
            if config.sample_every_n_steps is not None or config.sample_at_first:
                raise UserError("there are no prompts to make previews of; give eval_prompts_file")
            if config.measure != "off":
                logger.info("without prompts the slider is neither measured nor calibrated; eval_prompts_file gives some")
        self.prompts, self.others = _two_spreads(prompts, NUM_PROMPTS * (2 if config.measure == "full" else 1), sampling.size)
        self.pictures = self._measurer(self.prompts)
        lora = network.loras[0]
        self.early_stop = EarlyStop(gain=config.early_stop_gain, network_scale=lora.alpha.item() / lora.rank)
        self.best = KeepBest()
        self.given: set[str] = set()  # the keys of the warnings that were given
        self.last: tuple[int, float] | None = None  # the step that was measured last, and its selection score
        self.stop: str | None = None
        self.record: EvaluationRecord | None = None  # what was measured last
        self.running: RunningGain | None = None
        self.spent = self._trained_before = self._spent_before = 0
        self._seen: list[tuple[Tensor, Tensor, Finished | None]] = []  # of updates since the last check, on the model's device
        self._trajectories: Trajectories | None = None
        self._trail: list[tuple[int, float]] = []  # the running gain of both signs, at each check

    @property
    def measures(self) -> bool:
        return bool(self.prompts) and self.config.measure != "off"

    @property
    def trained(self) -> int:
        """Evaluations of the U-Net for the training itself, those before a resume included."""
        return self._trained_before + self.model.num_unet_evaluations - (self.spent - self._spent_before)

    @property
    def interval(self) -> int:
        """Updates between observations at regular places."""
        if self.config.evaluate_every_n_steps is not None:
            return self.config.evaluate_every_n_steps
        looks = LOOKS_WITH_JUDGES if self.judges.names else LOOKS
        return 50 if self.config.measure == "full" else max(1, -(-self.num_steps // looks))

    # ---- while training ----

    def follow(self, term: ScoreTerm) -> None:
        """Have the running gain made from a term's updates, and its trajectories' signs drawn by what it says."""
        term.watch = self._watch
        self._trajectories = term.rollout.trajectories

    def _watch(self, batch: RolloutBatch, out: LossOutput, finished: Finished | None) -> None:
        """Nothing is computed or waited for here."""
        if self.measures and self.reward.goals and out.promised is not None:
            self._seen.append((batch.multipliers, out.promised, finished))

    def start(self) -> Observation | None:
        """Before the first update: the base model's pictures are made, from which every unit comes.

        Raises:
            UserError: the base model's score does not vary, so that a gain has no unit; a judge that breaks.
        """
        return self.observe(0) if self.measures else None

    def looks_after(self, step: int) -> bool:
        """Whether `after` does anything after update number `step`."""
        return self.measures and (self._check_due(step) or due(step, self.interval))

    def after(self, step: int) -> Observation | None:
        """After update number `step` (1, 2, ...): an observation, if one is worth its evaluations."""
        if not self.looks_after(step):
            return None
        self._check(step)
        wanted = due(step, self.interval) or self._asks(step)
        if not self.agree(wanted):
            return None
        try:
            return self.observe(step)
        except Exception as error:  # a judge that breaks costs a measurement, never the run
            logger.warning("step %d: the measurement ended in an error: %s: %s", step, type(error).__name__, error)
            return None

    def observe(self, step: int) -> Observation:
        """Measure the slider at +1 and -1 after `step` updates, warn, and hold its weights if it is the best yet.

        It begins with a part of the pictures, and goes on to the rest while the answers are open (`_is_open`).
        """
        with self._spending():
            self._check_unit(self.pictures)
            record = self._measured((-1.0, 1.0), f"step {step}", self._is_open if step > 0 else lambda record: False)
        if self.running is None and self.reward.goals:
            self.running = self._new_running()
        if self.running is not None and step > 0:
            for sign, place in zip((1, -1), record.ends, strict=True):
                self.running.add_observation(sign, record.gain(REWARD, place))
        logger.info("step %d: %s", step, record)
        warnings = find_warnings(record, self.reward.goals)
        score = selection_score(record, warnings, self.config.early_stop_gain)
        stop, flat = self.early_stop.add(step, record, plateau=self.agree(self._is_plateau(step)))
        new = [warning for warning in [*warnings, *flat] if warning.key not in self.given]
        for warning in new:
            logger.warning("step %d: %s", step, warning)
        self.given |= {warning.key for warning in new}
        if step > 0:
            self.best.offer(step, score, record, self.network)
        self.last, self.stop, self.record = (step, score), stop, record
        return Observation(step=step, record=record, warnings=new, stop=stop)

    def running_metrics(self) -> dict[str, float]:
        """For the trackers; empty before anything is known."""
        return {} if self.running is None else self.running.metrics()

    def _check_due(self, step: int) -> bool:
        return step % max(1, self.num_steps // CHECKS) == 0

    @torch.no_grad()
    def _absorb(self) -> None:
        """Take in what was seen since the last time: one wait for the device, and the scorer on the trajectories that ended."""
        seen, self._seen = self._seen, []
        if self.running is None:
            return
        for multipliers, promised, finished in seen:
            self.running.add_step(multipliers.tolist(), promised.tolist())
            if finished is not None:
                sigmas = finished.latents.new_zeros(len(finished.latents))
                asked_for = self.encoder.frozen_cond(list(finished.prompts), finished.cond)
                scores = self.reward(finished.latents, sigmas, asked_for, finished.prompts).total.tolist()
                for prompt, multiplier, score in zip(finished.prompts, finished.multipliers, scores, strict=True):
                    self.running.add_finished(prompt.prompt, multiplier, prompt.direction, score)

    def _check(self, step: int) -> None:
        """Bring the running gain up to date, and let the weaker sign have more of the trajectories."""
        self._absorb()
        if self.running is not None:
            self._trail.append((step, sum(self.running.gain(sign).value for sign in SIGNS) / 2))
            if self._trajectories is not None:
                self._trajectories.skip = self.running.skip()

    def _asks(self, step: int) -> bool:
        """Whether the running gain says that the slider is strong enough, or grows no more, and that was not looked at lately."""
        if self.running is None:
            return False
        since = step - (self.last[0] if self.last else 0)
        strong = self.config.early_stop_gain is not None and self.running.weaker.value >= self.config.early_stop_gain
        return (strong and since >= max(2, self.num_steps // 50)) or (self._is_plateau(step) and since >= self.interval // 2)

    def _is_plateau(self, step: int) -> bool:
        """Whether the running gain has not grown for a fifth of the run, but by what is lost in its noise."""
        span = max(40, self.num_steps // 5)
        before = [gain for at, gain in self._trail if step - 2 * span <= at < step - span]
        now = [gain for at, gain in self._trail if at >= step - span]
        return len(before) > 3 and len(now) > 3 and float(np.mean(now)) > FIRM_GAIN and float(np.mean(now) - np.mean(before)) < PLATEAU

    def _is_open(self, record: EvaluationRecord) -> bool:
        """Whether more pictures could change what follows: is it strong enough; do judges fall while the score rises?"""
        wanted = self.config.early_stop_gain
        for place in record.ends:
            for score in record.training_scores:
                gain = record.gain(score.name, place)
                if wanted is not None and gain.low < wanted < gain.high and record.score_gain(place) > 0.8 * wanted:
                    return True
                judged = [record.gain(judge.name, place) for judge in record.judges]
                if gain.value >= FIRM_GAIN and any(judge.low < 0 < judge.high for judge in judged):
                    return True
        return False

    # ---- at the end ----

    def finish(self, step: int) -> Outcome:
        """After the last update: the best weights are put into the network, and its alpha is scaled to what `calibrate` says.

        An error in a measurement does not cost the slider: it becomes a warning, and the network stays as trained.
        """
        outcome = Outcome(step=step, stop=self.stop, worth=self.reward.worth)
        if not self.measures:
            return outcome
        try:
            outcome = replace(outcome, step=self._restore_best(step), record=self.best.record or self.record)
            if self.config.target is not None and self.reward.goals:
                with self._spending():
                    calibration, record = self.calibration(self.config.target)
                self.network.scale_alpha(calibration.scale)
                logger.info("%s", calibration.note)
                outcome = replace(outcome, calibration=calibration, record=record)
        except Exception as error:  # whatever it is: hours of training stand against one more measurement
            logger.warning("the last measurement ended in an error, so the slider is saved as trained: %s: %s", type(error).__name__, error)
            return replace(outcome, error=f"{type(error).__name__}: {error}")
        if outcome.record is not None:
            outcome = replace(outcome, warnings=tuple(find_warnings(outcome.record, self.reward.goals)))
        return outcome

    def _restore_best(self, step: int) -> int:
        if self.last is None or self.last[0] != step:
            self.observe(step)
        if self.best.step is None or self.last is None:
            return step
        if self.best.step != step:
            self.best.restore(self.network)
            scores = self.best.score, step, self.last[1]
            logger.info("step %d is the best of all measured steps (selection score %.2f; step %d: %.2f)", self.best.step, *scores)
        logger.info("step %d is kept: %s", self.best.step, self.best.record)
        return self.best.step

    def calibration(self, target: Target) -> tuple[Calibration, EvaluationRecord]:
        """The strength that is to become weight 1, from what observations know and a few more strengths, confirmed by other pictures at
        fresh seeds; and what those say of weight +1 and -1."""
        before = self.model.num_unet_evaluations
        known = self.best.record or self._measured((-1.0, 1.0), "the strength")
        curve = curve_of(known, REWARD)
        for _ in range(MAX_STRENGTHS):
            strength = next_strength(curve, target)
            if strength is None:
                break
            curve = curve.joined(self._curve(strength))
        scale = choose_scale(curve, target).scale
        sampling, seeds = self.pictures.sampling, len(self.pictures.seeds[0])
        of_a_picture = sampling.num_steps * (1 if sampling.guidance_scale == 1 else 2)
        left = (CALIBRATION_SHARE * self.trained - (self.model.num_unet_evaluations - before)) / of_a_picture  # pictures
        prompts = spread(self.others, max(FEWEST_FRESH, int(left / (3 * seeds))))
        if max(curve.multipliers) < FARTHER * scale and left > 3 * seeds * len(prompts) + 2 * FIRST_PAIRS:  # for the usable range
            curve = curve.joined(self._curve(2 * scale))
        fresh = self._measurer(prompts, FRESH_SEEDS, seeds)
        record = fresh.measure(self.network, (-scale, scale), name="weight 1")
        base = [part.base(self.network).scores[REWARD] for part in (self.pictures, fresh)]
        unit_scores = np.concatenate(base) if base[0].shape[1] == base[1].shape[1] else None
        calibration = confirm(curve, curve_of(record, REWARD, unit_scores), target)
        return calibration, replace(record, multipliers=tuple(weight / scale for weight in record.multipliers))

    def _curve(self, strength: float) -> ResponseCurve:
        return curve_of(self._measured((-strength, strength), f"strength {strength:.3g}"), REWARD)

    # ---- measurements ----

    def _measured(
        self, multipliers: Sequence[float], name: str, is_open: Callable[[EvaluationRecord], bool] | None = None
    ) -> EvaluationRecord:
        """The slider on a part of the pictures, then on the rest while `is_open`."""
        record: EvaluationRecord | None = None
        for part in self._parts():
            if record is None:
                record = self.pictures.measure(self.network, multipliers, name=name, part=part)
            elif is_open is not None and is_open(record):
                record = record.joined(self.pictures.measure(self.network, multipliers, name=name, part=part))
        assert record is not None
        return record

    def _parts(self) -> list[Part]:
        """The pictures in parts of about `FIRST_PAIRS` and the rest; all at once where everything is measured."""
        rows, seeds = range(len(self.prompts)), len(self.pictures.seeds[0])
        if self.config.measure == "full":
            return [self.pictures.everything]
        if 2 * len(rows) > FIRST_PAIRS:
            return [Part(rows[::2], slice(0, 2)), Part(rows[1::2], slice(0, 2))]
        first = min(seeds, -(-FIRST_PAIRS // len(rows)))
        return [Part(rows, slice(0, first)), *([Part(rows, slice(first, seeds))] if seeds - first >= 2 else [])]

    @contextmanager
    def _spending(self) -> Iterator[None]:
        before = self.model.num_unet_evaluations
        try:
            yield
        finally:
            self.spent += self.model.num_unet_evaluations - before

    def _new_running(self) -> RunningGain:
        scores = self.pictures.base(self.network).scores[REWARD]
        means = scores.mean(1)
        base = {prompt.prompt: float(mean) for prompt, mean in zip(self.prompts, means, strict=True)}
        pools = 1 if self._trajectories is None else len(self._trajectories.pools)
        return RunningGain(within_prompt_std(scores), base, float(means.std()), life=self.train_steps * pools)

    def preview(self, output_dir: Path, output_name: str, step: int) -> Path:
        """Write the grid of previews and return its path."""
        path = preview_path(output_dir, output_name, step)
        prompts = spread(self.prompts, PREVIEW_PROMPTS)
        write_preview(path, self.model, self.network, prompts, PREVIEW_WEIGHTS, self.sampling, self.encoder)
        return path

    def state_dict(self) -> dict[str, Any]:
        """What a run that goes on must know: what was measured and warned of, the base model's pictures, and the best weights."""
        self._absorb()
        return {
            "early_stop": self.early_stop.state_dict(),
            "given": sorted(self.given),
            "best": self.best.state_dict(),
            "last": self.last,
            "pictures": self.pictures.state_dict(),
            "running": None if self.running is None else self.running.state_dict(),
            "trail": list(self._trail),
            "spent": self.spent,
            "trained": self.trained,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.early_stop.load_state_dict(state["early_stop"])
        self.given = set(state["given"])
        self.best.load_state_dict(state["best"])
        self.last, self._trail = state["last"], [tuple(entry) for entry in state["trail"]]
        self._trained_before, self._spent_before = state["trained"] - self.model.num_unet_evaluations, state["spent"]
        self.spent = state["spent"]
        self.pictures.load_state_dict(state["pictures"])
        if state["running"] is not None:
            self.running = self._new_running()
            self.running.load_state_dict(state["running"])

    def _measurer(self, prompts: Sequence[PromptSpec], seed_offset: int = 0, seeds: int | None = None) -> Measurer:
        sampling = self.sampling
        if self.config.measure == "light" and sampling.num_steps > QUICK_STEPS and detect(self.model) is None:
            sampling = replace(sampling, sampler=QUICK_SAMPLER, num_steps=QUICK_STEPS, spacing=None)
        seeds = seeds or max(3, -(-NUM_PICTURES // max(len(prompts), 1)))
        return Measurer(
            model=self.model,
            raters=Raters(reward=self.reward, judges=self.judges),
            prompts=prompts,
            seeds=seed_table(prompts, seeds, offset=seed_offset),
            sampling=sampling,
            encoder=self.encoder,
        )

    def _check_unit(self, pictures: Measurer) -> None:
        if self.reward.goals and within_prompt_std(pictures.base(self.network).scores[REWARD]) == 0:
            raise UserError("the base model's score does not vary between seeds, so a gain has no unit; give other eval prompts")


def _two_spreads(prompts: Sequence[PromptSpec], count: int, size: tuple[int, int]) -> tuple[list[PromptSpec], list[PromptSpec]]:
    """`count` prompts evenly over the list, and as many others, or the same where there are no others. Those that can be sampled together
    are neighbours."""
    both = spread(prompts, 2 * count)
    parts = (both[::2], both[1::2]) if len(both) == 2 * count else (spread(prompts, count),) * 2
    first, second = (sorted(part, key=lambda prompt: (size_of(prompt, size), prompt.num_steps or 0)) for part in parts)
    return first, second


def due(step: int, every: int | None) -> bool:
    """Whether something that happens every n steps happens after update number `step` (1, 2, ...)."""
    return every is not None and step % every == 0
