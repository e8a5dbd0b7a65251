"""LECO: the frozen model's own words as the target (arXiv 2303.07345; as sliders with both signs, arXiv 2311.12092).

    loss = | f_LoRA(x_t, target) - [f(x_t, neutral) +- guidance (f(x_t, positive) - f(x_t, unconditional))] |^2

f is what the U-Net puts out, x_t is where a trajectory of the target prompt stands, rolled out with the LoRA on. One belt for each
picture size (see `library.rollouts.belt`) hands out x_t at every call, so a step is one U-Net call with gradient, of one row a sample, and
one without: the frozen predictions and the rollout's unconditional branch together. Published programs denoise from noise for each step.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from library.errors import UserError
from library.objectives.base import TERMS, Term, TrainingContext
from library.objectives.predictions import predict_plain
from library.objectives.regression import as_output, min_snr_weights, squared_errors
from library.prompts.leco_files import LecoSetting, load_leco_settings
from library.rollouts.belt import Belt
from library.rollouts.prompt_encoder import Size
from library.settings.options import option
from library.training.runtime import upload
from library.types import Conditioning, LossOutput, PromptSpec, RolloutBatch

logger = logging.getLogger(__name__)

SIDE_STEP = 64  # pixels; of dynamic_resolution


@dataclass(frozen=True, kw_only=True)
class LecoConfig:
    """Learning from words: directions between prompts."""

    leco_prompts_file: str = option(
        "",
        help="Prompt file of sd-scripts' train_leco.py, LECO or Concept Sliders (.toml, .yaml). Default: prompts_file.",
        only_with=({"objective": ("leco",)}, {"objective": (), "scorer": ()}),
    )


@dataclass(frozen=True, kw_only=True)
class LecoPrompt(PromptSpec):
    """A setting as the belt rolls it out: its target, at its multiplier, guided away from its unconditional prompt."""

    setting: LecoSetting


@dataclass(frozen=True)
class FrozenPredictions:
    """What the model says without the LoRA, as the U-Net puts it out [B, C, h, w] each; and the rollout's unconditional eps with it."""

    positive: Tensor
    neutral: Tensor
    unconditional: Tensor
    rollout_uncond: Tensor | None


