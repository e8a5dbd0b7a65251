"""The training of a scorer: its noise, its batches, its loop."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from library.diffusion.noise_schedule import NoiseSchedule, per_sample, sigma_to_abar
from library.errors import UserError
from library.scorer_data.batches import LatentBatch
from library.scorer_training.balancing import Balance
from library.scorer_training.config import ScorerTrainingConfig
from library.scorer_training.criteria.base import get_criterion
from library.scorer_training.criteria.ensembles import bootstrap_weights, mean_outputs, member_losses
from library.scorer_training.criteria.masked import MaskedLatentPretraining
from library.scorer_training.tasks import Stage, Task
from library.scorer_training.validation import AveragedWeights, BestState, SigmaTable, selection_value, validate
from library.scorers.base import Backbone, BackboneScorer, ScorerSpec
from library.training.interrupts import Interrupts
from library.training.optimizers import evaluating
from library.training.runtime import any_process, generator
from library.training.tracking import Tracker
from library.types import Conditioning

if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.getLogger(__name__)

PATIENCE = 5  # validations that are not better than the best before them, after which training stops
REFERENCE_PICTURES = 2048  # the scale of a score is measured on so many training pictures


def standard_schedule() -> NoiseSchedule:
    """The schedule that SD1, SD2 and SDXL share: sigma from 0.03 to 14.6."""
    return NoiseSchedule.from_config({"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"})


def draw_sigmas(count: int, clean_fraction: float, schedule: NoiseSchedule, generator: torch.Generator) -> Tensor:
    """Noise levels [count]: a share of zeros, the others at uniform timesteps; stratified, so that every batch has its share of each."""
    place = (torch.randperm(count, generator=generator) + torch.rand(count, generator=generator)) / count  # each in a slot of its own, 0..1
    noisy = (place - clean_fraction) / max(1 - clean_fraction, 1e-6)
    timesteps = (noisy * len(schedule)).long().clamp(0, len(schedule) - 1)
    return torch.where(place < clean_fraction, torch.zeros(()), schedule.sigmas(timesteps))


def add_noise(latents: Tensor, sigmas: Tensor, generator: torch.Generator) -> Tensor:
    """x = sqrt(abar) x0 + sqrt(1 - abar) eps at abar = 1 / (1 + sigma^2). The noise is drawn on the CPU: the same on every device."""
    noise = torch.randn(latents.shape, generator=generator).to(latents.device)
    abar = per_sample(sigma_to_abar(sigmas), latents)
    return abar.sqrt() * latents + (1 - abar).sqrt() * noise


def share_out(batch_size: int, proportions: Sequence[float]) -> list[int]:
    """Whole numbers, at least 1 each, that add up to `batch_size` in these proportions as nearly as can be (largest remainders).

    Raises:
        UserError: there are more shares than pictures in a batch.
    """
    if len(proportions) > batch_size:
        raise UserError(f"train_batch_size is {batch_size}, but there are {len(proportions)} datasets; give each at least one picture")
    spare, total = batch_size - len(proportions), sum(proportions)
    ideal = [1 + spare * proportion / total for proportion in proportions]
    counts = [int(share) for share in ideal]
    by_remainder = sorted(range(len(ideal)), key=lambda index: counts[index] - ideal[index])
    for index in by_remainder[: batch_size - sum(counts)]:
        counts[index] += 1
    return counts


class PretrainingScorer(BackboneScorer):
    """A scorer of which only the backbone is kept; it may also learn to fill in hidden cells."""

    def __init__(self, spec: ScorerSpec, backbone: Backbone) -> None:
        super().__init__(spec, backbone)
        if any(get_criterion(head.criterion).target == "picture" for head in spec.heads):
            self.masked = MaskedLatentPretraining(backbone)


class ScorerTrainer:
    """Trains scorers on one machine's settings.

    Args:
        encode_prompts: prompts to the conditioning of the U-Net; needed by scorers that use the prompt.
        interrupts: one that is received ends a stage after the step.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        settings: ScorerTrainingConfig,
        tracker: Tracker,
        encode_prompts: Callable[[Sequence[str]], Conditioning] | None = None,
        interrupts: Interrupts | None = None,
    ) -> None:
        self.accelerator, self.settings, self.tracker = accelerator, settings, tracker
        self.encode_prompts, self.interrupts = encode_prompts, Interrupts() if interrupts is None else interrupts
        self.schedule = standard_schedule()

    def fit(self, scorer: BackboneScorer, stage: Stage) -> dict[str, Any]:
        """Train a scorer, leave it with its best averaged weights, and return the record of the stage as JSON values.

        It ends before its last step when `PATIENCE` validations in a row were no better than the best before them.
        """
        settings, device = self.settings, self.accelerator.device
        scorer.to(device).train()
        rng = generator(settings.seed, stage.name, self.accelerator.process_index)
        balance = Balance(self.accelerator, scorer, stage, settings)
        average = AveragedWeights(scorer, settings.ema_decay)
        best = BestState(scorer, average)
        sizes = share_out(settings.train_batch_size, [task.dataset.proportion for task in stage.tasks])
        batches = [task.train.endless(size, rng) for task, size in zip(stage.tasks, sizes, strict=True)]

        shown = (*(f"loss/{task.name}" for task in stage.tasks), "best")
        progress = self.tracker.progress(stage.steps, 0, stage.name, shown[-3:])
        done = 0
        for step in range(stage.steps):
            losses = {
                task.name: self._loss(scorer, task, next(source).to(device), size, rng)
                for task, source, size in zip(stage.tasks, batches, sizes, strict=True)
            }
            values = balance.step(losses)
            check_losses(values, step)
            average.step()

            done = step + 1
            validated = done % settings.validate_every_n_steps == 0 or done == stage.steps
            stopping = any_process(bool(self.interrupts), self.accelerator)
            if validated or (stopping and not best.tables):
                with contextlib.ExitStack() as stack:
                    for optimizer in balance.optimizers:
                        stack.enter_context(evaluating(optimizer))
                    best.consider(done, lambda: self.measure(scorer, stage.tasks), lambda tables: self._value(stage, tables))
            metrics = {f"loss/{name}": value for name, value in values.items()} | {"lr": balance.learning_rate(), "best": best.value}
            self.tracker.log(metrics, stage.first_step + step)
            progress.update()
            if validated and done < stage.steps and any_process(best.validations_since >= PATIENCE, self.accelerator):
                logger.info(
                    "%s ends after step %d: %d validations in a row were no better than that of step %d",
                    stage.name,
                    done,
                    PATIENCE,
                    best.step,
                )
                break
            if stopping:
                break
        progress.close()
        best.restore()
        self.accelerator.print(best.describe([task.name for task in stage.tasks]))
        return {
            "steps": done,
            "best_step": best.step,
            "optimizer": stage.optimizer.optimizer_type,
            "learning_rate": stage.optimizer.learning_rate,
            "tasks": {task.name: task.describe() for task in stage.tasks},
            "validation_by_task": dict(best.tables),
        }

    def measure(self, scorer: BackboneScorer, tasks: Sequence[Task]) -> dict[str, SigmaTable]:
        """How well a scorer does each task, at each noise level."""
        return {
            task.name: validate(
                lambda batch, sigmas, rng, task=task: mean_outputs(self._outputs(scorer, task, batch, sigmas, rng), task.head),
                task.validation,
                lambda outputs, targets, task=task: task.criterion.metrics(outputs, targets, task.head),
                batch_size=self.settings.train_batch_size,
                device=self.accelerator.device,
            )
            for task in tasks
        }

    @torch.no_grad()
    def reference_scale(self, scorer: BackboneScorer, task: Task) -> tuple[float, float]:
        """Mean and standard deviation of the score over clean training pictures, REFERENCE_PICTURES at most.

        Raises:
            UserError: the scorer gives all of them one score.
        """
        scorer.eval()
        scores: list[Tensor] = []
        for batch in task.train.in_order(self.settings.train_batch_size):
            batch = batch.to(self.accelerator.device)
            for latents in (batch.latents, batch.second):
                if latents is not None:
                    scores.append(scorer(latents, latents.new_zeros(len(latents)), self._cond(scorer, batch), batch.prompts).cpu())
            if sum(map(len, scores)) >= REFERENCE_PICTURES:
                break
        values = torch.cat(scores).double()
        mean, std = values.mean().item(), values.std(correction=0).item()
        if not std > 1e-6 * max(1.0, abs(mean)):
            raise UserError(f"the scorer gives all pictures the score {mean:g}: it learned nothing; train longer, or check the ratings")
        return mean, std

    def _loss(self, scorer: BackboneScorer, task: Task, batch: LatentBatch, size: int, rng: torch.Generator) -> Callable[[], Tensor]:
        """A function that computes the mean loss of a task's part of the batch: `size` pictures, or fewer at a bucket's end."""

        def compute() -> Tensor:
            sigmas = draw_sigmas(len(batch), self.settings.clean_fraction, self.schedule, rng).to(batch.latents.device)
            outputs = self._outputs(scorer, task, batch, sigmas, rng)
            weights = None
            if task.head.members > 1:
                pictures = task.train_pictures[batch.indices.cpu()]
                weights = bootstrap_weights(task.head.members, pictures, self.settings.seed).to(outputs.device)
            losses = member_losses(task.criterion, outputs.float(), batch.targets, task.head, weights)
            return (losses * batch.weights).sum() / size  # a picture counts the same in a bucket's small last batch

        return compute

    def _outputs(self, scorer: BackboneScorer, task: Task, batch: LatentBatch, sigmas: Tensor, rng: torch.Generator) -> Tensor:
        """Outputs [B, members, K] of a clean batch with noise added, or [B, 2, members, K] of pairs."""
        cond = self._cond(scorer, batch)
        with self.accelerator.autocast():
            if isinstance(scorer, PretrainingScorer) and task.criterion.target == "picture":
                return scorer.masked(add_noise(batch.latents, sigmas, rng), sigmas, batch.latents, rng)[:, None, None]
            outputs = scorer.outputs(task.name, add_noise(batch.latents, sigmas, rng), sigmas, cond, batch.prompts)
            if batch.second is None:
                return outputs
            second = scorer.outputs(task.name, add_noise(batch.second, sigmas, rng), sigmas, cond, batch.prompts)
            return torch.stack([outputs, second], dim=1)

    def _cond(self, scorer: BackboneScorer, batch: LatentBatch) -> Conditioning | None:
        if not scorer.spec.uses_prompt or self.encode_prompts is None:
            return None
        with torch.no_grad():
            return self.encode_prompts(batch.prompts or [""] * len(batch)).to(self.accelerator.device)

    @staticmethod
    def _value(stage: Stage, tables: Mapping[str, SigmaTable]) -> float:
        chosen = [task for task in stage.tasks if task.name in stage.selecting]
        return sum(selection_value(tables[task.name], task.criterion.selection) for task in chosen) / len(chosen)


def check_losses(losses: Mapping[str, Tensor], step: int) -> None:
    """Raises UserError naming the step if a loss is not finite."""
    for name, loss in losses.items():
        if not torch.isfinite(loss):
            raise UserError(
                f"step {step + 1}: the loss of {name} is {loss.item()}, so training stopped; "
                "lower learning_rate, or use mixed_precision bf16"
            )
