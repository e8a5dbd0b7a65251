"""Train a slider LoRA from a score alone: weight +1 raises it, weight -1 lowers it.

    accelerate launch train_leco_score.py --config_file examples/shapes/slider.toml

Trajectories of the prompts are denoised with the LoRA on. At every step, the latents that the next step leads to are scored, and
the LoRA learns to make that score higher where its multiplier is positive and lower where it is negative, while staying near the
frozen model. It stops when the slider is strong enough, and the strength at which weight 1 does what `calibrate` says is folded
into alpha. Left out: captions, image pairs, and any gradient through more than one step.
"""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from library.checkpoints import load_state, restore_rng_state, rng_state
from library.cli import parse_config, run_main, setup_logging
from library.config import LoggingConfig, ModelConfig, NetworkConfig, OptimizerConfig, SavingConfig, TrainingConfig
from library.errors import UserError
from library.independent_judges import load_judges
from library.models.loading import load_model
from library.monitor import Monitor, MonitorConfig, due
from library.network_setup import build_network, in_use
from library.objectives.anchors import AnchorConfig
from library.objectives.base import Term, Workbench
from library.objectives.image_pairs import ImagePairsConfig
from library.objectives.images import ImagesConfig
from library.objectives.leco import LecoConfig
from library.objectives.registry import ObjectiveConfig, TermConfigs, build_terms
from library.objectives.regression import RegressionConfig
from library.objectives.score_config import ESTIMATORS, ScoreConfig
from library.optimizers import create_optimizer, create_scheduler, optimizer_train_mode
from library.prompt_buckets import with_aspect_buckets
from library.prompts import PromptOptions, load_prompts
from library.rewards import RewardConfig, load_reward
from library.rollout import RolloutConfig
from library.runtime import all_reduce_grads, check_writable, create_accelerator, describe_device, generator, set_num_threads, weight_dtype
from library.sampling import model_autocast
from library.sampling_setup import fit_rollout
from library.slider_files import SliderFiles, restore, states_of
from library.text_free.image_prompts import TextFreeConfig, encoder_and_prompts
from library.tracking import Tracker
from library.types import LossOutput

logger = logging.getLogger("train_leco_score")


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
    saving: SavingConfig
    logging: LoggingConfig


