"""Anchors: prompts whose pictures the slider must leave alone."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from library.errors import UserError
from library.objectives.base import Workbench
from library.objectives.regression import RegressionConfig, as_output, min_snr_weights, squared_errors
from library.prompts.files import load_prompts
from library.rollouts.belt import Belt
from library.rollouts.sample import guide
from library.settings.options import check_above, check_at_least, option
from library.types import Conditioning, LossOutput, PromptSpec


@dataclass(frozen=True, kw_only=True)
class AnchorConfig:
    """What must not move."""

    anchor_prompts_file: str = option("", help="Prompts whose pictures must not change, in any format of prompts_file. Turns anchors on.")
    anchor_weight: float = option(1.0, help="Weight of the anchors in the loss.", expert=True, only_with="anchor_prompts_file")
    anchor_batch_size: int = option(
        2,
        help="Trajectories of anchor prompts; each costs about as much as one of train_batch_size.",
        expert=True,
        only_with="anchor_prompts_file",
    )

    def __post_init__(self) -> None:
        check_above(self, 0, "anchor_weight")
        check_at_least(self, 1, "anchor_batch_size")


class AnchorsTerm:
    """Squared distance of the U-Net's output with the LoRA, at each of train_multipliers in turn, from that of the frozen model.

    On a belt of its own, so that it is measured where the slider leads pictures of the anchor prompts: a trajectory takes 3
    evaluations to grade, 1 for the frozen model and 1 for the unconditional branch that moves it on, where guided. The latents of
    another term's belt would save that last one, but they are pictures of other prompts, on which an anchor says little.
    """

    name = "anchors"

    def __init__(self, workbench: Workbench, prompts: Sequence[PromptSpec], config: AnchorConfig, regression: RegressionConfig) -> None:
        self.workbench, self.regression = workbench, regression
        self.weight = config.anchor_weight
        rollout = replace(workbench.rollout, train_batch_size=config.anchor_batch_size)
        workbench.encoder.encode_ahead(prompts, rollout.size(workbench.model.spec.resolution))
        self.belt = Belt(workbench.model, workbench.network, prompts, workbench.encoder, rollout, workbench.generator(self.name))
        self._counted = 0  # of the belt's evaluations, those that a loss has reported

    def __call__(self) -> LossOutput:
        model, network = self.workbench.model, self.workbench.network
        batch = self.belt.batch()
        rows = len(batch.prompts)
        conds, multipliers = [self._frozen_cond(batch.prompts, batch.cond)], [torch.zeros_like(batch.multipliers)]
        if guided := bool((batch.guidance_scales != 1).any()):
            conds.append(batch.uncond)
            multipliers.append(batch.multipliers)
        with torch.no_grad():
            network.set_multiplier(torch.cat(multipliers))
            latents, timesteps = batch.latents.repeat(len(conds), 1, 1, 1), batch.timesteps.repeat(len(conds))
            without = model.predict_eps(latents, timesteps, Conditioning.cat(conds))
        network.set_multiplier(batch.multipliers)
        eps = model.predict_eps(batch.latents, batch.timesteps, batch.cond)
        output, frozen = (as_output(model, batch.latents, part, batch.timesteps) for part in (eps, without[:rows]))
        errors = squared_errors(output, frozen)
        losses = errors * min_snr_weights(model, batch.timesteps, self.regression.min_snr_gamma)

        eps = eps.detach()
        uncond, rescale = without[rows:] if guided else None, self.workbench.rollout.guidance_rescale
        self.belt.advance(guide(model, batch.latents, batch.timesteps, eps, uncond, batch.guidance_scales, rescale))
        rolled = self.belt.num_unet_evaluations - self._counted
        self._counted += rolled
        return LossOutput(
            loss=losses.mean(),
            sample_losses=losses.detach(),
            samples=[
                f"anchor {prompt.prompt!r} at timestep {int(timestep)}"
                for prompt, timestep in zip(batch.prompts, batch.timesteps, strict=True)
            ],
            metrics={"drift": errors.detach().mean().sqrt()},
            num_unet_evaluations=3 * rows + len(latents) + rolled,
        )

    def state_dict(self) -> dict[str, Any]:
        return self.belt.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.belt.load_state_dict(state)
        self._counted = self.belt.num_unet_evaluations

    def _frozen_cond(self, prompts: Sequence[PromptSpec], cond: Conditioning) -> Conditioning:
        """What the plain text encoders make of the prompts: told the same sizes, without the LoRA."""
        if not self.workbench.network.text_encoder_loras:
            return cond
        model = self.workbench.model
        with torch.no_grad(), self.workbench.network.disabled():
            return replace(model.encode_prompts([prompt.prompt for prompt in prompts]), time_ids=cond.time_ids)


def build(workbench: Workbench, config: AnchorConfig, regression: RegressionConfig) -> AnchorsTerm:
    """The term, from its prompt file. Raises UserError."""
    if not config.anchor_prompts_file:
        raise UserError("anchors have no prompts: set anchor_prompts_file to a file of prompts that must not change")
    return AnchorsTerm(workbench, load_prompts(config.anchor_prompts_file), config, regression)
