"""The settings of train_latent_scorer.py, one dataclass per concern.

Those of buckets, cached variants and augmentation live with their code; those of a mixture of datasets in
`library.scorer_training.dataset_config`.
"""

import ast
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from library.errors import UserError
from library.scorer_training.criteria.registry import CRITERIA, PRETRAINING_CRITERIA
from library.scorer_training.dataset_config import Dataset, Subset, read_dataset_config
from library.settings.options import check_above, check_at_least, key_value_pairs, option
from library.settings.shared import OptimizerConfig

BALANCING = ("sum", "uncertainty", "independent")
INDEPENDENT_OPTIMIZER, INDEPENDENT_LEARNING_RATE = "Lion", 1e-4
SUMMED_OPTIMIZER, SUMMED_LEARNING_RATE = "AdamW", 1e-3


@dataclass(frozen=True, kw_only=True)
class VaeConfig:
    """Whose latents the scorer reads."""

    pretrained_model_name_or_path: str = option("", help="Checkpoint file or diffusers folder; only its VAE, but for unet_encoder.")
    vae: Path | None = option(None, help="VAE file or folder to use in place of the model's own; enough by itself.")
    model_family: str = option("auto", choices=("auto", "sd1", "sd2", "sdxl"), help="Kind of model; needed for a file with only a VAE.")

    def __post_init__(self) -> None:
        if self.vae is None and not self.pretrained_model_name_or_path:
            raise UserError("pretrained_model_name_or_path is not set; give a model, or its VAE by vae")

    @property
    def path(self) -> Path:
        return self.vae or Path(self.pretrained_model_name_or_path)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The rated pictures: one file or folder, or a mixture."""

    train_data_file: Path | None = option(None, help="Rated pictures: a table with path and score, or any source of docs/datasets.md.")
    data_reader: str = option("auto", help="Reader of train_data_file; auto tells by its ending or its folders. See docs/datasets.md.")
    image_dir: Path | None = option(None, help="What the paths in the file are relative to; not set: the file's own folder.")
    criterion: str = option("mse", choices=CRITERIA, help="What is learned from train_data_file, and how. See docs/criteria.md.")
    score_column: str = option("", help="Column to take as the score, such as year; not set: score.")
    target_class: str = option("", help="Class or tag whose log odds are the score, for classification and tags.")
    dataset_config: Path | None = option(None, help="A dataset.toml that mixes several sources and criteria, in place of train_data_file.")
    score_head: str = option("", help="Name of the dataset whose head is the score; not set: the first.")
    validation_split: float = option(0.1, help="Share of the pictures kept for validation, chosen by a hash of their path.")
    cache_dir: Path | None = option(None, help="Folder of the latent cache; not set: output_dir/latent_cache.")
    vae_batch_size: int = option(8, help="Pictures encoded at a time.")
    use_npz_caches: bool = option(True, help="Take latents from sd-scripts' .npz files beside the pictures where they fit.")

    def __post_init__(self) -> None:
        if (self.train_data_file is None) == (self.dataset_config is None):
            raise UserError(
                "train_data_file and dataset_config are both set; leave one out"
                if self.train_data_file
                else "train_data_file is not set; give a table with the columns path and score, or a mixture by dataset_config"
            )
        if not 0 < self.validation_split < 1:
            raise UserError(f"validation_split is {self.validation_split}, but it must be above 0 and below 1, such as 0.1")
        check_at_least(self, 1, "vae_batch_size")

    def datasets(self) -> tuple[Dataset, ...]:
        """What is to be learned, the score's own first. Raises UserError when dataset_config is not as it must be."""
        if self.dataset_config is None:
            assert self.train_data_file is not None
            options = {"score_column": self.score_column} if self.score_column else {}
            subset = Subset(path=self.train_data_file, reader=self.data_reader, image_dir=self.image_dir, reader_options=options)
            return (Dataset(name="score", criterion=self.criterion, subsets=(subset,), target_class=self.target_class),)
        datasets = read_dataset_config(self.dataset_config)
        for dataset in datasets:
            if dataset.criterion not in CRITERIA:
                raise UserError(f"dataset {dataset.name}: criterion {dataset.criterion} gives no score; it is for pretrain_dataset_config")
        names = [dataset.name for dataset in datasets]
        if self.score_head and self.score_head not in names:
            raise UserError(f"score_head is {self.score_head!r}, but {self.dataset_config} has {', '.join(names)}")
        return tuple(sorted(datasets, key=lambda dataset: dataset.name != self.score_head)) if self.score_head else datasets


@dataclass(frozen=True, kw_only=True)
class ScorerConfig:
    """The network."""

    scorer_kind: str = option("latent_resnet", help="Kind of scorer; docs/guide.md says which to take.")
    scorer_size: str = option(
        "base", help="Its size or model name; of latent_resnet, tiny for 8x8 latents and a CPU, base from 512 pixels."
    )
    scorer_args: tuple[str, ...] = option((), help='Settings of the kind, "key=value" each, e.g. dropout=0.1 or tuning=lora.')
    backbone_weights: Path | None = option(None, help="Backbone or scorer file to start from; the heads start anew.")
    head_members: int = option(1, help="Heads side by side, each trained on its own reweighting of the pictures, for uncertainty.")
    head_hidden: int = option(0, help="Width of a hidden layer in each head; 0 for a linear one.")

    def __post_init__(self) -> None:
        check_at_least(self, 1, "head_members")
        check_at_least(self, 0, "head_hidden")
        key_value_pairs("scorer_args", self.scorer_args)

    @property
    def backbone_options(self) -> dict[str, Any]:
        """`scorer_args` with values as Python literals where they are such, else as text."""
        return {key: _literal(text) for key, text in key_value_pairs("scorer_args", self.scorer_args).items()}


