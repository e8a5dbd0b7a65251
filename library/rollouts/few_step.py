"""Bases that were distilled to draw in a few steps: how to tell one, how to sample it, and what to say when the settings do not fit it.

The figures are those of the models' own pages: SDXL-Turbo and SD-Turbo (arXiv 2311.17042), LCM (2310.04378), SDXL-Lightning (2402.13929),
Hyper-SD (2404.13686), DMD2 (2405.14867), PCM (2405.18407), SDXL Flash (huggingface.co/sd-community/sdxl-flash),
Z-Image-Turbo (2511.22699).
"""

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

from library.diffusion.noise_schedule import TimestepSpacing
from library.diffusion.solvers import SOLVERS
from library.errors import UserError
from library.models.base import DiffusionModel
from library.models.registry import FAMILIES
from library.rollouts.config import RolloutConfig
from library.rollouts.prompt_encoder import Size
from library.rollouts.sample import SamplingConfig

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class FewStepBase:
    """How a distilled base is meant to be sampled.

    Attributes:
        name: of the method.
        num_steps: that it draws best in.
        min_steps, max_steps: that it was distilled for.
        guidance_scale: classifier-free guidance by two branches; 1 is none.
        max_guidance_scale: above it pictures burn.
        samplers: names in `solvers.SOLVERS` of all that do, the best first.
        spacing: of the timesteps.
        note: how it was recognised, for the log.
        embedded_guidance: the scale that its U-Net takes as an input; None if it takes none.
    """

    name: str
    num_steps: int
    min_steps: int
    max_steps: int
    guidance_scale: float = 1.0
    max_guidance_scale: float = 2.0
    samplers: tuple[str, ...]
    spacing: TimestepSpacing = "trailing"
    note: str = ""
    embedded_guidance: float | None = None

    @property
    def sampler(self) -> str:
        return self.samplers[0]


# of a model that is no few-step base
ORDINARY: Mapping[str, Any] = MappingProxyType({"num_steps": 20, "guidance_scale": 5.0, "sampler": "ddim"})
LCM = FewStepBase(name="LCM", num_steps=4, min_steps=1, max_steps=8, samplers=("lcm",), spacing="lcm")
DMD2 = FewStepBase(name="DMD2", num_steps=4, min_steps=4, max_steps=8, samplers=("lcm",))
TURBO = FewStepBase(name="Turbo", num_steps=4, min_steps=1, max_steps=4, samplers=("euler_a", "euler", "ddim", "ddpm"))
Z_IMAGE_TURBO = FewStepBase(
    name="Z-Image-Turbo", num_steps=8, min_steps=8, max_steps=9, max_guidance_scale=1.0, samplers=("euler", "ddim"), spacing="flow"
)
LIGHTNING = FewStepBase(name="Lightning", num_steps=4, min_steps=2, max_steps=8, samplers=("euler", "ddim"))
HYPER = FewStepBase(name="Hyper-SD", num_steps=8, min_steps=2, max_steps=12, samplers=("ddim", "euler"))
PCM = FewStepBase(name="PCM", num_steps=4, min_steps=2, max_steps=16, samplers=("ddim", "euler"))
FLASH = FewStepBase(
    name="SDXL Flash",
    num_steps=7,
    min_steps=6,
    max_steps=9,
    guidance_scale=3.0,
    max_guidance_scale=3.5,
    samplers=("dpmpp_2m", "euler_a"),  # its page names DPM++ SDE
)

# What a file's or folder's name says, in lower case with CamelCase split. "hyper" also begins "hyper realism", so it needs company.
_NAMES = (
    (r"lightning", LIGHTNING),
    (r"(?<![a-z])hyper([-_ ]?(sd|xl|vae|baked|\d+[-_ ]?step)|[-_]?\d*\.|$)", HYPER),
    (r"(?<![a-z])pcm(?![a-z])", PCM),
    (r"(sdxl|xl)[-_ ]?flash(?![a-z])", FLASH),
    (r"(?<![a-z])dmd2?(?![a-z])", DMD2),
    (r"(?<![a-z])lcm(?![a-z])", LCM),
    (r"turbo", TURBO),
)
_EULER = ("EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler")  # SD-Turbo's, SDXL-Turbo's
_TURBO_RESOLUTION = 512


def detect(model: DiffusionModel) -> FewStepBase | None:
    """Which few-step base a model is, by its U-Net, its name or its scheduler; None if nothing says that it is one.

    Raises:
        UserError: it is one that cannot be sampled here: a one-step checkpoint of Lightning or Hyper-SD.
    """
    spec, schedule = model.spec, model.schedule
    if model.embeds_guidance:
        note = "its U-Net takes the guidance scale as an input"
        return replace(LCM, note=note, max_guidance_scale=1.0, embedded_guidance=model.embedded_guidance)
    name = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", spec.name).lower()
    for pattern, base in _NAMES:
        if re.search(pattern, name):
            if base is TURBO and spec.prediction_type == "flow":
                base = Z_IMAGE_TURBO
            return _variant(replace(base, note=f"it is called {spec.name}"), name)
    if spec.scheduler == "LCMScheduler":
        return replace(LCM, note="its scheduler is LCMScheduler")
    # SDXL and SD2 at 512 pixels, predicting eps, with trailing steps: of the published models only Turbo is all of that
    if (
        spec.scheduler in _EULER
        and schedule.timestep_spacing == "trailing"
        and spec.prediction_type == "epsilon"
        and getattr(FAMILIES[spec.family], "has_turbo", False)
        and spec.resolution == _TURBO_RESOLUTION
    ):
        return replace(TURBO, note=f"its scheduler is {spec.scheduler} with trailing steps, and it draws {spec.resolution} pixels")
    return None


