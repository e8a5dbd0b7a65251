"""Pools of sampling trajectories: how they begin (a fresh prompt and fresh noise), where they stand, and how they are moved."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from library.diffusion.solvers import get_solver
from library.errors import UserError
from library.models.base import DiffusionModel
from library.rollouts.prompt_encoder import PromptEncoder, Size, size_of
from library.rollouts.sample import SamplingConfig, guidance_scales, model_autocast, predict_guided_eps
from library.types import History, PromptSpec, RolloutBatch
from networks.lora import LoRANetwork

MULTIPLIERS = (1.0, -1.0)  # of the network, that trajectories take in turn


@dataclass(eq=False)
class Pool:
    """Trajectories of one picture size and number of steps. Tensors are on the model's device, everything else is on the CPU."""

    size: Size
    timesteps: Tensor  # [steps + 1], the last is -1
    prompts: list[PromptSpec]
    weights: Tensor  # of the prompts, on the CPU
    weight: float  # of all of them
    latents: Tensor  # [B, C, h, w]
    steps: list[int]  # how many steps each has taken
    chosen: list[int]  # index into prompts
    turns: list[int]  # how many trajectories each place has held; says whose turn it is among the multipliers
    history: History | None  # of a solver that remembers

    @property
    def num_steps(self) -> int:
        return len(self.timesteps) - 1