@dataclass(frozen=True, kw_only=True)
class PretrainingConfig:
    """Teaching the backbone something else first, for which there are many pictures; then the score, for which there are few ratings."""

    pretrain_data_file: Path | None = option(None, help="Pictures to pretrain on: as train_data_file; labels are learned by default.")
    pretrain_criterion: str = option("classification", choices=PRETRAINING_CRITERIA, help="What it teaches; masked needs no ratings.")
    pretrain_dataset_config: Path | None = option(None, help="A dataset.toml to pretrain on, in place of pretrain_data_file.")
    pretrain_steps: int = option(2000, help="Steps of pretraining.")
    pretrain_learning_rate: float | None = option(None, help="Its learning rate; not set: the default of its optimizer.")

    def __post_init__(self) -> None:
        if self.pretrain_data_file is not None and self.pretrain_dataset_config is not None:
            raise UserError("pretrain_data_file and pretrain_dataset_config are both set; leave one out")
        check_at_least(self, 1, "pretrain_steps")
        check_above(self, 0, "pretrain_learning_rate")

    def datasets(self) -> tuple[Dataset, ...]:
        """What is learned first; nothing if there is no pretraining."""
        if self.pretrain_dataset_config is not None:
            return read_dataset_config(self.pretrain_dataset_config)
        if self.pretrain_data_file is None:
            return ()
        return (Dataset(name="pretraining", criterion=self.pretrain_criterion, subsets=(Subset(path=self.pretrain_data_file),)),)


@dataclass(frozen=True, kw_only=True)
class ScorerTrainingConfig:
    """The optimisation."""

    max_train_steps: int = option(2000, help="Number of optimizer steps.")
    train_batch_size: int = option(64, help="Pictures in a batch, on each device, shared out among the datasets by their proportions.")
    balancing: str = option(
        "sum",
        choices=BALANCING,
        help="How datasets share the backbone: sum of losses by weight, learned uncertainty weights, or independent optimizers, one each.",
    )
    optimizer_type: str = option("", help="As in train_leco_score.py; not set: AdamW, or Lion where balancing is independent.")
    optimizer_args: tuple[str, ...] = option((), help='Arguments of the optimizer, "key=value" each.')
    learning_rate: float | None = option(None, help="Highest learning rate; not set: 1e-3, or 1e-4 where balancing is independent.")
    lr_scheduler: str = option("cosine", help="Schedule of the learning rate after its warmup.")
    lr_warmup_steps: float = option(100, help="Steps over which the learning rate rises from 0; below 1, a share of all steps.")
    layer_lr_decay: float = option(1.0, help="Factor of the learning rate from each layer of the backbone to the one before it; try 0.7.")
    freeze_backbone_steps: int = option(0, help="Train only the heads for this many steps first.")
    weight_decay: float = option(0.05, help="Weight decay, for optimizers that have one; norms and biases have none.")
    max_grad_norm: float = option(1.0, help="Gradients are scaled down to this norm; 0 leaves them alone.")
    ema_decay: float = option(0.999, help="The scorer is this exponential average of the weights over the steps.")
    clean_fraction: float = option(0.25, help="Share of clean latents; the others are at uniform timesteps. 1: a noise-blind scorer.")
    mixup_alpha: float = option(0.0, help="Mix pictures and their targets by Beta(alpha, alpha), where the criterion allows; 0 does not.")
    validate_every_n_steps: int = option(200, help="How often the average is validated; the best one is kept.")
    max_validation_pictures: int = option(5000, help="Most pictures of a dataset to validate with, chosen at random.")
    gradient_checkpointing: bool = option(False, help="Compute activations twice, which saves memory and costs time; for the large kinds.")
    mixed_precision: str = option("no", choices=("no", "fp16", "bf16"), help="Precision that the scorer computes in; no is float32.")
    seed: int = option(0, help="Seed of every random draw of the run.")
    num_threads: int | None = option(None, help="CPU threads for torch; not set: the cores that this process may use.")

    def __post_init__(self) -> None:
        check_at_least(self, 1, "max_train_steps", "train_batch_size", "validate_every_n_steps", "num_threads")
        check_at_least(self, 2, "max_validation_pictures")
        check_at_least(self, 0, "lr_warmup_steps", "weight_decay", "max_grad_norm", "seed", "freeze_backbone_steps", "mixup_alpha")
        check_above(self, 0, "learning_rate", "layer_lr_decay")
        for name in ("ema_decay", "clean_fraction", "layer_lr_decay"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{name} is {getattr(self, name)}, but it must be between 0 and 1")

    def optimizer_config(self, learning_rate: float | None = None) -> OptimizerConfig:
        """For `library.training.optimizers`. Raises UserError for settings that no optimizer can have."""
        independent = self.balancing == "independent"
        default = INDEPENDENT_LEARNING_RATE if independent else SUMMED_LEARNING_RATE
        return OptimizerConfig(
            optimizer_type=self.optimizer_type or (INDEPENDENT_OPTIMIZER if independent else SUMMED_OPTIMIZER),
            optimizer_args=self.optimizer_args,
            learning_rate=learning_rate or self.learning_rate or default,
            lr_scheduler=self.lr_scheduler,
            lr_warmup_steps=self.lr_warmup_steps,
        )


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


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