def _variant(base: FewStepBase, name: str) -> FewStepBase:
    """The base with what its name says besides: the number of steps, and for Hyper-SD and PCM whether it kept guidance."""
    found = re.search(r"(\d+)[-_ ]?steps?", name)
    if base.name not in (LIGHTNING.name, HYPER.name, PCM.name):
        return base
    if base.name == HYPER.name and "cfg" in name:
        base = replace(base, guidance_scale=5.0, max_guidance_scale=8.0)
    if base.name == PCM.name and re.search(r"normal[-_ ]?cfg", name):
        base = replace(base, guidance_scale=7.5, max_guidance_scale=9.0)
    if found is None:
        return base
    num_steps = int(found[1])
    if num_steps == 1:
        raise UserError(
            f"The model is a one-step checkpoint of {base.name}, which puts out another quantity or starts at another timestep than the "
            "schedule has; give the 2-, 4- or 8-step checkpoint."
        )
    return replace(base, num_steps=num_steps, min_steps=num_steps, max_steps=num_steps)


def resolve_sampling(config: RolloutConfig, model: DiffusionModel) -> SamplingConfig:
    """How the rollout samples this model: see `choose_sampling`. The model takes zero terminal SNR.

    Raises:
        UserError: zero terminal SNR for a model that cannot have it; a base that cannot be sampled.
    """
    if config.zero_terminal_snr:
        model.schedule = model.schedule.with_zero_terminal_snr()
    return choose_sampling(
        model,
        config.size(model.spec.resolution),
        num_steps=config.max_denoising_steps,
        guidance_scale=config.leco_denoise_guidance_scale,
        sampler=config.sampler,
        spacing=config.timestep_spacing,
        guidance_rescale=config.guidance_rescale,
        batch_size=config.batch_size,
    )


def choose_sampling(model: DiffusionModel, size: Size, *, ordinary: Mapping[str, Any] = ORDINARY, **given: Any) -> SamplingConfig:
    """How to sample a model: by what is given, else what suits a few-step base, else `ordinary` values.

    A few-step base is named in the log, and so is every value that does not fit it. For one whose U-Net takes the guidance scale as an
    input, a guidance scale that is given is that input, as in diffusers: the model takes it, and no guidance by two branches comes on top.

    Args:
        size: (height, width) in pixels.
        ordinary, given: values of `SamplingConfig`, by name; None is not given.

    Raises:
        UserError: a base that cannot be sampled.
    """
    base = detect(model)
    given = {name: value for name, value in given.items() if value is not None}
    if base is None:
        return SamplingConfig(**{"size": size, **ordinary, **given})
    if base.embedded_guidance is not None:
        model.embedded_guidance = given.pop("guidance_scale", base.embedded_guidance)
    own = {name: getattr(base, name) for name in ("num_steps", "guidance_scale", "sampler", "spacing")}
    sampling = SamplingConfig(**{"size": size, **own, **given})
    how = f"sampled in {sampling.num_steps} steps by {sampling.sampler}, guidance scale {sampling.guidance_scale:g}"
    logger.info("few-step base %s (%s): %s", base.name, base.note, how)
    for warning in _warnings(base, sampling):
        logger.warning("%s", warning)
    return sampling


def _warnings(base: FewStepBase, sampling: SamplingConfig) -> list[str]:
    """What of this does not fit the base, in words."""
    warnings = []
    if not base.min_steps <= sampling.num_steps <= base.max_steps:
        steps = f"{base.min_steps}" if base.min_steps == base.max_steps else f"{base.min_steps} to {base.max_steps}"
        warnings.append(f"The base is {base.name}, distilled to draw in {steps} steps, not {sampling.num_steps}: use {base.num_steps}.")
    if sampling.guidance_scale > base.max_guidance_scale:
        kept = "with little guidance" if base.guidance_scale > 1 else "without guidance"
        warnings.append(
            f"The base is {base.name}, distilled to draw {kept}: a guidance scale of {sampling.guidance_scale:g} burns its pictures; "
            f"use {base.guidance_scale:g}."
        )
    if SOLVERS[sampling.sampler].name not in base.samplers:
        warnings.append(f"The base is {base.name}, which is not made for the sampler {sampling.sampler}: use {base.sampler}.")
    if sampling.spacing != base.spacing:
        warnings.append(f"The base is {base.name}, distilled at {base.spacing} timesteps, not {sampling.spacing}: use {base.spacing}.")
    return warnings
