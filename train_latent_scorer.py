"""Train a latent scorer: rated pictures in, one .safetensors that scores latents at any noise level out.

Pictures are encoded by the VAE once, into a cache on disk. The scorer learns from noisy latents, so that it can judge a picture in the
making. It can learn scores, votes, classes, tags and preferences, several of them at once, and its backbone can be taught something
else before. Saved is the average of the weights over the steps, from where it did best on pictures that training never saw, with a
table of how well it does at each noise level.

    python train_latent_scorer.py --pretrained_model_name_or_path sd15.safetensors --train_data_file ratings.csv --output_dir out
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import logging
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library.settings.start_up import before_torch

if __name__ == "__main__":
    before_torch()

import torch

from library.models.vae import VaeFingerprint, decode_pictures
from library.scorer_training.closed_form import fit_head, fits_head
from library.scorer_training.config import LatentScorerConfig
from library.scorer_training.folds import choose_steps
from library.scorer_training.run import PretrainingScorer, ScorerRun
from library.scorer_training.setup import make_backbone, make_prompt_encoder, make_source
from library.scorer_training.stages import Chosen, Stage
from library.scorer_training.tasks import Task, load_tasks
from library.scorer_training.trainer import ScorerFiles, ScorerTrainer
from library.scorers.base import BackboneScorer, ScorerSpec
from library.scorers.io import load_backbone_weights, save_backbone
from library.scorers.worth import worth_of
from library.settings.cli import parse_config, run_main
from library.settings.options import settings_as_text
from library.settings.shared import TrainingConfig
from library.training.interrupts import interruptible
from library.training.optimizers import check_optimizer
from library.training.run_state import SETTINGS
from library.training.runtime import create_accelerator, describe_device, set_num_threads
from library.training.tracking import Tracker, check_trackers

if TYPE_CHECKING:
    from accelerate import Accelerator

    from library.settings.shared import OptimizerConfig

logger = logging.getLogger("train_latent_scorer")


def train(config: LatentScorerConfig) -> Path:
    """Run the whole training and return the path of the scorer.

    Raises:
        UserError: bad input, too many losses that are not finite, another process that trains a scorer of this name.
        SystemExit: 130, 143 or 129 after Ctrl-C, SIGTERM or SIGHUP, when scorer and state are saved.
    """
    settings, output = config.training, config.output
    optimizer = settings.optimizer_config()
    check_optimizer(optimizer, settings.max_train_steps)
    check_trackers(config.logging)
    set_num_threads(settings.num_threads)
    torch.manual_seed(settings.seed)  # weights and dropout draw from the global generator; every other draw has a generator of its own
    files = ScorerFiles(output)
    files.check_outputs()
    files.uploads.check()
    accelerator = create_accelerator(TrainingConfig(mixed_precision=settings.mixed_precision))
    logger.info("%s", describe_device(accelerator))
    with files.only_run() if accelerator.is_main_process else nullcontext():
        return fit(config, optimizer, accelerator, files)


def fit(config: LatentScorerConfig, optimizer: OptimizerConfig, accelerator: Accelerator, files: ScorerFiles) -> Path:
    """Load everything, train, and write the scorer."""
    settings, output = config.training, config.output
    if accelerator.is_main_process:
        files.remove_unfinished()
    source = make_source(config.model, accelerator)
    tasks, pretraining_tasks = load_tasks(config, source, accelerator)
    if tasks[0].folds is not None and config.scorer.scorer_kind == "latent_resnet":
        few = "%d ratings are few; if they are of photographs, scorer_kind efficientnet_lite may learn more from them (docs/guide.md)"
        logger.info(few, len(tasks[0].train))
    backbone, architecture = make_backbone(
        config.scorer, source, tasks[0].train.latent_area, gradient_checkpointing=settings.gradient_checkpointing
    )
    spec = ScorerSpec(
        kind=config.scorer.scorer_kind,
        architecture=architecture,
        vae=VaeFingerprint.of(source.vae),
        heads=tuple(task.head for task in tasks),
        score_head=tasks[0].name,
        noise_aware=settings.clean_fraction < 1,
        uses_prompt=bool(architecture.get("use_prompt")),
    )
    if config.scorer.backbone_weights is not None:
        load_backbone_weights(config.scorer.backbone_weights, backbone, spec)
    encode_prompts = make_prompt_encoder(source, accelerator) if spec.uses_prompt else None
    vae = source.vae
    del source  # the rest of the model is not needed
    files.shared = shared_settings(config, spec, [*tasks, *pretraining_tasks], accelerator)
    resumed = files.load_state()

    def run_of(scorer: BackboneScorer, stage: Stage) -> ScorerRun:
        return ScorerRun(accelerator, settings, scorer, stage, encode_prompts)

    record: dict[str, Any] = {"settings": dataclasses.asdict(settings) | {"mixed_precision": accelerator.mixed_precision}}
    first_step = resumed[1].step if resumed else 0
    tracker = Tracker(
        config.logging,
        files.metrics_path,
        first_step=first_step,
        begin=files.keep_earlier,
        settings=record["settings"],
        enabled=accelerator.is_main_process,
    )
    with tracker, interruptible() as interrupts:
        trainer = ScorerTrainer(accelerator, tracker, files, interrupts)
        first_step = config.pretraining.steps if pretraining_tasks else 0
        if resumed and not resumed[1].pretraining:
            record |= resumed[1].record
        elif pretraining_tasks:
            names = [task.name for task in pretraining_tasks]
            pretrained = dataclasses.replace(spec, heads=tuple(task.head for task in pretraining_tasks), score_head=names[0])
            stage = Stage("pretraining", pretraining_tasks, names, first_step, optimizer, pretraining=True)
            teaching = PretrainingScorer(pretrained, backbone, functools.partial(decode_pictures, vae))
            record["pretraining"] = trainer.fit(run_of(teaching, stage), record, resumed)
            resumed = None
            if accelerator.is_main_process:
                files.keep_earlier()
                save_backbone(files.backbone_path, backbone, dataclasses.replace(spec, training=record))
        if backbone.features_are_given:
            backbone.requires_grad_(False)
        scorer = BackboneScorer(spec, backbone)
        stage = Stage("training", tasks, [spec.score_head], settings.max_train_steps, optimizer, first_step)
        if fits_head(scorer, tasks):
            run = run_of(scorer, stage)
            record |= fit_head(run)
        else:
            if tasks[0].folds is not None and "folds" not in record:
                record["folds"] = choose_steps(run_of, scorer, stage, interrupts).to_dict()
            if "folds" in record:
                stage = dataclasses.replace(stage, chosen=Chosen.from_dict(record["folds"]))
            run = run_of(scorer, stage)
            record |= trainer.fit(run, record, resumed)
        path = files.save_scorer(run, record)
    logger.info("scorer saved to %s", path)
    if worth := worth_of(scorer.spec, output.output_name):
        logger.log(logging.WARNING if worth.doubtful else logging.INFO, "%s", worth)
    return path


def shared_settings(config: LatentScorerConfig, spec: ScorerSpec, tasks: Sequence[Task], accelerator: Accelerator) -> dict[str, Any]:
    """What a run that goes on from a state must have in common with it. The batch may be parted among other processes."""
    settings = config.training
    return {
        "seed": settings.seed,
        "mixed_precision": accelerator.mixed_precision,
        "optimizer_type": settings.optimizer_config().optimizer_type,
        "balancing": settings.balancing,
        "pictures in a step": settings.train_batch_size * settings.gradient_accumulation_steps * accelerator.num_processes,
        "scorer": f"{spec.kind} with hash {digest(spec.architecture)}",
        "VAE": digest(spec.vae.to_dict()),
        "ratings": {task.name: task.ratings for task in tasks},
        SETTINGS: settings_as_text(config, ("output", "logging", "cache_dir", "max_train_steps", "num_threads"))
        | {"learning_rate": f"{settings.optimizer_config().learning_rate}", "criterion": ", ".join(task.criterion.name for task in tasks)},
    }


def digest(values: object) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def main() -> None:
    train(parse_config(LatentScorerConfig, description=__doc__))


if __name__ == "__main__":
    run_main(main)
