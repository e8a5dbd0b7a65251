"""Train a latent scorer: rated pictures in, one .safetensors that scores latents at any noise level out.

Pictures are encoded by the VAE once, into a cache on disk. The scorer learns from noisy latents, so that it can judge a picture in the
making. It can learn scores, votes, classes, tags and preferences, several of them at once, and its backbone can be taught something
else before. Saved is the average of the weights over the steps, from where it did best on pictures that training never saw, with a
table of how well it does at each noise level.

    python train_latent_scorer.py --pretrained_model_name_or_path sd15.safetensors --train_data_file ratings.csv --output_dir out
"""

from __future__ import annotations

import dataclasses
import logging
import os
import re
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch is imported: threads that wait must not take others' cores

import torch

from library.atomic_files import check_outputs, only_process, remove_unfinished
from library.models.vae import VaeFingerprint
from library.scorer_training.config import LatentScorerConfig
from library.scorer_training.setup import make_backbone, make_prompt_encoder, make_source
from library.scorer_training.tasks import Stage, load_tasks
from library.scorer_training.trainer import PretrainingScorer, ScorerTrainer
from library.scorers.base import BackboneScorer, ScorerSpec
from library.scorers.io import load_backbone_weights, save_backbone, save_scorer
from library.settings.cli import parse_config, run_main
from library.settings.shared import TrainingConfig
from library.training.interrupts import interruptible
from library.training.optimizers import check_optimizer
from library.training.runtime import any_process, create_accelerator, describe_device, set_num_threads
from library.training.tracking import METRICS_FILE, Tracker

if TYPE_CHECKING:
    from accelerate import Accelerator

    from library.settings.shared import OptimizerConfig

logger = logging.getLogger("train_latent_scorer")


def train(config: LatentScorerConfig) -> Path:
    """Run the whole training and return the path of the scorer.

    Raises:
        UserError: bad input, a loss that is not finite, another process that trains a scorer of this name.
        SystemExit: 130, 143 or 129 after Ctrl-C, SIGTERM or SIGHUP, when the best scorer so far is saved.
    """
    settings, output = config.training, config.output
    optimizer = settings.optimizer_config()
    check_optimizer(optimizer, settings.max_train_steps)
    set_num_threads(settings.num_threads)
    torch.manual_seed(settings.seed)  # weights and dropout draw from the global generator; every other draw has a generator of its own
    check_outputs(output.path(), output.path("-backbone"), output.output_dir / METRICS_FILE)
    accelerator = create_accelerator(TrainingConfig(mixed_precision=settings.mixed_precision))
    logger.info("%s", describe_device(accelerator))
    folder, name = output.output_dir, output.output_name
    with only_process(folder / f".{name}.lock", f"{name} in {folder} is trained") if accelerator.is_main_process else nullcontext():
        return fit(config, optimizer, accelerator)


def fit(config: LatentScorerConfig, optimizer: OptimizerConfig, accelerator: Accelerator) -> Path:
    """Load everything, train, and write the scorer."""
    settings, output = config.training, config.output
    if accelerator.is_main_process:
        remove_unfinished(output.output_dir, rf"{re.escape(output.output_name)}(-backbone)?\.safetensors")
    source = make_source(config.model, accelerator)
    tasks, pretraining_tasks = load_tasks(config, source, accelerator)
    backbone, architecture = make_backbone(config.scorer, source, gradient_checkpointing=settings.gradient_checkpointing)
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
    del source  # the rest of the model is not needed

    record: dict[str, Any] = {"settings": dataclasses.asdict(settings) | {"mixed_precision": accelerator.mixed_precision}}
    tracker = Tracker(config.logging, output.output_dir, settings=record["settings"], enabled=accelerator.is_main_process)
    with tracker, interruptible() as interrupts:
        trainer = ScorerTrainer(accelerator, settings, tracker, encode_prompts, interrupts)
        first_step = 0
        if pretraining_tasks:
            names = [task.name for task in pretraining_tasks]
            pretrained = dataclasses.replace(spec, heads=tuple(task.head for task in pretraining_tasks), score_head=names[0])
            first_step = config.pretraining.steps
            stage = Stage("pretraining", pretraining_tasks, names, first_step, optimizer)
            record["pretraining"] = trainer.fit(PretrainingScorer(pretrained, backbone), stage)
            if accelerator.is_main_process:
                save_backbone(output.path("-backbone"), backbone, dataclasses.replace(spec, training=record))
            if any_process(bool(interrupts), accelerator):
                logger.info("pretraining stopped early; its best backbone so far is %s, for --backbone_weights", output.path("-backbone"))
                raise SystemExit(interrupts.exit_code)
        scorer = BackboneScorer(spec, backbone)
        stage = Stage("training", tasks, [spec.score_head], settings.max_train_steps, optimizer, first_step)
        record |= trainer.fit(scorer, stage)
        mean, std = trainer.reference_scale(scorer, tasks[0])

    record["validation"] = record["validation_by_task"][spec.score_head]
    scorer.spec = dataclasses.replace(spec, mean=mean, std=std, training=record)
    if accelerator.is_main_process:
        save_scorer(output.path(), scorer)
        logger.info("scorer saved to %s", output.path())
    if record["steps"] < settings.max_train_steps and any_process(bool(interrupts), accelerator):
        logger.info("training stopped after step %d of %d; what is saved is the best until then", record["steps"], settings.max_train_steps)
        raise SystemExit(interrupts.exit_code)
    return output.path()


def main() -> None:
    train(parse_config(LatentScorerConfig, description=__doc__))


if __name__ == "__main__":
    run_main(main)
