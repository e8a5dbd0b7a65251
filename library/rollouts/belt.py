"""The belt: a pool of sampling trajectories, each at its own step of the schedule, that training moves along.

Every U-Net call is a rollout step and a training step at once. The pool stands where its trajectories stand; one call
evaluates it whole, each sample at its own timestep and multiplier; the latents that the call leads to are scored for
training and, detached, are where each trajectory goes on. A finished trajectory makes room for a fresh prompt and fresh
noise. So every sample is on-policy, the timesteps in a batch are stratified, and nothing is computed twice.
"""

from typing import Any

from torch import Tensor

from library.rollouts.base import ROLLOUTS, Rollout
from library.rollouts.trajectories import Pool, Trajectories
from library.types import Finished, RolloutBatch


@ROLLOUTS.register("belt")
class Belt(Rollout):
    """Each pool is spread over the schedule at first: the sampler itself sends the i-th of B trajectories i/B of the way."""

    def __init__(self, trajectories: Trajectories, settings: Any = None) -> None:
        super().__init__(trajectories, settings)
        self._last: tuple[Pool, RolloutBatch] | None = None  # what was last handed out
        for pool in trajectories.pools:
            count = len(pool.steps)
            trajectories.move_to(pool, [place * pool.num_steps // count for place in range(count)])

    def next_batch(self) -> RolloutBatch:
        """Where the trajectories of one pool stand."""
        pool = self.trajectories.next_pool()
        batch = self.trajectories.batch_of(pool)
        self._last = pool, batch
        return batch

    def advance(self, eps: Tensor) -> Finished | None:
        """Move the last batch's trajectories along the guided prediction eps [B, C, h, w]; the finished make room for new ones."""
        assert not eps.requires_grad, "the rollout carries no gradient"
        assert self._last is not None, "advance() follows next_batch()"
        pool, batch = self._last
        pool.latents, pool.history = self.trajectories.step(batch, eps)
        pool.steps = [step + 1 for step in pool.steps]
        ended = [place for place, step in enumerate(pool.steps) if step == pool.num_steps]
        if not ended:
            return None
        weights = batch.multipliers[ended].tolist()
        finished = Finished(pool.latents[ended], [batch.prompts[place] for place in ended], weights, batch.cond[ended])
        for place in ended:
            self.trajectories.start(pool, place)
        return finished
