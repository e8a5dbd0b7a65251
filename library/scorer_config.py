"""The settings of train_latent_scorer.py, one dataclass per concern; those of the buckets are in `library.scorer_data.buckets`."""

from dataclasses import dataclass
from pathlib import Path

from diffusers import AutoencoderKL

from library.config import check_above, check_at_least, option
from library.errors import UserError
from library.models.vae import VaeFingerprint
from library.scorer_losses import criteria_of
from library.scorers.base import ScorerSpec
from library.scorers.registry import preset_architecture


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

    def path(self, ending: str = "") -> Path:
        """Where the scorer goes, or with an ending to its name, a file beside it."""
        return self.output_dir / f"{self.output_name}{ending}.safetensors"


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
