"""Rollouts that train on finished pictures, noised anew with noise that is known.

A picture that cost a whole trajectory is used several times; a picture from a folder costs no trajectory at all.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from library.diffusion.noise_schedule import per_sample
from library.models.base import DiffusionModel
from library.rollouts.belt import Belt, Pool, RolloutConfig
from library.rollouts.sample import PromptEncoder
from library.types import PromptSpec, RolloutBatch
from networks.lora import LoRANetwork


class NoisedRollout(Belt):
    """The run's own finished pictures, each noised `num_renoisings` times to random places of the schedule."""

    def begin(self) -> None:
        self._clean: Tensor | None = None  # [B, C, h, w], the pictures in use
        self._uses = 0

    def batch(self) -> RolloutBatch:
        if self._clean is None or self._uses == self.config.num_renoisings:
            self._pool = self._next_pool()
            self.start_all(self._pool)
            self._clean, self._uses = self._pictures(self._pool), 0
        pool, self._uses = self._pool, self._uses + 1
        pool.steps = self._steps(pool)
        abar = self.model.schedule.abar(pool.timesteps[torch.tensor(pool.steps, device=self.model.device)])
        noise = torch.randn(self._clean.shape, generator=self.generator).to(self._clean)
        pool.latents = per_sample(abar.sqrt(), noise) * self._clean + per_sample((1 - abar).sqrt(), noise) * noise
        if pool.history is not None:
            pool.history.abar.zero_()
        return replace(self._batch_of(pool), added_noise=noise)

    def advance(self, eps: Tensor) -> None:
        """Nothing to move: the next batch noises the pictures anew."""
        assert not eps.requires_grad, "the rollout carries no gradient"

    def state_dict(self) -> dict[str, Any]:
        clean = None if self._clean is None else self._clean.cpu().clone()
        return super().state_dict() | {"clean": clean, "uses": self._uses, "pool": self.pools.index(self._pool)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self._clean = None if state["clean"] is None else state["clean"].to(self.model.device)
        self._uses, self._pool = state["uses"], self.pools[state["pool"]]

    def _pictures(self, pool: Pool) -> Tensor:
        """Clean latents [B, C, h, w] of the prompts that the pool has just started."""
        self._move_to(pool, [pool.num_steps] * len(pool.steps))
        return pool.latents.clone()

    def _steps(self, pool: Pool) -> list[int]:
        """Where on the schedule each picture is noised to."""
        return torch.randint(pool.num_steps, (len(pool.steps),), generator=self.generator).tolist()


class LastStepNoisedRollout(NoisedRollout):
    """The run's own finished pictures, noised to the last step, from where one prediction finishes them again."""

    def _steps(self, pool: Pool) -> list[int]:
        return [pool.num_steps - 1] * len(pool.steps)


class PictureRollout(NoisedRollout):
    """Pictures from elsewhere, noised to random places of the schedule: no trajectory is sampled.

    Args:
        pictures: clean latents [C, h, w] with their prompts; a prompt's size is that of its latents.
    """

    def __init__(
        self,
        model: DiffusionModel,
        network: LoRANetwork,
        pictures: Sequence[tuple[Tensor, PromptSpec]],
        encoder: PromptEncoder,
        config: RolloutConfig,
        generator: torch.Generator,
    ) -> None:
        scale = model.spec.vae_scale_factor
        prompts = [replace(prompt, height=latents.shape[1] * scale, width=latents.shape[2] * scale) for latents, prompt in pictures]
        self._latents_of = {id(prompt): latents for (latents, _), prompt in zip(pictures, prompts, strict=True)}
        super().__init__(model, network, prompts, encoder, config, generator)

    def _pictures(self, pool: Pool) -> Tensor:
        return torch.stack([self._latents_of[id(pool.prompts[index])] for index in pool.chosen]).to(pool.latents)
