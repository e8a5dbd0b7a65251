"""A slider's training from its settings to everything that the loop moves."""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass, fields, make_dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from library.errors import UserError
from library.measuring.judges import load_judges
from library.models.base import DiffusionModel
from library.models.config import ModelConfig
from library.models.headers import latent_space
from library.models.hub import FILE_ENDINGS, find_model
from library.models.packed import pack_unet
from library.models.vae import move
from library.objectives.base import TERMS, Term, TrainingContext
from library.objectives.estimator import ESTIMATORS
from library.objectives.registry import ObjectiveConfig, build_terms, term_names
from library.objectives.regression import RegressionConfig
from library.objectives.reward_config import RewardConfig, load_reward
from library.objectives.terms.score import ScoreTerm
from library.prompts.files import PromptOptions, load_prompts, spread, with_aspect_buckets
from library.rollouts.base import ROLLOUTS
from library.rollouts.config import RolloutConfig
from library.rollouts.few_step import resolve_sampling
from library.scorers.io import check_scorer_fits, load_scorer
from library.scorers.pixel_decoder import check_decodes, load_tiny_autoencoder
from library.settings.options import settings_as_text
from library.settings.presets import PRESETS, MemoryConfig
from library.settings.shared import LoggingConfig, MetadataConfig, NetworkConfig, OptimizerConfig, SavingConfig, TrainingConfig
from library.slider_training.check import CheckConfig
from library.slider_training.files import SliderFiles, SliderState
from library.slider_training.monitor import Monitor
from library.slider_training.monitor_config import MonitorConfig
from library.slider_training.network import build_network, merge_base_weights
from library.slider_training.previews import PREVIEW_PROMPTS, Previews
from library.text_free.image_prompts import TextFreeConfig, encoder_and_prompts
from library.training.optimizers import check_optimizer
from library.training.run_files import RunFiles
from library.training.run_state import AUTO, SETTINGS, find_state
from library.training.runtime import any_process, generator, weight_dtype
from networks.lora import LoRANetwork

if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.getLogger(__name__)

OF_NO_WEIGHT = ("check", "saving", "metadata", "logging", "max_train_steps", "num_threads")
"""Concerns and settings in which a run may differ from the one that it goes on from without a word."""


@dataclass(frozen=True, kw_only=True)
class LecoScoreConfig:
    """The settings that every run has. `leco_score_config` adds those of the terms, the estimators and the rollouts."""

    model: ModelConfig
    objective: ObjectiveConfig
    reward: RewardConfig
    regression: RegressionConfig
    prompts: PromptOptions
    text_free: TextFreeConfig
    rollout: RolloutConfig
    network: NetworkConfig
    optimizer: OptimizerConfig
    training: TrainingConfig
    memory: MemoryConfig
    monitor: MonitorConfig
    check: CheckConfig
    saving: SavingConfig
    metadata: MetadataConfig
    logging: LoggingConfig

    @property
    def parts(self) -> dict[str, Any]:
        """Settings of the terms, estimators and rollouts that have some, by the part's name."""
        common = {field.name for field in fields(LecoScoreConfig)}
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name not in common}


def leco_score_config() -> type[LecoScoreConfig]:
    """The script's config: what every run has, and one concern for each registered term, estimator and rollout with settings."""
    parts = [(name, part.config_class) for table in (TERMS, ESTIMATORS, ROLLOUTS) for name, part in table.items() if part.config_class]
    return make_dataclass("LecoScoreConfig", parts, bases=(LecoScoreConfig,), frozen=True, kw_only=True)


@dataclass(frozen=True)
class SliderParts:
    """What a training works on.

    Attributes:
        context: what the terms work with.
        terms: of the objective by name, each with its own batches.
        monitor: measures, warns, keeps the best step, calibrates.
        previews: grids of pictures while it trains.
        files: writes what the run leaves behind.
        shared: what a run that goes on from a state must have in common with it: plain values.
    """

    model: DiffusionModel
    network: LoRANetwork
    context: TrainingContext
    terms: dict[str, Term]
    monitor: Monitor
    previews: Previews
    files: SliderFiles
    shared: dict[str, Any]


def decide_open(config: LecoScoreConfig, accelerator: Accelerator) -> LecoScoreConfig:
    """The settings with what they leave open: the state that `resume = auto` finds, and the seed, of that state or drawn anew."""
    from accelerate.utils import broadcast_object_list

    folder, seed = find_state(config.saving), config.training.seed
    if seed is None:
        if folder is not None:
            seed = SliderState.load(folder).shared.get("seed")
        if type(seed) is not int:
            (seed,) = broadcast_object_list([torch.Generator().seed() % 2**32])
        if accelerator.is_main_process:
            logger.info("seed %d: give it as seed to repeat this run", seed)
    return replace(config, training=replace(config.training, seed=seed), saving=replace(config.saving, resume=folder))


