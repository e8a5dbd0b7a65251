"""What training minimises is a sum of terms, each with its own batches: a slider can learn from words, pictures and scores at once."""

import logging
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from library.errors import UserError
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

MAX_IN_A_ROW = 8  # batches of a term without a finite loss; of a whole run, so many or 1 %


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
        return Trajectories(self.model, self.network, prompts, self.encoder, sampling, generator)


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


class FiniteLosses:
    """Watches for losses that are NaN or infinite. Too many of them are to end the run.

    A sample that a scorer cannot judge does not count, and the others of its batch do. Where the network itself put out something that
    is not finite, the whole batch does not count: through the gradient of the weights, which the samples share, it would reach all.

    Args:
        num_steps: updates of the run.
        scorers: what is followed, to be named in complaints.

    Attributes:
        found: what was not finite, in words, oldest first.
    """

    def __init__(self, num_steps: int, scorers: Sequence[str] = ()) -> None:
        self.limit = max(MAX_IN_A_ROW, num_steps // 100)
        self.found: list[str] = []
        self._scorers = f" (scorer {', '.join(scorers)})" if scorers else ""
        self._in_a_row: Counter[str] = Counter()
        self._any_finite = False
        self._last_found: int | None = None

    @property
    def none_finite(self) -> bool:
        return bool(self.found) and not self._any_finite

    @property
    def too_many(self) -> bool:
        return len(self.found) > self.limit or max(self._in_a_row.values(), default=0) > MAX_IN_A_ROW

    def check(self, out: LossOutput, step: int, name: str) -> bool:
        """Whether a batch of the term `name` counts; a sample without a finite loss is logged. `step` counts from 0."""
        bad = (~torch.isfinite(out.sample_losses)).nonzero().flatten().tolist()
        if not bad:
            self._in_a_row[name], self._any_finite = 0, True
            return True
        counts = len(bad) < len(out.sample_losses) and bool(torch.isfinite(out.loss))
        self._any_finite |= counts
        blamed = [scorer for scorer, rows in out.unscored.items() if rows[bad[0]]]
        followed = f" (scorer {', '.join(blamed)})" if blamed else self._scorers if out.promised is not None else ""
        ignored = "this batch does" if not counts else "this sample does" if len(bad) == 1 else f"{len(bad)} samples do"
        self._add(f"the {name} loss of {out.samples[bad[0]]}{followed}", name, step, ignored)
        return counts

    def check_gradient(self, norm: Tensor, step: int) -> bool:
        """Whether the norm of an update's gradient is finite."""
        if finite := bool(torch.isfinite(norm)):
            self._in_a_row["gradient"] = 0
        else:
            self._add("the norm of the gradient", "gradient", step, "this batch does")
        return finite

    def all_finite(self, step: int) -> bool:
        """Whether nothing was found at this step."""
        return self._last_found != step

    def complaint(self, saved: str) -> UserError:
        """The error that ends the run; `saved` says what is left of it."""
        advice = "lower learning_rate, or use mixed_precision bf16 or no"
        if not self._any_finite:
            advice = "check the scorer and the model with --check_reward, or use mixed_precision bf16 or no"
        return UserError(f"{self.found[0]} was not finite, nor were {len(self.found) - 1} more, so training stopped{saved}; {advice}")

    def _add(self, what: str, name: str, step: int, ignored: str) -> None:
        self.found.append(f"step {step + 1}: {what}")
        self._in_a_row[name] += 1
        self._last_found = step
        logger.warning("%s is not finite, so %s not count", self.found[-1], ignored)


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
