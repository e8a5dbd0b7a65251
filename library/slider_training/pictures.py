"""The pictures that a slider is measured on while it trains and after it, and the strength that they give weight 1."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np

from library.errors import UserError
from library.measuring.calibration import Calibration, CalibrationTarget
from library.measuring.measure import Measurer, Raters, seed_table
from library.measuring.pictures import Part
from library.measuring.record import REWARD, EvaluationRecord
from library.measuring.response_curve import ResponseCurve, curve_of
from library.measuring.statistics import PairedChanges, within_prompt_std
from library.measuring.strength import at_level, choose_scale, confirm, next_strength
from library.models.base import DiffusionModel
from library.prompts.files import spread
from library.rollouts.few_step import detect
from library.rollouts.prompt_encoder import PromptEncoder, size_of
from library.rollouts.sample import SamplingConfig
from library.slider_training.previews import CARD_PROMPTS
from library.types import PromptSpec
from networks.lora import LoRANetwork

FRESH_SEEDS = 1_000_000  # added to the seeds of pictures that check what others have chosen
NUM_PROMPTS, NUM_PICTURES = 16, 64  # of the base model; with fewer prompts, more seeds of each
FIRST_PAIRS = 16  # of prompt and seed, that a measurement begins with
QUICK_SAMPLER, QUICK_STEPS = "dpmpp_2m", 10  # on some of the training's own timesteps (docs/experiments.md)
MAX_STRENGTHS = 3  # measured for the calibration besides those that observations know
MEASURED_SHARE, FEWEST_PICTURES = 0.42, 240  # that all measuring may take: of the training's evaluations, 29.6 % of a run; all the same
FEWEST_FRESH, MANY_FRESH = 11, 48  # prompts that confirm it all the same; with `full`
FARTHER = 1.5  # times weight 1, that the usable range is to be known to


class SliderPictures:
    """A fixed set of prompts and seeds, of which the base model's pictures are made once.

    Args:
        raters: the training's reward, and judges.
        prompts: some are taken, evenly over the list, and others to confirm what those chose.
        sampling: as the training samples.
        full: sample so, measure all pictures every time and calibrate on many; else in a few steps, beginning with a part of them.

    Attributes:
        measurer: of the prompts that are taken.
        spent: evaluations of the U-Net for measurements.
    """

    def __init__(
        self,
        model: DiffusionModel,
        network: LoRANetwork,
        raters: Raters,
        prompts: Sequence[PromptSpec],
        encoder: PromptEncoder,
        sampling: SamplingConfig,
        *,
        full: bool = False,
    ) -> None:
        self.model, self.network, self.raters, self.encoder, self.full = model, network, raters, encoder, full
        self.sampling = replace(sampling, batch_size=None)
        self.prompts, self.others = _two_parts(prompts, NUM_PROMPTS * (2 if full else 1), sampling.size)
        self.measurer = self.measurer_of(self.prompts)
        self.spent = self._trained_before = self._spent_before = 0

    @property
    def trained(self) -> int:
        """Evaluations of the U-Net for the training itself, those before a resume included."""
        return self._trained_before + self.model.num_unet_evaluations - (self.spent - self._spent_before)

    def base_scores(self) -> np.ndarray:
        """The reward of the base model's pictures [P, S]. Raises UserError without a unit for gains: not finite, or all alike."""
        scores = self.measurer.base(self.network).scores[REWARD]
        if not np.isfinite(scores).all():
            raise UserError("the score of the base model's pictures is not finite: the model or a scorer is broken, or overflows in fp16")
        if within_prompt_std(scores) == 0:
            raise UserError("the base model's score does not vary between seeds, so a gain has no unit; give other eval prompts")
        return scores

    def measured(
        self, multipliers: Sequence[float], name: str, is_open: Callable[[EvaluationRecord], bool] | None = None
    ) -> EvaluationRecord:
        """The slider on a part of the pictures, then on the rest while `is_open`."""
        record: EvaluationRecord | None = None
        for part in self._parts():
            if record is None:
                record = self.measurer.measure(self.network, multipliers, name=name, part=part)
            elif is_open is not None and is_open(record):
                record = record.joined(self.measurer.measure(self.network, multipliers, name=name, part=part))
        assert record is not None
        return record

    def _parts(self) -> list[Part]:
        """The pictures in parts of about `FIRST_PAIRS` and the rest; all at once where everything is measured."""
        rows, seeds = range(len(self.prompts)), len(self.measurer.seeds[0])
        if self.full:
            return [self.measurer.everything]
        if 2 * len(rows) > FIRST_PAIRS:
            return [Part(rows[::2], slice(0, 2)), Part(rows[1::2], slice(0, 2))]
        first = min(seeds, -(-FIRST_PAIRS // len(rows)))
        return [Part(rows, slice(0, first)), *([Part(rows, slice(first, seeds))] if seeds - first >= 2 else [])]

    @contextmanager
    def spending(self) -> Iterator[None]:
        """What is evaluated inside the block was spent on measuring."""
        before = self.model.num_unet_evaluations
        try:
            yield
        finally:
            self.spent += self.model.num_unet_evaluations - before

    def calibration(self, target: CalibrationTarget, known: EvaluationRecord | None) -> tuple[Calibration, EvaluationRecord]:
        """The strength that is to become weight 1, from what observations know and a few more strengths, confirmed by other pictures at
        fresh seeds; and the measurement that is nearest to the weights +1 and -1, whose judges, flaws and pictures are told of."""
        trained, before = self.trained, self.model.num_unet_evaluations
        known = self._whole(known or self.measured((-1.0, 1.0), "the strength"))
        made = {1.0: known}  # by strength
        curve = curve_of(known, REWARD)
        for _ in range(MAX_STRENGTHS):
            strength = next_strength(curve, target)
            if strength is None:
                break
            curve = self._farther(curve, strength, made)
        scale = choose_scale(curve, target).scale
        sampling, seeds = self.measurer.sampling, len(self.measurer.seeds[0])
        pairs = slice(0, seeds // 2)  # the unit is harder to know than the gain, and comes from all of the base model's pictures
        spent = self.spent + self.model.num_unet_evaluations - before
        left = max(FEWEST_PICTURES, MEASURED_SHARE * trained / sampling.num_evaluations) - spent / sampling.num_evaluations  # pictures
        prompts = spread(self.others, max(MANY_FRESH if self.full else FEWEST_FRESH, int(left / (seeds + 2 * pairs.stop))))
        spare = left - (seeds + 2 * pairs.stop) * len(prompts)
        if max(curve.multipliers) < FARTHER * scale and spare > 2 * FIRST_PAIRS:  # for the usable range
            curve = self._farther(curve, 2 * scale, made)
        fresh = self.measurer_of(prompts, FRESH_SEEDS, seeds)
        record = fresh.measure(self.network, (-scale, scale), name="weight 1", part=Part(range(len(prompts)), pairs))
        level = curve_of(record, REWARD, fresh.base(self.network).scores[REWARD], [self._changes(known, curve, scale)])
        calibration = confirm(curve, level, target)
        if calibration.curve is not None:  # other pictures gain or change less, or far more: perhaps where nothing was measured yet
            strength = next_strength(calibration.curve.rescaled(1 / calibration.scale), target)
            if strength is not None:
                calibration = confirm(self._farther(curve, strength, made), level, target)
        made[scale] = record
        with_pictures = [strength for strength, own in made.items() if own.pictures] or [scale]  # those of a resumed run are not kept
        nearest = min(with_pictures, key=lambda strength: abs(math.log(strength / calibration.scale)))
        own = made[nearest]
        record = replace(own, multipliers=tuple(weight / nearest for weight in own.multipliers))
        return replace(calibration, pictured_at=nearest / calibration.scale), record

    def _whole(self, known: EvaluationRecord) -> EvaluationRecord:
        """With the prompts that an observation left out because its question was answered: the base model's pictures are there, so that
        they cost half of what other prompts do."""
        first, *rest = self._parts()
        pairs = len(first.rows) * len(self.measurer.seeds[0][first.places])
        if known.num_pairs != pairs or not rest or rest[0].rows == first.rows:
            return known
        return known.joined(self.measurer.measure(self.network, (-1.0, 1.0), name="the strength", part=rest[0]))

    def _changes(self, known: EvaluationRecord, curve: ResponseCurve, scale: float) -> PairedChanges:
        """What the pictures of +1 and -1 say of the strengths -`scale`, 0 and `scale`, by the form of the curve; the unit alone, where it
        does not rise from 0 to both."""
        base = self.measurer.base(self.network).scores[REWARD]
        rows = {(prompt.prompt, seeds[0]): row for row, (prompt, seeds) in enumerate(zip(self.prompts, self.measurer.seeds, strict=True))}
        own = [(prompt, seeds[0]) for prompt, seeds in zip(known.prompts, known.seeds, strict=True)]
        at, there = (np.array([curve.gain_at(sign * strength) for sign in (-1, 1)]) for strength in (1.0, scale))
        if not rows.keys() >= {*own} or not ((at * [-1, 1] > 0) & (there * [-1, 1] > 0)).all():
            return PairedChanges(base)
        response = known.responses[REWARD]
        changes = (response.values - response.values[:, :, known.base, None]) * response.signs[:, None, None]
        return PairedChanges(base[[rows[key] for key in own]], changes * [there[0] / at[0], 0.0, there[1] / at[1]])

    def _farther(self, curve: ResponseCurve, strength: float, made: dict[float, EvaluationRecord]) -> ResponseCurve:
        """The curve with a strength and its opposite. They are measured on the first of the pictures, and what those say of it over what
        they say of the trained strength is brought to the level of all that are known. The record is put into `made`."""
        record = made[strength] = self.measured((-strength, strength), f"strength {strength:.3g}")
        known, form = made[1.0], curve_of(record, REWARD)
        first = known.first(len(record.prompts), len(record.seeds[0]))
        if (first.prompts, first.seeds) == (record.prompts, record.seeds):
            form = at_level(curve_of(first, REWARD).joined(form), curve_of(known, REWARD)) or form
        return curve.joined(form)

    def measurer_of(self, prompts: Sequence[PromptSpec], seed_offset: int = 0, seeds: int | None = None) -> Measurer:
        sampling = self.sampling
        if not self.full and sampling.num_steps > QUICK_STEPS and detect(self.model) is None:
            sampling = replace(sampling, sampler=QUICK_SAMPLER, stride=round(sampling.num_steps / QUICK_STEPS), guidance_every=2)
        seeds = seeds or max(3, -(-NUM_PICTURES // max(len(prompts), 1)))
        return Measurer(
            model=self.model,
            raters=self.raters,
            prompts=prompts,
            seeds=seed_table(prompts, seeds, offset=seed_offset),
            sampling=sampling,
            encoder=self.encoder,
            num_pictures=CARD_PROMPTS,
        )

    def state_dict(self) -> dict[str, Any]:
        """The base model's pictures, and what was spent."""
        return {"base": self.measurer.state_dict(), "spent": self.spent, "trained": self.trained}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.measurer.load_state_dict(state["base"])
        self._trained_before, self._spent_before = state["trained"] - self.model.num_unet_evaluations, state["spent"]
        self.spent = state["spent"]


def _two_parts(prompts: Sequence[PromptSpec], count: int, size: tuple[int, int]) -> tuple[list[PromptSpec], list[PromptSpec]]:
    """`count` prompts evenly over the list, and all others, or the same where fewer are left. Those that can be sampled together are
    neighbours."""
    first = spread(prompts, count)
    taken = set(first)
    rest = [prompt for prompt in prompts if prompt not in taken]
    parts = (first, rest if len(rest) >= len(first) else first)
    first, others = (sorted(part, key=lambda prompt: (size_of(prompt, size), prompt.num_steps or 0)) for part in parts)
    return first, others
