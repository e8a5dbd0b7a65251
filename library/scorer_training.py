"""The parts of a scorer's training: noise, optimizer, averaging, validation at every noise level, the choice of the best."""

import contextlib
import math
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from library.config import check_above, check_at_least, option
from library.errors import UserError
from library.models.vae import VaeFingerprint
from library.noise_schedule import NoiseSchedule, per_sample, sigma_to_abar
from library.scorer_data.batches import LatentDataset
from library.scorer_losses import Criterion, criteria_of
from library.scorers.base import Backbone, ScorerSpec
from library.scorers.registry import preset_architecture

TABLE_SIGMAS = (0.0, 0.25, 0.5, 1.0, 2.0, 5.0, 10.0)
# The schedule that SD1, SD2 and SDXL share: sigma from 0.03 to 14.6.
STANDARD_SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
SigmaTable = list[dict[str, float]]  # a row for each of TABLE_SIGMAS: sigma, and the metrics by name


@dataclass(frozen=True, kw_only=True)
class VaeConfig:
    """Whose latents the scorer reads."""

    pretrained_model_name_or_path: str = option("", help="Checkpoint file or diffusers folder; only its VAE is used.")
    vae: Path | None = option(None, help="VAE file or folder to use in place of the model's own; enough by itself.")
    model_family: str = option("auto", choices=("auto", "sd1", "sd2", "sdxl"), help="Kind of model; needed for a file with only a VAE.")

    def __post_init__(self) -> None:
        if self.vae is None and not self.pretrained_model_name_or_path:
            raise UserError("pretrained_model_name_or_path is not set; give a model, or its VAE by vae")

    @property
    def path(self) -> Path:
        return self.vae or Path(self.pretrained_model_name_or_path)


@dataclass(frozen=True, kw_only=True)
class ScorerConfig:
    """The network."""

    scorer_kind: str = option("latent_resnet", help="Kind of scorer; see library/scorers/registry.py.")
    scorer_size: str = option("base", help="Its size: tiny for latents of 8x8 and a CPU, base for pictures of 512 pixels and more.")
    scorer_dropout: float = option(0.0, help="Share of the features dropped in training, from 0 to below 1.")
    criterion: str = option("mse", choices=criteria_of("score"), help="What is minimised; huber forgives single odd ratings.")
    backbone_weights: Path | None = option(None, help="Backbone or scorer file to start from; the head starts anew.")

    def __post_init__(self) -> None:
        if not 0 <= self.scorer_dropout < 1:
            raise UserError(f"scorer_dropout is {self.scorer_dropout}, but it must be at least 0 and below 1")


@dataclass(frozen=True, kw_only=True)
class PretrainingConfig:
    """Learning class labels first, which teaches a backbone to see when there are many labels and few ratings."""

    pretrain_data_file: Path | None = option(None, help="Labelled pictures: a file like train_data_file with path and label.")
    pretrain_steps: int = option(2000, help="Steps of pretraining, if there is a pretrain_data_file.")
    pretrain_learning_rate: float = option(1e-3, help="Its learning rate.")

    def __post_init__(self) -> None:
        check_at_least(self, 1, "pretrain_steps")
        check_above(self, 0, "pretrain_learning_rate")


