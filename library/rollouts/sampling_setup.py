"""How a run samples its base: as the settings say, or as the base was distilled to be sampled."""

import logging
from dataclasses import fields, replace
from typing import cast

from library.diffusion.noise_schedule import TimestepSpacing
from library.models.base import DiffusionModel
from library.rollouts.belt import RolloutConfig
from library.rollouts.few_step import SamplingChoice, detect, recommended

logger = logging.getLogger(__name__)


def choose_sampling(
    model: DiffusionModel,
    *,
    num_steps: int | None,
    guidance_scale: float | None,
    sampler: str | None,
    spacing: TimestepSpacing | None,
    ordinary: SamplingChoice,
) -> SamplingChoice:
    """What the user set (None is not set), what suits a few-step base, or else `ordinary`; the model's schedule takes the spacing.

    A few-step base is named in the log, and so is every setting that does not fit it.
    """
    base = detect(model)
    choice = recommended(base, num_steps=num_steps, guidance_scale=guidance_scale, sampler=sampler, spacing=spacing, ordinary=ordinary)
    if base is not None:
        logger.info(
            "few-step base %s (%s): sampled in %d steps by %s, guidance scale %g",
            base.name,
            base.note,
            choice.num_steps,
            choice.sampler,
            choice.guidance_scale,
        )
    for warning in choice.warnings:
        logger.warning("%s", warning)
    if choice.embedded_guidance is not None:
        model.embedded_guidance = choice.embedded_guidance
    if choice.spacing is not None:
        model.schedule = replace(model.schedule, timestep_spacing=choice.spacing)
    return choice


def fit_rollout(config: RolloutConfig, model: DiffusionModel) -> RolloutConfig:
    """The rollout's settings for this model, whose schedule is changed where they say so.

    A setting that has its default counts as not set: a few-step base replaces it.

    Raises:
        UserError: zero terminal SNR for a model that cannot have it; a base that cannot be sampled.
    """
    if config.zero_terminal_snr:
        model.schedule = model.schedule.with_zero_terminal_snr()
    default = {field.name: field.default for field in fields(RolloutConfig)}

    def own(name: str):
        value = getattr(config, name)
        return None if value == default[name] else value

    choice = choose_sampling(
        model,
        num_steps=own("max_denoising_steps"),
        guidance_scale=own("leco_denoise_guidance_scale"),
        sampler=own("sampler"),
        spacing=cast(TimestepSpacing | None, config.timestep_spacing),
        ordinary=SamplingChoice(
            num_steps=config.max_denoising_steps, guidance_scale=config.leco_denoise_guidance_scale, sampler=config.sampler, spacing=None
        ),
    )
    return replace(
        config,
        max_denoising_steps=choice.num_steps,
        leco_denoise_guidance_scale=choice.guidance_scale,
        sampler=choice.sampler,
        draft_steps=min(config.draft_steps, choice.num_steps),
    )
