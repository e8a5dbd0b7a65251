"""The LECO-score step: move the LoRA so that the latents which the next step leads to score higher.

One U-Net call with gradient predicts the noise of the conditional branch; the unconditional branch and the frozen model
are predicted in one call without. An estimator turns the guided prediction into the latents that are scored. The
score's gradient is taken with respect to the prediction, normalised, and handed to the U-Net as a linear loss, so the
scorer and the U-Net are never in one graph and the scorer's scale does not matter.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from library.config import check_at_least, option
from library.errors import UserError
from library.models.base import DiffusionModel
from library.noise_schedule import abar_to_sigma, eps_to_x0
from library.objectives.preservation import eps_drift
from library.rewards import Reward
from library.solvers import Solver, guided_eps
from library.types import Conditioning, LossOutput, RolloutBatch
from networks.lora import LoRANetwork


@dataclass(frozen=True, kw_only=True)
class ScoreConfig:
    """What is scored, how the score becomes a loss, and what holds the model in place."""

    scorer: tuple[str, ...] = option((), help="Latent scorer files, made by train_latent_scorer.py.")
    scorer_weights: tuple[float, ...] = option((), help="Weight of each scorer; below 0 lowers that score. Default 1 each.")
    score_estimator: str = option(
        "prev",
        choices=("prev", "x0"),  # the keys of ESTIMATORS, below
        help="Latents to score: prev, the next step's (needs a noise-aware scorer), or x0, the clean latents foreseen.",
    )
    reward_loss: str = option(
        "hinge", choices=("hinge", "linear"), help="hinge stops pushing a sample that is hinge_margin above the frozen model; linear never."
    )
    hinge_margin: float = option(
        5.0, help="Gain over the frozen model at which hinge stops, over a whole trajectory, in standard deviations of the score."
    )
    reward_weight: float = option(1.0, help="Weight of the score in the loss; 0 trains the other terms alone.")
    preserve_weight: float = option(
        3.0, help="Weight of staying near the frozen model's prediction; with w, the prediction moves by about reward_weight / 2w."
    )
    normalize_gradient: bool = option(True, help="Scale the score's gradient to RMS 1 per sample, so that all noise levels count alike.")
    min_timestep: int = option(0, help="Train only on steps at or above this timestep (0 to 1000).")
    max_timestep: int = option(1000, help="Train only on steps below this timestep (0 to 1000).")
    force_scorer: bool = option(False, help="Use a scorer that never saw noise with score_estimator prev all the same.")

    def __post_init__(self) -> None:
        check_at_least(self, 0, "hinge_margin", "reward_weight", "preserve_weight", "min_timestep")
        if not self.scorer:
            raise UserError("scorer is not set; give the .safetensors file that train_latent_scorer.py wrote")
        if not self.min_timestep < self.max_timestep <= 1000:
            raise UserError(
                f"min_timestep {self.min_timestep} and max_timestep {self.max_timestep} leave no step to train; use 0 <= min < max <= 1000"
            )


@dataclass(frozen=True)
class Scored:
    """Latents to score [B, C, h, w], the sigma they are at [B], and how far they follow the step's own move [B].

    A change of eps moves the next latents by sigma - next_sigma, in units of x / sqrt(abar); `lever` is how many times that
    these latents move, so that a margin means the same gain over a trajectory whatever is scored.
    """

    latents: Tensor
    sigmas: Tensor
    lever: Tensor


def score_prev(batch: RolloutBatch, eps: Tensor, abar: Tensor, next_abar: Tensor, solver: Solver) -> Scored:
    """The seed's choice: the latents that the sampler's next step leads to, at that step's noise."""
    latents = solver.step(batch.latents, eps, abar, next_abar, batch.noise)
    return Scored(latents, abar_to_sigma(next_abar), torch.ones_like(abar))


def score_x0(batch: RolloutBatch, eps: Tensor, abar: Tensor, next_abar: Tensor, solver: Solver) -> Scored:
    """The clean latents that the prediction foresees, as ReFL scores them (arXiv 2304.05977): sharp at low noise, a blur at high."""
    sigma, next_sigma = abar_to_sigma(abar), abar_to_sigma(next_abar)
    return Scored(eps_to_x0(batch.latents, eps, abar), torch.zeros_like(abar), sigma / (sigma - next_sigma))


ESTIMATORS: dict[str, Callable[[RolloutBatch, Tensor, Tensor, Tensor, Solver], Scored]] = {"prev": score_prev, "x0": score_x0}