class Trajectories:
    """Pools of trajectories, one for each picture size and number of steps among the prompts, each of `sampling.batch_size`.

    Args:
        encoder: holds the prompts' conditioning, so that the text encoders can be freed; encodes them anew, with gradient, at every
            batch of a network with text encoder modules.
        sampling: of prompts that bring no size, steps or guidance of their own.
        generator: the source of every random draw.

    Attributes:
        skip: a sign of the multiplier, and the share of its turns that go to the next multiplier; for a sign that is ahead of the other.
    """

    def __init__(
        self,
        model: DiffusionModel,
        network: LoRANetwork,
        prompts: Sequence[PromptSpec],
        encoder: PromptEncoder,
        sampling: SamplingConfig,
        generator: torch.Generator,
    ) -> None:
        self.model, self.network, self.encoder, self.generator = model, network, encoder, generator
        self.sampling = sampling
        self.skip: tuple[int, float] = (1, 0.0)
        self.solver = get_solver(sampling.sampler)
        self.schedule = self.solver.schedule(model.schedule)  # as the sampler ends it
        groups: dict[tuple[Size, int], list[PromptSpec]] = {}
        for prompt in prompts:
            groups.setdefault((size_of(prompt, sampling.size), prompt.num_steps or sampling.num_steps), []).append(prompt)
        self.pools = [self._new_pool(size, num_steps, own) for (size, num_steps), own in groups.items()]

    def step(self, batch: RolloutBatch, eps: Tensor) -> tuple[Tensor, History | None]:
        """The sampler's step along the guided prediction: the next latents [B, C, h, w] and what the solver is to remember."""
        abar, next_abar = self.schedule.abar(batch.timesteps), self.schedule.abar(batch.next_timesteps)
        latents = self.solver.step(batch.latents, eps, abar, next_abar, batch.noise, batch.history)
        return latents, self.solver.remember(batch.latents, eps, abar)

    def state_dict(self) -> dict[str, Any]:
        """All that the future of the trajectories depends on: tensors and plain containers."""
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
        return {"pools": pools, "generator": self.generator.get_state(), "skip": self.skip}

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
        self.skip = tuple(state["skip"])

    def _new_pool(self, size: Size, num_steps: int, prompts: list[PromptSpec]) -> Pool:
        count, scale = self.sampling.batch_size, self.model.spec.vae_scale_factor
        latents = torch.empty(count, self.model.spec.latent_channels, size[0] // scale, size[1] // scale, device=self.model.device)
        # Neighbours hold different multipliers, so that a batch always holds each.
        pool = Pool(
            size=size,
            timesteps=self.schedule.inference_timesteps(num_steps, self.sampling.spacing).to(self.model.device),
            prompts=prompts,
            weights=torch.tensor([prompt.weight for prompt in prompts]),
            weight=sum(prompt.weight for prompt in prompts),
            latents=latents,
            steps=[0] * count,
            chosen=[0] * count,
            turns=list(range(-1, count - 1)),
            history=History(torch.zeros_like(latents), latents.new_zeros(count)) if self.solver.needs_history else None,
        )
        self.start_all(pool)
        return pool

    def next_pool(self) -> Pool:
        """One at random, as often as its prompts weigh."""
        weights = torch.tensor([pool.weight for pool in self.pools])
        return self.pools[int(torch.multinomial(weights, 1, generator=self.generator))]

    def start(self, pool: Pool, place: int) -> None:
        """A fresh prompt and fresh noise in one place."""
        pool.chosen[place] = int(torch.multinomial(pool.weights, 1, generator=self.generator))
        pool.latents[place] = torch.randn(pool.latents.shape[1:], generator=self.generator).to(pool.latents)
        pool.steps[place] = 0
        pool.turns[place] += 1
        sign, share = self.skip
        if MULTIPLIERS[pool.turns[place] % len(MULTIPLIERS)] * sign > 0 and share > 0:
            pool.turns[place] += int(torch.rand((), generator=self.generator) < share)
        if pool.history is not None:
            pool.history.abar[place] = 0

    def start_all(self, pool: Pool) -> None:
        """A fresh prompt and fresh noise in every place."""
        for place in range(len(pool.steps)):
            self.start(pool, place)

    def restart_broken(self) -> None:
        """A fresh prompt and fresh noise in every place whose latents are not finite."""
        for pool in self.pools:
            parts = [pool.latents] if pool.history is None else [pool.latents, pool.history.x0]
            finite = torch.stack([part.isfinite().all(1).all(1).all(1) for part in parts]).all(0)
            for place in (~finite).nonzero().flatten().tolist():
                self.start(pool, place)
                if pool.history is not None:
                    pool.history.x0[place] = 0  # 0 times NaN would be NaN

    @torch.no_grad()
    def move_to(self, pool: Pool, goals: Sequence[int]) -> None:
        """Denoise each trajectory up to its own step."""
        for _ in range(max(goals)):
            going = torch.tensor([step < goal for step, goal in zip(pool.steps, goals, strict=True)], device=self.model.device)
            batch = self.batch_of(pool)
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
        with model_autocast(self.model):
            return predict_guided_eps(
                self.model, batch.latents, batch.timesteps, batch.cond, uncond, batch.guidance_scales, self.sampling.guidance_rescale
            )

    def batch_of(self, pool: Pool) -> RolloutBatch:
        """Where the pool's trajectories stand, with fresh noise for a sampler that draws some."""
        device = self.model.device
        steps = torch.tensor(pool.steps, device=device)
        timesteps, next_timesteps = pool.timesteps[steps], pool.timesteps[(steps + 1).clamp(max=pool.num_steps)]
        prompts = [pool.prompts[index] for index in pool.chosen]
        in_turn = [MULTIPLIERS[turn % len(MULTIPLIERS)] for turn in pool.turns]
        multipliers = [turn if prompt.multiplier is None else prompt.multiplier for prompt, turn in zip(prompts, in_turn, strict=True)]
        strengths = torch.tensor(multipliers, device=device)
        noise = torch.randn(pool.latents.shape, generator=self.generator).to(device) if self.solver.needs_noise else None
        return RolloutBatch(
            latents=pool.latents,
            timesteps=timesteps,
            next_timesteps=next_timesteps,
            sigmas=self.schedule.sigmas(timesteps),
            next_sigmas=self.schedule.sigmas(next_timesteps),
            multipliers=strengths,
            guidance_scales=guidance_scales(self.model, prompts, self.sampling.guidance_scale),
            cond=self.encoder.trained_cond(prompts, pool.size, strengths),
            uncond=self.encoder.uncond(prompts, pool.size, multipliers),
            prompts=prompts,
            noise=noise,
            history=pool.history,
        )