def train(config: LecoScoreConfig) -> Path:
    """Run the whole training and return the path of the slider. Raises UserError for bad input and for a loss that is not finite."""
    seed, saving = config.training.seed, config.saving
    set_num_threads(config.training.num_threads)
    torch.manual_seed(seed)  # dropout draws from the global generator; every other draw has a generator of its own
    file, eval_file = config.rollout.prompts_file, config.monitor.eval_prompts_file
    prompts = load_prompts(file, config.rollout.prompt_categories, config.prompts, generator(seed, "prompts")) if file else []
    eval_prompts = load_prompts(eval_file, None, config.prompts) if eval_file else prompts

    accelerator = create_accelerator(config.training)
    logger.info("%s", describe_device(accelerator))
    model = load_model(
        config.model.pretrained_model_name_or_path,
        family=config.model.family,
        v_parameterization=config.model.v_parameterization,
        vae=config.model.vae,
        clip_skip=config.model.clip_skip,
        dtype=weight_dtype(config.training.mixed_precision),
        device=accelerator.device,
    )
    model.prompt_weighting = config.prompts.prompt_weighting
    rollout = fit_rollout(config.rollout, model)
    if config.prompts.enable_bucket:
        prompts = with_aspect_buckets(
            prompts,
            rollout.size(model.spec.resolution),
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
    check_writable(saving.output_dir)
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
    encoder.encode_ahead(eval_prompts, rollout.size(model.spec.resolution))
    if config.network.network_train_unet_only:
        model.free_text_encoders()
    groups, _ = network.prepare_optimizer_params(config.optimizer.text_encoder_lr, config.optimizer.unet_lr, config.optimizer.learning_rate)
    optimizer = accelerator.prepare(create_optimizer(config.optimizer, groups))
    scheduler = create_scheduler(config.optimizer, optimizer.optimizer, config.training.max_train_steps)
    monitor = Monitor(model, network, reward, eval_prompts, encoder, rollout, config.monitor, judges)
    files = SliderFiles(saving, config.network, model.spec, rollout.size(model.spec.resolution), _training_metadata(config))

    parts: dict[str, Any] = {"network": network, "optimizer": optimizer.optimizer, "scheduler": scheduler, "monitor": monitor}
    if accelerator.scaler is not None:
        parts["scaler"] = accelerator.scaler
    if accelerator.is_main_process:  # whose trajectories a state holds; those of the other processes begin anew
        parts |= {f"term {term.name}": term for term in terms}

    def state(step: int) -> dict:
        return {"step": step, "unet_evaluations": unet_evaluations, "rng": rng_state(), "parts": states_of(parts)}

    first_step = done = unet_evaluations = 0
    if saving.resume is not None:
        saved = load_state(saving.resume)
        restore(parts, saved["parts"], saving.resume)
        optimizer_train_mode(optimizer.optimizer)
        restore_rng_state(saved["rng"])
        first_step, unet_evaluations = saved["step"], saved["unet_evaluations"]
        if first_step >= config.training.max_train_steps:
            raise UserError(
                f"{saving.resume} was saved after step {first_step} and max_train_steps is {config.training.max_train_steps}, so nothing "
                "is left to train; raise max_train_steps"
            )

    if accelerator.is_main_process:
        files.remove_unfinished()
    with Tracker(config.logging, saving.output_dir, first_step=first_step, enabled=accelerator.is_main_process) as tracker:
        if config.monitor.sample_at_first and accelerator.is_main_process:
            with in_use(network, optimizer.optimizer):
                tracker.image("preview", monitor.preview(saving.output_dir, saving.output_name, first_step), first_step)
        start: dict[str, float] = {}
        if first_step == 0 and monitor.observes_at(0):
            with in_use(network, optimizer.optimizer):
                start = monitor.observe(0).metrics()
        progress = tracker.progress(config.training.max_train_steps, first_step, "training", ("loss", "reward", "gain_at_+1", "gain_at_-1"))
        for step in range(first_step, config.training.max_train_steps):
            outs: dict[str, list[LossOutput]] = {term.name: [] for term in terms}
            for _ in range(config.training.gradient_accumulation_steps):
                for term in terms:  # each with its own backward pass, so that memory is that of the largest
                    with model_autocast(model):
                        out = term()
                    _check_finite(out, step)
                    accelerator.backward(out.loss * term.weight / config.training.gradient_accumulation_steps)
                    unet_evaluations += out.num_unet_evaluations
                    outs[term.name].append(out)
            all_reduce_grads(network.parameters(), accelerator)
            metrics = start | _mean_metrics(terms, outs) | {"lr": scheduler.get_last_lr()[0], "unet_evaluations": unet_evaluations}
            if config.optimizer.max_grad_norm:
                norm = accelerator.clip_grad_norm_(network.parameters(), config.optimizer.max_grad_norm)
                metrics["grad_norm"] = torch.as_tensor(norm)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            if config.network.scale_weight_norms is not None:
                network.apply_max_norm_regularization(config.network.scale_weight_norms)

            start, done, stop = {}, step + 1, None
            with in_use(network, optimizer.optimizer):
                if monitor.observes_at(done):
                    seen = monitor.observe(done)  # on every process, so that all stop together
                    metrics, stop = metrics | seen.metrics(), seen.stop
                if accelerator.is_main_process:
                    if due(done, config.monitor.sample_every_n_steps):
                        tracker.image("preview", monitor.preview(saving.output_dir, saving.output_name, done), step)
                    if due(done, saving.save_every_n_steps):
                        files.save(network, done)
                        if saving.save_state:
                            files.save_state(state(done), done)
            tracker.log(metrics, step)
            progress.update()
            if stop is not None:
                logger.info("%s; training stops", stop)
                break

    with in_use(network, optimizer.optimizer):
        if (saving.save_state_on_train_end or saving.save_state) and accelerator.is_main_process:
            files.save_state(state(done), done, final=True)
        kept, calibration = monitor.finish(done)
        if accelerator.is_main_process:
            files.save(network, kept, final=True, calibration=calibration)
            logger.info("slider saved to %s", files.slider_path)
    return files.slider_path


def _check_finite(out: LossOutput, step: int) -> None:
    bad = (~torch.isfinite(out.sample_losses)).nonzero().flatten().tolist()
    if bad:
        raise UserError(
            f"step {step + 1}: the loss of {out.samples[bad[0]]} is not finite, so training stopped and no slider was written; lower "
            "learning_rate, or use mixed_precision bf16 or no"
        )


def _mean_metrics(terms: list[Term], outs: dict[str, list[LossOutput]]) -> dict[str, float | Tensor]:
    """The loss and the metrics of one update, over its batches; with several terms a metric's name begins with its term's."""
    metrics, losses = {}, []
    for term in terms:
        prefix = f"{term.name}/" if len(terms) > 1 else ""
        own = outs[term.name]
        metrics |= {prefix + name: torch.stack([torch.as_tensor(out.metrics[name]) for out in own]).mean() for name in own[0].metrics}
        losses.append(torch.stack([out.loss.detach() for out in own]).mean())
        if prefix:
            metrics[f"{term.name}/loss"] = losses[-1]
    return {**metrics, "loss": torch.stack([term.weight * loss for term, loss in zip(terms, losses, strict=True)]).sum()}


def _training_metadata(config: LecoScoreConfig) -> dict:
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


def main() -> None:
    setup_logging()
    train(parse_config(LecoScoreConfig, description=__doc__))


if __name__ == "__main__":
    run_main(main)
