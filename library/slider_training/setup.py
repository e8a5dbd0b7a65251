"""A slider's training from its settings to everything that the loop moves."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from library.measuring.judges import load_judges
from library.models.base import DiffusionModel
from library.models.config import ModelConfig
from library.objectives.anchors import AnchorConfig
from library.objectives.base import Term, Workbench
from library.objectives.image_pairs import ImagePairsConfig
from library.objectives.images import ImagesConfig
from library.objectives.leco import LecoConfig
from library.objectives.registry import ObjectiveConfig, TermConfigs, build_terms
from library.objectives.regression import RegressionConfig
from library.objectives.rewards import Reward, RewardConfig, load_reward
from library.objectives.score_config import ESTIMATORS, ScoreConfig
from library.prompts.buckets import with_aspect_buckets
from library.prompts.files import PromptOptions, load_prompts
from library.rollouts.belt import RolloutConfig
from library.rollouts.sampling_setup import fit_rollout
from library.settings.shared import LoggingConfig, NetworkConfig, OptimizerConfig, SavingConfig, TrainingConfig
from library.slider_training.check import CheckConfig
from library.slider_training.files import SliderFiles
from library.slider_training.monitor import Monitor, MonitorConfig
from library.slider_training.network import build_network
from library.text_free.image_prompts import TextFreeConfig, encoder_and_prompts
from library.training.runtime import check_writable, generator, weight_dtype
from networks.lora import LoRANetwork


@dataclass(frozen=True, kw_only=True)
class LecoScoreConfig:
    model: ModelConfig
    objective: ObjectiveConfig
    reward: RewardConfig
    score: ScoreConfig
    leco: LecoConfig
    image_pairs: ImagePairsConfig
    images: ImagesConfig
    anchors: AnchorConfig
    regression: RegressionConfig
    prompts: PromptOptions
    text_free: TextFreeConfig
    rollout: RolloutConfig
    network: NetworkConfig
    optimizer: OptimizerConfig
    training: TrainingConfig
    monitor: MonitorConfig
    check: CheckConfig
    saving: SavingConfig
    logging: LoggingConfig


@dataclass(frozen=True)
class SliderParts:
    """What a training works on.

    Attributes:
        workbench: what the terms work with.
        reward: what is scored; without goals if there is no score.
        terms: of the objective, each with its own batches.
        monitor: measures, warns, keeps the best step, calibrates.
        files: writes what the run leaves behind.
    """

    model: DiffusionModel
    network: LoRANetwork
    workbench: Workbench
    reward: Reward
    terms: list[Term]
    monitor: Monitor
    files: SliderFiles


def prepare(config: LecoScoreConfig, accelerator: Accelerator) -> SliderParts:
    """Load and build everything, in the order in which a user's mistake costs least. Raises UserError."""
    seed = config.training.seed
    file, eval_file = config.rollout.prompts_file, config.monitor.eval_prompts_file
    prompts = load_prompts(file, config.rollout.prompt_categories, config.prompts, generator(seed, "prompts")) if file else []
    eval_prompts = load_prompts(eval_file, None, config.prompts) if eval_file else prompts
    model = config.model.load(dtype=weight_dtype(config.training.mixed_precision), device=accelerator.device)
    model.prompt_weighting = config.prompts.prompt_weighting
    rollout = fit_rollout(config.rollout, model)
    size = rollout.size(model.spec.resolution)
    if config.prompts.enable_bucket:
        prompts = with_aspect_buckets(
            prompts,
            size,
            min_side=config.prompts.min_bucket_reso,
            max_side=config.prompts.max_bucket_reso,
            step=config.prompts.bucket_reso_steps,
        )
    reward = load_reward(
        config.reward,
        model.vae_fingerprint(),
        needs_noise_aware=ESTIMATORS[config.score.score_estimator](config.score).noisy,
        gradient_checkpointing=config.training.gradient_checkpointing,
    ).to(accelerator.device)
    judges = load_judges(config.monitor.judges, config.monitor.judge_scorers, training_files=config.reward.scorer, model=model)
    check_writable(config.saving.output_dir)

    model.set_attention(config.training.attention)
    network = build_network(
        config.network, model, generator(seed, "network"), gradient_checkpointing=config.training.gradient_checkpointing
    )
    if config.training.torch_compile:
        model.unet.compile()
    encoder, train_prompts = encoder_and_prompts(
        config.text_free, model, network, reward.scorers, prompts, generator(seed, "image_prompts")
    )
    eval_prompts = eval_prompts or train_prompts
    workbench = Workbench(
        model=model,
        network=network,
        encoder=encoder,
        generator=lambda name: generator(seed, name, accelerator.process_index),
        rollout=rollout,
    )
    configs = TermConfigs(
        score=config.score,
        leco=config.leco,
        image_pairs=config.image_pairs,
        images=config.images,
        anchors=config.anchors,
        regression=config.regression,
    )
    terms = build_terms(workbench, config.objective, configs, reward, train_prompts)
    encoder.encode_ahead(eval_prompts, size)
    if config.network.network_train_unet_only:
        model.free_text_encoders()
    monitor = Monitor(model, network, reward, eval_prompts, encoder, rollout, config.monitor, judges)
    files = SliderFiles(config.saving, config.network, model.spec, size, _training_metadata(config))
    return SliderParts(model, network, workbench, reward, terms, monitor, files)


def _training_metadata(config: LecoScoreConfig) -> dict[str, Any]:
    return {
        "learning_rate": config.optimizer.learning_rate,
        "unet_lr": config.optimizer.unet_lr,
        "text_encoder_lr": config.optimizer.text_encoder_lr,
        "lr_scheduler": config.optimizer.lr_scheduler,
        "optimizer": config.optimizer.optimizer_type,
        "max_train_steps": config.training.max_train_steps,
        "seed": config.training.seed,
        "mixed_precision": config.training.mixed_precision,
        "clip_skip": config.model.clip_skip,
        "leco_scorer": [Path(path).name for path in config.reward.scorer],
        "leco_score_estimator": config.score.score_estimator,
        "leco_preserve_weight": config.score.preserve_weight,
    }
