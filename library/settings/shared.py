"""The settings that several scripts share, one dataclass per concern, under the names that sd-scripts gave them.

The engine that fills them is in `library.settings.options`.
"""

import re
from dataclasses import dataclass, fields
from pathlib import Path

from library.errors import UserError
from library.settings.options import check_above, check_at_least, key_value_pairs, option
from library.settings.sd_scripts_keys import LOG_ARGS

HUB_ID = r"[\w-][\w.-]*/[\w-][\w.-]*"


def output_stem(name: str) -> str:
    """The name of a result, without the ending that some people give it. Raises UserError: it is no file name, or a hidden one."""
    stem = name.removesuffix(".safetensors")
    if not stem or stem != Path(stem).name or stem.startswith("."):
        raise UserError(f"output_name is {name!r}, but it must be a file name that does not begin with a dot; the folder is output_dir")
    return stem


@dataclass(frozen=True, kw_only=True)
class NetworkConfig:
    """The LoRA."""

    network_module: str = option(
        "networks.lora", help="Python module of the network: networks.lora, or one of your own that extends it.", expert=True
    )
    network_dim: int = option(8, help="Rank of the LoRA.", only_with={"dim_from_weights": (False,)})
    network_alpha: float = option(
        8.0, help="The LoRA's output is scaled with alpha / rank; 0 stands for the rank.", only_with={"dim_from_weights": (False,)}
    )
    network_dropout: float | None = option(None, help="Share of the rank's neurons dropped in each step, from 0 to below 1.", expert=True)
    network_args: tuple[str, ...] = option((), help='Settings of the network module, "key=value" each, e.g. conv_dim=4.')
    network_weights: Path | None = option(None, help="LoRA file to start from.")
    dim_from_weights: bool = option(False, help="Take rank and alpha of each layer from network_weights.", expert=True)
    network_train_unet_only: bool = option(True, help="Train the U-Net only; when off, the text encoders get a LoRA too.", expert=True)
    network_train_text_encoder_only: bool = option(
        False, help="Train the text encoders only; network_train_unet_only, which is on by default, is then off.", expert=True
    )
    base_weights: tuple[Path, ...] = option((), help="LoRA files that are merged into the model before training.", expert=True)
    base_weights_multiplier: tuple[float, ...] = option(
        (), help="Strength of each of base_weights; 1 where it is not given.", only_with="base_weights", expert=True
    )
    scale_weight_norms: float | None = option(None, help="Scale each LoRA weight down to this norm after every step; try 1.0.", expert=True)

    def __post_init__(self) -> None:
        check_at_least(self, 1, "network_dim")
        check_at_least(self, 0, "network_alpha", "network_dropout")
        check_above(self, 0, "scale_weight_norms")
        if self.network_dropout is not None and self.network_dropout >= 1:
            raise UserError(f"network_dropout is {self.network_dropout}, but it must be below 1")
        if self.dim_from_weights and self.network_weights is None:
            raise UserError("dim_from_weights is set without network_weights; name the LoRA file that the ranks are taken from")
        if self.base_weights and len(self.base_weights_multiplier) > len(self.base_weights):
            raise UserError(
                f"base_weights_multiplier has {len(self.base_weights_multiplier)} values for {len(self.base_weights)} files in "
                "base_weights; give one for each file"
            )
        key_value_pairs("network_args", self.network_args)

    @property
    def trains_text_encoders(self) -> bool:
        return self.network_train_text_encoder_only or not self.network_train_unet_only

    @property
    def base_loras(self) -> list[tuple[Path, float]]:
        """base_weights with their multipliers."""
        missing = len(self.base_weights) - len(self.base_weights_multiplier)
        return list(zip(self.base_weights, self.base_weights_multiplier + (1.0,) * missing, strict=False))

    @property
    def network_kwargs(self) -> dict[str, str]:
        """`network_args` as the text-valued keyword arguments that a network module's create_network takes."""
        return key_value_pairs("network_args", self.network_args)


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Optimizer, learning rates and their schedule: read by `library.training.optimizers`."""

    optimizer_type: str = option("AdamW", help="AdamW, AdamW8bit, Lion, Prodigy, Adafactor, AdamWScheduleFree, ..., or pkg.module.Class.")
    optimizer_args: tuple[str, ...] = option((), help='Arguments of the optimizer, "key=value" each, e.g. weight_decay=0.01.', expert=True)
    learning_rate: float = option(1e-4, help="Learning rate. About 1.0 for Prodigy and D-Adaptation.")
    unet_lr: float | None = option(None, help="Learning rate of the U-Net's LoRA, if not learning_rate.", expert=True)
    text_encoder_lr: float | None = option(
        None,
        help="Learning rate of the text encoders' LoRA, if not learning_rate.",
        only_with=({"network_train_unet_only": (False,)}, "network_train_text_encoder_only"),
        expert=True,
    )
    lr_scheduler: str = option(
        "constant",
        help="constant, constant_with_warmup, linear, cosine, cosine_with_restarts, polynomial, inverse_sqrt, cosine_with_min_lr, "
        "warmup_stable_decay, piecewise_constant, adafactor, a class of torch.optim.lr_scheduler, or pkg.module.Class.",
    )
    lr_scheduler_args: tuple[str, ...] = option((), help='Arguments of the schedule, "key=value" each, e.g. num_cycles=2.', expert=True)
    lr_warmup_steps: float = option(0, help="Steps over which the learning rate rises from 0; below 1, a share of all steps.", expert=True)
    max_grad_norm: float = option(1.0, help="Gradients are scaled down to this norm; 0 leaves them alone.", expert=True)

    def __post_init__(self) -> None:
        check_above(self, 0, "learning_rate")
        check_at_least(self, 0, "unet_lr", "text_encoder_lr", "lr_warmup_steps", "max_grad_norm")
        if self.lr_warmup_steps > 1 and not float(self.lr_warmup_steps).is_integer():
            raise UserError(f"lr_warmup_steps is {self.lr_warmup_steps}, but it must be a whole number of steps, or a share below 1")
        key_value_pairs("optimizer_args", self.optimizer_args)
        key_value_pairs("lr_scheduler_args", self.lr_scheduler_args)


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Length, precision, memory and randomness of a run."""

    max_train_steps: int = option(500, help="Number of optimizer steps.")
    gradient_accumulation_steps: int = option(1, help="Batches whose gradients are averaged for one optimizer step.", expert=True)
    gradient_checkpointing: bool = option(False, help="Compute activations twice, which saves memory and costs time.")
    mixed_precision: str | None = option(
        None,
        choices=("no", "fp16", "bf16"),
        help="Precision that the models compute in. no: float32. Not set: bf16 on a GPU that has it, else fp16; float32 on a CPU.",
    )
    xformers: bool = option(False, help="Use xformers' memory-efficient attention in place of torch's own.")
    torch_compile: bool = option(False, help="Compile the U-Net with torch.compile.", expert=True)
    seed: int | None = option(None, help="Seed of every random draw of the run; not set: another one each time, which the log names.")
    num_threads: int | None = option(None, help="CPU threads for torch; not set: the cores that this process may use.", expert=True)

    def __post_init__(self) -> None:
        check_at_least(self, 1, "max_train_steps", "gradient_accumulation_steps", "num_threads")
        check_at_least(self, 0, "seed")


