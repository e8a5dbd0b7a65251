"""The LECO-score step: move the LoRA so that the latents which its prediction leads to score higher.

One U-Net call with gradient predicts the noise of the conditional branch; the unconditional branch and the frozen model
are predicted in one call without. An estimator says which latents the guided prediction leads to. The score's gradient is
taken at those latents, normalised, and handed back as a linear loss, so the scorer and the U-Net are never in one graph and
neither the scorer's scale nor the number of steps matters.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from library.diffusion.solvers import SOLVERS
from library.errors import UserError
from library.objectives.base import TrainingContext
from library.objectives.estimator import ESTIMATORS, PredictedLatents, StepState
from library.objectives.goals import ascent_direction
from library.objectives.predictions import predict_plain
from library.objectives.regression import squared_errors
from library.objectives.reward_shapes import SHAPES
from library.objectives.rewards import score_gradients
from library.rollouts.sample import guide
from library.settings.options import check_at_least, option
from library.training.runtime import upload
from library.types import Conditioning, LossOutput, RolloutBatch

# Gains over the frozen model over a whole trajectory, in the score's standard deviations, at multiplier 1.
HINGE_MARGIN = 5.0  # where hinge and softplus stop
TARGET = 3.0  # of reward_loss target, if every step's gain lasted; a third of it does


@dataclass(frozen=True, kw_only=True)
class ScoreConfig:
    """What is scored, how the score becomes a loss, and what holds the model in place."""

    score_estimator: str = option(
        "x0_renoise",
        choices=ESTIMATORS,
        help="Latents to score: prev, the next step's; x0, the clean latents that are predicted; x0_renoise, those noised anew; "
        "direct_align, noised finished pictures.",
        only_with="scorer",
    )
    reward_loss: str = option(
        "hinge",
        choices=SHAPES,
        help="hinge stops pushing a sample that is far enough above the frozen model, softplus fades out there; target pushes back "
        "beyond its target; linear never stops.",
        only_with="scorer",
    )
    preserve_weight: float = option(
        3.0,
        help="Weight of staying near the frozen model's prediction; with w, the prediction moves by about 1 / 2w.",
        only_with="scorer",
    )
    min_timestep: int = option(0, help="Train only on steps at or above this timestep (0 to 1000).", expert=True, only_with="scorer")
    max_timestep: int = option(1000, help="Train only on steps below this timestep (0 to 1000).", expert=True, only_with="scorer")

    def __post_init__(self) -> None:
        check_at_least(self, 0, "preserve_weight", "min_timestep")
        if not self.min_timestep < self.max_timestep <= 1000:
            raise UserError(
                f"min_timestep {self.min_timestep} and max_timestep {self.max_timestep} leave no step to train; use 0 <= min < max <= 1000"
            )


class ScoreObjective:
    """Loss of one batch.

    Minimising `-<g, eps - eps_frozen> + preserve_weight |eps - eps_frozen|^2`, with g the score's gradient at RMS 1,
    moves eps by `1 / (2 preserve_weight)` RMS along g at most: the trained slider has a strength by construction.
    """

    def __init__(self, context: TrainingContext, config: ScoreConfig) -> None:
        self.context, self.config, self.reward = context, config, context.reward
        self.model, self.network = context.model, context.network
        name = config.score_estimator
        self.estimator = ESTIMATORS[name](context.settings.get(name))
        self.solver = SOLVERS[context.sampling.sampler]
        self.schedule = self.solver.schedule(self.model.schedule)
        self.needs_frozen = config.reward_loss != "linear" or self.reward.needs_frozen or config.preserve_weight > 0

    def __call__(self, batch: RolloutBatch, generator: torch.Generator | None = None) -> tuple[LossOutput, Tensor]:
        """The loss, and the guided prediction along which the trajectories go on [B, C, h, w], without gradient.

        Args:
            generator: for an estimator that draws noise of its own.
        """
        own = self.trained(batch)
        # what was asked for, in the frozen model's words: a LoRA of the text encoder must not talk to the scorer
        asked_for = self.context.encoder.frozen_cond(own.prompts, own.cond)
        plain = predict_plain(self.model, self.network, batch, asked_for if self.needs_frozen else None, rows=self._rows(batch))
        self.network.set_multiplier(own.multipliers)
        eps = self.model.predict_eps(own.latents, own.timesteps, own.cond)
        every_eps = plain.with_passing(eps.detach())
        every_uncond = None if batch.sparse_uncond is None else batch.sparse_uncond.complete(every_eps, plain.uncond)
        uncond = every_uncond if every_uncond is None or plain.rows is None else every_uncond[plain.rows]

        state = StepState(batch=own, schedule=self.schedule, solver=self.solver)
        noise = upload(torch.randn(self.estimator.num_views, *own.latents.shape, generator=generator), own.latents.device)
        predicted = self.estimator.predict_latents(state, self._guide(eps, uncond, own))
        base = None
        if plain.frozen is not None:
            with torch.no_grad():
                base = self.estimator.predict_latents(state, self._guide(plain.frozen, uncond, own))
        direction, reward, gain, unscored = self._ascent(own, asked_for, predicted, base, noise)
        scored = ~torch.stack(list(unscored.values())).any(0)

        losses = -self._move(direction, predicted, base, own)
        metrics: dict[str, float | Tensor] = {
            "reward": reward.nanmean(),
            "gain_per_step": gain.nanmean(),
            "pushed": (direction.abs().amax((1, 2, 3)) > 0).float().mean(),
        }
        if plain.frozen is not None:
            drift = squared_errors(eps, plain.frozen)  # the KL term of DRaFT+ (NeMo-Aligner)
            losses = losses + self.config.preserve_weight * drift
            metrics["eps_drift"] = drift.detach().mean().sqrt()
        losses = losses * scored  # and not where(): what the U-Net itself made NaN must show
        out = LossOutput(
            loss=losses.sum() / len(batch.latents),
            sample_losses=losses.detach().where(scored, torch.nan),
            samples=[f"prompt {prompt.prompt!r} at timestep {int(time)}" for prompt, time in zip(own.prompts, own.times, strict=True)],
            metrics=metrics,
            promised=gain.detach() / self.step_fraction(own, predicted).clamp_min(1e-12),
            unscored=unscored,
        )
        return out, self._guide(every_eps, every_uncond, batch)

    def trained(self, batch: RolloutBatch) -> RolloutBatch:
        """The rows of a batch that are scored and learned from: those within min_timestep and max_timestep. The others only move on."""
        rows = self._rows(batch)
        return batch if rows is None else batch.take(rows)

    def _rows(self, batch: RolloutBatch) -> list[int] | None:
        rows = [row for row, time in enumerate(batch.times) if self.config.min_timestep <= time < self.config.max_timestep]
        return None if len(rows) == len(batch.times) else rows

    @torch.no_grad()
    def predict_frozen(self, batch: RolloutBatch) -> PredictedLatents:
        """Where the frozen model's prediction leads."""
        batch = batch.evaluated_whole()
        frozen_cond = self.context.encoder.frozen_cond(batch.prompts, batch.cond)
        plain = predict_plain(self.model, self.network, batch, frozen_cond)
        assert plain.frozen is not None
        state = StepState(batch=batch, schedule=self.schedule, solver=self.solver)
        return self.estimator.predict_latents(state, self._guide(plain.frozen, plain.uncond, batch))

    def step_fraction(self, batch: RolloutBatch, predicted: PredictedLatents) -> Tensor:
        """The part of a whole trajectory's change that this step accounts for [B]."""
        return predicted.num_steps / batch.num_steps

    def _guide(self, eps: Tensor, uncond: Tensor | None, batch: RolloutBatch) -> Tensor:
        rescale = self.context.sampling.guidance_rescale
        return guide(self.model, batch.latents, batch.timesteps, eps, uncond, batch.guidance_scales, rescale)

    def _ascent(
        self, batch: RolloutBatch, asked_for: Conditioning, predicted: PredictedLatents, base: PredictedLatents | None, noise: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
        """Where each sample's latents should go.

        Args:
            asked_for: what a scorer that reads the prompt is given.

        Returns:
            The direction in the predicted latents [B, C, h, w] (0 for a sample that is to rest), the reward [B], the gain over the frozen
            model in the wanted direction [B] (NaN when the frozen model was not consulted), and as `LossOutput.unscored`: those samples
            have no direction, and NaN for reward and gain.
        """
        count, directions = len(batch.latents), batch.directions
        latents, sigmas, scales = self.estimator.views(predicted, noise)
        views = len(latents) // count
        cond, prompts, signs = asked_for.repeat(views), batch.prompts * views, directions.repeat(views)

        def mean_over_views(of_goals: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return {name: value.view(views, count, *value.shape[1:]).mean(0) for name, value in of_goals.items()}

        all_values, slopes = score_gradients(self.reward, latents.detach(), sigmas, cond, prompts, signs)
        values = mean_over_views(all_values)
        gradients = mean_over_views({name: scales.view(-1, 1, 1, 1) * slope for name, slope in slopes.items()})
        base_values = None
        if base is not None:
            with torch.no_grad():
                latents, sigmas, _ = self.estimator.views(base, noise)
                base_values = mean_over_views(self.reward(latents, sigmas, cond, prompts, signs).terms)
        reward = self._total(values)
        gain = torch.full_like(reward, torch.nan) if base_values is None else directions * (reward - self._total(base_values))
        push = self._push(batch, predicted)
        fraction = self.step_fraction(batch, predicted)
        direction = ascent_direction(self.reward.goals, gradients, values, base_values, push, directions, fraction)
        unscored = {name: ~(values[name] + gradients[name].sum((1, 2, 3))).isfinite() for name in values}
        if base_values is not None:
            unscored = {name: rows | ~base_values[name].isfinite() for name, rows in unscored.items()}
        broken = torch.stack(list(unscored.values())).any(0)
        direction = direction.masked_fill(broken.view(-1, 1, 1, 1), 0)
        return direction, reward.masked_fill(broken, torch.nan), gain.masked_fill(broken, torch.nan), unscored

    def _total(self, values: Mapping[str, Tensor]) -> Tensor:
        return torch.stack([goal.weight * values[goal.name] for goal in self.reward.goals if goal.sign]).sum(0)

    def _push(self, batch: RolloutBatch, predicted: PredictedLatents) -> Callable[[Tensor], Tensor]:
        """How much a sample is pushed, by its gain [B] over the frozen model in the wanted direction."""
        shape = SHAPES[self.config.reward_loss]
        wanted = TARGET if self.config.reward_loss == "target" else HINGE_MARGIN
        margin = wanted * batch.multipliers.abs() * self.step_fraction(batch, predicted)
        return lambda gain: shape(gain, margin)

    def _move(self, direction: Tensor, predicted: PredictedLatents, base: PredictedLatents | None, batch: RolloutBatch) -> Tensor:
        """How far the prediction has moved along the direction [B], with gradient: RMS of eps, from the frozen model's prediction."""
        moved = predicted.latents - (predicted.latents if base is None else base.latents).detach()
        # a schedule may end with a step that moves nothing
        return (direction * moved).mean((1, 2, 3)) / (predicted.sensitivity * batch.guidance_scales).abs().clamp_min(1e-12)
