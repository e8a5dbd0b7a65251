"""The settings of the rollout."""

from dataclasses import dataclass
from typing import get_args

from library.diffusion.noise_schedule import TimestepSpacing
from library.diffusion.solvers import SOLVERS
from library.errors import UserError
from library.rollouts.base import ROLLOUTS
from library.rollouts.prompt_encoder import Size
from library.settings.options import check_above, check_at_least, option
from library.types import SIDES, is_side

DEFAULT_BATCH_SIZE = 8


@dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    """How training pictures come about. What is not set (None) is decided by the model: `library.rollouts.few_step.resolve_sampling`."""

    prompts_file: str = option("", help="Prompts to train on: .txt (one a line), .toml, .yaml or .json (tables), .csv or .tsv.")
    rollout: str | None = option(
        None,
        choices=ROLLOUTS,
        help="Latents that the score trains on. belt: trajectories of which every U-Net call is a step; noised: finished pictures, noised "
        "anew. Not set: noised with score_estimator direct_align, else belt.",
        expert=True,
        only_with="scorer",
    )
    train_batch_size: int | None = option(
        None, help="Trajectories on the belt, which is also the samples of one U-Net call. Not set: 8, or batch_size of a LECO file."
    )
    max_denoising_steps: int | None = option(None, help="Steps of the sampler's schedule. Not set: 20, or a few-step base's own.")
    leco_denoise_guidance_scale: float | None = option(
        None, help="Classifier-free guidance of the rollout; 1 is none, and faster. Not set: 5, or a few-step base's own."
    )
    uncond_every_n_steps: int | None = option(
        None,
        help="Steps of a trajectory that one evaluation of the unconditional branch serves: in between, its distance from the conditional "
        "one is taken to stay. Not set: 3 with 20 steps, fewer with fewer; 1 takes nothing over.",
        expert=True,
    )
    sampler: str | None = option(None, choices=SOLVERS, help="Sampler of the rollout. Not set: ddim, or a few-step base's own.")
    timestep_spacing: str | None = option(
        None,
        choices=get_args(TimestepSpacing),
        help="Which timesteps the sampler takes. Not set: the model's own, or its few-step kind's.",
        expert=True,
    )
    guidance_rescale: float = option(
        0.0, help="phi of rescaled guidance, 0 to 1, against burnt colours at high guidance; 0.7 is usual.", expert=True
    )
    zero_terminal_snr: bool = option(False, help="Rescale the noise schedule of a v-prediction model to end in pure noise.", expert=True)
    resolution: tuple[int, ...] = option((), help="Width and height (or one number) in pixels, multiples of 8; default the model's own.")

    def __post_init__(self) -> None:
        check_at_least(self, 1, "train_batch_size", "max_denoising_steps", "uncond_every_n_steps")
        check_above(self, 0, "leco_denoise_guidance_scale")
        if not 0 <= self.guidance_rescale <= 1:
            raise UserError(f"guidance_rescale is {self.guidance_rescale}; it must be from 0 (off) to 1")
        if len(self.resolution) > 2 or not all(map(is_side, self.resolution)):
            raise UserError(f"resolution is {list(self.resolution)}; it must be one number or width and height, {SIDES}")

    @property
    def batch_size(self) -> int:
        """Of all but LECO, whose file may have its own."""
        return self.train_batch_size or DEFAULT_BATCH_SIZE

    def size(self, native: int) -> Size:
        """(height, width) in pixels."""
        width, height = (self.resolution * 2)[:2] or (native, native)
        return height, width