@dataclass(frozen=True, kw_only=True)
class RunFilesConfig:
    """Where a training writes, how often, and the state that it goes on from."""

    output_dir: Path = option(Path("output"), help="Folder for everything that the run writes.")
    output_name: str = option("result", help="File name of the result, without its extension.")
    save_every_n_steps: int | None = option(None, help="Save every so many steps too; not set: at the end only.")
    save_last_n_steps: int | None = option(
        None, help="Delete files that save_every_n_steps wrote more than so many steps ago.", expert=True, only_with="save_every_n_steps"
    )
    save_last_n_steps_state: int | None = option(
        None, help="The same for the states that save_state wrote; not set: save_last_n_steps.", expert=True, only_with="save_state"
    )
    save_state: bool = option(False, help="Save the whole training state, for resume, beside every saved file.")
    save_state_on_train_end: bool = option(False, help="Save the training state at the end.", expert=True)
    resume: Path | None = option(
        None, help="Folder of a training state to go on from; auto: the newest whole one of this output_name, or none if there is none."
    )
    resume_with_changes: bool = option(
        False,
        help="Go on from a state though seed, data, scorers, sampler or model are not those that it was trained with.",
        expert=True,
        only_with="resume",
    )
    overwrite: bool = option(False, help="Write over files that an earlier run of this output_name left; else they are kept as NAME-1, ...")
    huggingface_repo_id: str | None = option(
        None, help="Repository on the Hugging Face hub, OWNER/NAME, that every saved file is put into; it is made if missing.", expert=True
    )
    huggingface_repo_type: str | None = option(
        None, choices=("model", "dataset", "space"), help="Its kind; not set: model.", expert=True, only_with="huggingface_repo_id"
    )
    huggingface_path_in_repo: str | None = option(
        None, help="Folder in it; not set: its top.", expert=True, only_with="huggingface_repo_id"
    )
    huggingface_repo_visibility: str | None = option(
        None,
        choices=("private", "public"),
        help="Who sees it, if it is made; not set: private.",
        expert=True,
        only_with="huggingface_repo_id",
    )
    huggingface_token: str | None = option(
        None,
        secret=True,
        help="Token for the hub; not set: HF_TOKEN, or that of `hf auth login`. Never printed or written.",
        expert=True,
        only_with=("huggingface_repo_id", "resume_from_huggingface"),
    )
    save_state_to_huggingface: bool = option(
        False, help="Put the states that save_state writes there, too.", expert=True, only_with="huggingface_repo_id"
    )
    async_upload: bool = option(False, help="Go on training while files are sent to the hub.", expert=True, only_with="huggingface_repo_id")
    resume_from_huggingface: bool = option(
        False, help="resume is a folder on the hub: OWNER/NAME/FOLDER, or OWNER/NAME/FOLDER:REVISION:TYPE.", expert=True, only_with="resume"
    )

    def __post_init__(self) -> None:
        check_at_least(self, 1, "save_every_n_steps", "save_last_n_steps")
        check_at_least(self, 0, "save_last_n_steps_state")
        object.__setattr__(self, "output_name", output_stem(self.output_name))
        if self.save_last_n_steps is not None and self.save_every_n_steps is None:
            raise UserError("save_last_n_steps is set without save_every_n_steps; say how often to save")
        if self.huggingface_repo_id is not None and not re.fullmatch(HUB_ID, self.huggingface_repo_id):
            raise UserError(f"huggingface_repo_id is {self.huggingface_repo_id!r}, but it must be OWNER/NAME")


