"""The settings of train_latent_scorer.py, one dataclass per concern; those of one part alone live with its code."""

import ast
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from library.errors import UserError
from library.models.registry import FAMILIES
from library.scorer_data.buckets import BucketConfig
from library.scorer_data.pixel_augmentation import PixelAugmentation
from library.scorer_training.dataset_config import DataConfig, PretrainingConfig
from library.scorers.base import SCORER_KINDS
from library.settings.options import check_above, check_at_least, key_value_pairs, option
from library.settings.shared import LoggingConfig, OptimizerConfig, RunFilesConfig

BALANCING = ("sum", "independent")
INDEPENDENT_OPTIMIZER, INDEPENDENT_LEARNING_RATE = "Lion", 1e-4
SUMMED_OPTIMIZER, SUMMED_LEARNING_RATE = "AdamW", 1e-3


@dataclass(frozen=True, kw_only=True)
class VaeConfig:
    """Whose latents the scorer reads."""

    pretrained_model_name_or_path: str | None = option(None, help="Checkpoint or diffusers folder; only its VAE but for unet_encoder.")
    vae: Path | None = option(None, help="VAE file or folder to use in place of the model's own; enough by itself.")
    model_family: str = option("auto", choices=("auto", *FAMILIES), help="Kind of model; needed for a file with only a VAE.")

    def __post_init__(self) -> None:
        if self.vae is None and self.pretrained_model_name_or_path is None:
            raise UserError("pretrained_model_name_or_path is not set; give a model, or its VAE by vae")

    @property
    def path(self) -> Path:
        return self.vae or Path(str(self.pretrained_model_name_or_path))


@dataclass(frozen=True, kw_only=True)
class ScorerConfig:
    """The network."""

    scorer_kind: str = option("latent_resnet", choices=SCORER_KINDS, help="Kind of scorer; docs/guide.md says which to take.")
    scorer_size: str | None = option(
        None, help="Its size or model name; not set: tiny for pictures of up to 128x128 pixels, small of up to 256x256, else base."
    )
    scorer_args: tuple[str, ...] = option((), help='Settings of the kind, "key=value" each, e.g. dropout=0.1 or tuning=lora.')
    backbone_weights: Path | None = option(None, help="Backbone or scorer file to start from; the heads start anew.")
    head_members: int = option(1, help="Heads side by side, each trained on its own reweighting of the pictures, for uncertainty.")

    def __post_init__(self) -> None:
        check_at_least(self, 1, "head_members")
        key_value_pairs("scorer_args", self.scorer_args)

    @property
    def backbone_options(self) -> dict[str, Any]:
        """`scorer_args` with values as Python literals where they are such, else as text."""
        return {key: _literal(text) for key, text in key_value_pairs("scorer_args", self.scorer_args).items()}


@dataclass(frozen=True, kw_only=True)
class ScorerTrainingConfig:
    """The optimisation."""

    max_train_steps: int = option(2000, help="Number of optimizer steps.")
    train_batch_size: int = option(64, help="Pictures in a batch, on each device, shared out among the datasets by their proportions.")
    gradient_accumulation_steps: int = option(
        1, help="Batches that are one large batch for one optimizer step; less memory than a larger train_batch_size.", expert=True
    )
    balancing: str = option(
        "sum",
        choices=BALANCING,
        help="How datasets share the backbone: by the sum of their losses, each times its weight, or by independent optimizers, one each.",
    )
    optimizer_type: str | None = option(None, help="As in train_leco_score.py; not set: AdamW, or Lion where balancing is independent.")
    optimizer_args: tuple[str, ...] = option((), help='Arguments of the optimizer, "key=value" each.', expert=True)
    learning_rate: float | None = option(None, help="Highest learning rate; not set: 1e-3, or 1e-4 where balancing is independent.")
    lr_scheduler: str = option("cosine", help="Schedule of the learning rate after its warmup.")
    lr_warmup_steps: float = option(
        100, help="Steps over which the learning rate rises from 0, a tenth of all steps at most; below 1, a share of all steps."
    )
    weight_decay: float = option(0.05, help="Weight decay, for optimizers that have one; norms and biases have none.", expert=True)
    max_grad_norm: float = option(1.0, help="Gradients are scaled down to this norm; 0 leaves them alone.", expert=True)
    ema_decay: float = option(0.999, help="The scorer is this exponential average of the weights over the steps.", expert=True)
    clean_fraction: float = option(
        0.25, help="Share of clean latents; the others are at uniform timesteps. 1: a noise-blind scorer.", expert=True
    )
    validate_every_n_steps: int = option(200, help="How often the average is validated; the best one is kept.")
    gradient_checkpointing: bool = option(False, help="Compute activations twice, which saves memory and costs time; for the large kinds.")
    mixed_precision: str | None = option(
        None,
        choices=("no", "fp16", "bf16"),
        help="Precision that the scorer computes in. no: float32. Not set: bf16 on a GPU that has it, else fp16; float32 on a CPU.",
    )
    seed: int = option(0, help="Seed of every random draw of the run.")
    num_threads: int | None = option(None, help="CPU threads for torch; not set: the cores that this process may use.", expert=True)

    def __post_init__(self) -> None:
        check_at_least(
            self, 1, "max_train_steps", "train_batch_size", "validate_every_n_steps", "num_threads", "gradient_accumulation_steps"
        )
        check_at_least(self, 0, "lr_warmup_steps", "weight_decay", "max_grad_norm", "seed")
        check_above(self, 0, "learning_rate")
        for name in ("ema_decay", "clean_fraction"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{name} is {getattr(self, name)}, but it must be between 0 and 1")

    def optimizer_config(self) -> OptimizerConfig:
        """For `library.training.optimizers`. Raises UserError for settings that no optimizer can have."""
        independent = self.balancing == "independent"
        default = INDEPENDENT_LEARNING_RATE if independent else SUMMED_LEARNING_RATE
        return OptimizerConfig(
            optimizer_type=self.optimizer_type or (INDEPENDENT_OPTIMIZER if independent else SUMMED_OPTIMIZER),
            optimizer_args=self.optimizer_args,
            learning_rate=self.learning_rate or default,
            lr_scheduler=self.lr_scheduler,
            lr_warmup_steps=self.lr_warmup_steps,
        )


@dataclass(frozen=True, kw_only=True)
class OutputConfig(RunFilesConfig):
    """What is written, and where a run goes on."""

    output_name: str = option("scorer", help="File name of the scorer, without its extension.")


@dataclass(frozen=True, kw_only=True)
class LatentScorerConfig:
    model: VaeConfig
    data: DataConfig
    buckets: BucketConfig
    variants: PixelAugmentation
    scorer: ScorerConfig
    pretraining: PretrainingConfig
    training: ScorerTrainingConfig
    output: OutputConfig
    logging: LoggingConfig

    @property
    def cache_dir(self) -> Path:
        return self.data.cache_dir or self.output.output_dir / "latent_cache"


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
