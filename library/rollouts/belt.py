"""The belt: a pool of sampling trajectories, each at its own step of the schedule, that training moves along.

Every U-Net call is a rollout step and a training step at once. The pool stands where its trajectories stand; one call
evaluates it whole, each sample at its own timestep and multiplier; the latents that the call leads to are scored for
training and, detached, are where each trajectory goes on. A finished trajectory makes room for a fresh prompt and fresh
noise. So every sample is on-policy, the timesteps in a batch are stratified, and nothing is computed twice.

The other rollouts bring trajectories to where an estimator wants them: `library.objectives` says which it needs.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args

import torch
from torch import Tensor

from library.diffusion.noise_schedule import TimestepSpacing
from library.diffusion.solvers import ALIASES, SOLVERS, get_solver
from library.errors import UserError
from library.models.base import DiffusionModel
from library.rollouts.sample import (
    PromptEncoder,
    SamplingConfig,
    Size,
    guidance_scales,
    model_autocast,
    predict_guided_eps,
    size_of,
    time_ids_of,
)
from library.settings.options import check_above, check_at_least, option
from library.types import Conditioning, History, PromptSpec, RolloutBatch
from networks.lora import LoRANetwork


@dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    """How training pictures come about."""

    prompts_file: str = option("", help="Prompts to train on: .txt (one a line), .toml ([[prompts]]) or PartiPrompts .tsv.")
    prompt_categories: tuple[str, ...] = option((), help="Of a PartiPrompts .tsv, take only these categories.", expert=True)
    rollout: str = option(
        "belt",
        choices=("belt", "per_sample"),  # of ROLLOUTS, below; the others are chosen by the estimators that need them
        help="belt: every U-Net call trains. per_sample: denoise to one random step, train there, start afresh (slow; to compare with).",
        expert=True,
    )
    train_batch_size: int = option(8, help="Trajectories on the belt, which is also the samples of one U-Net call.")
    max_denoising_steps: int = option(20, help="Steps of the sampler's schedule; at 20, a few-step base takes its own.")
    leco_denoise_guidance_scale: float = option(
        5.0, help="Classifier-free guidance of the rollout; 1 is none, and faster; at 5, a few-step base takes its own."
    )
    sampler: str = option("ddim", choices=(*SOLVERS, *ALIASES), help="Sampler of the rollout.")
    timestep_spacing: str | None = option(
        None,
        choices=get_args(TimestepSpacing),
        help="Which timesteps the sampler takes; not set: the model's own, or its few-step kind's.",
        expert=True,
    )
    guidance_rescale: float = option(
        0.0, help="phi of rescaled guidance, 0 to 1, against burnt colours at high guidance; 0.7 is usual.", expert=True
    )
    zero_terminal_snr: bool = option(False, help="Rescale the noise schedule of a v-prediction model to end in pure noise.", expert=True)
    resolution: tuple[int, ...] = option((), help="Width and height (or one number) in pixels, multiples of 8; default the model's own.")
    train_multipliers: tuple[float, ...] = option((1.0, -1.0), help="LoRA multipliers that trajectories take in turn.", expert=True)
    draft_steps: int = option(
        1,
        help="With score_estimator draft: how many of the sampler's last steps carry gradient.",
        expert=True,
        only_with={"score_estimator": ("draft",)},
    )
    num_renoisings: int = option(
        4,
        help="With score_estimator draft_lv or direct_align: how often a finished picture is noised anew and trained on.",
        expert=True,
        only_with={"score_estimator": ("draft_lv", "direct_align")},
    )

    def __post_init__(self) -> None:
        check_at_least(self, 1, "train_batch_size", "max_denoising_steps", "draft_steps", "num_renoisings")
        check_above(self, 0, "leco_denoise_guidance_scale")
        if not 0 <= self.guidance_rescale <= 1:
            raise UserError(f"guidance_rescale is {self.guidance_rescale}; it must be from 0 (off) to 1")
        if self.draft_steps > self.max_denoising_steps:
            raise UserError(f"draft_steps is {self.draft_steps}, more than the {self.max_denoising_steps} of max_denoising_steps; lower it")
        if len(self.resolution) > 2 or any(pixels <= 0 or pixels % 8 for pixels in self.resolution):
            raise UserError(f"resolution is {list(self.resolution)}; it must be one or two positive multiples of 8 (width, height)")
        if not self.train_multipliers or 0 in self.train_multipliers:
            raise UserError("train_multipliers must hold at least one number and no 0 (at 0 the LoRA is off and learns nothing)")

    def size(self, native: int) -> Size:
        """(height, width) in pixels."""
        width, height = (self.resolution * 2)[:2] or (native, native)
        return height, width

    def sampling(self, native: int, batch_size: int) -> SamplingConfig:
        """How the rollout samples, for whole pictures."""
        return SamplingConfig(
            num_steps=self.max_denoising_steps,
            guidance_scale=self.leco_denoise_guidance_scale,
            size=self.size(native),
            sampler=self.sampler,
            guidance_rescale=self.guidance_rescale,
            batch_size=batch_size,
        )


@dataclass(eq=False)
class Pool:
    """Trajectories of one picture size and number of steps. Tensors are on the model's device, everything else is on the CPU."""

    size: Size
    timesteps: Tensor  # [steps + 1], the last is -1
    prompts: list[PromptSpec]
    latents: Tensor  # [B, C, h, w]
    steps: list[int]  # how many steps each has taken
    chosen: list[int]  # index into prompts
    turns: list[int]  # how many trajectories each place has held; says whose turn it is among the multipliers
    history: History | None  # of a solver that remembers

    @property
    def num_steps(self) -> int:
        return len(self.timesteps) - 1