@dataclass(frozen=True, kw_only=True)
class SavingConfig(RunFilesConfig):
    """What is written, where and when."""

    output_name: str = option("slider", help="File name of the result, without its extension.")
    save_precision: str = option("fp16", choices=("fp16", "bf16", "float"), help="Precision of the saved weights.", expert=True)
    initial_step: int | None = option(
        None,
        help="Count the updates from here, after those of an earlier run; with resume, in place of the state's own count.",
        expert=True,
    )
    no_metadata: bool = option(False, help="Leave out the metadata that is not needed to load the file.", expert=True)
    training_comment: str | None = option(None, help="A comment for the metadata.", expert=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self, 0, "initial_step")


@dataclass(frozen=True, kw_only=True)
class MetadataConfig:
    """What the LoRA file says of itself besides how it was made, as https://github.com/Stability-AI/ModelSpec has it."""

    metadata_title: str | None = option(None, help="Title; not set: output_name.", expert=True)
    metadata_author: str | None = option(None, help="Author.", expert=True)
    metadata_description: str | None = option(None, help="Description.", expert=True)
    metadata_license: str | None = option(None, help="Licence.", expert=True)
    metadata_tags: str | None = option(None, help="Tags, parted by commas.", expert=True)
    metadata_merged_from: str | None = option(None, help="What the model was merged from, parted by commas.", expert=True)

    @property
    def modelspec(self) -> dict[str, str]:
        """What is set, under ModelSpec's names without their prefix."""
        values = {field.name.removeprefix("metadata_"): getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if value is not None}


@dataclass(frozen=True, kw_only=True)
class LoggingConfig:
    """Where numbers and pictures go, besides the run's NAME.metrics.jsonl: read by `library.training.tracking`."""

    logging_dir: Path | None = option(
        None, help="Folder for TensorBoard and wandb; not set: output_dir/logs. Setting it turns TensorBoard on."
    )
    log_with: str | None = option(None, choices=("tensorboard", "wandb", "all"), help="Trackers to write to.")
    log_args: tuple[str, ...] = option(
        (),
        secret=True,
        help='Details of the trackers, "key=value" each; never printed or written. wandb: wandb_run_name, wandb_api_key, and '
        "log_tracker_name for the project; TensorBoard: log_prefix begins the folder's name, log_tracker_name is a folder in it.",
        only_with=("log_with", "logging_dir"),
        expert=True,
    )

    def __post_init__(self) -> None:
        for pair in self.log_args:
            if pair.partition("=")[0] not in LOG_ARGS or "=" not in pair:  # not shown: it may be the API key
                raise UserError(f'log_args has an entry that is not "key=value" with a key of {", ".join(LOG_ARGS)}')

    @property
    def details(self) -> dict[str, str]:
        return key_value_pairs("log_args", self.log_args)

    @property
    def trackers(self) -> frozenset[str]:
        """The trackers asked for, out of "tensorboard" and "wandb"; logging_dir alone stands for TensorBoard, as in sd-scripts."""
        if self.log_with is None:
            return frozenset() if self.logging_dir is None else frozenset({"tensorboard"})
        return frozenset({"tensorboard", "wandb"}) if self.log_with == "all" else frozenset({self.log_with})
