"""The parts of a scorer's training: noise, optimizer, averaging, validation at every noise level, the choice of the best."""

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.optimization import get_cosine_schedule_with_warmup
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from library.errors import UserError
from library.noise_schedule import NoiseSchedule, per_sample, sigma_to_abar
from library.scorer_data.batches import LatentDataset
from library.scorer_data.datasets import RatedData
from library.scorer_losses import Criterion
from library.scorers.base import Backbone

TABLE_SIGMAS = (0.0, 0.25, 0.5, 1.0, 2.0, 5.0, 10.0)
SigmaTable = list[dict[str, float]]  # a row for each of TABLE_SIGMAS: sigma, and the metrics by name


@dataclass(frozen=True)
class Stage:
    """One thing learned: a criterion by name, its pictures, for how long; `std` is the unit of its errors; `first_step` for the logs."""

    criterion: str
    data: RatedData
    steps: int
    learning_rate: float
    std: float = 1.0
    first_step: int = 0

    def describe(self) -> dict[str, Any]:
        """For the record in the scorer's file."""
        pictures = {"train": len(self.data.train), "validation": len(self.data.validation)}
        return {"criterion": self.criterion, "pictures": pictures, "steps": self.steps, "learning_rate": self.learning_rate}


class Classifier(nn.Module):
    """A backbone and a linear layer to classes: what pretraining trains. Latents [B, C, h, w] and sigmas [B] to logits [B, classes]."""

    def __init__(self, backbone: Backbone, num_classes: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(backbone.feature_width, num_classes)

    def forward(self, latents: Tensor, sigmas: Tensor) -> Tensor:
        return self.head(self.backbone(latents, sigmas))


def standard_schedule() -> NoiseSchedule:
    """The schedule that SD1, SD2 and SDXL share: sigma from 0.03 to 14.6."""
    return NoiseSchedule.from_config({"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"})


def draw_sigmas(count: int, clean_fraction: float, schedule: NoiseSchedule, generator: torch.Generator) -> Tensor:
    """Noise levels [count]: a share of zeros, the others at uniform timesteps; stratified, so that every batch has its share of each."""
    place = (torch.randperm(count, generator=generator) + torch.rand(count, generator=generator)) / count  # each in a slot of its own, 0..1
    noisy = (place - clean_fraction) / max(1 - clean_fraction, 1e-6)
    timesteps = (noisy * len(schedule)).long().clamp(0, len(schedule) - 1)
    return torch.where(place < clean_fraction, torch.zeros(()), schedule.sigmas(timesteps))


def add_noise(latents: Tensor, sigmas: Tensor, generator: torch.Generator) -> Tensor:
    """x = sqrt(abar) x0 + sqrt(1 - abar) eps at abar = 1 / (1 + sigma^2). The noise is drawn on the CPU: the same on every device."""
    noise = torch.randn(latents.shape, generator=generator).to(latents.device)
    abar = per_sample(sigma_to_abar(sigmas), latents)
    return abar.sqrt() * latents + (1 - abar).sqrt() * noise


def make_optimizer(
    model: nn.Module, learning_rate: float, weight_decay: float, warmup_steps: int, steps: int
) -> tuple[torch.optim.AdamW, LambdaLR]:
    """AdamW, and a schedule of a linear rise and a cosine to 0. Biases and the scales of norms, which are all vectors, do not decay."""
    parameters = list(model.parameters())
    groups = [
        {"params": [parameter for parameter in parameters if parameter.ndim > 1], "weight_decay": weight_decay},
        {"params": [parameter for parameter in parameters if parameter.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=learning_rate)
    return optimizer, get_cosine_schedule_with_warmup(optimizer, warmup_steps, steps)


@contextlib.contextmanager
def averaged(model: nn.Module, ema: EMAModel) -> Iterator[None]:
    """Within the block the model has its averaged weights and is in evaluation mode."""
    parameters = list(model.parameters())
    ema.store(parameters)
    ema.copy_to(parameters)
    model.eval()
    try:
        yield
    finally:
        ema.restore(parameters)
        model.train()


@torch.no_grad()
def validate(
    predict: Callable[[Tensor, Tensor], Tensor],
    dataset: LatentDataset,
    criterion: Criterion,
    *,
    batch_size: int,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> SigmaTable:
    """Metrics over a whole set at each of TABLE_SIGMAS, always with the same noise for one seed. `predict(latents, sigmas)`."""
    table: SigmaTable = []
    for sigma in TABLE_SIGMAS:
        generator = torch.Generator().manual_seed(seed)
        outputs, targets = [], []
        for batch in dataset.in_order(batch_size):
            sigmas = torch.full((len(batch),), sigma, device=device)
            latents = add_noise(batch.latents.to(device), sigmas, generator)
            outputs.append(predict(latents, sigmas).float().cpu())
            targets.append(batch.targets)
        table.append({"sigma": sigma, **criterion.metrics(torch.cat(outputs), torch.cat(targets))})
    return table


def selection_value(table: SigmaTable, criterion: Criterion) -> float:
    """The number that chooses the best checkpoint: half the metric on clean latents, half its mean over the noisy levels."""
    clean = [row[criterion.selection] for row in table if row["sigma"] == 0]
    noisy = [row[criterion.selection] for row in table if row["sigma"] > 0]
    return 0.5 * sum(clean) / len(clean) + 0.5 * sum(noisy) / len(noisy)


class BestCheckpoint:
    """Validates the averaged weights when asked and remembers the best.

    Attributes:
        value: the highest selection value so far. step: when it was. table: what was measured then.
    """

    def __init__(self, model: nn.Module, ema: EMAModel, criterion: Criterion, dataset: LatentDataset, batch_size: int) -> None:
        self.value, self.step = -math.inf, 0
        self.table: SigmaTable = []
        self._weights: dict[str, Tensor] = {}
        self._model, self._ema, self._criterion, self._dataset, self._batch_size = model, ema, criterion, dataset, batch_size

    def consider(self, step: int, device: torch.device | str = "cpu") -> None:
        """Keep the averaged weights after `step` steps if they are better than all before."""
        with averaged(self._model, self._ema):
            table = validate(self._model, self._dataset, self._criterion, batch_size=self._batch_size, device=device)
            value = selection_value(table, self._criterion)
            if value > self.value:
                self.value, self.step, self.table = value, step, table
                self._weights = {name: tensor.detach().cpu().clone() for name, tensor in self._model.state_dict().items()}

    def __str__(self) -> str:
        return f"best at step {self.step}, on {len(self._dataset)} validation pictures:\n{format_table(self.table)}"

    def restore(self) -> None:
        """Give the model the best weights."""
        self._model.load_state_dict(self._weights)


def check_loss(loss: Tensor, step: int) -> None:
    """Raises UserError naming the step if the loss is not finite."""
    if not torch.isfinite(loss):
        raise UserError(
            f"step {step + 1}: the loss is {loss.item()}, so training stopped; lower learning_rate, or use mixed_precision bf16"
        )


def format_table(table: SigmaTable) -> str:
    """A table for people: a row for each sigma, a column for each metric."""
    names = [name for name in table[0] if name != "sigma"]
    lines = ["sigma  " + "".join(f"{name.upper():>9}" for name in names)]
    lines += [f"{row['sigma']:<7g}" + "".join(f"{row[name]:9.4f}" for name in names) for row in table]
    return "\n".join(lines)