@dataclass(frozen=True, kw_only=True)
class ScorerTrainingConfig:
    """The optimisation."""

    max_train_steps: int = option(2000, help="Number of optimizer steps.")
    train_batch_size: int = option(64, help="Pictures in a batch, on each device.")
    learning_rate: float = option(1e-3, help="Highest learning rate of AdamW; it falls to 0 as a cosine.")
    lr_warmup_steps: int = option(100, help="Steps over which the learning rate rises from 0.")
    weight_decay: float = option(0.05, help="AdamW's weight decay; norms and biases have none.")
    max_grad_norm: float = option(1.0, help="Gradients are scaled down to this norm; 0 leaves them alone.")
    ema_decay: float = option(0.999, help="The scorer is this exponential average of the weights over the steps.")
    clean_fraction: float = option(0.25, help="Share of clean latents; the others are at uniform timesteps. 1: a noise-blind scorer.")
    validate_every_n_steps: int = option(200, help="How often the average is validated; the best one is kept.")
    mixed_precision: str = option("no", choices=("no", "fp16", "bf16"), help="Precision that the scorer computes in; no is float32.")
    seed: int = option(0, help="Seed of every random draw of the run.")
    num_threads: int | None = option(None, help="CPU threads for torch; not set: the cores that this process may use.")

    def __post_init__(self) -> None:
        check_at_least(self, 1, "max_train_steps", "train_batch_size", "validate_every_n_steps", "num_threads")
        check_at_least(self, 0, "lr_warmup_steps", "weight_decay", "max_grad_norm", "seed")
        check_above(self, 0, "learning_rate")
        for name in ("ema_decay", "clean_fraction"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{name} is {getattr(self, name)}, but it must be between 0 and 1")


@dataclass(frozen=True, kw_only=True)
class OutputConfig:
    """What is written."""

    output_dir: Path = option(Path("output"), help="Folder for everything that the run writes.")
    output_name: str = option("scorer", help="File name of the scorer, without its extension.")

    def __post_init__(self) -> None:
        if not self.output_name or self.output_name != Path(self.output_name).name:
            raise UserError(f"output_name is {self.output_name!r}, but it must be a file name; the folder is output_dir")


class Classifier(nn.Module):
    """A backbone and a linear layer to classes: what pretraining trains. Latents [B, C, h, w] and sigmas [B] to logits [B, classes]."""

    def __init__(self, backbone: Backbone, num_classes: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(backbone.feature_width, num_classes)

    def forward(self, latents: Tensor, sigmas: Tensor) -> Tensor:
        return self.head(self.backbone(latents, sigmas))


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


def make_optimizer(model: nn.Module, learning_rate: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW that decays matrices and kernels, but not biases and the scales of norms, which are all vectors."""
    parameters = list(model.parameters())
    groups = [
        {"params": [parameter for parameter in parameters if parameter.ndim > 1], "weight_decay": weight_decay},
        {"params": [parameter for parameter in parameters if parameter.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=learning_rate)


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
    """The weights with the highest selection value so far, and the table that they had it with."""

    def __init__(self) -> None:
        self.value = -math.inf
        self.step = 0
        self.table: SigmaTable = []
        self._weights: dict[str, Tensor] = {}

    def consider(self, model: nn.Module, table: SigmaTable, value: float, step: int) -> None:
        if value > self.value:
            self.value, self.step, self.table = value, step, table
            self._weights = {name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()}

    def restore(self, model: nn.Module) -> None:
        model.load_state_dict(self._weights)


def make_spec(
    config: ScorerConfig, vae: AutoencoderKL, fingerprint: VaeFingerprint, *, noise_aware: bool, mean: float, std: float
) -> ScorerSpec:
    """What the scorer of a run is. Raises UserError when there is no such kind or size."""
    preset = preset_architecture(config.scorer_kind, config.scorer_size)
    return ScorerSpec(
        kind=config.scorer_kind,
        architecture={"in_channels": vae.config["latent_channels"], **preset, "dropout": config.scorer_dropout},
        vae=fingerprint,
        noise_aware=noise_aware,
        mean=mean,
        std=std,
    )


def check_writable(folder: Path) -> None:
    """Raises UserError if nothing can be written to the folder, before hours are spent on what is to go there. Makes the folder."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"nothing can be written to output_dir {folder} ({error.strerror}); choose another folder") from error


def check_loss(loss: Tensor, step: int) -> None:
    """Raises UserError naming the step if the loss is not finite."""
    if not torch.isfinite(loss):
        raise UserError(f"the loss of step {step} is {loss.item()}; lower learning_rate, or set mixed_precision to no or bf16")


def format_table(table: SigmaTable) -> str:
    """A table for people: a row for each sigma, a column for each metric."""
    names = [name for name in table[0] if name != "sigma"]
    lines = ["sigma  " + "".join(f"{name.upper():>9}" for name in names)]
    lines += [f"{row['sigma']:<7g}" + "".join(f"{row[name]:9.4f}" for name in names) for row in table]
    return "\n".join(lines)