@TERMS.register("leco")
class LecoTerm(Term):
    """Settings drawn alike, each as a trajectory of its own with its own multiplier; `weight` of a setting weighs its loss.

    As many trajectories hold the settings of one picture size side by side: train_batch_size, else the largest batch_size of the file.
    """

    config_class: ClassVar[type | None] = LecoConfig

    @classmethod
    def build(cls, context: TrainingContext, settings: LecoConfig) -> "LecoTerm":
        path = settings.leco_prompts_file or context.rollout.prompts_file
        if not path:
            raise UserError("leco has no prompts: set leco_prompts_file (or prompts_file) to a file with [[prompts]] or [[targets]]")
        return cls(context, load_leco_settings(path))

    def __init__(self, context: TrainingContext, settings: Sequence[LecoSetting]) -> None:
        self.context, self.settings = context, settings
        self.generator = context.generator("leco")
        own = [setting.batch_size for setting in settings if setting.batch_size is not None]
        self.batch_size = context.rollout.train_batch_size or max(own, default=context.rollout.batch_size)
        native = context.sampling.size
        self._sizes = [possible_sizes(setting, native) for setting in settings]
        self._belts: dict[Size, Belt] = {}  # a size has one from its first batch on: dynamic_resolution knows many, and each costs a start
        self._log_what_is_not_used()
        texts = {text: None for own in settings for text in (own.target, own.positive, own.unconditional, own.neutral)}
        context.encoder.encode_ahead([PromptSpec(prompt=text) for text in texts], native)

    def __call__(self) -> LossOutput:
        model, network = self.context.model, self.context.network
        belt = self._next_belt()
        batch = belt.next_batch()
        settings = [prompt.setting for prompt in batch.prompts if isinstance(prompt, LecoPrompt)]
        cond, negative = self._with_crops(batch, settings)
        frozen = self._predict_plain(batch, settings, cond, negative)
        network.set_multiplier(batch.multipliers)
        eps = model.predict_eps(batch.latents, batch.timesteps, cond)

        shifts = upload([setting.shift for setting in settings], eps.device).view(-1, 1, 1, 1)
        target = frozen.neutral + shifts * (frozen.positive - frozen.unconditional)
        errors = squared_errors(as_output(model, batch.latents, eps, batch.timesteps), target)
        weights = upload([setting.weight for setting in settings], eps.device)
        losses = errors * weights * min_snr_weights(model, batch.timesteps, self.context.min_snr_gamma)

        belt.advance(belt.trajectories.guided(batch, eps.detach(), frozen.rollout_uncond))
        return LossOutput(
            loss=losses.mean(),
            sample_losses=losses.detach(),
            samples=[
                f"leco target {setting.target!r} at timestep {int(timestep)}"
                for setting, timestep in zip(settings, batch.times, strict=True)
            ],
            metrics={"mse": errors.detach().mean(), "shift": squared_errors(target, frozen.neutral).mean().sqrt()},
        )

    def renew_broken(self) -> None:
        for belt in self._belts.values():
            belt.renew_broken()

    def state_dict(self) -> dict[str, Any]:
        belts = [{"size": list(size), "belt": belt.state_dict()} for size, belt in self._belts.items()]
        return {"belts": belts, "generator": self.generator.get_state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raises UserError if the state was saved with other prompts, sizes or batch size."""
        self._belts.clear()
        for saved in state["belts"]:
            size = (saved["size"][0], saved["size"][1])
            if not any(size in sizes for sizes in self._sizes):
                raise UserError(
                    f"resume: the saved state trained leco at {size[1]}x{size[0]} pixels; resume with the same LECO prompts file"
                )
            self._belt_of(size).load_state_dict(saved["belt"])
        self.generator.set_state(state["generator"])  # last: belts draw from it as they are made

    def _next_belt(self) -> Belt:
        """Of a size of a setting drawn alike, which is how often the setting's trajectories are to be seen at it."""
        sizes = self._sizes[_draw(len(self.settings), self.generator)]
        return self._belt_of(sizes[_draw(len(sizes), self.generator)])

    def _belt_of(self, size: Size) -> Belt:
        if size not in self._belts:
            prompts = [
                LecoPrompt(
                    prompt=setting.target,
                    negative_prompt=setting.unconditional,
                    height=size[0],
                    width=size[1],
                    weight=1 / len(sizes),
                    multiplier=setting.multiplier,
                    setting=setting,
                )
                for setting, sizes in zip(self.settings, self._sizes, strict=True)
                if size in sizes
            ]
            self._belts[size] = Belt(self.context.trajectories(prompts, self.generator, self.batch_size))
        return self._belts[size]

    def _predict_plain(
        self, batch: RolloutBatch, settings: Sequence[LecoSetting], cond: Conditioning, uncond: Conditioning
    ) -> FrozenPredictions:
        """All in one call; a text that a sample needs twice, such as a neutral that is its unconditional, is predicted once."""
        model, row_of = self.context.model, _frozen_rows_of(settings)
        places = [place for place, _ in row_of]
        height, width = (side * model.spec.vae_scale_factor for side in batch.latents.shape[-2:])
        texts = self.context.encoder.encode([text for _, text in row_of], (height, width), [0.0] * len(row_of))
        frozen_cond = replace(texts, time_ids=cond[places].time_ids)
        plain = predict_plain(model, self.context.network, batch, frozen_cond, uncond=uncond, frozen_rows=places)
        assert plain.frozen is not None
        outputs = as_output(model, batch.latents[places], plain.frozen, batch.timesteps[places])

        def of(texts: Sequence[str]) -> Tensor:
            return outputs[[row_of[place, text] for place, text in enumerate(texts)]]

        return FrozenPredictions(
            positive=of([setting.positive for setting in settings]),
            neutral=of([setting.neutral for setting in settings]),
            unconditional=of([setting.unconditional for setting in settings]),
            rollout_uncond=plain.uncond,
        )

    def _with_crops(self, batch: RolloutBatch, settings: Sequence[LecoSetting]) -> tuple[Conditioning, Conditioning]:
        """The batch's conditioning, where dynamic_crops is set with time_ids of a crop drawn anew: one for all predictions of a sample."""
        time_ids = batch.cond.time_ids
        if time_ids is None or not any(setting.dynamic_crops for setting in settings):
            return batch.cond, batch.uncond
        cropped = upload([setting.dynamic_crops for setting in settings], time_ids.device)
        time_ids = torch.where(cropped[:, None], random_crops(time_ids, self.generator), time_ids)
        return replace(batch.cond, time_ids=time_ids), replace(batch.uncond, time_ids=time_ids)

    def _log_what_is_not_used(self) -> None:
        if any(setting.batch_size not in (None, self.batch_size) for setting in self.settings):
            logger.warning("the batches of all LECO settings have %d trajectories, whatever batch_size each has", self.batch_size)
        if any(setting.dynamic_resolution and len(sizes) == 1 for setting, sizes in zip(self.settings, self._sizes, strict=True)):
            logger.warning("dynamic_resolution is for squares of 128 pixels and more; other settings keep their resolution")
        if any(setting.dynamic_crops for setting in self.settings) and self.context.model.spec.family != "sdxl":
            logger.warning("dynamic_crops does nothing here: only SDXL knows of crops")


def possible_sizes(setting: LecoSetting, default: Size) -> list[Size]:
    """The (height, width) that a setting may take: with dynamic_resolution, sides in steps of 64 from half of a square's to all of it."""
    height, width = setting.size or default
    if not setting.dynamic_resolution or height != width or height < SIDE_STEP:
        return [(height, width)]
    sides = range(max(height // 2 // SIDE_STEP, 1) * SIDE_STEP, height + 1, SIDE_STEP)
    return [(high, wide) for high in sides for wide in sides]


def random_crops(time_ids: Tensor, generator: torch.Generator) -> Tensor:
    """time_ids [B, 6] of pictures that were 1 to 3 times as large and of which a random part was cut, as sd-scripts draws them."""
    size = time_ids[:, 4:6]
    scale, top, left = upload(torch.rand(3, len(time_ids), 1, generator=generator), time_ids.device)
    original = (size * (1 + 2 * scale)).floor()
    corner = (torch.cat([top, left], dim=1) * (original - size)).floor()
    return torch.cat([original, corner, size], dim=1)


def _frozen_rows_of(settings: Sequence[LecoSetting]) -> dict[tuple[int, str], int]:
    """The row of each (sample, text) that the frozen model is asked for."""
    wanted = [
        (place, text) for place, setting in enumerate(settings) for text in (setting.positive, setting.neutral, setting.unconditional)
    ]
    return {key: row for row, key in enumerate(dict.fromkeys(wanted))}


def _draw(count: int, generator: torch.Generator) -> int:
    return int(torch.randint(count, (1,), generator=generator))
