"""What training minimises is a sum of terms, each with its own batches: a slider can learn from words, pictures and scores at once."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from library.models.base import DiffusionModel
from library.rollout import RolloutConfig
from library.sampling import PromptEncoder
from library.types import LossOutput
from networks.lora import LoRANetwork


class Term(Protocol):
    """One term. It is made once, before the text encoders are freed, and encodes every text that it will need.

    Attributes:
        name: its key in `library.objectives.registry.TERMS`; its metrics are logged as name/metric when there are several terms.
        weight: of its loss in the sum.
    """

    name: str
    weight: float

    def __call__(self) -> LossOutput:
        """Draw a batch, move the term's own trajectories on, and return the loss, still with gradient to the network."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """All that the term's future batches depend on (rollouts, generators): tensors and plain containers."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there. Raises UserError if the state was saved with other settings."""
        ...


@dataclass(frozen=True, kw_only=True)
class Workbench:
    """What every term works with.

    Attributes:
        generator: a generator of random draws by name; the same name gives the same draws, on every process others.
        rollout: sampler, steps, guidance, batch size, resolution and multipliers that terms share.
    """

    model: DiffusionModel
    network: LoRANetwork
    encoder: PromptEncoder
    generator: Callable[[str], torch.Generator]
    rollout: RolloutConfig
