"""What a slider does while it trains: its running gain, observations where one is worth it, what independent judges say, when to stop,
which step to keep, and which strength to call 1."""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from library.measuring.judges import Judges
from library.measuring.measure import Raters
from library.measuring.record import FIRM_GAIN, REWARD, EvaluationRecord
from library.measuring.statistics import within_prompt_std
from library.measuring.warnings import find_warnings
from library.models.base import DiffusionModel
from library.objectives.rewards import Reward
from library.objectives.terms.score import ScoreTerm
from library.rollouts.prompt_encoder import PromptEncoder
from library.rollouts.sample import SamplingConfig
from library.rollouts.trajectories import Trajectories
from library.slider_training.early_stop import EarlyStop
from library.slider_training.keep_best import KeepBest, selection_score
from library.slider_training.monitor_config import MonitorConfig
from library.slider_training.outcome import Observation, Outcome
from library.slider_training.pictures import SliderPictures
from library.slider_training.running_gain import SIGNS, RunningGain
from library.training.run_files import due
from library.types import Finished, LossOutput, PromptSpec, RolloutBatch
from networks.lora import LoRANetwork

logger = logging.getLogger(__name__)

OBSERVATIONS, OBSERVATIONS_WITH_JUDGES = 3, 8  # observations of a run at regular places, besides those that the running gain asks for
CHECKS = 100  # times a run that the running gain is looked at
TOO_STRONG = 1.4  # times early_stop_gain: a running gain that may be so much, within its standard deviation, is looked at
PLATEAU = 0.1  # within-prompt standard deviations in a fifth of a run: less is no growth


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
        pictures: what the slider is measured on.
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
        self.network, self.reward, self.encoder = network, reward, encoder
        self.config, self.judges, self.num_steps, self.agree = config, judges or Judges(), num_steps, agree
        self.train_steps = sampling.num_steps
        if not prompts and config.measure != "off":
            logger.info("without prompts the slider is neither measured nor calibrated; eval_prompts_file gives some")
        raters = Raters(reward=reward, judges=self.judges)
        self.pictures = SliderPictures(model, network, raters, prompts, encoder, sampling, full=config.measure == "full")
        lora = network.loras[0]
        self.early_stop = EarlyStop(gain=config.early_stop_gain, network_scale=lora.alpha.item() / lora.rank)
        self.best = KeepBest()
        self.given: set[str] = set()  # the keys of the warnings that were given
        self.last: tuple[int, float] | None = None  # the step that was measured last, and its selection score
        self.stop: str | None = None
        self.record: EvaluationRecord | None = None  # what was measured last
        self.running: RunningGain | None = None
        self._seen: list[tuple[Tensor, Tensor, Finished | None]] = []  # of updates since the last check, on the model's device
        self._trajectories: Trajectories | None = None
        self._trail: list[tuple[int, float]] = []  # the running gain of both signs, at each check

    @property
    def measures(self) -> bool:
        return bool(self.pictures.prompts) and self.config.measure != "off"

    @property
    def interval(self) -> int:
        """Updates between observations at regular places."""
        if self.config.evaluate_every_n_steps is not None:
            return self.config.evaluate_every_n_steps
        count = OBSERVATIONS_WITH_JUDGES if self.judges.names else OBSERVATIONS
        return 50 if self.config.measure == "full" else max(1, -(-self.num_steps // count))

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

    def acts_after(self, step: int) -> bool:
        """Whether `after` does anything after update number `step`."""
        return self.measures and (step % max(1, self.num_steps // CHECKS) == 0 or due(step, self.interval))

    def after(self, step: int) -> Observation | None:
        """After update number `step` (1, 2, ...): an observation, if one is worth its evaluations."""
        if not self.acts_after(step):
            return None
        self._absorb()
        if self.running is not None:
            self._trail.append((step, sum(self.running.gain(sign).value for sign in SIGNS) / 2))
            if self._trajectories is not None:
                self._trajectories.skip = self.running.skip()  # the weaker sign has more of them
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
        with self.pictures.spending():
            if self.reward.goals:
                self.pictures.base_scores()
            record = self.pictures.measured((-1.0, 1.0), f"step {step}", self._is_open if step > 0 else None)
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

    def _asks(self, step: int) -> bool:
        """Whether the running gain says that the slider is strong enough, or may be much too strong, or grows no more, and that was not
        looked at lately."""
        if self.running is None:
            return False
        since, wanted, gain = step - (self.last[0] if self.last else 0), self.config.early_stop_gain, self.running.weaker
        strong = wanted is not None and (gain.value >= wanted or TOO_STRONG * wanted <= gain.value + gain.std < math.inf)
        lately = max(1, min(step // 10, self.num_steps // 50))
        return (strong and since >= lately) or (self._is_plateau(step) and since >= self.interval // 2)

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
            target = self.config.target
            if target is not None and self.reward.goals:
                if any(worth.doubtful for worth in self.reward.worth):
                    target = replace(target, max_strength=1.0)
                with self.pictures.spending():
                    calibration, record = self.pictures.calibration(target, self.best.record)
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

    def _new_running(self) -> RunningGain:
        scores = self.pictures.base_scores()
        means = scores.mean(1)
        base = {prompt.prompt: float(mean) for prompt, mean in zip(self.pictures.prompts, means, strict=True)}
        life = self.train_steps if self._trajectories is None else self._trajectories.life
        return RunningGain(within_prompt_std(scores), base, float(means.std()), life)

    def state_dict(self) -> dict[str, Any]:
        """What a run that goes on must know: what was measured and warned of, the base model's pictures, and the best weights."""
        self._absorb()
        return {
            "early_stop": self.early_stop.state_dict(),
            "given": sorted(self.given),
            "best": self.best.state_dict(),
            "last": self.last,
            "stop": self.stop,
            "pictures": self.pictures.state_dict(),
            "running": None if self.running is None else self.running.state_dict(),
            "trail": list(self._trail),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.early_stop.load_state_dict(state["early_stop"])
        self.given = set(state["given"])
        self.best.load_state_dict(state["best"])
        self.last, self._trail = state["last"], [tuple(entry) for entry in state["trail"]]
        self.stop = state["stop"]
        self.pictures.load_state_dict(state["pictures"])
        if state["running"] is not None:
            self.running = self._new_running()
            self.running.load_state_dict(state["running"])
