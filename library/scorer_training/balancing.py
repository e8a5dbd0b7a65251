"""How several things to learn share one backbone: by the sum of their losses, or by an optimizer each."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from library.scorer_training.config import ScorerTrainingConfig
from library.scorer_training.tasks import Task
from library.scorers.base import BackboneScorer
from library.settings.shared import OptimizerConfig
from library.training.optimizers import create_optimizer, create_scheduler
from library.training.runtime import all_reduce_grads


def parameter_groups(
    scorer: BackboneScorer, heads: Sequence[str], learning_rate: float, layer_lr_decay: float, weight_decay: float
) -> list[dict[str, Any]]:
    """Groups for an optimizer: a backbone's n layers at `layer_lr_decay`^n ... `layer_lr_decay`^1 of the rate, the heads at the rate.

    Biases and the scales of norms, which are all vectors, do not decay. After Bao et al., arXiv 2106.08254.
    """
    layers = [*scorer.backbone.layers(), [parameter for name in heads for parameter in scorer.heads[name].parameters()]]
    groups = []
    for depth, layer in enumerate(layers):
        rate = learning_rate * layer_lr_decay ** (len(layers) - 1 - depth)
        trainable = [parameter for parameter in layer if parameter.requires_grad]
        for decays in (True, False):
            chosen = [parameter for parameter in trainable if (parameter.ndim > 1) is decays]
            if chosen:
                groups.append({"params": chosen, "lr": rate, "weight_decay": weight_decay if decays else 0.0})
    return groups


class Balance(ABC):
    """How several tasks move one backbone. `step` is given each task's loss as a function, so that one graph is alive at a time."""

    def __init__(self, accelerator: Accelerator, max_grad_norm: float) -> None:
        self.accelerator, self.max_grad_norm = accelerator, max_grad_norm
        self.optimizers: list[Any] = []
        self._schedulers: list[Any] = []
        self._parameters: list[list[nn.Parameter]] = []

    @abstractmethod
    def step(self, losses: Mapping[str, Callable[[], Tensor]]) -> dict[str, Tensor]:
        """One step on all tasks. Returns each task's loss, detached."""

    def metrics(self) -> dict[str, float]:
        return {"lr": self._schedulers[0].get_last_lr()[-1]}

    def _add_optimizer(self, config: OptimizerConfig, groups: list[dict[str, Any]], num_steps: int) -> None:
        optimizer = create_optimizer(config, groups)
        self._schedulers.append(create_scheduler(config, optimizer, num_steps))
        self.optimizers.append(self.accelerator.prepare(optimizer))
        self._parameters.append([parameter for group in groups for parameter in group["params"]])

    def _update(self, index: int) -> None:
        """Step one optimizer on the gradients that there are, and clear them."""
        parameters = self._parameters[index]
        all_reduce_grads(parameters, self.accelerator)
        if self.max_grad_norm > 0:
            self.accelerator.clip_grad_norm_(parameters, self.max_grad_norm)
        self.optimizers[index].step()
        self._schedulers[index].step()
        self.optimizers[index].zero_grad()


class SummedLosses(Balance):
    """One optimizer on the sum of the losses, each times its weight."""

    def __init__(
        self,
        accelerator: Accelerator,
        scorer: BackboneScorer,
        tasks: Sequence[Task],
        settings: ScorerTrainingConfig,
        config: OptimizerConfig,
        steps: int,
    ) -> None:
        super().__init__(accelerator, settings.max_grad_norm)
        names = [task.name for task in tasks]
        groups = parameter_groups(scorer, names, config.learning_rate, settings.layer_lr_decay, settings.weight_decay)
        self.weights = {task.name: task.dataset.weight for task in tasks}
        # Log variances of Kendall et al., arXiv 1705.07115: the loss is sum_t weight_t L_t exp(-s_t) + s_t / 2, so that s_t settles
        # where a task's loss and its weight say; without them s_t stays 0.
        self.log_variances = nn.ParameterDict({name: nn.Parameter(torch.zeros((), device=accelerator.device)) for name in names})
        if settings.balancing == "uncertainty":
            groups.append({"params": list(self.log_variances.parameters()), "lr": config.learning_rate, "weight_decay": 0.0})
        else:
            self.log_variances.requires_grad_(False)
        self._add_optimizer(config, groups, steps)

    def step(self, losses: Mapping[str, Callable[[], Tensor]]) -> dict[str, Tensor]:
        values = {}
        for name, compute in losses.items():
            loss, log_variance = compute(), self.log_variances[name]
            self.accelerator.backward(self.weights[name] * loss * (-log_variance).exp() + log_variance / 2)
            values[name] = loss.detach()
        self._update(0)
        return values

    def metrics(self) -> dict[str, float]:
        learned = {name: value.item() for name, value in self.log_variances.items() if value.requires_grad}
        return {**super().metrics(), **{f"log_variance/{name}": value for name, value in learned.items()}}


class IndependentOptimizers(Balance):
    """An optimizer for each task, stepped one after the other on that task's gradient alone.

    With Lion (arXiv 2302.06675), whose step is the sign of a momentum, every task moves every weight equally far whatever the
    scale of its loss: there is nothing to balance. The seed's second version worked this way.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        scorer: BackboneScorer,
        tasks: Sequence[Task],
        settings: ScorerTrainingConfig,
        config: OptimizerConfig,
        steps: int,
    ) -> None:
        super().__init__(accelerator, settings.max_grad_norm)
        self._names = [task.name for task in tasks]
        for name in self._names:
            groups = parameter_groups(scorer, [name], config.learning_rate, settings.layer_lr_decay, settings.weight_decay)
            self._add_optimizer(config, groups, steps)

    def step(self, losses: Mapping[str, Callable[[], Tensor]]) -> dict[str, Tensor]:
        values = {}
        for index, name in enumerate(self._names):
            loss = losses[name]()
            self.accelerator.backward(loss)
            self._update(index)
            values[name] = loss.detach()
        return values