def check_files(config: LecoScoreConfig) -> None:
    """Refuse at once what a look at the disk refuses: what checks the rest takes seconds to import. Raises UserError."""
    RunFiles(config.saving).check_outputs()
    name = str(config.model.pretrained_model_name_or_path)
    if name.endswith(FILE_ENDINGS):
        find_model(name)
    previews = config.monitor.sample_prompts if config.monitor.previews else None
    for file in (config.rollout.prompts_file, config.monitor.eval_prompts_file, previews):
        if file and not Path(file).expanduser().exists():
            load_prompts(file, config.prompts)  # says what is wrong
    leco_file = config.parts["leco"].leco_prompts_file or config.rollout.prompts_file
    anchored = bool(config.parts["anchors"].anchor_prompts_file)
    term_names(config.objective, scored=bool(config.reward.scorer), leco_file=leco_file, anchored=anchored)
    for path in config.reward.scorer:
        if not Path(path).expanduser().is_file():
            load_scorer(path)
    resume = config.saving.resume
    if resume is not None and resume != AUTO and not config.saving.resume_from_huggingface and not resume.is_dir():
        SliderState.load(resume)


def prepare(config: LecoScoreConfig, accelerator: Accelerator, model: DiffusionModel | None = None) -> SliderParts:
    """Load and build everything, in the order in which a user's mistake costs least. Raises UserError.

    Args:
        model: as `load_base` would make it; None has it made.
    """
    files = RunFiles(config.saving)
    files.check_outputs()
    files.uploads.check()
    check_optimizer(config.optimizer, config.training.max_train_steps)
    seed = config.training.seed
    assert seed is not None, "decide_open chooses one"
    file, eval_file = config.rollout.prompts_file, config.monitor.eval_prompts_file
    prompts = load_prompts(file, config.prompts, generator(seed, "prompts")) if file else []
    eval_prompts = load_prompts(eval_file, config.prompts) if eval_file else prompts
    sample_file = config.monitor.sample_prompts
    sample_prompts = load_prompts(sample_file, config.prompts) if sample_file and config.monitor.previews else []
    tiny_folder = config.monitor.preview_vae if config.monitor.previews else None
    preview_vae = None if tiny_folder is None else load_tiny_autoencoder(str(tiny_folder), "preview_vae", "nothing for the model's own")
    names, code = (config.monitor.judges, config.monitor.judge_scorers), config.reward.allow_code
    judges = load_judges(*names, training_files=config.reward.scorer, allow_code=code)
    reward = load_reward(
        config.reward,
        latent_space(config.model.pretrained_model_name_or_path) if model is None and config.model.vae is None else None,
        needs_noise_aware=ESTIMATORS[config.parts["score"].score_estimator].noisy,
        gradient_checkpointing=config.training.gradient_checkpointing,
    )
    model = model or load_base(config, accelerator)
    if preview_vae is not None:
        check_decodes(preview_vae, model.vae, f"preview_vae {tiny_folder}")
        move(preview_vae, accelerator.device)
    sampling = resolve_sampling(config.rollout, model)
    if config.prompts.enable_bucket:
        prompts = with_aspect_buckets(prompts, sampling.size)
    for scorer in reward.members:
        check_scorer_fits(scorer, model.vae_fingerprint())
    reward = reward.to(accelerator.device)
    for worth in reward.worth:
        logger.log(logging.WARNING if worth.doubtful else logging.INFO, "%s", worth)

    model.set_attention("xformers" if config.training.xformers else "sdpa")
    network = build_network(
        config.network, model, generator(seed, "network"), gradient_checkpointing=config.training.gradient_checkpointing
    )
    if config.training.torch_compile:
        logger.info("the U-Net is compiled in the first training steps, which take long; pictures are sampled without")
        model.compile()
    encoder, train_prompts = encoder_and_prompts(config.text_free, model, network, reward.scorers, prompts)
    eval_prompts = eval_prompts or train_prompts
    if not config.network.trains_text_encoders:
        encoder.encode_ahead(train_prompts, sampling.size)
        model.rest_text_encoders()  # while the terms start their trajectories
    context = TrainingContext(
        model=model,
        network=network,
        encoder=encoder,
        generator=lambda name: generator(seed, name, accelerator.process_index),
        rollout=config.rollout,
        sampling=sampling,
        reward=reward,
        prompts=train_prompts,
        min_snr_gamma=config.regression.min_snr_gamma,
        settings=config.parts,
    )
    terms = build_terms(context, config.objective)
    encoder.encode_ahead([*eval_prompts, *sample_prompts], sampling.size)
    if not config.network.trains_text_encoders and not encoder.encodes_late:
        model.free_text_encoders()
    monitor = Monitor(
        model,
        network,
        reward,
        eval_prompts,
        encoder,
        sampling,
        config.monitor,
        judges.on(model),
        num_steps=config.training.max_train_steps,
        agree=lambda wanted: any_process(wanted, accelerator),
    )
    previews = Previews(
        model=model,
        network=network,
        prompts=sample_prompts or spread(monitor.pictures.prompts, PREVIEW_PROMPTS),
        sampling=monitor.pictures.sampling,
        encoder=encoder,
        tiny=preview_vae,
    )
    if config.monitor.previews and not previews.prompts:
        raise UserError("there are no prompts to make previews of; give eval_prompts_file")
    if isinstance(score := terms.get("score"), ScoreTerm):
        monitor.follow(score)
    model.rest_vae()  # until something is measured
    scored = config.parts["score"]
    files = SliderFiles(
        config.saving,
        config.network,
        model.spec,
        sampling.size,
        _training_metadata(config, accelerator.mixed_precision),
        model=config.model,
        timesteps=(scored.min_timestep, scored.max_timestep - 1) if "score" in terms else None,
        modelspec=config.metadata.modelspec,
    )
    files.check_space(network, config.training.max_train_steps)
    return SliderParts(
        model, network, context, terms, monitor, previews, files, _shared_settings(config, context, accelerator.mixed_precision)
    )


