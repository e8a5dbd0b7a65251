"""How several things to learn share one backbone: by the sum of their losses, or by an optimizer each."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import Parameter

from library.scorer_training.config import ScorerTrainingConfig
from library.scorer_training.stages import Stage
from library.scorers.base import BackboneScorer
from library.training.finite_losses import FiniteLosses
from library.training.optimizers import create_optimizer, create_scheduler, optimizer_train_mode, own_settings, warmup_steps
from library.training.runtime import all_reduce_grads
from library.types import LossOutput

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

    def __init__(
        self, accelerator: Accelerator, scorer: BackboneScorer, stage: Stage, settings: ScorerTrainingConfig, finite: FiniteLosses
    ) -> None:
        self.accelerator, self.max_grad_norm, self.finite = accelerator, settings.max_grad_norm, finite
        names, is_sum = [task.name for task in stage.tasks], settings.balancing == "sum"
        longest = stage.steps // 10  # a warm-up that takes a larger part of a short run is most of it
        config = dataclasses.replace(stage.optimizer, lr_warmup_steps=float(min(warmup_steps(stage.optimizer, stage.steps), longest)))
        self.weights = {task.name: task.dataset.weight if is_sum else 1.0 for task in stage.tasks}
        self.optimizers: list[Any] = []
        self._parts: list[tuple[list[str], list[Parameter], Any]] = []  # names of the tasks, what they move, schedule of its rate
        for own in [names] if is_sum else [[name] for name in names]:
            groups = parameter_groups(scorer, own, settings.weight_decay)
            optimizer = create_optimizer(config, groups)
            parameters = [parameter for group in groups for parameter in group["params"]]
            self._parts.append((own, parameters, create_scheduler(config, optimizer, stage.steps)))
            self.optimizers.append(accelerator.prepare(optimizer))

    def step(self, losses: Mapping[str, Callable[[], Iterable[LossOutput]]], step: int) -> tuple[dict[str, Tensor], bool]:
        """One step on all tasks.

        Args:
            losses: of each task, a function that gives the parts of its loss, so that one graph is alive at a time.
            step: counted from 0, for what is said of losses that are not finite.

        Returns:
            The losses, detached, and whether any weight was moved: what is not finite does not count.
        """
        values, moved = {}, False
        for optimizer, (names, parameters, scheduler) in zip(self.optimizers, self._parts, strict=True):
            for name in names:
                parts = []
                for out in losses[name]():
                    parts.append(out.loss.detach())
                    if self.finite.check(out, step, name):
                        self.accelerator.backward(self.weights[name] * out.loss)
                values[name] = torch.stack(parts).sum() if parts else torch.zeros(())
            all_reduce_grads(parameters, self.accelerator)
            if any(parameter.grad is not None for parameter in parameters) and self._clipped(parameters, step):
                optimizer.step()
                moved = True
            scheduler.step()
            optimizer.zero_grad()
        return values, moved

    def state_dict(self) -> dict[str, Any]:
        scaler = self.accelerator.scaler
        return {
            "optimizers": [optimizer.optimizer.state_dict() for optimizer in self.optimizers],
            "schedulers": [scheduler.state_dict() for _, _, scheduler in self._parts],
            "scaler": {} if scaler is None else scaler.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for prepared, (_, _, scheduler), *own in zip(self.optimizers, self._parts, state["optimizers"], state["schedulers"], strict=True):
            with own_settings(prepared.optimizer, scheduler):
                prepared.optimizer.load_state_dict(own[0])
                scheduler.load_state_dict(own[1])
            optimizer_train_mode(prepared.optimizer)
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])

    def _clipped(self, parameters: list[Parameter], step: int) -> bool:
        """Scale the gradient down to max_grad_norm -> whether it is finite; a loss scaler looks for that itself."""
        largest = self.max_grad_norm if self.max_grad_norm > 0 else math.inf
        norm = torch.as_tensor(self.accelerator.clip_grad_norm_(parameters, largest))
        return self.accelerator.scaler is not None or self.finite.check_gradient(norm, step)

    def learning_rate(self) -> float:
        """Of the heads, for the log."""
        return self._parts[0][2].get_last_lr()[-1]
