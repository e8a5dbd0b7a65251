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
import os
from contextlib import nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch is imported: threads that wait must not take others' cores

import torch

from library.atomic_files import expendable
from library.errors import UserError
from library.objectives.base import mean_metrics
from library.rollouts.sample import model_autocast
from library.settings.cli import parse_config, run_main, setup_logging
from library.settings.sd_scripts_defaults import SD_SCRIPTS
from library.slider_training.check import check_reward
from library.slider_training.estimate import estimate
from library.slider_training.files import SliderState
from library.slider_training.monitor import due
from library.slider_training.network import in_use
from library.slider_training.setup import LecoScoreConfig, SliderParts, leco_score_config, prepare, settle
from library.slider_training.vital_signs import VitalSigns
from library.training.finite_losses import FiniteLosses, LastGood
from library.training.interrupts import Interrupted, interruptible
from library.training.optimizers import check_optimizer, create_optimizer, create_scheduler, optimizer_train_mode, restart_schedule
from library.training.runtime import all_reduce_grads, any_process, create_accelerator, describe_device, set_num_threads
from library.training.tracking import Tracker, check_trackers, to_floats
from library.types import LossOutput

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
    check_optimizer(config.optimizer, config.training.max_train_steps)
    check_trackers(config.logging)
    set_num_threads(config.training.num_threads)
    if config.check.estimate:
        print(estimate(config))
        raise SystemExit(0)
    accelerator = create_accelerator(config.training)
    logger.info("%s", describe_device(accelerator))
    config = settle(config, accelerator)
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
    saving, num_steps = config.saving, config.training.max_train_steps
    model, network, terms, monitor, files = made.model, made.network, made.terms, made.monitor, made.files
    groups, _ = network.prepare_optimizer_params(config.optimizer.text_encoder_lr, config.optimizer.unet_lr, config.optimizer.learning_rate)
    optimizer = accelerator.prepare(create_optimizer(config.optimizer, groups))
    scheduler = create_scheduler(config.optimizer, optimizer.optimizer, num_steps)

    parts: dict[str, Any] = {"network": network, "optimizer": optimizer.optimizer, "scheduler": scheduler, "monitor": monitor}
    if accelerator.scaler is not None:
        parts["scaler"] = accelerator.scaler
    if accelerator.is_main_process:  # whose trajectories a state holds; those of the other processes begin anew
        parts |= {f"term {name}": term for name, term in terms.items()}

    def state(step: int, *, watched: bool = True) -> SliderState:
        return SliderState.of(parts, step=step, unet_evaluations=unet_evaluations, watched=watched, shared=made.shared)

    first_step, watched = saving.initial_step or 0, True
    unet_evaluations = model.num_unet_evaluations  # those that started the trajectories
    if accelerator.is_main_process and not dry_run:
        files.remove_unfinished()
    folder = saving.resume
    if folder is not None:
        files.owns_names = True
        saved = SliderState.load(folder)
        saved.check_shared(made.shared, folder, with_changes=saving.resume_with_changes)
        saved.restore(parts, folder)
        optimizer_train_mode(optimizer.optimizer)
        restart_schedule(scheduler)
        unet_evaluations, watched = saved.unet_evaluations, saved.watched
        first_step = saved.step if saving.initial_step is None else saving.initial_step
    # one that died between its last step and its end goes on to that
    is_own_end = folder is not None and folder.absolute().parent == saving.output_dir.absolute() and not files.is_finished()
    if first_step > num_steps or (first_step == num_steps and watched and not is_own_end):
        begins = f"initial_step is {first_step}" if folder is None else f"{folder} was saved after step {first_step}"
        raise UserError(f"{begins} and max_train_steps is {num_steps}, so nothing is left to train; raise max_train_steps")
    done = first_step

    if dry_run:
        return files.slider_path
    losses, last_good = FiniteLosses(num_steps, [scorer.name for scorer in made.context.reward.scorers]), LastGood()
    signs = VitalSigns()
    with Tracker(config.logging, saving.output_dir, first_step=first_step, enabled=accelerator.is_main_process) as tracker:
        if config.monitor.sample_at_first and accelerator.is_main_process:
            with in_use(network, optimizer.optimizer):
                tracker.image("preview", made.previews.write(saving.output_dir, saving.output_name, first_step), first_step)
        start: dict[str, float] = {}
        stop = monitor.stop if is_own_end else None  # it had stopped before max_train_steps, for this reason
        if folder is None or not watched:
            with in_use(network, optimizer.optimizer):
                seen = monitor.start() if folder is None else monitor.after(first_step)
                if seen is not None:
                    start, stop = seen.record.metrics(), seen.stop
        shown = ("loss", "reward", "running_gain_at_+1", "running_gain_at_-1")
        progress = tracker.progress(num_steps, first_step, "training", shown)
        with interruptible() as interrupts:
            for step in range(first_step, num_steps if stop is None else first_step):
                outs: dict[str, list[LossOutput]] = {name: [] for name in terms}
                already_counted = model.num_unet_evaluations
                for _ in range(config.training.gradient_accumulation_steps):
                    for name, term in terms.items():  # each with its own backward pass, so that memory is that of the largest
                        with model_autocast(model):
                            out = term()
                        outs[name].append(out)
                        if losses.check(out, step, name):
                            accelerator.backward(out.loss * term.weight / config.training.gradient_accumulation_steps)
                        if not losses.all_finite(step):
                            term.renew_broken()
                unet_evaluations += model.num_unet_evaluations - already_counted
                all_reduce_grads(network.parameters(), accelerator)
                found = start | mean_metrics(terms, outs) | {"lr": scheduler.get_last_lr()[0], "unet_evaluations": unet_evaluations}
                usable = any(weight.grad is not None for weight in network.parameters())
                if config.optimizer.max_grad_norm and usable:
                    norm = accelerator.clip_grad_norm_(network.parameters(), config.optimizer.max_grad_norm)
                    found["grad_norm"] = torch.as_tensor(norm)
                metrics = to_floats(found)  # one wait for the device, for the numbers that are logged and whether the gradient is finite
                if "grad_norm" in metrics and accelerator.scaler is None:  # a scaler looks for itself: its scale must find infinity first
                    usable = losses.check_gradient(metrics["grad_norm"], step)
                if any_process(losses.too_many or (step + 1 == num_steps and losses.none_finite), accelerator):
                    raise losses.complaint(files.save_last_good(network, last_good) if accelerator.is_main_process else "")
                if usable:
                    if losses.all_finite(step):
                        last_good.keep(step, network)
                    optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
                if config.network.scale_weight_norms is not None:
                    network.apply_max_norm_regularization(config.network.scale_weight_norms)

                start, done = {}, step + 1
                with in_use(network, optimizer.optimizer):
                    unwatched = state(done, watched=False) if monitor.looks_after(done) else None
                    seen = None
                    if not any_process(bool(interrupts), accelerator):
                        with suppress(Interrupted), interrupts.at_once(accelerator.num_processes == 1):
                            seen = monitor.after(done)  # on every process, so that all stop together
                    metrics |= monitor.running_metrics()
                    if seen is not None:
                        metrics, stop = metrics | seen.record.metrics(), seen.stop
                    signs.see(tracker.log(metrics, step), done)
                    if any_process(bool(interrupts), accelerator):
                        if accelerator.is_main_process:
                            files.save_interrupted(network, unwatched or state(done, watched=done < num_steps), done)
                        raise SystemExit(interrupts.exit_code)
                    if accelerator.is_main_process:
                        if due(done, config.monitor.sample_every_n_steps):
                            with expendable(f"step {done}"):
                                tracker.image("preview", made.previews.write(saving.output_dir, saving.output_name, done), step)
                        if due(done, saving.save_every_n_steps):
                            with expendable(f"step {done}"):
                                files.save(network, done)
                                if saving.save_state:
                                    files.save_state(state(done), done)
                progress.update()
                if stop is not None:
                    break
        if stop is not None:
            logger.info("training ends after step %d: %s; the best of the measured steps is looked for and kept", done, stop)

    with in_use(network, optimizer.optimizer):
        if accelerator.is_main_process:  # as trained: whatever the last measurements meet, it is on disk
            files.save(network, done, final=True)
            if saving.save_state_on_train_end or saving.save_state:
                with expendable("the state at the end"):
                    files.save_state(state(done), done, final=True)
        outcome = monitor.finish(done)
        if accelerator.is_main_process:
            files.save(network, outcome.step, final=True, outcome=outcome)
            logger.info("slider saved to %s (after %d updates). %s", files.slider_path, outcome.step, outcome.verdict)
    return files.slider_path


def main() -> None:
    setup_logging()
    sets = {"sd-scripts": SD_SCRIPTS}
    train(parse_config(leco_score_config(), description=__doc__, defaults=sets, check=partial(train, dry_run=True)))


if __name__ == "__main__":
    run_main(main)
