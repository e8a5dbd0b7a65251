"""How several things to learn share one backbone: by the sum of their losses, or by an optimizer each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.nn import Parameter

from library.scorer_training.config import ScorerTrainingConfig
from library.scorer_training.tasks import Stage
from library.scorers.base import BackboneScorer
from library.training.optimizers import create_optimizer, create_scheduler
from library.training.runtime import all_reduce_grads

if TYPE_CHECKING:
    from accelerate import Accelerator


def parameter_groups(scorer: BackboneScorer, heads: Sequence[str], weight_decay: float) -> list[dict[str, Any]]:
    """Groups for an optimizer, of the backbone and these heads. Biases and the scales of norms, which are all vectors, do not decay."""
    layers = [*scorer.backbone.layers(), [parameter for name in heads for parameter in scorer.heads[name].parameters()]]
    groups = []
    for layer in layers:
        trainable = [parameter for parameter in layer if parameter.requires_grad]
        for decays in (True, False):
            chosen = [parameter for parameter in trainable if (parameter.ndim > 1) is decays]
            if chosen:
                groups.append({"params": chosen, "weight_decay": weight_decay if decays else 0.0})
    return groups


class Balance:
    """The optimizers of a stage: one for the sum of the losses, each times its dataset's weight; or one for each task.

    Those of the tasks are stepped one after the other, each on its task's gradient alone. With Lion (arXiv 2302.06675), whose step is the
    sign of a momentum, every task then moves every weight equally far whatever the scale of its loss: there is nothing to balance.
    """

    def __init__(self, accelerator: Accelerator, scorer: BackboneScorer, stage: Stage, settings: ScorerTrainingConfig) -> None:
        self.accelerator, self.max_grad_norm = accelerator, settings.max_grad_norm
        names, is_sum = [task.name for task in stage.tasks], settings.balancing == "sum"
        self.weights = {task.name: task.dataset.weight if is_sum else 1.0 for task in stage.tasks}
        self.optimizers: list[Any] = []
        self._parts: list[tuple[list[str], list[Parameter], Any]] = []  # names of the tasks, what they move, schedule of its rate
        for own in [names] if is_sum else [[name] for name in names]:
            groups = parameter_groups(scorer, own, settings.weight_decay)
            optimizer = create_optimizer(stage.optimizer, groups)
            parameters = [parameter for group in groups for parameter in group["params"]]
            self._parts.append((own, parameters, create_scheduler(stage.optimizer, optimizer, stage.steps)))
            self.optimizers.append(accelerator.prepare(optimizer))

    def step(self, losses: Mapping[str, Callable[[], Tensor]]) -> dict[str, Tensor]:
        """One step on all tasks, whose losses are given as functions, so that one graph is alive at a time. Returns them, detached."""
        values = {}
        for optimizer, (names, parameters, scheduler) in zip(self.optimizers, self._parts, strict=True):
            for name in names:
                loss = losses[name]()
                self.accelerator.backward(self.weights[name] * loss)
                values[name] = loss.detach()
            all_reduce_grads(parameters, self.accelerator)
            if self.max_grad_norm > 0:
                self.accelerator.clip_grad_norm_(parameters, self.max_grad_norm)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        return values

    def learning_rate(self) -> float:
        """Of the heads, for the log."""
        return self._parts[0][2].get_last_lr()[-1]
