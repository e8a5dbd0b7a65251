"""The rollout that trains on finished pictures, noised anew with noise that is known.

A picture that cost a whole trajectory is used several times; a picture from a folder costs no trajectory at all.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from library.rollouts.base import ROLLOUTS, Rollout
from library.rollouts.pool import Pool
from library.rollouts.trajectories import Trajectories
from library.training.runtime import upload
from library.types import PromptSpec, RolloutBatch

NUM_RENOISINGS = 4  # how often a finished picture is noised anew and trained on


@ROLLOUTS.register("noised")
class NoisedRollout(Rollout):
    """Finished pictures, each noised NUM_RENOISINGS times to random places of the schedule.

    Args:
        pictures: clean latents [B, C, h, w] of the prompts that a pool has just started; None: those that the sampler finishes.
    """

    def __init__(self, trajectories: Trajectories, settings: None = None, pictures: Callable[[Pool], Tensor] | None = None) -> None:
        super().__init__(trajectories, settings)
        self._pictures = pictures or self._finish
        self._pool = trajectories.pools[0]
        self._clean: Tensor | None = None  # [B, C, h, w], the pictures in use
        self._uses = 0

    def next_batch(self) -> RolloutBatch:
        """The pictures in use, noised anew."""
        own = self.trajectories
        if self._clean is None or self._uses == NUM_RENOISINGS:
            self._pool = own.next_pool()
            own.start_all(self._pool)
            self._clean, self._uses = self._pictures(self._pool), 0
        pool, self._uses = self._pool, self._uses + 1
        pool.steps = torch.randint(pool.num_steps, (len(pool.steps),), generator=own.generator).tolist()
        timesteps = pool.timesteps[upload(pool.steps, own.model.device)]
        noise = upload(torch.randn(self._clean.shape, generator=own.generator), own.model.device)
        pool.latents = own.model.schedule.add_noise(self._clean, noise, timesteps)
        if pool.history is not None:
            pool.history.abar.zero_()
        places = own.next_places(pool)
        batch = own.batch_of(pool, places, going_on=False)
        return replace(batch, added_noise=noise if places is None else noise[upload(places, noise.device)])

    def advance(self, eps: Tensor) -> None:
        """Nothing moves: the next batch noises the pictures anew."""
        assert not eps.requires_grad, "the rollout carries no gradient"

    def renew_broken(self) -> None:
        super().renew_broken()
        self._clean = None

    def state_dict(self) -> dict[str, Any]:
        clean = None if self._clean is None else self._clean.cpu().clone()
        return super().state_dict() | {"clean": clean, "uses": self._uses, "pool": self.trajectories.pools.index(self._pool)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self._clean = None if state["clean"] is None else state["clean"].to(self.trajectories.model.device)
        self._uses, self._pool = state["uses"], self.trajectories.pools[state["pool"]]

    def _finish(self, pool: Pool) -> Tensor:
        self.trajectories.move_to(pool, [pool.num_steps] * len(pool.steps))
        return pool.latents.clone()


def given_pictures(pictures: Sequence[tuple[Tensor, PromptSpec]], scale: int) -> tuple[list[PromptSpec], Callable[[Pool], Tensor]]:
    """Pictures from elsewhere as the prompts of trajectories, and as `pictures` of a `NoisedRollout` over those: nothing is sampled.

    Args:
        pictures: clean latents [C, h, w] with their prompts; a prompt's size becomes that of its latents.
        scale: pixels per latent.
    """
    prompts = [replace(prompt, height=latents.shape[1] * scale, width=latents.shape[2] * scale) for latents, prompt in pictures]
    latents_of = {id(prompt): latents for (latents, _), prompt in zip(pictures, prompts, strict=True)}

    def chosen(pool: Pool) -> Tensor:
        return torch.stack([latents_of[id(pool.prompts[index])] for index in pool.chosen]).to(pool.latents)

    return prompts, chosen
