"""The LECO-score step: move the LoRA so that the latents which its prediction leads to score higher.

One U-Net call with gradient predicts the noise of the conditional branch; the unconditional branch and the frozen model
are predicted in one call without. An estimator says which latents the guided prediction leads to. The score's gradient is
taken at those latents, normalised, and handed back as a linear loss, so the scorer and the U-Net are never in one graph and
neither the scorer's scale nor the number of steps matters.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from library.diffusion.noise_schedule import eps_to_x0
from library.diffusion.solvers import Solver
from library.errors import UserError
from library.models.base import DiffusionModel
from library.objectives.draft import Draft
from library.objectives.estimators import Foreseen, Predict, Scene
from library.objectives.goals import ascent_direction
from library.objectives.gradients import score_gradients
from library.objectives.preservation import asymmetry, eps_drift, statistics_drift
from library.objectives.reward_shapes import SHAPES
from library.objectives.rewards import Reward
from library.objectives.score_config import ESTIMATORS, ScoreConfig
from library.objectives.x0_renoise import X0Renoise
from library.rollouts.sample import guide
from library.types import Conditioning, LossOutput, RolloutBatch
from networks.lora import LoRANetwork


class ScoreObjective:
    """Loss of one batch.

    Minimising `-reward_weight <g, eps - eps_frozen> + preserve_weight |eps - eps_frozen|^2`, with g the score's gradient at RMS 1,
    moves eps by `reward_weight / (2 preserve_weight)` RMS along g at most: the trained slider has a strength by construction.

    Args:
        num_steps: of the sampler, for prompts that bring none; a gain over a whole trajectory is this many times that of one step.
        guidance_rescale: phi of `library.diffusion.solvers.rescale_guidance`.
    """

    def __init__(
        self,
        model: DiffusionModel,
        network: LoRANetwork,
        reward: Reward,
        config: ScoreConfig,
        solver: Solver,
        num_steps: int,
        guidance_rescale: float = 0.0,
    ) -> None:
        self.model, self.network, self.reward, self.config, self.solver = model, network, reward, config, solver
        self.guidance_rescale = guidance_rescale
        self.estimator = ESTIMATORS[config.score_estimator](config)
        self.num_steps, self.schedule = num_steps, solver.schedule(model.schedule)
        self.needs_frozen = (
            config.reward_loss != "linear"
            or self.estimator.at_frozen
            or reward.needs_frozen
            or max(config.preserve_weight, config.stat_guard, config.odd_weight) > 0
        )
        if config.paired_signs and network.text_encoder_loras:
            raise UserError("paired_signs trains the U-Net only; set network_train_unet_only = true")
        if not config.normalize_gradient and any(goal.limit is not None for goal in reward.goals):
            raise UserError("scorer_limits weighs gradients against each other, which needs normalize_gradient; set it, or give no limits")
        if isinstance(self.estimator, Draft) and solver.needs_noise:
            raise UserError(f"score_estimator draft needs a sampler that draws no noise, and {solver.name} does; use ddim or dpmpp_2m")

    def __call__(self, batch: RolloutBatch, generator: torch.Generator | None = None) -> tuple[LossOutput, Tensor]:
        """The loss, and the guided prediction along which the trajectories go on [B, C, h, w], without gradient.

        Args:
            generator: for an estimator that draws noise of its own.
        """
        own = len(batch.latents)
        batch = batch.mirrored() if self.config.paired_signs else batch
        scene = Scene(batch=batch, schedule=self.schedule, solver=self.solver)
        uncond, frozen = self._predict_without_gradient(batch, own, frozen=self.needs_frozen)
        self.network.set_multiplier(batch.multipliers)
        eps = self.model.predict_eps(batch.latents, batch.timesteps, batch.cond)

        noise = self._noise(batch, own, generator)
        drifts: list[Tensor] = []  # of the further steps that the estimator takes [B] each
        foreseen = self.estimator.foresee(scene, self._guide(eps, uncond, batch), self._predictor(batch, drifts))
        base = None
        if frozen is not None:
            with torch.no_grad():
                base = self.estimator.foresee(scene, self._guide(frozen, uncond, batch), self._frozen_predictor(batch))
        direction, reward, gain = self._ascent(batch, foreseen, base, noise)

        trained = (batch.timesteps >= self.config.min_timestep) & (batch.timesteps < self.config.max_timestep)
        losses = -self.config.reward_weight * self._move(direction, foreseen, base, batch)
        metrics: dict[str, float | Tensor] = {
            "reward": reward.mean(),
            "gain_per_step": gain.mean(),
            "pushed": (direction.abs().amax((1, 2, 3)) > 0).float().mean(),
        }
        if frozen is not None:
            drift = torch.stack([eps_drift(eps, frozen), *drifts])  # [steps with gradient, B]
            losses = losses + self.config.preserve_weight * drift.sum(0)
            metrics["eps_drift"] = drift.detach().mean().sqrt()
            if self.config.stat_guard:
                x0, frozen_x0 = (eps_to_x0(batch.latents, self._guide(part, uncond, batch), scene.abar) for part in (eps, frozen))
                moved = statistics_drift(x0, frozen_x0, scene.abar)
                losses = losses + self.config.stat_guard * moved
                metrics["statistics_drift"] = moved.detach().mean().sqrt()
            if self.config.odd_weight:
                uneven = asymmetry(eps[:own], eps[own:], frozen[:own]).repeat(2)
                losses = losses + self.config.odd_weight * uneven
                metrics["asymmetry"] = uneven.detach().mean().sqrt()
        losses = losses * trained
        tail = 0 if batch.tail_timesteps is None else len(batch.tail_timesteps) - 2  # steps that the estimator took itself
        guided, consulted, rows = uncond is not None, frozen is not None, len(batch.latents)
        further = tail * rows * (3 + guided + (self.config.preserve_weight > 0) + consulted * (1 + guided))
        out = LossOutput(
            loss=losses.mean(),
            sample_losses=losses.detach(),
            samples=[
                f"prompt {prompt.prompt!r} at timestep {int(time)}" for prompt, time in zip(batch.prompts, batch.timesteps, strict=True)
            ],
            metrics=metrics,
            num_unet_evaluations=rows * (3 + guided) + own * consulted + further,
        )
        return out, self._guide(eps.detach(), uncond, batch)[:own]

    @torch.no_grad()
    def foresee_frozen(self, batch: RolloutBatch) -> Foreseen:
        """Where the frozen model's prediction leads."""
        uncond, frozen = self._predict_without_gradient(batch, len(batch.latents), frozen=True)
        assert frozen is not None
        scene = Scene(batch=batch, schedule=self.schedule, solver=self.solver)
        return self.estimator.foresee(scene, self._guide(frozen, uncond, batch), self._frozen_predictor(batch))

    @torch.no_grad()
    def _predict_without_gradient(self, batch: RolloutBatch, own: int, *, frozen: bool) -> tuple[Tensor | None, Tensor | None]:
        """eps of the unconditional branch with the LoRA and of the conditional one without it, in one call; None where not needed.

        Args:
            own: how many rows differ in more than the multiplier; the frozen model is asked for these alone.
            frozen: whether it is needed.
        """
        rows: list[tuple[Tensor, Tensor, Conditioning, Tensor]] = []
        guided = bool((batch.guidance_scales != 1).any())
        if guided:
            rows.append((batch.latents, batch.timesteps, batch.uncond, batch.multipliers))
        if frozen:
            frozen_cond = self._frozen_cond(batch)[:own]
            rows.append((batch.latents[:own], batch.timesteps[:own], frozen_cond, torch.zeros_like(batch.multipliers[:own])))
        if not rows:
            return None, None
        latents, timesteps, conds, multipliers = zip(*rows, strict=True)
        self.network.set_multiplier(torch.cat(multipliers))
        outputs = self.model.predict_eps(torch.cat(latents), torch.cat(timesteps), Conditioning.cat(conds))
        parts = list(outputs.split([len(part) for part in latents]))
        uncond = parts.pop(0) if guided else None
        return uncond, parts[0].repeat(len(batch.latents) // own, 1, 1, 1) if parts else None

    def _predictor(self, batch: RolloutBatch, drifts: list[Tensor]) -> Predict:
        """The guided prediction at later latents of the batch's trajectories; its unconditional branch carries no gradient.

        Args:
            drifts: each prediction's distance from the frozen model's at the same latents [B] is appended, if preserve_weight asks for it.
        """

        def predict(latents: Tensor, timesteps: Tensor) -> Tensor:
            there = replace(batch, latents=latents, timesteps=timesteps)
            uncond, frozen = self._predict_without_gradient(there, len(latents), frozen=self.config.preserve_weight > 0)
            self.network.set_multiplier(batch.multipliers)
            eps = self.model.predict_eps(latents, timesteps, batch.cond)
            if frozen is not None:
                drifts.append(eps_drift(eps, frozen))
            return self._guide(eps, uncond, there)

        return predict

    def _frozen_predictor(self, batch: RolloutBatch) -> Predict:
        """The same of the frozen model; its unconditional branch is the LoRA's."""

        def predict(latents: Tensor, timesteps: Tensor) -> Tensor:
            there = replace(batch, latents=latents, timesteps=timesteps)
            uncond, frozen = self._predict_without_gradient(there, len(latents), frozen=True)
            assert frozen is not None
            return self._guide(frozen, uncond, there)

        return predict

    def _frozen_cond(self, batch: RolloutBatch) -> Conditioning:
        if not self.network.text_encoder_loras:
            return batch.cond
        with self.network.disabled():
            return replace(self.model.encode_prompts([prompt.prompt for prompt in batch.prompts]), time_ids=batch.cond.time_ids)

    def _guide(self, eps: Tensor, uncond: Tensor | None, batch: RolloutBatch) -> Tensor:
        return guide(self.model, batch.latents, batch.timesteps, eps, uncond, batch.guidance_scales, self.guidance_rescale)

    def _noise(self, batch: RolloutBatch, own: int, generator: torch.Generator | None) -> Tensor:
        """Noise for the estimator's views [V, B, C, h, w], the same for both signs of a sample; none for one that has no views."""
        views = self.estimator.num_views if isinstance(self.estimator, X0Renoise) else 0
        noise = torch.randn(views, own, *batch.latents.shape[1:], generator=generator)
        return noise.repeat(1, len(batch.latents) // own, 1, 1, 1).to(batch.latents.device)

    def _ascent(self, batch: RolloutBatch, foreseen: Foreseen, base: Foreseen | None, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Where each sample's latents should go.

        Returns:
            The direction in the foreseen latents [B, C, h, w] (0 for a sample that is to rest), the reward [B], and the gain over
            the frozen model in the wanted direction [B] (NaN when the frozen model was not consulted).
        """
        count, config, directions = len(batch.latents), self.config, batch.directions
        # what was asked for, in the frozen model's words: a LoRA of the text encoder must not talk to the scorer
        asked_for = self._frozen_cond(batch) if any(scorer.spec.uses_prompt for scorer in self.reward.scorers) else batch.cond

        def score(at: Foreseen, *, gradient: bool) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
            latents, sigmas, scales = self.estimator.look(at, noise)
            views = len(latents) // count
            cond, prompts, signs = asked_for.repeat(views), batch.prompts * views, directions.repeat(views)
            if not gradient:
                with torch.no_grad():
                    terms = self.reward(latents, sigmas, cond, prompts, signs).terms
                return {name: term.view(views, count).mean(0) for name, term in terms.items()}, {}
            values, slopes = score_gradients(self.reward, latents.detach(), sigmas, cond, prompts, signs, config.reward_smoothing)
            means = {name: value.view(views, count).mean(0) for name, value in values.items()}
            return means, {
                name: (scales.view(-1, 1, 1, 1) * slope).view(views, count, *slope.shape[1:]).mean(0) for name, slope in slopes.items()
            }

        values, gradients = score(foreseen, gradient=not self.estimator.at_frozen)
        base_values = None
        if base is not None:
            base_values, base_gradients = score(base, gradient=self.estimator.at_frozen)
            gradients = gradients or base_gradients
        reward = self._total(values)
        gain = torch.full_like(reward, torch.nan) if base_values is None else directions * (reward - self._total(base_values))
        if not config.normalize_gradient:  # the plain gradient of the mean reward: `losses` averages over elements, the reward does not
            shape = directions.view(-1, 1, 1, 1) * batch.latents[0].numel()
            slopes = [goal.weight * gradients[goal.name] for goal in self.reward.goals if goal.sign]
            return shape * torch.stack(slopes).sum(0) * self._push(batch, foreseen)(gain).view(-1, 1, 1, 1), reward, gain
        push, share = self._push(batch, foreseen), self.share(batch, foreseen)
        return ascent_direction(self.reward.goals, gradients, values, base_values, push, directions, share), reward, gain

    def _total(self, values: Mapping[str, Tensor]) -> Tensor:
        return torch.stack([goal.weight * values[goal.name] for goal in self.reward.goals if goal.sign]).sum(0)

    def _push(self, batch: RolloutBatch, foreseen: Foreseen) -> Callable[[Tensor], Tensor]:
        """How much a sample is pushed, by its gain [B] over the frozen model in the wanted direction."""
        config = self.config
        shape = SHAPES["linear" if self.estimator.at_frozen else config.reward_loss]
        wanted = config.reward_target if config.reward_loss == "target" else config.hinge_margin
        margin = wanted * batch.multipliers.abs() * self.share(batch, foreseen)
        return lambda gain: shape(gain, margin)

    def share(self, batch: RolloutBatch, foreseen: Foreseen) -> Tensor:
        """The part of a whole trajectory's change that this step accounts for [B]."""
        return foreseen.share / foreseen.share.new_tensor([prompt.num_steps or self.num_steps for prompt in batch.prompts])

    def _move(self, direction: Tensor, foreseen: Foreseen, base: Foreseen | None, batch: RolloutBatch) -> Tensor:
        """How far the prediction has moved along the direction [B], with gradient: RMS of eps, from the frozen model's prediction."""
        moved = foreseen.latents - (foreseen.latents if base is None else base.latents).detach()
        along = (direction * moved).mean((1, 2, 3))
        if not self.config.normalize_gradient:
            return along
        strength = batch.multipliers.abs() if self.estimator.at_frozen else 1.0
        # a schedule may end with a step that moves nothing
        return strength * along / (foreseen.reach * batch.guidance_scales).abs().clamp_min(1e-12)
