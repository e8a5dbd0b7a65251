"""The noise levels of flow matching, in terms of a variance-preserving model.

Latents are z = (1 - s) x0 + s eps for s in 0..1 (arXiv 2210.02747, 2209.03003), and the network puts out the velocity eps - x0. Divided by
sqrt((1 - s)^2 + s^2) they are variance-preserving, sigma = s / (1 - s), and Euler's step along the velocity is DDIM's.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from library.diffusion.noise_schedule import ABAR_FLOOR, NoiseSchedule, TimestepSpacing, num_timesteps
from library.errors import UserError

FLOW_SCHEDULER = "FlowMatchEulerDiscreteScheduler"
_OTHERS = ("invert_sigmas", "shift_terminal", "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "stochastic_sampling")


def share_to_abar(share: Tensor) -> Tensor:
    """abar where the share of noise is s, float64 -> float32; at s = 1 the floor."""
    return ((1 - share) ** 2 / ((1 - share) ** 2 + share**2)).clamp(min=ABAR_FLOOR).float()


@dataclass(frozen=True, eq=False, kw_only=True)
class FlowSchedule(NoiseSchedule):
    """Timestep t is s = (t + 1) / T, so that -1 is clean here too.

    Attributes:
        shift: above 1, more of a sampler's steps are taken where there is much noise (arXiv 2403.03206, section 5.3.2).
        shift_of_size: (base_image_seq_len, base_shift, max_image_seq_len, max_shift) of diffusers: log shift on a line over the number of
            patches of 2 x 2 latents; it takes the place of `shift`.
    """

    shift: float = 1.0
    shift_of_size: tuple[float, float, float, float] | None = None

    @classmethod
    def from_config(cls, scheduler_config: Mapping[str, Any]) -> "FlowSchedule":
        """From the config of a FlowMatchEulerDiscreteScheduler. Raises UserError for what is not supported."""
        config = scheduler_config
        if unknown := [name for name in _OTHERS if config.get(name)]:
            raise UserError(f"The model's scheduler has {unknown[0]}, which is not supported.")
        size = None
        if config.get("use_dynamic_shifting"):
            if config.get("time_shift_type", "exponential") != "exponential":
                raise UserError("The model's scheduler has time_shift_type linear; only exponential is supported.")
            defaults = {"base_image_seq_len": 256, "base_shift": 0.5, "max_image_seq_len": 4096, "max_shift": 1.15}
            size = tuple(float(config.get(name, default)) for name, default in defaults.items())
        shift = config.get("shift", 1.0)
        if not isinstance(shift, int | float) or not 0 < shift < 1000:
            raise UserError(f"The model's scheduler has shift {str(shift)[:40]}; it must be a number above 0 and below 1000.")
        share = torch.arange(1, num_timesteps(config) + 1, dtype=torch.float64)
        return cls(
            alphas_cumprod=share_to_abar(share / len(share)),
            prediction_type="flow",
            timestep_spacing="flow",
            shift=float(shift),
            shift_of_size=size,  # type: ignore[arg-type]
        )

    def with_zero_terminal_snr(self) -> NoiseSchedule:
        """It ends in pure noise already."""
        return self

    def _between(self, timesteps: Tensor, table: Tensor) -> Tensor:
        return share_to_abar((timesteps.double() + 1) / len(self))

    def timesteps_of(self, sigmas: Tensor) -> Tensor:
        share = sigmas.double() / (1 + sigmas.double())
        return (share * len(self) - 1).clamp(0, len(self) - 1).float()

    def inference_timesteps(self, num_steps: int, spacing: TimestepSpacing | None = None, size: tuple[int, int] = (128, 128)) -> Tensor:
        """As of `NoiseSchedule`; its own spacing "flow" is diffusers' FlowMatchEulerDiscreteScheduler at s from 1 to 1 / num_steps, as the
        pipelines ask for: float32.
        """
        if (spacing or self.timestep_spacing) != "flow" or not 1 <= num_steps <= len(self):
            return super().inference_timesteps(num_steps, spacing, size)
        share = torch.linspace(1, 1 / num_steps, num_steps, dtype=torch.float64)
        shift = self._shift_at(size)
        steps = (len(self) * shift * share / (1 + (shift - 1) * share) - 1).clamp(min=0).float()
        return torch.cat([steps, torch.tensor([-1])])

    def _shift_at(self, size: tuple[int, int]) -> float:
        if self.shift_of_size is None:
            return self.shift
        base_length, base, max_length, most = self.shift_of_size
        return math.exp(base + (most - base) * (size[0] * size[1] / 4 - base_length) / (max_length - base_length))