def load_base(config: LecoScoreConfig, accelerator: Accelerator) -> DiffusionModel:
    """The model that is trained on, with `base_weights` in it, its U-Net's weights packed if that is wanted. Raises UserError."""
    memory, device = config.memory, accelerator.device
    if memory.preset is not None:
        listed = ", ".join(f"{name} = {value}" for name, value in PRESETS[memory.preset].items())
        logger.info("preset %s stands for %s, where you set nothing else", memory.preset, listed)
    # packed weights go to the device one by one: whole, they might not fit
    model = config.model.load(dtype=weight_dtype(accelerator.mixed_precision), device="cpu" if memory.packs else device)
    merge_base_weights(config.network, model)
    if memory.packs:
        blocks = pack_unet(model.unet, memory.quantize_base, memory.blocks_to_swap, device)
        model.to(device)
        logger.info("the U-Net's weights are kept in %s, those of %d blocks on the CPU", memory.quantize_base or model.dtype, blocks)
    return model


def _shared_settings(config: LecoScoreConfig, context: TrainingContext, precision: str) -> dict[str, Any]:
    return {
        "network_alpha": sorted({lora.alpha.item() for lora in context.network.loras}),  # which is in a state, with the weights
        "seed": config.training.seed,
        "pretrained_model_name_or_path": Path(config.model.pretrained_model_name_or_path).name,
        "mixed_precision": precision,
        "sampler": context.sampling.sampler,
        "max_denoising_steps": context.sampling.num_steps,
        "scorer": [f"{Path(path).name} {_digest(Path(path).expanduser().read_bytes())}" for path in config.reward.scorer],
        "prompts": f"{len(context.prompts)} with hash {_digest(repr(list(context.prompts)).encode())}",
        SETTINGS: settings_as_text(config, OF_NO_WEIGHT),
    }


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _training_metadata(config: LecoScoreConfig, precision: str) -> dict[str, Any]:
    score = config.parts["score"]
    return {
        "learning_rate": config.optimizer.learning_rate,
        "unet_lr": config.optimizer.unet_lr,
        "text_encoder_lr": config.optimizer.text_encoder_lr,
        "lr_scheduler": config.optimizer.lr_scheduler,
        "optimizer": config.optimizer.optimizer_type,
        "max_train_steps": config.training.max_train_steps,
        "seed": config.training.seed,
        "mixed_precision": precision,
        "clip_skip": config.model.clip_skip,
        "base_weights": [f"{file.name} {multiplier:g}" for file, multiplier in config.network.base_loras] or None,
        "leco_scorer": [Path(path).name for path in config.reward.scorer],
        "leco_score_estimator": score.score_estimator,
        "leco_preserve_weight": score.preserve_weight,
    }