class Belt:
    """Pools of trajectories, one for each picture size and number of steps among the prompts.

    Args:
        encoder: holds the prompts' conditioning, so that the text encoders can be freed.
        generator: the source of every random draw.
        size: (height, width) in pixels for prompts that bring none.
        network: with text encoder modules, prompts are encoded anew at every batch, with gradient.
    """

    def __init__(
        self,
        model: DiffusionModel,
        network: LoRANetwork,
        prompts: Sequence[PromptSpec],
        encoder: PromptEncoder,
        config: RolloutConfig,
        generator: torch.Generator,
    ) -> None:
        self.model, self.network, self.encoder, self.generator = model, network, encoder, generator
        self.config = config
        self.solver = get_solver(config.sampler)
        self.schedule = self.solver.schedule(model.schedule)  # as the sampler ends it
        size = config.size(model.spec.resolution)
        groups: dict[tuple[Size, int], list[PromptSpec]] = {}
        for prompt in prompts:
            groups.setdefault((size_of(prompt, size), prompt.num_steps or config.max_denoising_steps), []).append(prompt)
        self.pools = [self._new_pool(size, num_steps, own) for (size, num_steps), own in groups.items()]
        self._pool, self._batch = self.pools[0], None  # whose batch was last handed out
        self.num_unet_evaluations = 0  # of the rollout alone, not of training
        self.begin()

    def begin(self) -> None:
        """Spread each pool over the schedule: the sampler itself sends the i-th of B trajectories i/B of the way."""
        for pool in self.pools:
            count = len(pool.steps)
            self._move_to(pool, [place * pool.num_steps // count for place in range(count)])

    def batch(self) -> RolloutBatch:
        """Where the trajectories of one pool stand. Pools take turns at random, as often as their prompts weigh."""
        self._pool = self._next_pool()
        self._batch = self._batch_of(self._pool)
        return self._batch

    def advance(self, eps: Tensor) -> None:
        """Move the last batch's trajectories along the guided prediction eps [B, C, h, w]; the finished make room for new ones."""
        assert not eps.requires_grad, "the rollout carries no gradient"
        pool, batch = self._pool, self._batch
        assert batch is not None, "advance() follows batch()"
        pool.latents, pool.history = self.step(batch, eps)
        for place in range(len(pool.steps)):
            pool.steps[place] += 1
            if pool.steps[place] == pool.num_steps:
                self._start(pool, place)

    def step(self, batch: RolloutBatch, eps: Tensor) -> tuple[Tensor, History | None]:
        """The sampler's step along the guided prediction: the next latents [B, C, h, w] and what the solver is to remember."""
        abar, next_abar = self.schedule.abar(batch.timesteps), self.schedule.abar(batch.next_timesteps)
        latents = self.solver.step(batch.latents, eps, abar, next_abar, batch.noise, batch.history)
        return latents, self.solver.remember(batch.latents, eps, abar)

    def state_dict(self) -> dict[str, Any]:
        """All that the future of the belt depends on: tensors and plain containers."""
        pools = [
            {
                "latents": pool.latents.cpu().clone(),
                "steps": list(pool.steps),
                "chosen": list(pool.chosen),
                "turns": list(pool.turns),
                "history": None if pool.history is None else (pool.history.x0.cpu().clone(), pool.history.abar.cpu().clone()),
            }
            for pool in self.pools
        ]
        return {"pools": pools, "generator": self.generator.get_state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raises UserError if the state was saved with other prompts, sizes or another batch size."""
        saved = state["pools"]
        fits = len(saved) == len(self.pools) and all(
            old["latents"].shape == pool.latents.shape
            and max(old["chosen"]) < len(pool.prompts)
            and max(old["steps"]) < pool.num_steps
            and (old["history"] is None) == (pool.history is None)
            for old, pool in zip(saved, self.pools, strict=True)
        )
        if not fits:
            raise UserError(
                "resume: the saved rollout has other prompts, sizes, steps, sampler or batch size than this run; "
                "resume with the same settings"
            )
        for old, pool in zip(saved, self.pools, strict=True):
            pool.latents = old["latents"].to(self.model.device)
            pool.steps, pool.chosen, pool.turns = list(old["steps"]), list(old["chosen"]), list(old["turns"])
            if old["history"] is not None:
                pool.history = History(*(part.to(self.model.device) for part in old["history"]))
        self.generator.set_state(state["generator"])

    def _new_pool(self, size: Size, num_steps: int, prompts: list[PromptSpec]) -> Pool:
        count, scale = self.config.train_batch_size, self.model.spec.vae_scale_factor
        latents = torch.empty(count, self.model.spec.latent_channels, size[0] // scale, size[1] // scale, device=self.model.device)
        # Neighbours hold different multipliers, so that a batch always holds each.
        pool = Pool(
            size=size,
            timesteps=self.schedule.inference_timesteps(num_steps).to(self.model.device),
            prompts=prompts,
            latents=latents,
            steps=[0] * count,
            chosen=[0] * count,
            turns=list(range(-1, count - 1)),
            history=History(torch.zeros_like(latents), latents.new_zeros(count)) if self.solver.needs_history else None,
        )
        self.start_all(pool)
        return pool

    def _next_pool(self) -> Pool:
        weights = torch.tensor([sum(prompt.weight for prompt in pool.prompts) for pool in self.pools])
        return self.pools[int(torch.multinomial(weights, 1, generator=self.generator))]

    def _start(self, pool: Pool, place: int) -> None:
        weights = torch.tensor([prompt.weight for prompt in pool.prompts])
        pool.chosen[place] = int(torch.multinomial(weights, 1, generator=self.generator))
        pool.latents[place] = torch.randn(pool.latents.shape[1:], generator=self.generator).to(pool.latents)
        pool.steps[place] = 0
        pool.turns[place] += 1
        if pool.history is not None:
            pool.history.abar[place] = 0

    def start_all(self, pool: Pool) -> None:
        """A fresh prompt and fresh noise in every place."""
        for place in range(len(pool.steps)):
            self._start(pool, place)

    @torch.no_grad()
    def _move_to(self, pool: Pool, goals: Sequence[int]) -> None:
        """Denoise each trajectory up to its own step."""
        for _ in range(max(goals)):
            going = torch.tensor([step < goal for step, goal in zip(pool.steps, goals, strict=True)], device=self.model.device)
            batch = self._batch_of(pool)
            moved, history = self.step(batch, self.predict(batch))
            pool.latents = torch.where(going[:, None, None, None], moved, pool.latents)
            if history is not None and pool.history is not None:
                x0 = torch.where(going[:, None, None, None], history.x0, pool.history.x0)
                pool.history = History(x0, torch.where(going, history.abar, pool.history.abar))
            pool.steps = [min(step + 1, goal) for step, goal in zip(pool.steps, goals, strict=True)]

    @torch.no_grad()
    def predict(self, batch: RolloutBatch) -> Tensor:
        """The guided prediction for the whole batch, LoRA on, without gradient: eps [B, C, h, w]."""
        uncond = batch.uncond if bool((batch.guidance_scales != 1).any()) else None
        self.network.set_multiplier(batch.multipliers)
        self.num_unet_evaluations += len(batch.latents) * (1 if uncond is None else 2)
        with model_autocast(self.model):
            return predict_guided_eps(
                self.model, batch.latents, batch.timesteps, batch.cond, uncond, batch.guidance_scales, self.config.guidance_rescale
            )

    def _batch_of(self, pool: Pool) -> RolloutBatch:
        device = self.model.device
        steps = torch.tensor(pool.steps, device=device)
        timesteps, next_timesteps = pool.timesteps[steps], pool.timesteps[(steps + 1).clamp(max=pool.num_steps)]
        prompts = [pool.prompts[index] for index in pool.chosen]
        in_turn = [self.config.train_multipliers[turn % len(self.config.train_multipliers)] for turn in pool.turns]
        multipliers = [turn if prompt.multiplier is None else prompt.multiplier for prompt, turn in zip(prompts, in_turn, strict=True)]
        cond, uncond = self.conditioning(prompts, pool.size, torch.tensor(multipliers, device=device))
        noise = torch.randn(pool.latents.shape, generator=self.generator).to(device) if self.solver.needs_noise else None
        return RolloutBatch(
            latents=pool.latents,
            timesteps=timesteps,
            next_timesteps=next_timesteps,
            sigmas=self.schedule.sigmas(timesteps),
            next_sigmas=self.schedule.sigmas(next_timesteps),
            multipliers=torch.tensor(multipliers, device=device),
            guidance_scales=guidance_scales(self.model, prompts, self.config.leco_denoise_guidance_scale),
            cond=cond,
            uncond=uncond,
            prompts=prompts,
            noise=noise,
            history=pool.history,
        )

    def conditioning(self, prompts: list[PromptSpec], size: Size, multipliers: Tensor) -> tuple[Conditioning, Conditioning]:
        """Of both branches, B rows each, the LoRA of the text encoders at these multipliers [B]; with gradient to it in the first."""
        if not self.network.text_encoder_loras:
            return self.encoder.cond(prompts, size), self.encoder.uncond(prompts, size)
        self.network.set_multiplier(multipliers)
        told = [time_ids_of(prompt, size) for prompt in prompts]
        cond = self.model.encode_prompts([prompt.prompt for prompt in prompts], size, told)
        with torch.no_grad():
            return cond, self.model.encode_prompts([prompt.negative_prompt for prompt in prompts], size, told)


class FreshRollout(Belt):
    """Trajectories from pure noise for every batch, graded once and dropped. A subclass says how far they go."""

    def begin(self) -> None:
        """Nothing to spread: every batch starts from noise."""

    def advance(self, eps: Tensor) -> None:
        """Nothing to move: a graded trajectory is dropped."""
        assert not eps.requires_grad, "the rollout carries no gradient"

    def batch(self) -> RolloutBatch:
        self._pool = self._next_pool()
        self.start_all(self._pool)
        self._move_to(self._pool, self._goals(self._pool))
        return self._batch_of(self._pool)

    def _goals(self, pool: Pool) -> list[int]:
        """How many steps each trajectory takes without gradient."""
        raise NotImplementedError


class PerSampleRollout(FreshRollout):
    """The loop of LECO and of the seed: for every batch, trajectories from pure noise to a random step each, graded once there.

    Kept to compare with the belt, at many times its cost (docs/experiments.md).
    """

    def _goals(self, pool: Pool) -> list[int]:
        return torch.randint(pool.num_steps, (len(pool.steps),), generator=self.generator).tolist()


class LastStepsRollout(FreshRollout):
    """Trajectories that stand `draft_steps` before their end, which is where DRaFT's gradient begins (arXiv 2309.17400)."""

    def _goals(self, pool: Pool) -> list[int]:
        return [max(pool.num_steps - self.config.draft_steps, 0)] * len(pool.steps)

    def batch(self) -> RolloutBatch:
        batch = super().batch()
        return replace(batch, tail_timesteps=self._pool.timesteps[-self.config.draft_steps - 1 :])


ROLLOUTS: dict[str, type[Belt]] = {"belt": Belt, "per_sample": PerSampleRollout, "last_steps": LastStepsRollout}
