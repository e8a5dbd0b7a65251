"""How well a scorer does on pictures that it never saw, at every noise level, and which of its states was the best."""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from library.scorer_data.batches import LatentBatch, LatentDataset
from library.scorer_training.criteria.base import Criterion
from library.scorers.heads import HeadSpec

TABLE_SIGMAS = (0.0, 0.25, 0.5, 1.0, 2.0, 5.0, 10.0)
SigmaTable = list[dict[str, float]]  # a row for each of TABLE_SIGMAS: sigma, and the metrics by name
# (clean batch, sigmas [B], generator of the noise) -> outputs [B, ...] of the noisy batch
Predict = Callable[[LatentBatch, Tensor, torch.Generator], Tensor]
Predictions = dict[float, tuple[Tensor, Tensor]]  # of each noise level, outputs [N, ...] and targets [N, ...]


@torch.no_grad()
def validate(predict: Predict, dataset: LatentDataset, *, batch_size: int, seed: int = 0) -> Predictions:
    """Outputs and targets over a whole set at each of TABLE_SIGMAS, always with the same noise for one seed."""
    found: Predictions = {}
    for sigma in TABLE_SIGMAS:
        generator = torch.Generator().manual_seed(seed)
        outputs, targets = [], []
        for batch in dataset.in_order(batch_size):
            sigmas = torch.full((len(batch),), sigma)
            outputs.append(predict(batch, sigmas, generator).float().cpu())
            targets.append(batch.targets)
        found[sigma] = torch.cat(outputs), torch.cat(targets)
    return found


def table_of(predictions: Predictions, criterion: Criterion, head: HeadSpec) -> SigmaTable:
    """The criterion's metrics at each noise level."""
    return [{"sigma": sigma, **criterion.metrics(outputs, targets, head)} for sigma, (outputs, targets) in predictions.items()]


def changing(model: nn.Module) -> dict[str, Tensor]:
    """What training changes of a model: the trainable weights, and the buffers (of batch norms)."""
    return {name: tensor for name, tensor in model.named_parameters() if tensor.requires_grad} | dict(model.named_buffers())


def selection_value(table: SigmaTable, metric: str) -> float:
    """The number that chooses the best state: half the metric on clean latents, half its mean over the noisy levels."""
    clean = [row[metric] for row in table if row["sigma"] == 0]
    noisy = [row[metric] for row in table if row["sigma"] > 0]
    return 0.5 * sum(clean) / len(clean) + 0.5 * sum(noisy) / len(noisy)


def format_table(table: SigmaTable) -> str:
    """A table for people: a row for each sigma, a column for each metric."""
    names = [name for name in table[0] if name != "sigma"]
    widths = [max(9, len(name) + 2) for name in names]
    lines = ["sigma  " + "".join(f"{name.upper():>{width}}" for name, width in zip(names, widths, strict=True))]
    lines += [
        f"{row['sigma']:<7g}" + "".join(f"{row[name]:{width}.4f}" for name, width in zip(names, widths, strict=True)) for row in table
    ]
    return "\n".join(lines)


class AveragedWeights:
    """The exponential average of a model's trainable weights over the steps."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        from diffusers.training_utils import EMAModel

        self._model = model
        self._parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        self._ema = EMAModel(self._parameters.values(), decay=decay)

    def step(self) -> None:
        self._ema.step(self._parameters.values())

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Within the block the model has its averaged weights and is in evaluation mode."""
        self._ema.store(self._parameters.values())
        self._ema.copy_to(self._parameters.values())
        self._model.eval()
        try:
            yield
        finally:
            self._ema.restore(self._parameters.values())
            self._model.train()

    def state_dict(self) -> dict[str, Any]:
        return self._ema.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raises ValueError or RuntimeError for the average of another model."""
        own = self._ema.shadow_params
        self._ema.load_state_dict({**state, "decay": self._ema.decay})
        self._ema.shadow_params = [copy.copy_(saved) for copy, saved in zip(own, self._ema.shadow_params, strict=True)]


class BestState:
    """Remembers the weights that did best.

    Attributes:
        value: the highest selection value so far. step: after how many steps that was.
        validations_since: how many have not been better since.
        tables: what was measured then, by task.
    """

    def __init__(self) -> None:
        self.value, self.step, self.validations_since = -math.inf, 0, 0
        self.tables: Mapping[str, SigmaTable] = {}
        self._state: dict[str, Tensor] = {}

    def consider(self, step: int, tables: Mapping[str, SigmaTable], value: float, model: nn.Module) -> None:
        """Keep the model as it is after `step` steps if the `value` of its tables is higher than all before."""
        self.validations_since += 1
        if value > self.value or not self._state:  # a value of NaN is never higher, and something must be kept
            self.value, self.step, self.tables, self.validations_since = value, step, tables, 0
            self._state = {name: tensor.detach().to("cpu", copy=True) for name, tensor in changing(model).items()}

    def restore(self, model: nn.Module) -> None:
        """Give the model the best weights."""
        model.load_state_dict(self._state, strict=False)

    def state_dict(self) -> dict[str, Any]:
        own = {"value": self.value, "step": self.step, "validations_since": self.validations_since}
        return own | {"tables": dict(self.tables), "weights": self._state}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.value, self.step, self.validations_since = state["value"], state["step"], state["validations_since"]
        self.tables, self._state = state["tables"], dict(state["weights"])
