"""The noise schedule of a variance-preserving model, and the conversions between eps, v, a flow's velocity, x0, abar and sigma.

`abar` is the cumulative product of 1 - beta; `x_t = sqrt(abar) x0 + sqrt(1 - abar) eps`; `sigma = sqrt(1 - abar) / sqrt(abar)`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from library.errors import UserError

PredictionType = Literal["epsilon", "v_prediction", "flow"]
TimestepSpacing = Literal["leading", "trailing", "linspace", "lcm", "karras", "flow"]
CONFIG_SPACINGS = ("leading", "trailing", "linspace")  # those that a scheduler_config.json can name

KARRAS_RHO = 7.0

# The smallest abar a schedule may hold. A zero-terminal-SNR schedule ends at abar = 0, where eps alone does not determine x0.
# 2**-24 (sigma = 4096) is what diffusers' EulerDiscreteScheduler puts there. It is also where the two errors balance: pretending
# that some x0 is left costs x0 about sqrt(abar), float32 rounding of eps about 2**-24 / sqrt(abar).
ABAR_FLOOR = 2.0**-24
MOST_TIMESTEPS = 100_000  # models have 1000


def per_sample(abar: Tensor, like: Tensor) -> Tensor:
    """[B] -> [B, 1, 1, ...] so that it multiplies `like` [B, ...] sample by sample."""
    return abar.reshape(-1, *[1] * (like.ndim - 1))


def eps_to_x0(latents: Tensor, eps: Tensor, abar: Tensor) -> Tensor:
    """x0 = (x - sqrt(1 - abar) eps) / sqrt(abar); DDIM, arXiv 2010.02502, eq. 9. latents, eps [B, C, h, w]; abar [B]."""
    abar = per_sample(abar, latents)
    return (latents - (1 - abar).sqrt() * eps) / abar.sqrt()


def v_to_eps(latents: Tensor, v: Tensor, abar: Tensor) -> Tensor:
    """eps = sqrt(abar) v + sqrt(1 - abar) x; progressive distillation, arXiv 2202.00512, appendix D."""
    abar = per_sample(abar, latents)
    return abar.sqrt() * v + (1 - abar).sqrt() * latents


def eps_to_v(latents: Tensor, eps: Tensor, abar: Tensor) -> Tensor:
    """v = (eps - sqrt(1 - abar) x) / sqrt(abar): the inverse of `v_to_eps`."""
    abar = per_sample(abar, latents)
    return (eps - (1 - abar).sqrt() * latents) / abar.sqrt()


def add_noise(x0: Tensor, noise: Tensor, abar: Tensor) -> Tensor:
    """x_t = sqrt(abar) x0 + sqrt(1 - abar) noise; DDPM, arXiv 2006.11239, eq. 4. x0, noise [B, C, h, w]; abar [B]."""
    abar = per_sample(abar, x0)
    return abar.sqrt() * x0 + (1 - abar).sqrt() * noise


def flow_scale(abar: Tensor) -> Tensor:
    """What flow-matching latents are divided with to be variance-preserving, sqrt((1 - s)^2 + s^2), at the same sigma."""
    return 1 / (abar.sqrt() + (1 - abar).sqrt())


def flow_to_eps(latents: Tensor, velocity: Tensor, abar: Tensor) -> Tensor:
    """eps = z + (1 - s) v of variance-preserving latents [B, C, h, w], z being theirs times `flow_scale`; v = eps - x0."""
    abar = per_sample(abar, latents)
    return flow_scale(abar) * (latents + abar.sqrt() * velocity)


def eps_to_flow(latents: Tensor, eps: Tensor, abar: Tensor) -> Tensor:
    """v = eps - x0: the inverse of `flow_to_eps`."""
    return eps - eps_to_x0(latents, eps, abar)


def output_to_eps(latents: Tensor, output: Tensor, abar: Tensor, prediction_type: PredictionType) -> Tensor:
    """What a network of this prediction type puts out [B, C, h, w], as eps."""
    match prediction_type:
        case "v_prediction":
            return v_to_eps(latents, output, abar)
        case "flow":
            return flow_to_eps(latents, output, abar)
    return output


def eps_to_output(latents: Tensor, eps: Tensor, abar: Tensor, prediction_type: PredictionType) -> Tensor:
    """The inverse of `output_to_eps`."""
    match prediction_type:
        case "v_prediction":
            return eps_to_v(latents, eps, abar)
        case "flow":
            return eps_to_flow(latents, eps, abar)
    return eps


def abar_to_sigma(abar: Tensor) -> Tensor:
    """sigma = sqrt((1 - abar) / abar), the noise level of the variance-exploding form; EDM, arXiv 2206.00364."""
    return ((1 - abar) / abar).sqrt()


def sigma_to_abar(sigma: Tensor) -> Tensor:
    """abar = 1 / (1 + sigma^2): the inverse of `abar_to_sigma`."""
    return 1 / (1 + sigma**2)


def rescale_zero_terminal_snr(alphas_cumprod: Tensor) -> Tensor:
    """Shift and scale sqrt(abar) [T] so that it ends at 0 and keeps its first value; arXiv 2305.08891, algorithm 1."""
    root = alphas_cumprod.sqrt()
    return ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2


def num_timesteps(config: Mapping[str, Any]) -> int:
    num_steps = config.get("num_train_timesteps", 1000)
    if type(num_steps) is not int or not 1 < num_steps <= MOST_TIMESTEPS:
        raise UserError(f"The model's scheduler has num_train_timesteps {str(num_steps)[:40]}; it must be from 2 to {MOST_TIMESTEPS}.")
    return num_steps


def _betas(config: Mapping[str, Any]) -> Tensor:
    """[T] float32; computed in float32 as diffusers does, because models are sampled with its rounding."""
    if config.get("trained_betas") is not None:
        return torch.tensor(config["trained_betas"], dtype=torch.float32)
    num_steps = num_timesteps(config)
    start, end = config.get("beta_start", 0.0001), config.get("beta_end", 0.02)
    match config.get("beta_schedule", "linear"):
        case "linear":
            return torch.linspace(start, end, num_steps, dtype=torch.float32)
        case "scaled_linear":
            return torch.linspace(start**0.5, end**0.5, num_steps, dtype=torch.float32) ** 2
        case other:
            raise UserError(f"The model's scheduler has beta_schedule {other!r}; only linear and scaled_linear are supported.")


@dataclass(frozen=True, eq=False, kw_only=True)
class NoiseSchedule:
    """What a model's timesteps mean.

    Attributes:
        alphas_cumprod: abar of each training timestep [T], float32 on the CPU, falling, never below `ABAR_FLOOR`.
        final_alpha_cumprod: abar where sampling ends (timestep -1): 1.0, or that of timestep 0 when set_alpha_to_one is false.
        prediction_type: what the network puts out, "epsilon", "v_prediction" or "flow" (`library.diffusion.flow`).
        timestep_spacing, steps_offset: the model's own choice of timesteps; arXiv 2305.08891, table 2.
        lcm_steps: on how many of its timesteps a latent consistency model was distilled; spacing "lcm" takes some of them.
    """

    alphas_cumprod: Tensor
    final_alpha_cumprod: float = 1.0
    prediction_type: PredictionType = "epsilon"
    timestep_spacing: TimestepSpacing = "leading"
    steps_offset: int = 0
    lcm_steps: int = 50
    _tables: dict[torch.device, Tensor] = field(init=False, default_factory=dict)  # alphas_cumprod, by device

    @classmethod
    def from_config(cls, scheduler_config: Mapping[str, Any]) -> "NoiseSchedule":
        """From the contents of a diffusers scheduler_config.json, of whatever class; absent keys mean what DDIMScheduler takes them for.

        Raises:
            UserError: a beta schedule, prediction type or spacing that is not supported.
        """
        prediction_type = scheduler_config.get("prediction_type", "epsilon")
        if prediction_type not in ("epsilon", "v_prediction"):
            raise UserError(f"The model's scheduler has prediction_type {prediction_type!r}; only epsilon and v_prediction are supported.")
        spacing = scheduler_config.get("timestep_spacing", "leading")
        if spacing not in CONFIG_SPACINGS:
            raise UserError(f"The model's scheduler has timestep_spacing {spacing!r}; use {', '.join(CONFIG_SPACINGS)}.")
        if scheduler_config.get("_class_name") == "LCMScheduler":  # which does not heed timestep_spacing
            spacing = "lcm"
        whole = {name: scheduler_config.get(name, usual) for name, usual in (("steps_offset", 0), ("original_inference_steps", 50))}
        for name, value in whole.items():
            if type(value) is not int:
                raise UserError(f"The model's scheduler has {name} {value!r}; it must be a whole number.")
        betas = _betas(scheduler_config)
        if betas.ndim != 1 or not ((betas >= 0) & (betas <= 1)).all() or not betas.any():
            raise UserError("The model's scheduler has betas that are no noise schedule; they must be from 0 to 1, and rise.")
        alphas_cumprod = torch.cumprod(1 - betas, dim=0)
        if scheduler_config.get("rescale_betas_zero_snr", False):
            alphas_cumprod = rescale_zero_terminal_snr(alphas_cumprod)
        alphas_cumprod = alphas_cumprod.clamp(min=ABAR_FLOOR)
        return cls(
            alphas_cumprod=alphas_cumprod,
            final_alpha_cumprod=1.0 if scheduler_config.get("set_alpha_to_one", True) else alphas_cumprod[0].item(),
            prediction_type=prediction_type,
            timestep_spacing=spacing,
            steps_offset=whole["steps_offset"],
            lcm_steps=whole["original_inference_steps"],
        )

    def with_zero_terminal_snr(self) -> "NoiseSchedule":
        """The schedule rescaled to end in pure noise, with trailing steps, which begin there; arXiv 2305.08891, sections 3.1 and 3.3.

        A schedule that ends there already comes back as it is.

        Raises:
            UserError: the model predicts eps, which says nothing about the picture where all is noise.
        """
        if self.prediction_type != "v_prediction":
            raise UserError(
                "zero_terminal_snr was asked for, but the model predicts eps; only a v-prediction model can use it: leave it out."
            )
        if self.alphas_cumprod[-1] <= ABAR_FLOOR:
            return self
        alphas_cumprod = rescale_zero_terminal_snr(self.alphas_cumprod).clamp(min=ABAR_FLOOR)
        return replace(self, alphas_cumprod=alphas_cumprod, timestep_spacing="trailing")

    def __len__(self) -> int:
        """T, the number of training timesteps."""
        return len(self.alphas_cumprod)

    def abar(self, timesteps: Tensor) -> Tensor:
        """abar at each timestep [B] -> [B] float32 on its device; below 0 is the end of the schedule (`final_alpha_cumprod`).

        A float timestep lies between two training timesteps: log sigma is interpolated linearly, as k-diffusion does.
        """
        table = self._tables.get(timesteps.device)
        if table is None:  # copied once: a copy is waited for
            table = self._tables[timesteps.device] = self.alphas_cumprod.to(timesteps.device)
        abar = self._between(timesteps, table) if timesteps.is_floating_point() else table[timesteps.clamp(min=0)]
        return torch.where(timesteps < 0, self.final_alpha_cumprod, abar)

    def _between(self, timesteps: Tensor, table: Tensor) -> Tensor:
        """abar at float timesteps [B] -> [B] float32."""
        log_sigmas = abar_to_sigma(table.double()).log()
        position = timesteps.double().clamp(0, len(self) - 1)
        low = position.floor().long()
        high = position.ceil().long()
        return sigma_to_abar(torch.lerp(log_sigmas[low], log_sigmas[high], position - low).exp()).float()

    def sigmas(self, timesteps: Tensor) -> Tensor:
        """sigma at each timestep [B] -> [B] float32 on its device; see `abar`."""
        return abar_to_sigma(self.abar(timesteps))

    def timesteps_of(self, sigmas: Tensor) -> Tensor:
        """The float timestep in 0..T-1 whose sigma it is [B] -> [B] float32; a sigma outside the schedule takes the nearest end."""
        log_sigmas = abar_to_sigma(self.alphas_cumprod.to(sigmas.device).double()).log()
        wanted = sigmas.double().log().clamp(log_sigmas[0], log_sigmas[-1])
        high = torch.searchsorted(log_sigmas, wanted).clamp(1, len(self) - 1)
        low_value, high_value = log_sigmas[high - 1], log_sigmas[high]
        return (high - 1 + (wanted - low_value) / (high_value - low_value)).float()

    def inference_timesteps(self, num_steps: int, spacing: TimestepSpacing | None = None, size: tuple[int, int] = (128, 128)) -> Tensor:
        """The timesteps of a sampler with `num_steps` steps: [num_steps + 1] on the CPU, descending, the last one -1 (clean).

        int64, but float32 for "karras", whose sigmas lie between the training timesteps. The first `num_steps` equal those of
        diffusers' DDIMScheduler, those of its LCMScheduler ("lcm"), or the sigmas of EDM (arXiv 2206.00364, eq. 5).

        Args:
            spacing: overrides the model's own.
            size: (height, width) of the latents, which some flows heed.

        Raises:
            UserError: more steps than there are timesteps, or fewer than 1; an unknown spacing.
        """
        total = len(self)
        if not 1 <= num_steps <= total:
            raise UserError(f"A sampler takes 1 to {total} steps, not {num_steps}.")
        match spacing or self.timestep_spacing:
            case "leading":
                steps = torch.arange(num_steps).flip(0) * (total // num_steps)
                steps = steps + min(self.steps_offset, total - 1 - int(steps[0]))  # at num_steps = T the offset has no room
            case "trailing":
                # float64 arithmetic in diffusers' order: n times a rounded ratio decides which way halves round
                ratio = total / num_steps
                steps = torch.tensor([round(total - index * ratio) - 1 for index in range(num_steps)])
            case "linspace":
                steps = torch.linspace(0, total - 1, num_steps, dtype=torch.float64).round().long().flip(0)
            case "lcm":
                if num_steps > self.lcm_steps:
                    raise UserError(
                        f"{num_steps} steps were asked for, but the timestep spacing lcm has {self.lcm_steps}; take fewer or another one."
                    )
                skipped = torch.arange(num_steps) * self.lcm_steps // num_steps
                steps = (self.lcm_steps - skipped) * (total // self.lcm_steps) - 1
            case "karras":
                ends = self.sigmas(torch.tensor([total - 1, 0])).double() ** (1 / KARRAS_RHO)
                sigmas = torch.lerp(ends[0], ends[1], torch.linspace(0, 1, num_steps, dtype=torch.float64)) ** KARRAS_RHO
                steps = self.timesteps_of(sigmas)
            case "flow":
                raise UserError("The timestep spacing flow is for models of flow matching; use another, or leave it out.")
            case other:
                raise UserError(f"There is no timestep spacing {other!r}; use {', '.join(get_args(TimestepSpacing))}.")
        return torch.cat([steps, torch.tensor([-1])])

    def add_noise(self, x0: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """x0 and noise [B, C, h, w] at timesteps [B]; see `add_noise`."""
        return add_noise(x0, noise, self.abar(timesteps))
