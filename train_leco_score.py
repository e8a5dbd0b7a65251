"""Train a slider LoRA from a score alone: weight +1 raises it, weight -1 lowers it.

    accelerate launch train_leco_score.py --config_file examples/shapes/slider.toml

Trajectories of the prompts are denoised with the LoRA on. At every step, the latents that the prediction leads to are scored, and
the LoRA learns to make that score higher where its multiplier is positive and lower where it is negative, while staying near the
frozen model. Independent judges watch; training stops when the slider is strong enough, or when the score is gamed, the best step is
kept, and the strength at which weight 1 does what `calibrate` says is folded into alpha. Words (LECO), pictures and pairs of pictures
can be learned from as well, alone or together with a score: `objective`.
"""

from __future__ import annotations

import logging
from contextlib import nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from library.settings.start_up import before_torch

if __name__ == "__main__":
    before_torch()

import torch

from library.atomic_files import expendable
from library.errors import UserError
from library.settings.cli import parse_config, run_main, setup_logging
from library.settings.sd_scripts_defaults import SD_SCRIPTS
from library.slider_training.check import check_reward
from library.slider_training.estimate import estimate
from library.slider_training.network import in_use
from library.slider_training.setup import LecoScoreConfig, SliderParts, check_files, decide_open, leco_score_config, prepare
from library.slider_training.updates import Updates
from library.slider_training.vital_signs import VitalSigns
from library.training.interrupts import Interrupted, interruptible
from library.training.optimizers import check_optimizer
from library.training.run_files import due
from library.training.runtime import any_process, create_accelerator, describe_device, set_num_threads
from library.training.tracking import Tracker, check_trackers

if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.getLogger("train_leco_score")
FLAT_OR_EXPLODING = 3  # exit code of check_reward


def train(config: LecoScoreConfig, *, dry_run: bool = False) -> Path:
    """Run the whole training and return the path of the slider.

    Args:
        dry_run: stop before the first step, so that whatever a run would refuse is refused, and nothing is trained or written.

    Raises:
        UserError: bad input, too many losses that are not finite, another process that trains a slider of this name.
        SystemExit: 130, 143 or 129 after Ctrl-C, SIGTERM or SIGHUP, when slider and state are saved; 3 from check_reward; 0 from estimate.
    """
    check_files(config)
    check_optimizer(config.optimizer, config.training.max_train_steps)
    check_trackers(config.logging)
    set_num_threads(config.training.num_threads)
    if config.check.estimate:
        print(estimate(config))
        raise SystemExit(0)
    accelerator = create_accelerator(config.training)
    logger.info("%s", describe_device(accelerator))
    config = decide_open(config, accelerator)
    assert config.training.seed is not None
    torch.manual_seed(config.training.seed)  # dropout draws from the global generator; every other draw has a generator of its own
    made = prepare(config, accelerator)
    if config.check.check_reward:
        if not made.monitor.pictures.prompts:
            raise UserError("check_reward looks at one prompt, and there is none; set prompts_file or eval_prompts_file")
        report = check_reward(made.context, made.terms, config.parts["score"], config.optimizer, made.monitor.pictures.prompts[0])
        print(report)
        raise SystemExit(0 if report.passed else FLAT_OR_EXPLODING)
    with made.files.only_run() if accelerator.is_main_process else nullcontext():
        return fit(config, accelerator, made, dry_run=dry_run)


def fit(config: LecoScoreConfig, accelerator: Accelerator, made: SliderParts, *, dry_run: bool = False) -> Path:
    """Train what `prepare` made, from the state that `resume` says, and write its files."""
    saving, monitor, files, is_main = config.saving, made.monitor, made.files, accelerator.is_main_process
    updates = Updates(config, accelerator, made)
    if is_main and not dry_run:
        files.remove_unfinished()
    updates.go_on_from(saving.resume)
    if dry_run:
        return files.slider_path

    num_steps, first_step, signs = updates.num_steps, updates.done, VitalSigns()
    using = partial(in_use, made.network, updates.optimizer)
    with Tracker(config.logging, files.metrics_path, first_step=first_step, begin=files.keep_earlier, enabled=is_main) as tracker:
        if config.monitor.sample_at_first and is_main:
            with using():
                tracker.image("preview", made.previews.write(saving.output_dir, saving.output_name, first_step), first_step)
        observed: dict[str, float] = {}
        stop = monitor.stop if updates.is_own_end else None  # it had stopped before max_train_steps, for this reason
        if not updates.resumed or not updates.watched:
            with using():
                seen = monitor.after(first_step) if updates.resumed else monitor.start()
                if seen is not None:
                    observed, stop = seen.record.metrics(), seen.stop
        shown = ("loss", "reward", "running_gain_at_+1", "running_gain_at_-1")
        progress = tracker.progress(num_steps, first_step, "training", shown)
        with interruptible() as interrupts:
            while stop is None and updates.done < num_steps:
                metrics, observed = observed | updates.make(), {}
                done = updates.done
                with using():
                    unwatched = updates.state(watched=False) if monitor.acts_after(done) else None
                    seen = None
                    if not any_process(bool(interrupts), accelerator):
                        with suppress(Interrupted), interrupts.at_once(accelerator.num_processes == 1):
                            seen = monitor.after(done)  # on every process, so that all stop together
                    metrics |= monitor.running_metrics()
                    if seen is not None:
                        metrics, stop = metrics | seen.record.metrics(), seen.stop
                    signs.update(tracker.log(metrics, done - 1), done)
                    if any_process(bool(interrupts), accelerator):
                        if is_main:
                            files.save_interrupted(made.network, unwatched or updates.state(watched=done < num_steps), done)
                        raise SystemExit(interrupts.exit_code)
                    if is_main and due(done, config.monitor.sample_every_n_steps):
                        with expendable(f"step {done}"):
                            tracker.image("preview", made.previews.write(saving.output_dir, saving.output_name, done), done - 1)
                    if is_main and due(done, saving.save_every_n_steps):
                        with expendable(f"step {done}"):
                            files.save(made.network, done)
                            if saving.save_state:
                                files.save_state(updates.state(), done)
                progress.update()
        if stop is not None:
            logger.info("training ends after step %d: %s; the best of the measured steps is looked for and kept", updates.done, stop)

    with using():
        if is_main:  # as trained: whatever the last measurements meet, it is on disk
            files.save(made.network, updates.done, final=True)
            if saving.save_state_on_train_end or saving.save_state:
                with expendable("the state at the end"):
                    files.save_state(updates.state(), updates.done, final=True)
        try:
            outcome = monitor.finish(updates.done)
        except KeyboardInterrupt:
            logger.warning("stopped while it was measured: %s is as trained, neither chosen nor calibrated", files.slider_path)
            raise
        if is_main:
            files.save(made.network, outcome.step, final=True, outcome=outcome)
            logger.info("slider saved to %s (after %d updates). %s", files.slider_path, outcome.step, outcome.conclusion)
    return files.slider_path


def main() -> None:
    setup_logging()
    sets = {"sd-scripts": SD_SCRIPTS}
    train(parse_config(leco_score_config(), description=__doc__, defaults=sets, check=partial(train, dry_run=True)))


if __name__ == "__main__":
    run_main(main)
