"""What training minimises is a sum of terms, each with its own batches: a slider can learn from words, pictures and scores at once."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from library.errors import UserError
from library.models.base import DiffusionModel
from library.rollouts.belt import RolloutConfig
from library.rollouts.sample import PromptEncoder
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


def check_finite(out: LossOutput, step: int) -> None:
    """Raise UserError if a sample's loss is NaN or infinite, and name the sample. `step` counts from 0."""
    bad = (~torch.isfinite(out.sample_losses)).nonzero().flatten().tolist()
    if bad:
        raise UserError(
            f"step {step + 1}: the loss of {out.samples[bad[0]]} is not finite, so training stopped and no slider was written; lower "
            "learning_rate, or use mixed_precision bf16 or no"
        )


def mean_metrics(terms: Sequence[Term], outs: Mapping[str, Sequence[LossOutput]]) -> dict[str, float | Tensor]:
    """The loss and the metrics of one update, over its batches; with several terms a metric's name begins with its term's."""
    metrics, losses = {}, []
    for term in terms:
        prefix = f"{term.name}/" if len(terms) > 1 else ""
        own = outs[term.name]
        metrics |= {prefix + name: torch.stack([torch.as_tensor(out.metrics[name]) for out in own]).mean() for name in own[0].metrics}
        losses.append(torch.stack([out.loss.detach() for out in own]).mean())
        if prefix:
            metrics[f"{term.name}/loss"] = losses[-1]
    return {**metrics, "loss": torch.stack([term.weight * loss for term, loss in zip(terms, losses, strict=True)]).sum()}
