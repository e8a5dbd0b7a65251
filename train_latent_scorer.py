"""Train a latent scorer: rated pictures in, one .safetensors that scores latents at any noise level out.

Pictures are encoded by the VAE once, into a cache on disk. The scorer learns from noisy latents, so that it can judge a picture in the
making; given a file of class labels, its backbone learns those first. Saved is the average of the weights over the steps, from where
it did best on pictures that training never saw, with a table of how well it does at each noise level.

    python train_latent_scorer.py --pretrained_model_name_or_path sd15.safetensors --train_data_file ratings.csv --output_dir out

Left out: votes, pairs, tags, and several scores at once.
"""

import dataclasses
import functools
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from torch import nn

from library.cli import parse_config, run_main
from library.config import LoggingConfig, TrainingConfig
from library.models.loading import load_vae
from library.models.vae import VaeFingerprint, encode_images
from library.runtime import check_writable, create_accelerator, describe_device, generator, set_num_threads
from library.scorer_config import OutputConfig, PretrainingConfig, ScorerConfig, ScorerTrainingConfig, VaeConfig, make_spec
from library.scorer_data.buckets import BucketConfig
from library.scorer_data.datasets import DataConfig, load_rated_data
from library.scorer_data.latent_cache import open_cache
from library.scorer_losses import CRITERIA, score_scale
from library.scorer_training import (
    BestCheckpoint,
    Classifier,
    Stage,
    add_noise,
    check_loss,
    draw_sigmas,
    make_optimizer,
    standard_schedule,
)
from library.scorers.io import load_backbone_weights, save_backbone, save_scorer
from library.scorers.registry import build_scorer
from library.tracking import Tracker

logger = logging.getLogger("train_latent_scorer")


@dataclass(frozen=True, kw_only=True)
class LatentScorerConfig:
    model: VaeConfig
    data: DataConfig
    buckets: BucketConfig
    scorer: ScorerConfig
    pretraining: PretrainingConfig
    training: ScorerTrainingConfig
    output: OutputConfig
    logging: LoggingConfig


def train(config: LatentScorerConfig) -> Path:
    """Run the whole training and return the path of the scorer. Raises UserError for bad input and for a loss that is not finite."""
    settings, pretraining, output_dir = config.training, config.pretraining, config.output.output_dir
    assert config.data.train_data_file is not None  # DataConfig sees to it
    set_num_threads(settings.num_threads)
    torch.manual_seed(settings.seed)  # weights and dropout draw from the global generator; every other draw has a generator of its own
    check_writable(output_dir)
    accelerator = create_accelerator(TrainingConfig(mixed_precision=settings.mixed_precision))
    logger.info("%s", describe_device(accelerator))

    vae = load_vae(config.model.path, family=config.model.model_family).to(accelerator.device)
    fingerprint = VaeFingerprint.of(vae)
    with accelerator.main_process_first():  # the first process fills the cache and the others find it full
        cache = open_cache(config.data.cache_dir or output_dir / "latent_cache", fingerprint, config.buckets)
        encode = lambda pixels: encode_images(vae, pixels.to(accelerator.device))  # noqa: E731
        load = functools.partial(load_rated_data, config=config.data, buckets=config.buckets, cache=cache, encode=encode)
        ratings = load(config.data.train_data_file, "score")
        labels = load(pretraining.pretrain_data_file, "label") if pretraining.pretrain_data_file else None

    mean, std = score_scale(ratings.train.targets)
    spec = make_spec(config.scorer, vae, fingerprint, noise_aware=settings.clean_fraction < 1, mean=mean, std=std)
    scorer = build_scorer(spec)
    logger.info("scorer %s of %.2f M parameters", spec.kind, sum(parameter.numel() for parameter in scorer.parameters()) / 1e6)
    if config.scorer.backbone_weights is not None:
        load_backbone_weights(config.scorer.backbone_weights, scorer.backbone, spec)

    record: dict[str, Any] = {"settings": dataclasses.asdict(settings)}
    with Tracker(config.logging, output_dir, settings=record["settings"], enabled=accelerator.is_main_process) as tracker:
        if labels is not None:
            stage = Stage("classification", labels, pretraining.pretrain_steps, pretraining.pretrain_learning_rate)
            record["pretraining"] = fit(accelerator, Classifier(scorer.backbone, len(labels.classes)), stage, settings, tracker)
            if accelerator.is_main_process:
                save_backbone(config.output.path("-backbone"), scorer.backbone, dataclasses.replace(spec, training=record))
        first_step = pretraining.pretrain_steps if labels is not None else 0
        stage = Stage(config.scorer.criterion, ratings, settings.max_train_steps, settings.learning_rate, std, first_step)
        record |= fit(accelerator, scorer, stage, settings, tracker)

    scorer.spec = dataclasses.replace(spec, training=record)
    if accelerator.is_main_process:
        save_scorer(config.output.path(), scorer)
        logger.info("scorer saved to %s", config.output.path())
    return config.output.path()


def fit(accelerator: Accelerator, model: nn.Module, stage: Stage, settings: ScorerTrainingConfig, tracker: Tracker) -> dict[str, Any]:
    """Train a model of (latents, sigmas), leave it with its best averaged weights, and say how well it does."""
    criterion, schedule, device = CRITERIA[stage.criterion], standard_schedule(), accelerator.device
    rng = generator(settings.seed, stage.criterion, accelerator.process_index)
    optimizer, lr_scheduler = make_optimizer(model, stage.learning_rate, settings.weight_decay, settings.lr_warmup_steps, stage.steps)
    prepared, optimizer = accelerator.prepare(model, optimizer)
    ema = EMAModel(model.parameters(), decay=settings.ema_decay)
    best = BestCheckpoint(model, ema, criterion, stage.data.validation, settings.train_batch_size)
    batches = stage.data.train.endless(settings.train_batch_size, rng)

    model.train()
    progress = tracker.progress(stage.steps, 0, f"training ({stage.criterion})", ("loss", f"best_{criterion.selection}"))
    for step in range(stage.steps):
        batch = next(batches).to(device)
        sigmas = draw_sigmas(len(batch), settings.clean_fraction, schedule, rng).to(device)
        losses = criterion.loss(prepared(add_noise(batch.latents, sigmas, rng), sigmas), batch.targets, stage.std)
        loss = (losses * batch.weights).sum() / settings.train_batch_size  # a picture counts the same in a bucket's small last batch
        check_loss(loss, step)

        accelerator.backward(loss)
        if settings.max_grad_norm > 0:
            accelerator.clip_grad_norm_(model.parameters(), settings.max_grad_norm)
        optimizer.step()
        lr_scheduler.step()
        optimizer.zero_grad()
        ema.step(model.parameters())

        if (step + 1) % settings.validate_every_n_steps == 0 or step + 1 == stage.steps:
            best.consider(step + 1, device)
        metrics = {"loss": losses.mean().detach(), "lr": lr_scheduler.get_last_lr()[0], f"best_{criterion.selection}": best.value}
        tracker.log(metrics, stage.first_step + step)
        progress.update()
    progress.close()
    best.restore()
    accelerator.print(f"{stage.criterion}: {best}")
    return stage.describe() | {"best_step": best.step, "validation": best.table}


def main() -> None:
    train(parse_config(LatentScorerConfig, description=__doc__))


if __name__ == "__main__":
    run_main(main)