class ScoreObjective:
    """Loss of one belt batch.

    Minimising `-reward_weight <g, eps> + preserve_weight |eps - eps_frozen|^2`, with g the score's gradient at RMS 1, moves eps
    by `reward_weight / (2 preserve_weight)` RMS along g at most: the trained slider has a strength by construction.
    """

    def __init__(
        self, model: DiffusionModel, network: LoRANetwork, reward: Reward, config: ScoreConfig, solver: Solver, num_steps: int
    ) -> None:
        self.model, self.network, self.reward, self.config, self.solver = model, network, reward, config, solver
        self.estimate = ESTIMATORS[config.score_estimator]
        self.step_margin = config.hinge_margin / num_steps
        self.needs_frozen = config.reward_loss == "hinge" or config.preserve_weight > 0

    def __call__(self, batch: RolloutBatch) -> LossOutput:
        abar, next_abar = self.model.schedule.abar(batch.timesteps), self.model.schedule.abar(batch.next_timesteps)
        uncond, frozen = self._predict_without_gradient(batch)
        self.network.set_multiplier(batch.multipliers)
        eps = self.model.predict_eps(batch.latents, batch.timesteps, batch.cond)

        direction, reward, gain = self._ascent(batch, eps.detach(), uncond, frozen, abar, next_abar)
        trained = (batch.timesteps >= self.config.min_timestep) & (batch.timesteps < self.config.max_timestep)
        losses = -self.config.reward_weight * (direction * eps).mean((1, 2, 3))
        drift = eps_drift(eps, frozen) if frozen is not None else torch.zeros_like(losses)
        losses = (losses + self.config.preserve_weight * drift) * trained

        next_latents = self.solver.step(batch.latents, self._guide(eps.detach(), uncond, batch), abar, next_abar, batch.noise)
        rows = len(batch.latents)
        metrics: dict[str, float | Tensor] = {
            "reward": reward.mean(),
            "gain_per_step": gain.mean(),
            "pushed": (direction.abs().amax((1, 2, 3)) > 0).float().mean(),
            "eps_drift": drift.detach().mean().sqrt(),
        }
        return LossOutput(
            loss=losses.mean(),
            sample_losses=losses.detach(),
            next_latents=next_latents,
            metrics=metrics,
            num_unet_evaluations=rows * (3 + (uncond is not None) + (frozen is not None)),
        )

    @torch.no_grad()
    def _predict_without_gradient(self, batch: RolloutBatch) -> tuple[Tensor | None, Tensor | None]:
        """eps of the unconditional branch with the LoRA and of the conditional one without it, in one call; None where not needed."""
        rows: list[tuple[Conditioning, Tensor]] = []
        guided = bool((batch.guidance_scales != 1).any())
        if guided:
            rows.append((batch.uncond, batch.multipliers))
        if self.needs_frozen:
            rows.append((self._frozen_cond(batch), torch.zeros_like(batch.multipliers)))
        if not rows:
            return None, None
        self.network.set_multiplier(torch.cat([multipliers for _, multipliers in rows]))
        cond = Conditioning.cat([part for part, _ in rows])
        outputs = self.model.predict_eps(batch.latents.repeat(len(rows), 1, 1, 1), batch.timesteps.repeat(len(rows)), cond)
        parts = list(outputs.chunk(len(rows)))
        return (parts.pop(0) if guided else None), (parts.pop(0) if self.needs_frozen else None)

    def _frozen_cond(self, batch: RolloutBatch) -> Conditioning:
        if not self.network.text_encoder_loras:
            return batch.cond
        height, width = (side * self.model.spec.vae_scale_factor for side in batch.latents.shape[-2:])
        with self.network.disabled():
            return self.model.encode_prompts([prompt.prompt for prompt in batch.prompts], (height, width))

    def _guide(self, eps: Tensor, uncond: Tensor | None, batch: RolloutBatch) -> Tensor:
        return eps if uncond is None else guided_eps(uncond, eps, batch.guidance_scales)

    def _ascent(
        self, batch: RolloutBatch, eps: Tensor, uncond: Tensor | None, frozen: Tensor | None, abar: Tensor, next_abar: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Where each sample's eps should go.

        Returns:
            The direction in eps [B, C, h, w] (0 for a sample that hinge lets rest), the reward [B], and the gain over the frozen
            model in the wanted direction [B] (NaN when the frozen model was not consulted).
        """
        eps = eps.requires_grad_()
        with torch.enable_grad():
            scored = self.estimate(batch, self._guide(eps, uncond, batch), abar, next_abar, self.solver)
            reward = self.reward(scored.latents, scored.sigmas, batch.cond, batch.prompts).total
            (gradient,) = torch.autograd.grad(reward.sum(), eps)
        if self.config.normalize_gradient:
            gradient = gradient / gradient.square().mean((1, 2, 3), keepdim=True).sqrt().clamp_min(1e-12)
        else:  # the plain gradient of the mean reward: `losses` averages over elements, the reward does not
            gradient = gradient * gradient[0].numel()
        wanted = batch.directions
        gain = torch.full_like(reward, torch.nan)
        if frozen is not None:
            with torch.no_grad():
                base = self.estimate(batch, self._guide(frozen, uncond, batch), abar, next_abar, self.solver)
                gain = wanted * (reward - self.reward(base.latents, base.sigmas, batch.cond, batch.prompts).total)
        if self.config.reward_loss == "hinge":
            wanted = wanted * (gain < self.step_margin * batch.multipliers.abs() * scored.lever)
        return gradient * wanted.view(-1, 1, 1, 1), reward.detach(), gain
