"""One training of a scorer, step by step: all that its steps change is its state."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from library.errors import UserError
from library.scorer_data.batches import Epochs, LatentBatch
from library.scorer_training.balancing import Balance
from library.scorer_training.config import ScorerTrainingConfig
from library.scorer_training.criteria.base import get_criterion
from library.scorer_training.criteria.ensembles import bootstrap_weights, mean_outputs, member_losses
from library.scorer_training.criteria.self_taught import FromPictures, SelfTaught
from library.scorer_training.noise import NoisyBatch, draw_sigmas, standard_schedule
from library.scorer_training.stages import Stage
from library.scorer_training.tasks import Task
from library.scorer_training.validation import (
    AveragedWeights,
    BestState,
    Predictions,
    SigmaTable,
    changing,
    selection_value,
    table_of,
    validate,
)
from library.scorers.base import Backbone, BackboneScorer, ScorerSpec
from library.training.finite_losses import FiniteLosses
from library.training.optimizers import evaluating
from library.training.runtime import generator
from library.types import Conditioning, LossOutput

if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.getLogger(__name__)

REFERENCE_PICTURES = 2048  # the scale of a score is measured on so many training pictures


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
    """A scorer of which only the backbone is kept; it may also learn from pictures that nobody has rated.

    Args:
        decode: scaled latents [B, C, h, w] to pixels [B, 3, H, W] in 0..1.
    """

    self_taught: SelfTaught

    def __init__(self, spec: ScorerSpec, backbone: Backbone, decode: Callable[[Tensor], Tensor]) -> None:
        super().__init__(spec, backbone)
        for head in spec.heads:
            criterion = get_criterion(head.criterion)
            if isinstance(criterion, FromPictures):
                self.self_taught = criterion.pretraining(backbone, decode)


class ScorerRun:
    """A scorer in training.

    Every process draws the same batches, with the same noise, and computes its part of them; the parts of `gradient_accumulation_steps`
    come one after the other. So the gradient is that of one large batch, however it is parted.

    Args:
        encode_prompts: prompts to the conditioning of the U-Net; needed by scorers that use the prompt.

    Attributes:
        done: steps. best: the averaged weights that did best so far, where there are pictures to validate with.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        settings: ScorerTrainingConfig,
        scorer: BackboneScorer,
        stage: Stage,
        encode_prompts: Callable[[Sequence[str]], Conditioning] | None = None,
    ) -> None:
        self.accelerator, self.settings, self.scorer, self.stage = accelerator, settings, scorer, stage
        self.encode_prompts = encode_prompts
        # NVIDIA's convolutions of half precision are laid out so
        if accelerator.device.type == "cuda":
            nn.Module.to(scorer, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        scorer.to(accelerator.device).train()
        self.schedule, self.rng = standard_schedule(), generator(settings.seed, stage.name, 0)
        self.finite = FiniteLosses(stage.steps, to_check="the ratings and the VAE")
        self.balance = Balance(accelerator, scorer, stage, settings, self.finite)
        self.average = AveragedWeights(scorer, settings.ema_decay)
        self.best = BestState()
        self.parts = accelerator.num_processes * settings.gradient_accumulation_steps
        self.sizes = share_out(settings.train_batch_size * self.parts, [task.dataset.proportion for task in stage.tasks])
        self.sources = [Epochs(task.train, size, self.rng) for task, size in zip(stage.tasks, self.sizes, strict=True)]
        self.done = 0
        self._drawn: list[LatentBatch] = []

    def draw(self) -> None:
        """Read the batches of the next step, so that they are there when it begins. A state knows nothing of them."""
        self._drawn = self._drawn or [next(source) for source in self.sources]

    def step(self) -> dict[str, Tensor]:
        """One update; the losses of the tasks, of this process, detached."""
        self.draw()
        losses = {
            task.name: self._parted_loss(task, batch, size)
            for task, batch, size in zip(self.stage.tasks, self._drawn, self.sizes, strict=True)
        }
        self._drawn = []
        values, moved = self.balance.step(losses, self.done)
        if moved:
            self.average.step()
        self.done += 1
        return values

    def state_dict(self) -> dict[str, Any]:
        assert not self._drawn, "batches were drawn that a state does not hold"
        return {
            "weights": {name: tensor.detach().cpu().clone() for name, tensor in changing(self.scorer).items()},
            "balance": self.balance.state_dict(),
            "average": self.average.state_dict(),
            "best": self.best.state_dict(),
            "sources": [source.state_dict() for source in self.sources],
            "rng": self.rng.get_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        missing = changing(self.scorer).keys() ^ state["weights"].keys()
        if missing:
            raise KeyError(f"weights {min(missing)}")
        self.scorer.load_state_dict(state["weights"], strict=False)
        self.balance.load_state_dict(state["balance"])
        self.average.load_state_dict(state["average"])
        self.best.load_state_dict(state["best"])
        for source, own in zip(self.sources, state["sources"], strict=True):
            source.load_state_dict(own)
        self.rng.set_state(state["rng"])

    def validate(self) -> None:
        """Measure the averaged weights, and keep them if they do better than all before."""
        with self.averaged():
            tables = self.tables()
            chosen = [task for task in self.stage.tasks if task.name in self.stage.selecting]
            value = sum(selection_value(tables[task.name], task.criterion.selection) for task in chosen) / len(chosen)
            self.best.consider(self.done, tables, value, self.scorer)

    def keep_average(self) -> None:
        """Give the scorer its averaged weights, for good."""
        with self.averaged():
            kept = {name: tensor.detach().clone() for name, tensor in changing(self.scorer).items()}
        self.scorer.load_state_dict(kept, strict=False)

    def tables(self) -> dict[str, SigmaTable]:
        """How well the scorer as it is now does each task that has pictures to validate with, at each noise level."""
        found = {}
        for task in self.stage.tasks:
            if len(task.validation):
                predictions = self.predictions(task)
                found[task.name] = table_of(predictions, task.criterion, task.head)
                if task.criterion.target != "picture" and not (predictions[0.0][0] != predictions[0.0][0][:1]).any():
                    logger.warning("step %d: %s is the same for all %d validation pictures", self.done, task.name, len(task.validation))
        return found

    def predictions(self, task: Task) -> Predictions:
        """Outputs and targets of the task's validation pictures, for each noise level."""
        return validate(
            lambda batch, sigmas, rng: mean_outputs(
                self._outputs(task, self._noisy(task, batch, sigmas, rng).to(self.accelerator.device)), task.head
            ),
            task.validation,
            batch_size=self.settings.train_batch_size,
        )

    def features(self, batch: LatentBatch, sigmas: Tensor, rng: torch.Generator) -> Tensor:
        """What the backbone makes of a batch behind noise [B, feature_width]."""
        noisy = NoisyBatch.of(batch, sigmas, rng).to(self.accelerator.device)
        with self.accelerator.autocast():
            return self.scorer.backbone(noisy.latents, noisy.sigmas, self._cond(noisy.batch), noisy.batch.prompts)

    @torch.no_grad()
    def reference_scale(self, task: Task) -> tuple[float, float]:
        """Mean and standard deviation of the score over clean training pictures, REFERENCE_PICTURES at most.

        Raises:
            UserError: the scorer gives all of them one score, or none that is a number.
        """
        self.scorer.eval()
        scores: list[Tensor] = []
        for batch in task.train.in_order(self.settings.train_batch_size):
            batch = batch.to(self.accelerator.device)
            for latents in (batch.latents, batch.second):
                if latents is not None:
                    scores.append(self.scorer(latents, latents.new_zeros(len(latents)), self._cond(batch), batch.prompts).cpu())
            if sum(map(len, scores)) >= REFERENCE_PICTURES:
                break
        values = torch.cat(scores).double()
        mean, std = values.mean().item(), values.std(correction=0).item()
        if not values.isfinite().all():
            raise UserError("the scorer's scores of the training pictures are not finite; lower learning_rate, or use mixed_precision bf16")
        if not std > 1e-6 * max(1.0, abs(mean)):
            raise UserError(f"the scorer gives all pictures the score {mean:g}: it learned nothing; train longer, or check the ratings")
        return mean, std

    def averaged(self) -> ExitStack:
        """Within the block the scorer has its averaged weights, as they are to be used and saved."""
        stack = ExitStack()
        for optimizer in self.balance.optimizers:
            stack.enter_context(evaluating(optimizer))
        stack.enter_context(self.average.applied())
        return stack

    def _parted_loss(self, task: Task, batch: LatentBatch, size: int) -> Callable[[], Iterator[LossOutput]]:
        """A function that computes the losses of this process's parts of a batch. Their mean over the processes, and sum over the parts,
        is the mean loss of the batch: `size` pictures, or fewer at a bucket's end, where a picture counts the same."""

        def compute() -> Iterator[LossOutput]:
            sigmas = draw_sigmas(len(batch), self.settings.clean_fraction, self.schedule, self.rng)
            noisy = self._noisy(task, batch, sigmas, self.rng)
            first = self.accelerator.process_index * self.settings.gradient_accumulation_steps
            for number in range(first, first + self.settings.gradient_accumulation_steps):
                part = noisy[number :: self.parts] if self.parts > 1 else noisy
                if len(part):
                    yield self._loss(task, part.to(self.accelerator.device), size / self.accelerator.num_processes)

        return compute

    def _loss(self, task: Task, noisy: NoisyBatch, size: float) -> LossOutput:
        """The sum of the losses over `size`. A picture whose loss is not finite is no part of it, if others' are."""
        losses = sample_losses = self._losses(task, noisy)
        weights = noisy.batch.weights
        finite = sample_losses.isfinite()
        if not finite.all() and finite.any():
            losses, weights = self._losses(task, noisy[finite]), weights[finite]  # once more: what is not finite has no place in a graph
        indices, names = noisy.batch.indices, task.train
        samples = [names.name_of(int(index)) for index in indices] if not finite.all() else [""] * len(noisy)
        return LossOutput((losses * weights).sum() / size, sample_losses.detach(), samples)

    def _losses(self, task: Task, noisy: NoisyBatch) -> Tensor:
        outputs = self._outputs(task, noisy)
        weights = None
        if task.head.members > 1:
            pictures = task.train_pictures[noisy.batch.indices.cpu()]
            weights = bootstrap_weights(task.head.members, pictures, self.settings.seed).to(outputs.device)
        return member_losses(task.criterion, outputs.float(), noisy.batch.targets, task.head, weights)

    def _noisy(self, task: Task, batch: LatentBatch, sigmas: Tensor, rng: torch.Generator) -> NoisyBatch:
        if isinstance(self.scorer, PretrainingScorer) and isinstance(task.criterion, FromPictures):
            return NoisyBatch.of(batch, sigmas, rng, self.scorer.self_taught.draw_visible)
        return NoisyBatch.of(batch, sigmas, rng)

    def _outputs(self, task: Task, noisy: NoisyBatch) -> Tensor:
        """Outputs [B, members, K] of a noisy batch, or [B, 2, members, K] of pairs."""
        batch, sigmas, cond = noisy.batch, noisy.sigmas, self._cond(noisy.batch)
        with self.accelerator.autocast():
            if isinstance(self.scorer, PretrainingScorer) and isinstance(task.criterion, FromPictures):
                return self.scorer.self_taught(noisy.latents, sigmas, batch.latents, noisy.visible)[:, None, None]
            outputs = self.scorer.outputs(task.name, noisy.latents, sigmas, cond, batch.prompts)
            if (second := noisy.second) is None:
                return outputs
            return torch.stack([outputs, self.scorer.outputs(task.name, second, sigmas, cond, batch.prompts)], dim=1)

    def _cond(self, batch: LatentBatch) -> Conditioning | None:
        if not self.scorer.spec.uses_prompt or self.encode_prompts is None:
            return None
        with torch.no_grad():
            return self.encode_prompts(batch.prompts or [""] * len(batch)).to(self.accelerator.device)
