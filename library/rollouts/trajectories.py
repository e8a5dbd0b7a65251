"""Pools of sampling trajectories: how they begin (a fresh prompt and fresh noise), where they stand, and how they are moved."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from library.diffusion.solvers import SOLVERS
from library.errors import UserError
from library.models.base import DiffusionModel
from library.rollouts.pool import BatchPrompts, Pool
from library.rollouts.prompt_encoder import PromptEncoder, Size, size_of
from library.rollouts.rows import predict_rows, rows_of
from library.rollouts.sample import SamplingConfig, guidance_scales, guide, model_autocast
from library.training.runtime import upload
from library.types import History, PromptSpec, RolloutBatch, Sparse
from networks.lora import LoRANetwork

MULTIPLIERS = (1.0, -1.0)  # of the network, that trajectories take in turn


class Trajectories:
    """Pools of trajectories, one for each picture size and number of steps among the prompts, each of `sampling.batch_size`, but at
    least one for each multiplier.

    Args:
        encoder: holds the prompts' conditioning, so that the text encoders can be freed; encodes them anew, with gradient, at every
            batch of a network with text encoder modules.
        sampling: of prompts that bring no size, steps or guidance of their own.
        generator: the source of every random draw.
        uncond_every: steps of a trajectory that one evaluation of the unconditional branch serves; None is 3 of 20 steps, in
            proportion, and at least 1.

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
        uncond_every: int | None = None,
    ) -> None:
        self.model, self.network, self.encoder, self.generator = model, network, encoder, generator
        assert sampling.batch_size is not None
        self.sampling, self.batch_size, self.uncond_every = sampling, sampling.batch_size, uncond_every
        self.skip: tuple[int, float] = (1, 0.0)
        self.solver = SOLVERS[sampling.sampler]
        self.schedule = self.solver.schedule(model.schedule)  # as the sampler ends it
        groups: dict[tuple[Size, int], list[PromptSpec]] = {}
        for prompt in prompts:
            groups.setdefault((size_of(prompt, sampling.size), prompt.num_steps or sampling.num_steps), []).append(prompt)
        self.pools = [self._new_pool(size, num_steps, own) for (size, num_steps), own in groups.items()]

    @property
    def life(self) -> int:
        """Updates from a trajectory's start to its end: pools take turns, and so do the places of one that is larger than a batch."""
        return sum(pool.num_steps * -(-len(pool.steps) // self.batch_size) for pool in self.pools)

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
                "turn": pool.turn,
                "history": None if pool.history is None else (pool.history.x0.cpu().clone(), pool.history.abar.cpu().clone()),
                "distances": pool.distances.cpu().clone(),
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
            pool.latents, pool.asked = old["latents"].to(self.model.device), None
            pool.distances, pool.turn = old["distances"].to(self.model.device), old["turn"]
            pool.steps, pool.chosen, pool.turns = list(old["steps"]), list(old["chosen"]), list(old["turns"])
            if old["history"] is not None:
                pool.history = History(*(part.to(self.model.device) for part in old["history"]))
        self.generator.set_state(state["generator"])
        self.skip = tuple(state["skip"])

    def _new_pool(self, size: Size, num_steps: int, prompts: list[PromptSpec]) -> Pool:
        # no fewer than there are multipliers, so that a run of single samples does not stay at one for a whole trajectory
        count, scale = max(self.batch_size, len(MULTIPLIERS)), self.model.spec.vae_scale_factor
        self.model.check_size(size)
        latents = torch.empty(count, self.model.spec.latent_channels, size[0] // scale, size[1] // scale, device=self.model.device)
        timesteps = self.schedule.inference_timesteps(num_steps, self.sampling.spacing, (latents.shape[2], latents.shape[3]))
        # Neighbours hold different multipliers, so that a batch always holds each.
        pool = Pool(
            size=size,
            timesteps=timesteps.to(self.model.device),
            times=timesteps.tolist(),
            prompts=prompts,
            weights=torch.tensor([prompt.weight for prompt in prompts]),
            weight=sum(prompt.weight for prompt in prompts),
            latents=latents,
            steps=[0] * count,
            chosen=[0] * count,
            turns=list(range(-1, count - 1)),
            history=History(torch.zeros_like(latents), latents.new_zeros(count)) if self.solver.needs_history else None,
            distances=torch.zeros_like(latents),
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
        pool.latents[place] = upload(torch.randn(pool.latents.shape[1:], generator=self.generator), self.model.device)
        pool.steps[place], pool.asked = 0, None
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
        while going := [place for place, goal in enumerate(goals) if pool.steps[place] < goal]:
            batch = self.batch_of(pool, going)
            self.move(pool, batch, self.predict(batch), going)

    def move(self, pool: Pool, batch: RolloutBatch, eps: Tensor, places: Sequence[int] | None = None) -> None:
        """One step along the guided prediction eps [B, C, h, w] of a batch that stands at these places; None is the whole pool."""
        latents, history = self.step(batch, eps)
        if places is None:
            pool.latents, pool.history = latents, history
        else:
            index = upload(list(places), self.model.device)
            pool.latents[index] = latents
            if batch.sparse_uncond is not None and batch.sparse_uncond.distances is not None:
                pool.distances[index] = batch.sparse_uncond.distances
            if history is not None and pool.history is not None:
                pool.history.x0[index], pool.history.abar[index] = history.x0, history.abar
        for place in range(len(pool.steps)) if places is None else places:
            pool.steps[place] += 1

    def next_places(self, pool: Pool) -> list[int] | None:
        """Whose turn it is: None, all, or where the pool holds more than a batch, to have both signs of the multiplier, the next ones."""
        if self.batch_size == len(pool.steps):
            return None
        pool.turn = (pool.turn + 1) % (len(pool.steps) // self.batch_size)
        return list(range(pool.turn * self.batch_size, (pool.turn + 1) * self.batch_size))

    @torch.no_grad()
    def predict(self, batch: RolloutBatch) -> Tensor:
        """The guided prediction for the whole batch, LoRA on, without gradient: eps [B, C, h, w]."""
        parts = [rows_of(batch, batch.cond)]
        if batch.sparse_uncond is not None:
            parts.append(rows_of(batch, batch.uncond, batch.sparse_uncond.due))
        with model_autocast(self.model):
            eps, *others = predict_rows(self.model, self.network, parts)
        assert eps is not None
        return self.guided(batch, eps, others[0] if others else None)

    def guided(self, batch: RolloutBatch, eps: Tensor, uncond: Tensor | None) -> Tensor:
        """The guided prediction [B, C, h, w] of a batch, from the conditional one and what was evaluated of the unconditional branch."""
        uncond = batch.sparse_uncond.complete(eps, uncond) if batch.sparse_uncond is not None else None
        return guide(self.model, batch.latents, batch.timesteps, eps, uncond, batch.guidance_scales, self.sampling.guidance_rescale)

    def batch_of(self, pool: Pool, places: Sequence[int] | None = None, *, going_on: bool = True) -> RolloutBatch:
        """Where trajectories of the pool stand, with fresh noise for a sampler that draws some.

        Args:
            places: which; None is all.
            going_on: whether they go on from where their last batch led to, so that what was evaluated for it may serve once more.
        """
        device = self.model.device
        asked = self._asked(pool, places)
        chosen = range(len(pool.steps)) if places is None else places
        rows = slice(None) if places is None else upload(list(places), device)
        taken = [pool.steps[place] for place in chosen]
        steps = upload(taken, device)
        timesteps, next_timesteps = pool.timesteps[steps], pool.timesteps[(steps + 1).clamp(max=pool.num_steps)]
        latents = pool.latents[rows]
        guided = [self.sampling.of(prompt).guidance_scale != 1 for prompt in asked.prompts]
        every = (self.uncond_every or max(1, 3 * pool.num_steps // 20)) if going_on else 1
        return RolloutBatch(
            latents=latents,
            timesteps=timesteps,
            next_timesteps=next_timesteps,
            sigmas=self.schedule.sigmas(timesteps),
            times=[pool.times[step] for step in taken],
            num_steps=pool.num_steps,
            sparse_uncond=self._sparse(taken, guided, every, pool.distances[rows]) if any(guided) else None,
            noise=upload(torch.randn(latents.shape, generator=self.generator), device) if self.solver.needs_noise else None,
            history=pool.history if pool.history is None else History(pool.history.x0[rows], pool.history.abar[rows]),
            **vars(asked),
        )

    def _asked(self, pool: Pool, places: Sequence[int] | None) -> BatchPrompts:
        if places is None and pool.asked is not None:
            return pool.asked
        device = self.model.device
        chosen = range(len(pool.steps)) if places is None else places
        prompts = [pool.prompts[pool.chosen[place]] for place in chosen]
        in_turn = [MULTIPLIERS[pool.turns[place] % len(MULTIPLIERS)] for place in chosen]
        multipliers = [turn if prompt.multiplier is None else prompt.multiplier for prompt, turn in zip(prompts, in_turn, strict=True)]
        strengths = upload(multipliers, device)
        asked = BatchPrompts(
            prompts=prompts,
            strengths=multipliers,
            multipliers=strengths,
            prompt_directions=upload([prompt.direction for prompt in prompts], device),
            guidance_scales=guidance_scales(self.model, prompts, self.sampling.guidance_scale),
            cond=self.encoder.trained_cond(prompts, pool.size, strengths),
            uncond=self.encoder.uncond(prompts, pool.size, multipliers),
        )
        if places is None and self.encoder.is_fixed:
            pool.asked = asked
        return asked

    def _sparse(self, taken: Sequence[int], wanted: Sequence[bool], every: int, distances: Tensor) -> Sparse:
        due = [row for row, step in enumerate(taken) if wanted[row] and step % every == 0]
        kept = distances if every > 1 or not all(wanted) else None
        index = None if len(due) == len(taken) else upload(torch.tensor(due, dtype=torch.long), self.model.device)
        return Sparse(due=index, distances=kept)
