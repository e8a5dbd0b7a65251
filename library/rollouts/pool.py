"""A pool of trajectories: where each stands, and what it is asked for."""

from dataclasses import dataclass

from torch import Tensor

from library.rollouts.prompt_encoder import Size
from library.types import Conditioning, History, PromptSpec


@dataclass(frozen=True)
class BatchPrompts:
    """What some trajectories are asked for, on the model's device: the fields of `RolloutBatch` of these names."""

    prompts: list[PromptSpec]
    strengths: list[float]
    multipliers: Tensor
    prompt_directions: Tensor
    guidance_scales: Tensor
    cond: Conditioning
    uncond: Conditioning


@dataclass(eq=False)
class Pool:
    """Trajectories of one picture size and number of steps. Tensors are on the model's device, everything else is on the CPU."""

    size: Size
    timesteps: Tensor  # [steps + 1], the last is -1
    times: list[float]  # the same
    prompts: list[PromptSpec]
    weights: Tensor  # of the prompts, on the CPU
    weight: float  # of all of them
    latents: Tensor  # [B, C, h, w]
    steps: list[int]  # how many steps each has taken
    chosen: list[int]  # index into prompts
    turns: list[int]  # how many trajectories each place has held; says whose turn it is among the multipliers
    history: History | None  # of a solver that remembers
    distances: Tensor  # of the unconditional branch, as `Sparse` has them [B, C, h, w]
    turn: int = -1  # whose turn it was, where there are more than a batch
    asked: BatchPrompts | None = None  # of all places, as long as none starts anew

    @property
    def num_steps(self) -> int:
        return len(self.timesteps) - 1
