"""Train a latent scorer: rated pictures in, one .safetensors that scores latents at any noise level out.

Pictures are encoded by the VAE once, into a cache on disk. The scorer learns from noisy latents, so that it can judge a picture that is
still being made. If a file with class labels is given, its backbone learns those first. What is saved is the average of the weights over
the steps, at the step where it did best on pictures that training never saw, with a table of how well it does at each noise level.

    python train_latent_scorer.py --pretrained_model_name_or_path sd15.safetensors --train_data_file ratings.csv --output_dir out

It trains one scorer on one score; it knows no pairs, votes or tags.
"""

import dataclasses
import functools
import logging
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers.optimization import get_cosine_schedule_with_warmup
from diffusers.training_utils import EMAModel
from torch import nn
from tqdm import tqdm

from library.checkpoints import weights_path
from library.cli import parse_config, run_main
from library.models.loading import load_vae
from library.models.vae import VaeFingerprint, encode_images
from library.noise_schedule import NoiseSchedule
from library.scorer_data.buckets import BucketConfig
from library.scorer_data.datasets import DataConfig, RatedData, load_rated_data
from library.scorer_data.latent_cache import open_cache
from library.scorer_losses import CRITERIA, score_scale
from library.scorer_training import (
    STANDARD_SCHEDULE,
    BestCheckpoint,
    Classifier,
    OutputConfig,
    PretrainingConfig,
    ScorerConfig,
    ScorerTrainingConfig,
    VaeConfig,
    add_noise,
    averaged,
    check_loss,
    check_writable,
    draw_sigmas,
    format_table,
    make_optimizer,
    make_spec,
    selection_value,
    validate,
)
from library.scorers.io import load_backbone_weights, save_backbone, save_scorer
from library.scorers.registry import build_scorer

logger = logging.getLogger("train_latent_scorer")


@dataclass(frozen=True, kw_only=True)
class Config:
    model: VaeConfig
    data: DataConfig
    buckets: BucketConfig
    scorer: ScorerConfig
    pretraining: PretrainingConfig
    training: ScorerTrainingConfig
    output: OutputConfig


def main() -> None:
    config = parse_config(Config, description=__doc__)
    assert config.data.train_data_file is not None  # DataConfig sees to it
    output_dir, name = config.output.output_dir, config.output.output_name
    check_writable(output_dir)
    accelerator = Accelerator(mixed_precision=config.training.mixed_precision)
    set_seed(config.training.seed)

    vae = load_vae(config.model.path, family=config.model.model_family).to(accelerator.device)
    fingerprint = VaeFingerprint.of(vae)
    with accelerator.main_process_first():  # the first process fills the cache and the others find it full
        cache = open_cache(config.data.cache_dir or output_dir / "latent_cache", fingerprint, config.buckets)
        encode = lambda pixels: encode_images(vae, pixels.to(accelerator.device))  # noqa: E731
        load = functools.partial(load_rated_data, config=config.data, buckets=config.buckets, cache=cache, encode=encode)
        ratings = load(config.data.train_data_file, "score")
        labels = load(config.pretraining.pretrain_data_file, "label") if config.pretraining.pretrain_data_file else None

    mean, std = score_scale(ratings.train.targets)
    spec = make_spec(config.scorer, vae, fingerprint, noise_aware=config.training.clean_fraction < 1, mean=mean, std=std)
    scorer = build_scorer(spec)
    logger.info("scorer %s with %.2f M parameters", spec.kind, sum(parameter.numel() for parameter in scorer.parameters()) / 1e6)
    if config.scorer.backbone_weights is not None:
        load_backbone_weights(config.scorer.backbone_weights, scorer.backbone, spec)

    record: dict[str, Any] = {"settings": dataclasses.asdict(config.training)}
    if labels is not None:
        classifier = Classifier(scorer.backbone, len(labels.classes))
        steps, learning_rate = config.pretraining.pretrain_steps, config.pretraining.pretrain_learning_rate
        record["pretraining"] = fit(accelerator, classifier, labels, "classification", 1.0, steps, learning_rate, config.training)
        if accelerator.is_main_process:
            save_backbone(output_dir / f"{name}-backbone.safetensors", scorer.backbone, dataclasses.replace(spec, training=record))

    steps, learning_rate = config.training.max_train_steps, config.training.learning_rate
    record |= fit(accelerator, scorer, ratings, config.scorer.criterion, std, steps, learning_rate, config.training)
    scorer.spec = dataclasses.replace(spec, training=record)
    if accelerator.is_main_process:
        save_scorer(weights_path(output_dir, name), scorer)
        logger.info("the scorer is %s", weights_path(output_dir, name))


def fit(
    accelerator: Accelerator,
    model: nn.Module,
    data: RatedData,
    criterion_name: str,
    std: float,
    steps: int,
    learning_rate: float,
    settings: ScorerTrainingConfig,
) -> dict[str, Any]:
    """Train a model of (latents, sigmas), leave it with its best averaged weights, and say how well it does."""
    criterion, schedule, device = CRITERIA[criterion_name], NoiseSchedule.from_config(STANDARD_SCHEDULE), accelerator.device
    generator = torch.Generator().manual_seed(settings.seed + accelerator.process_index)
    optimizer = make_optimizer(model, learning_rate, settings.weight_decay)
    lr_scheduler = get_cosine_schedule_with_warmup(optimizer, settings.lr_warmup_steps, steps)
    prepared, optimizer = accelerator.prepare(model, optimizer)
    ema = EMAModel(model.parameters(), decay=settings.ema_decay)
    best = BestCheckpoint()
    batches = data.train.endless(settings.train_batch_size, generator)

    model.train()
    progress = tqdm(range(1, steps + 1), desc=f"Training ({criterion_name})", unit="step", disable=not accelerator.is_main_process)
    for step in progress:
        batch = next(batches).to(device)
        sigmas = draw_sigmas(len(batch), settings.clean_fraction, schedule, generator).to(device)
        latents = add_noise(batch.latents, sigmas, generator)
        losses = criterion.loss(prepared(latents, sigmas), batch.targets, std)
        loss = (losses * batch.weights).sum() / settings.train_batch_size  # a picture counts the same in a bucket's small last batch
        check_loss(loss, step)

        accelerator.backward(loss)
        if settings.max_grad_norm > 0:
            accelerator.clip_grad_norm_(model.parameters(), settings.max_grad_norm)
        optimizer.step()
        lr_scheduler.step()
        optimizer.zero_grad()
        ema.step(model.parameters())

        if step % settings.validate_every_n_steps == 0 or step == steps:
            with averaged(model, ema):
                table = validate(model, data.validation, criterion, batch_size=settings.train_batch_size, device=device)
                best.consider(model, table, selection_value(table, criterion), step)
            progress.set_postfix({"loss": f"{loss.item():.3f}", f"best {criterion.selection}": f"{best.value:.3f}"})

    best.restore(model)
    accelerator.print(f"{criterion_name}: best at step {best.step} of {steps}, on {len(data.validation)} pictures not trained on")
    accelerator.print(format_table(best.table))
    pictures = {"train": len(data.train), "validation": len(data.validation)}
    return {"criterion": criterion_name, "pictures": pictures, "steps": steps, "best_step": best.step, "validation": best.table}


if __name__ == "__main__":
    run_main(main)
