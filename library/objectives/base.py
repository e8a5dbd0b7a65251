"""What training minimises is a sum of terms, each with its own batches: a slider can learn from words, pictures and scores at once."""

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from library.models.base import DiffusionModel
from library.objectives.rewards import Reward
from library.rollouts.config import RolloutConfig
from library.rollouts.prompt_encoder import PromptEncoder
from library.rollouts.sample import SamplingConfig
from library.rollouts.trajectories import Trajectories
from library.settings.registry import Registry
from library.types import LossOutput, PromptSpec
from networks.lora import LoRANetwork

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class TrainingContext:
    """What every term works with.

    Attributes:
        encoder: holds the conditioning of texts.
        generator: a generator of random draws by name; the same name gives the same draws, on every process others.
        rollout: the batch size that terms share.
        sampling: how trajectories are sampled, and how large pictures are.
        reward: what is scored; without goals if no scorer is given.
        prompts: to train on.
        min_snr_gamma: of `regression.min_snr_weights`.
        settings: of the parts (terms, estimators, rollouts) that have some, by the part's name.
    """

    model: DiffusionModel
    network: LoRANetwork
    encoder: PromptEncoder
    generator: Callable[[str], torch.Generator]
    rollout: RolloutConfig
    sampling: SamplingConfig
    reward: Reward
    prompts: Sequence[PromptSpec] = ()
    min_snr_gamma: float | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)

    def trajectories(self, prompts: Sequence[PromptSpec], generator: torch.Generator, batch_size: int | None = None) -> Trajectories:
        """Freshly started trajectories of these prompts, sampled as the run samples.

        Args:
            batch_size: None is that of the rollout.
        """
        sampling = self.sampling if batch_size is None else replace(self.sampling, batch_size=batch_size)
        return Trajectories(self.model, self.network, prompts, self.encoder, sampling, generator, self.rollout.uncond_every_n_steps)


class Term(ABC):
    """One term. It is made once, before the text encoders are freed, and encodes every text that it will need.

    Attributes:
        config_class: its settings, a dataclass of options; None if it has none.
        weight: of its loss in the sum; from objective_weights.
    """

    config_class: ClassVar[type | None] = None
    weight: float = 1.0

    @classmethod
    @abstractmethod
    def build(cls, context: TrainingContext, settings: Any) -> "Term":
        """The term, from its settings (of `config_class`; None if there is none). Raises UserError if it lacks what it learns from."""

    @abstractmethod
    def __call__(self) -> LossOutput:
        """Draw a batch, move the term's own trajectories on, and return the loss, still with gradient to the network."""

    def renew_broken(self) -> None:  # noqa: B027 - most terms carry nothing from batch to batch
        """After a loss that was not finite: begin anew what the term carries on, where that is not finite any more."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """All that the term's future batches depend on (rollouts, generators): tensors and plain containers."""

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there. Raises UserError if the state was saved with other settings."""


TERMS: Registry[type[Term]] = Registry("objective", "library.objectives.terms", noun="objective")


def mean_metrics(terms: Mapping[str, Term], outs: Mapping[str, Sequence[LossOutput]]) -> dict[str, float | Tensor]:
    """The loss and the metrics of one update, over its batches; with several terms a metric's name begins with its term's."""
    metrics, losses = {}, []
    for term_name, own in outs.items():
        prefix = f"{term_name}/" if len(outs) > 1 else ""
        metrics |= {prefix + name: torch.stack([torch.as_tensor(out.metrics[name]) for out in own]).mean() for name in own[0].metrics}
        loss = torch.stack([out.loss.detach() for out in own]).mean()
        losses.append(terms[term_name].weight * loss)
        if prefix:
            metrics[f"{term_name}/loss"] = loss
    return {**metrics, "loss": torch.stack(losses).sum()}
