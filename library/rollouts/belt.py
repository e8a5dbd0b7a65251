"""The belt: a pool of sampling trajectories, each at its own step of the schedule, that training moves along.

Every U-Net call is a rollout step and a training step at once. The pool stands where its trajectories stand; one call
evaluates it whole, each sample at its own timestep and multiplier; the latents that the call leads to are scored for
training and, detached, are where each trajectory goes on. A finished trajectory makes room for a fresh prompt and fresh
noise. So every sample is on-policy, the timesteps in a batch are stratified, and nothing is computed twice.
"""

from typing import Any

import torch
from torch import Tensor

from library.rollouts.base import ROLLOUTS, Rollout
from library.rollouts.pool import Pool
from library.rollouts.trajectories import Trajectories
from library.training.runtime import upload
from library.types import Finished, RolloutBatch


@ROLLOUTS.register("belt")
class Belt(Rollout):
    """Each pool is spread over the schedule at first: the sampler itself sends the i-th of B trajectories i/B of the way."""

    def __init__(self, trajectories: Trajectories, settings: Any = None) -> None:
        super().__init__(trajectories, settings)
        self._last: tuple[Pool, RolloutBatch, list[int] | None] | None = None  # what was last handed out, and where it stands in the pool
        for pool in trajectories.pools:
            count = trajectories.batch_size  # the pool may hold more: then their signs differ as long as they end together
            trajectories.move_to(pool, [place % count * pool.num_steps // count for place in range(len(pool.steps))])

    def next_batch(self) -> RolloutBatch:
        """Where the trajectories of one pool stand; those whose turn it is, where the pool holds more than a batch."""
        pool = self.trajectories.next_pool()
        places = self.trajectories.next_places(pool)
        batch = self.trajectories.batch_of(pool, places)
        self._last = pool, batch, places
        return batch

    def pass_over(self, batch: RolloutBatch) -> None:
        """Its trajectories move on; those that end are nobody's."""
        self.advance(self.trajectories.predict(batch))

    def advance(self, eps: Tensor) -> Finished | None:
        """Move the last batch's trajectories along the guided prediction eps [B, C, h, w]; the finished make room for new ones."""
        assert not eps.requires_grad, "the rollout carries no gradient"
        assert self._last is not None, "advance() follows next_batch()"
        pool, batch, places = self._last
        self.trajectories.move(pool, batch, eps, places)
        moved = range(len(pool.steps)) if places is None else places
        rows = [row for row, place in enumerate(moved) if pool.steps[place] == pool.num_steps]
        if not rows:
            return None
        ended = [moved[row] for row in rows]
        index, row_index = (upload(torch.tensor(part), eps.device) for part in (ended, rows))
        prompts, weights = [batch.prompts[row] for row in rows], [batch.strengths[row] for row in rows]
        finished = Finished(pool.latents[index], prompts, weights, batch.cond[row_index])
        for place in ended:
            self.trajectories.start(pool, place)
        return finished
