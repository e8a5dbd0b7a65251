"""The updates of a slider's run: what one does, and what a state holds of them."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from library.errors import UserError
from library.objectives.base import mean_metrics
from library.rollouts.sample import model_autocast
from library.slider_training.files import SliderState
from library.slider_training.setup import LecoScoreConfig, SliderParts
from library.training.finite_losses import FiniteLosses, LastGood
from library.training.optimizers import create_optimizer, create_scheduler, optimizer_train_mode, own_settings
from library.training.runtime import all_reduce_grads, any_process
from library.training.tracking import to_floats
from library.types import LossOutput

if TYPE_CHECKING:
    from accelerate import Accelerator


class Updates:
    """Makes one update after the other, and begins where a state says.

    Attributes:
        done: updates that were made, those before a resumed state included.
        resumed: whether a state was gone on from.
        watched: whether the monitor had looked at the network after the last update of that state.
        is_own_end: whether it is of this very run, which died before its files were finished and goes on to its end.
        unet_evaluations: rows through the U-Net for training and for starting its trajectories; one with gradient counts 3.
    """

    def __init__(self, config: LecoScoreConfig, accelerator: "Accelerator", made: SliderParts) -> None:
        self.config, self.accelerator, self.made = config, accelerator, made
        network, self.num_steps = made.network, config.training.max_train_steps
        rates = config.optimizer.text_encoder_lr, config.optimizer.unet_lr, config.optimizer.learning_rate
        groups, _ = network.prepare_optimizer_params(*rates)
        self._prepared = accelerator.prepare(create_optimizer(config.optimizer, groups))
        self.optimizer: torch.optim.Optimizer = self._prepared.optimizer
        self.scheduler = create_scheduler(config.optimizer, self.optimizer, self.num_steps)
        self.parts: dict[str, Any] = {
            "network": network,
            "optimizer": self.optimizer,
            "scheduler": self.scheduler,
            "monitor": made.monitor,
        }
        if accelerator.scaler is not None:
            self.parts["scaler"] = accelerator.scaler
        if accelerator.is_main_process:  # whose trajectories a state holds; those of the other processes begin anew
            self.parts |= {f"term {name}": term for name, term in made.terms.items()}
        self.losses = FiniteLosses(self.num_steps, [scorer.name for scorer in made.context.reward.scorers])
        self.last_good = LastGood()
        self.done = config.saving.initial_step or 0
        self.resumed, self.watched, self.is_own_end = False, True, False
        self.unet_evaluations = made.model.num_unet_evaluations

    def state(self, *, watched: bool = True) -> SliderState:
        """What a run that goes on from here must know."""
        counted = {"step": self.done, "unet_evaluations": self.unet_evaluations, "watched": watched}
        return SliderState.of(self.parts, shared=self.made.shared, **counted)

    def go_on_from(self, folder: Path | None) -> None:
        """Take the state in `folder`, if one is given.

        Raises:
            UserError: it does not fit this run, or nothing is left to train.
        """
        saving, files = self.config.saving, self.made.files
        begins = f"initial_step is {self.done}"
        if folder is not None:
            files.owns_names = self.resumed = True
            saved = SliderState.load(folder)
            saved.check_shared(self.made.shared, folder, with_changes=saving.resume_with_changes)
            with own_settings(self.optimizer, self.scheduler):
                saved.restore(self.parts, folder)
            optimizer_train_mode(self.optimizer)
            self.unet_evaluations, self.watched = saved.unet_evaluations, saved.watched
            if saving.initial_step is None:
                self.done = saved.step
            begins = f"{folder} was saved after step {self.done}"
            self.is_own_end = folder.absolute().parent == saving.output_dir.absolute() and not files.is_finished()
        if self.done > self.num_steps or (self.done == self.num_steps and self.watched and not self.is_own_end):
            raise UserError(f"{begins} and max_train_steps is {self.num_steps}, so nothing is left to train; raise max_train_steps")

    def make(self) -> dict[str, float]:
        """One update: the losses' gradients, and a step of the optimizer if they can be used -> what the trackers are told of it.

        Raises:
            UserError: too many losses were not finite; the weights that last gave a finite one are saved.
        """
        step, network = self.done, self.made.network
        found = self._backward() | {"lr": self.scheduler.get_last_lr()[0], "unet_evaluations": self.unet_evaluations}
        usable = any(weight.grad is not None for weight in network.parameters())
        if self.config.optimizer.max_grad_norm and usable:
            norm = self.accelerator.clip_grad_norm_(network.parameters(), self.config.optimizer.max_grad_norm)
            found["grad_norm"] = torch.as_tensor(norm)
        metrics = to_floats(found)  # one wait for the device, for the numbers that are logged and whether the gradient is finite
        if "grad_norm" in metrics and self.accelerator.scaler is None:  # a scaler looks for itself: its scale must find infinity first
            usable = self.losses.check_gradient(metrics["grad_norm"], step)
        is_hopeless = self.losses.too_many or (step + 1 == self.num_steps and self.losses.none_finite)
        if any_process(is_hopeless, self.accelerator):
            is_main = self.accelerator.is_main_process
            raise self.losses.complaint(self.made.files.save_last_good(network, self.last_good) if is_main else "")
        if usable:
            if self.losses.all_finite(step):
                self.last_good.keep(step, network)
            self._prepared.step()
        self.scheduler.step()
        self._prepared.zero_grad()
        if self.config.network.scale_weight_norms is not None:
            network.apply_max_norm_regularization(self.config.network.scale_weight_norms)
        self.done = step + 1
        return metrics

    def _backward(self) -> dict[str, Any]:
        """Gradients of all terms, the mean over the processes -> the terms' metrics."""
        terms, model, parts = self.made.terms, self.made.model, self.config.training.gradient_accumulation_steps
        outs: dict[str, list[LossOutput]] = {name: [] for name in terms}
        counted = model.num_unet_evaluations
        for _ in range(parts):
            for name, term in terms.items():  # each with its own backward pass, so that memory is that of the largest
                with model_autocast(model):
                    out = term()
                outs[name].append(out)
                if self.losses.check(out, self.done, name):
                    self.accelerator.backward(out.loss * term.weight / parts)
                if not self.losses.all_finite(self.done):
                    term.renew_broken()
        self.unet_evaluations += model.num_unet_evaluations - counted
        all_reduce_grads(self.made.network.parameters(), self.accelerator)
        return mean_metrics(terms, outs)
